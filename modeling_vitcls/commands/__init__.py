"""The programs of the `vitcls` command: flags, one call into the package, and printed output.

    parsing.py         recipes and flags -> options; one-line errors and exit statuses
    inspect_tokens.py  vitcls inspect
    NAME.py            vitcls NAME

A program defines OPTIONS (a dataclass whose fields are the flags) and `run(options)`. A program also defines
`check_options(options)` if flags must be checked before torch is imported. cli.py prints ValueErrors and OSErrors of
programs as one-line messages. At module level, a program imports only the standard library, tyro, parsing.py and
options.py. These files are not copied to the Hub.
"""

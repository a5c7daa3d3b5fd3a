"""The programs of the `vitcls` command: flags, one call into the package, and printed output.

    parsing.py         recipes and flags -> options; one-line errors and exit statuses
    inspect_tokens.py  vitcls inspect
    NAME.py            vitcls NAME

A program has OPTIONS (a dataclass whose fields are the flags), `run(options)`, and, if flags have to be checked before
torch is imported, `check_options(options)`. cli.py prints the ValueErrors and OSErrors of a program in one line. At
module level, a program imports only the standard library, tyro, parsing.py and options.py. Nothing here is copied to
the Hub.
"""

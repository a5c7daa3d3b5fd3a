"""The subcommands of `vitcls`: flags, one call into the package, and printed output.

    parsing.py         recipes and flags -> options; one-line errors and exit statuses
    inspect_tokens.py  vitcls inspect
    NAME.py            vitcls NAME

A subcommand defines OPTIONS_CLASS (a dataclass whose fields are the flags) and `run(options)`. A subcommand also
defines `check_options(options)` if flags must be checked before torch is imported. cli.py prints ValueErrors and
OSErrors raised by subcommands as one-line messages. At module level, a subcommand imports only the standard library,
tyro, parsing.py and options.py. The files in this folder are not copied to the Hub.
"""

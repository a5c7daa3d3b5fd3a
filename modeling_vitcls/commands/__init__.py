"""The programs of the `vitcls` command: flags, one call into the package, and what is printed.

    parsing.py         recipes and flags -> options; one-line errors and exit statuses
    inspect_tokens.py  vitcls inspect
    NAME.py            vitcls NAME

A program has OPTIONS (a dataclass whose fields are the flags) and `run(options)`. cli.py prints its ValueErrors and
OSErrors in one line. It has `check(options)` if its flags have to be checked before torch is imported. At the top a
program imports only the standard library, tyro, parsing.py and options.py. Nothing here is copied to the Hub.
"""

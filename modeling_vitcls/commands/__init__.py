"""The subcommands of `vitcls`: flags, one call into the package, and printed output.

    parsing.py    recipes and flags -> options; one-line errors and exit statuses
    NAME.py       vitcls NAME

A subcommand defines OPTIONS_CLASS and `run(options)`. OPTIONS_CLASS is a dataclass whose fields are the flags, and
whose `__post_init__` raises ValueError if flags contradict each other, before torch is imported. cli.py prints
ValueErrors and OSErrors raised by subcommands as one-line messages. At module level, a subcommand imports only the
standard library, tyro, parsing.py and options.py. The files in this folder are not copied to the Hub.
"""

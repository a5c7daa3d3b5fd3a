"""Messages of a command name its flags: `held_out_fraction` becomes --held-out-fraction.

The package names parameters, as Python does. A command prints the same messages with its flags:

    | message of the package   | message of the command  |
    |--------------------------|-------------------------|
    | `held_out_fraction`      | --held-out-fraction     |
    | `num_workers=0`          | --num-workers 0         |
    | `mixed_precision='no'`   | --mixed-precision no    |
    | `exclude_layers=(1, 12)` | --exclude-layers 1 12   |
    | `overwrite=True`         | --overwrite             |
    | `probe=False`            | --no-probe              |
    | `images`                 | PATHS                   |
    | `vitcls push --model M`  | `vitcls push --model M` |

The other parameters, which the command does not have, and commands in backticks (`vitcls ...`)
stay.
"""

import ast
import re
import shlex
from collections.abc import Collection
from contextlib import AbstractContextManager, suppress
from functools import partial

from ..runtime.flags import to_arguments
from ..runtime.messages import messages_formatted_by


PARAMETER = re.compile(r"`(?P<name>[a-z][a-z0-9_]*)(=(?P<value>[^`]+))?`")


def messages_name_flags(flag_names: Collection[str]) -> AbstractContextManager[None]:
    """Name flags instead of parameters in the errors and other messages that the block prints.

    Args:
        flag_names: Names of the command's parameters, such as "batch_size".
    """
    return messages_formatted_by(partial(name_flags, flag_names=flag_names))


def name_flags(message: str, flag_names: Collection[str]) -> str:
    """Return a message in which the parameters in `flag_names` are flags."""

    def replace(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        if name == "images" and "paths" in flag_names:
            return "PATHS"
        if name not in flag_names:
            return found[0]
        if value is None:
            return f"--{name.replace('_', '-')}"
        with suppress(ValueError, SyntaxError):  # not a Python value, such as `epochs=N`
            value = ast.literal_eval(value)
        return shlex.join(to_arguments(name, value))

    return PARAMETER.sub(replace, message)

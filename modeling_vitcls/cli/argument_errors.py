"""Errors of the Python functions name arguments: `--held-out-fraction` becomes `held_out_fraction`.

The checks of the package are written for the command and name flags. The Python functions raise the same errors:

    | message for the command | message for Python      |
    |-------------------------|-------------------------|
    | --held-out-fraction     | held_out_fraction       |
    | --num-workers 0         | num_workers=0           |
    | --mixed-precision no    | mixed_precision='no'    |
    | --overwrite             | overwrite=True          |
    | --no-probe              | probe=False             |
    | PATHS                   | images                  |
    | `vitcls push --model M` | `vitcls push --model M` |

Only flags of the function's own command are renamed, and commands in backticks (`vitcls ...`) stay as they are.
"""

import re
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Union, get_args, get_origin

from ..runtime.errors import RunStopped
from ..runtime.flags import get_flag_fields


COMMAND_OR_FLAG = re.compile(
    r"`[^`]*\bvitcls [^`]*`"
    r"|(?<![\w/.-])PATHS(?![\w/.-])"
    r"|(?<![\w/-])--(?P<name>[a-z][a-z0-9-]*)(?![\w-])(?P<value_text> (?P<value>\w(?:[\w.-]*\w)?))?"
)


@contextmanager
def errors_name_arguments(options_class: type) -> Iterator[None]:
    """Name arguments instead of flags in the errors that the block raises. Also a decorator of a function.

    The error is the same object, so that its class, cause, notes and traceback stay.

    Args:
        options_class: The options of the command, whose fields are its flags.
    """
    try:
        yield
    except (ValueError, OSError, RunStopped) as error:
        # Errors of the operating system have several arguments, and no flags.
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (name_arguments(error.args[0], options_class),)
        raise


def name_arguments(message: str, options_class: type) -> str:
    """Return a message in which the flags of a command are arguments of its Python function."""
    fields = get_flag_fields(options_class)

    def replace(found: re.Match[str]) -> str:
        if found[0] == "PATHS":
            return "images"
        if found["name"] is None:
            return found[0]

        name = found["name"].replace("-", "_")
        positive_name = name.removeprefix("no_")
        value_text = found["value_text"] or ""
        if name not in fields and positive_name in fields:
            return f"{positive_name}=False{value_text}"
        if name not in fields:
            return found[0]

        value_types = get_value_types(fields[name].type)
        if bool in value_types:
            return f"{name}=True{value_text}"
        value = found["value"]
        if value in get_choices(value_types):
            return f"{name}={value!r}"
        if {int, float} & {*value_types} and re.fullmatch(r"\d+(\.\d+)?(e-?\d+)?", value or ""):
            return f"{name}={value}"
        return f"{name}{value_text}"

    return COMMAND_OR_FLAG.sub(replace, message)


def get_value_types(type_hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the type itself."""
    is_union = get_origin(type_hint) in (Union, types.UnionType)
    return get_args(type_hint) if is_union else (type_hint,)


def get_choices(value_types: tuple[Any, ...]) -> list[Any]:
    """Return the values of all Literal types."""
    literals = [type_ for type_ in value_types if get_origin(type_) is Literal]
    return [choice for literal in literals for choice in get_args(literal)]

"""Flags of the commands: checks of values, names, and conversion to recipes and command lines.

The options of each command are one flat dataclass in options.py of the folder that reads them. Each
field is a flag (`batch_size` is `--batch-size`), a keyword of the Python function, and a key of a
recipe file. The docstring below a field is the help text of the flag. Fields that several commands
share are in base classes. This file and the options import only the standard library and tyro, so
`--help` and errors about flags appear immediately.
"""

import ast
import dataclasses
import inspect
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from .files import find_file, replace_control_characters


# Flags with a path or another name, such as one on the Hub
PATH_FLAGS = ("model", "teacher", "dataset", "more_data", "answers", "old", "new", "paths")
# A parameter in a message: `batch_size` or `batch_size=64`
PARAMETER = re.compile(r"`([a-z]\w*)(?:=([^`]*))?`")
# Names of the flags of the command that runs (cli/parsing.py); empty in other programs
names_of_flags: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base class of the options of all commands, and of the groups of fields that they share.

    Python programs may write a path as a text, several values as a list or one text, a fraction as
    1, and numbers as NumPy does. `~` in paths is the home folder: a shell leaves it in
    `--output-dir=~/runs`, as Python does.
    """

    def __post_init__(self) -> None:
        # Without what tyro has to know about a flag of a command (Annotated)
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            # a separator `~` is no path
            if name in PATH_FLAGS or "Path" in str(hint):
                if value == "":  # As a path, it would be the current folder
                    raise ValueError(f"`{name}` is empty. Set it, or leave it out")
                value = expand_home(value)
            # NumPy is slow to import, so its types are known by their module
            if type(value).__module__ == "numpy":
                value = value.tolist()
            kinds = get_args(hint | None)  # All kinds of a union, or the one
            if isinstance(value, list):
                value = tuple(value)
            elif isinstance(value, str) and get_origin(kinds[0]) is tuple:
                value = (value,)
            elif isinstance(value, str) and Path in kinds:
                value = Path(value)
            elif isinstance(value, Path) and Path not in kinds:
                value = str(value)
            elif type(value) is int and float in kinds:  # No bool
                value = float(value)
            # The dataclass is frozen. A value may change only here, because nothing has read it
            # yet.
            object.__setattr__(self, name, value)

    def check(self) -> None:
        """Raise ValueError if a value is not allowed, or if fields contradict each other.

        The command line and the Python functions call it once; groups of fields extend it.
        """

    def check_files(self) -> None:
        """Raise ValueError without the files that only a command reads and writes.

        Functions of Python receive images, and return what a command writes.
        """


def expand_home(value: Any) -> Any:
    """Replace `~` in a path with the home folder, also in `transformers:~/model`.

    A path that exists in the other Unicode form is returned in that one; other values are unchanged.
    """
    if isinstance(value, str):
        # Path.expanduser raises an error for a user without a home folder, as in some containers.
        expand = os.path.expanduser
        path = re.sub(r"(^|[:@])(~[^/\\]*)", lambda part: part[1] + expand(part[2]), value)
        return find_file(path)
    if isinstance(value, Path):
        return Path(expand_home(str(value)))
    return tuple(map(expand_home, value)) if isinstance(value, tuple) else value


def check_types(options: Any, names: Iterable[str]) -> None:
    """Raise ValueError if a field in `names` has a value of another type. For flags, tyro does so."""
    from huggingface_hub.dataclasses import type_validator  # Slow to import

    hints = get_type_hints(type(options))
    for name in names:
        value = getattr(options, name)
        try:
            type_validator(name, value, hints[name])
        except (TypeError, ValueError):
            expected = inspect.formatannotation(hints[name])
            # The text of a network has a hundred lines
            text = repr(value)
            given = f"of type {type(value).__name__}" if "\n" in text else text
            hint = ". Quote text; save an object and set its path" if "str" in expected else ""
            raise ValueError(f"`{name}` is {given}, but it must be {expected}{hint}") from None


def check_value(options: Any, name: str, is_valid: bool, requirement: str) -> None:
    """Raise ValueError with the value of a flag and the requirement if `is_valid` is False."""
    if not is_valid:
        raise ValueError(f"`{name}` is {getattr(options, name)}, but it must be {requirement}")


def check_each(options: Any, is_valid: Callable[[Any], Any], requirement: str, *names: str) -> None:
    """Raise ValueError if a flag in `names`, or one of its values, is set and not valid."""
    for name in names:
        value = getattr(options, name)
        values = value if isinstance(value, tuple) else (value,)
        are_valid = all(each is None or is_valid(each) for each in values)
        check_value(options, name, are_valid, requirement)


def check_minimum(options: Any, minimum: int, *names: str) -> None:
    """Raise ValueError if a flag in `names`, or one of its values, is set and below the minimum."""
    check_each(options, lambda value: value >= minimum, f"{minimum} or more", *names)


def check_suffix(options: Any, name: str, *suffixes: str) -> None:
    """Raise ValueError if a flag is a file that does not end in one of the suffixes."""
    requirement = f"a file that ends in {' or '.join(suffixes)}"
    check_each(options, lambda file: file.suffix.lower() in suffixes, requirement, name)


def get_flag_fields(options_class: Any) -> dict[str, dataclasses.Field[Any]]:
    """List the fields of an options class by name."""
    return {field.name: field for field in dataclasses.fields(options_class)}


def to_flags(options: Any) -> dict[str, Any]:
    """Convert options to a dict of flags for YAML and JSON, without `--config`."""
    flags: dict[str, Any] = {}
    for name, value in vars(options).items():
        if isinstance(value, Path):
            flags[name] = str(value)
        else:
            flags[name] = list(value) if isinstance(value, tuple) else value
    # The values of the recipe are among the flags already, and its file may change or be absent
    # later.
    flags.pop("config", None)
    return flags


def to_arguments(name: str, value: Any) -> list[str]:
    """Convert a flag and its value to command-line arguments."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, dict):
        value = [
            f"{key}={each if isinstance(each, str) else json.dumps(each)}"
            for key, each in value.items()
        ]
    return [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]


def spell_flags(message: str) -> str:
    """Write a message as it is printed: with the flags of the command that runs.

    It may name files and classes, so escape sequences are replaced: they would reach the terminal.
    The package names parameters, as Python does: `num_workers=0` becomes --num-workers 0, and
    `probe=False` --no-probe. In other programs, and for names that are no flags, nothing changes.
    """

    def spell(match: re.Match[str]) -> str:
        name, value = match.groups()
        if name not in names_of_flags:
            return match[0]
        if value is None:
            return f"--{name.replace('_', '-')}"
        with suppress(ValueError, SyntaxError):  # Words such as NAME stay
            value = ast.literal_eval(value)
        return shlex.join(to_arguments(name, value))

    lines = PARAMETER.sub(spell, message).split("\n")
    return "\n".join(map(replace_control_characters, lines))

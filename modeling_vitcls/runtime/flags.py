"""Flags of the commands: checks of values, names, and conversion to recipes and command lines.

The options of each command are in options.py of the folder that reads them. Each field is a flag
(`batch_size` is `--batch-size`) and a key of a recipe file. The docstring below a field is the help
text of the flag. This file and the options import only the standard library, so that `--help` and
errors about flags appear immediately.
"""

import dataclasses
import difflib
import types
from collections.abc import Collection
from pathlib import Path
from typing import Any, Union, get_args, get_origin


# Flags of other training scripts -> equivalent flags in this package.
EQUIVALENT_FLAGS = {
    "lr": "learning_rate",
    "bs": "batch_size",
    "wd": "weight_decay",
    "per_device_train_batch_size": "batch_size",
    "num_train_epochs": "epochs",
    "data": "dataset",
    "data_dir": "dataset",
    "model_name_or_path": "model",
    "fp16": "mixed_precision",
    "bf16": "mixed_precision",
    "clip_grad": "max_gradient_norm",
}


def check_value(options: Any, name: str, is_valid: bool, requirement: str) -> None:
    """Raise ValueError with the value of a flag and the requirement if `is_valid` is False."""
    if not is_valid:
        raise ValueError(f"`{name}` is {getattr(options, name)}, but it must be {requirement}")


def check_minimum(options: Any, minimum: int, *names: str) -> None:
    """Raise ValueError if a flag in `names` is set to a value below the minimum."""
    for name in names:
        value = getattr(options, name)
        check_value(options, name, value is None or value >= minimum, f"{minimum} or more")


def get_flag_fields(options_class: Any) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of an options dataclass and its nested dataclasses, by name."""
    fields: dict[str, dataclasses.Field[Any]] = {}
    for option in dataclasses.fields(options_class):
        if dataclasses.is_dataclass(option.type):
            fields |= get_flag_fields(option.type)
        else:
            fields[option.name] = option
    return fields


def get_value_types(type_hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the type itself."""
    is_union = get_origin(type_hint) in (Union, types.UnionType)
    return get_args(type_hint) if is_union else (type_hint,)


def find_similar_flag(name: str, flag_names: Collection[str]) -> str | None:
    """Return the flag of this package for an unknown name, or None.

    It is the equivalent flag, or the one with the most similar name.
    """
    equivalent = EQUIVALENT_FLAGS.get(name)
    if equivalent in flag_names:
        return equivalent
    return next(iter(difflib.get_close_matches(name, flag_names, n=1)), None)


def to_flags(options: Any) -> dict[str, Any]:
    """Return a dict of all flags except `--config`. The values can be written to YAML and JSON."""
    flags: dict[str, Any] = {}
    for name, value in vars(options).items():
        if dataclasses.is_dataclass(value):
            flags |= to_flags(value)
        elif isinstance(value, Path):
            flags[name] = str(value)
        else:
            flags[name] = list(value) if isinstance(value, tuple) else value
    flags.pop("config", None)
    return flags


def to_arguments(name: str, value: Any) -> list[str]:
    """Convert a flag and its value to command-line arguments."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]

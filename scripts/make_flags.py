"""Write modeling_vitcls/cli/flags.py: the keyword arguments of the functions.

    python scripts/make_flags.py

Run it when a flag changes; tests/cli/test_flags.py fails otherwise.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from modeling_vitcls.analysis.options import InspectOptions, LookOptions
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.inference.options import EvaluateOptions, PredictOptions
from modeling_vitcls.runtime.flags import get_value_types
from modeling_vitcls.training.options import FinetuneOptions, PretrainOptions


FILE = Path(__file__).parents[1] / "modeling_vitcls" / "cli" / "flags.py"

HEADER = '''"""The keyword arguments of the functions in functions.py, for editors and type checkers.

Written by scripts/make_flags.py from the options of the commands; do not edit it. `vitcls finetune
--help-all` describes each flag and its default.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict
'''

FUNCTIONS = {
    "finetune": FinetuneOptions,
    "pretrain": PretrainOptions,
    "evaluate": EvaluateOptions,
    "predict": PredictOptions,
    "inspect_tokens": InspectOptions,
    "look": LookOptions,
}

# Fields that are no keyword arguments: parameters of the functions, and fields that the functions
# set
OMITTED = {"model", "paths", "output_dir", "config"}
OMITTED_IN_CLASS = {
    DataOptions: {"dataset"},
    PredictOptions: {"output", "shard"},
    LookOptions: {"output", "json"},
}
# Fields with strings that can be paths, and fields that also accept data in memory
PATHS = {"teacher"}
DATA = {"dataset"}


def build_module() -> str:
    """Return the text of the module, formatted by ruff."""
    classes: dict[str, str] = {}
    for options_class in FUNCTIONS.values():
        add_class(options_class, classes)
    text = "\n\n".join([HEADER, *classes.values()])
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(FILE), "-"]
    return subprocess.run(command, input=text, capture_output=True, check=True, text=True).stdout


def add_class(options_class: Any, classes: dict[str, str]) -> str:
    """Add the text of the class with the fields of an options class, and return its name.

    The classes of its base classes and of its nested options are added first.
    """
    name = options_class.__name__.replace("Options", "Flags")
    if name in classes:
        return name

    bases = [base for base in options_class.__bases__ if dataclasses.is_dataclass(base)]
    own_fields = get_own_fields(options_class)
    bases += [type_ for _, type_ in own_fields if dataclasses.is_dataclass(type_)]
    base_names = ", ".join(add_class(base, classes) for base in bases) or "TypedDict"

    lines = [
        f"class {name}({base_names}, total=False):",
        f'    """Flags of `{options_class.__name__}`."""',
        "",
    ]
    omitted = OMITTED | OMITTED_IN_CLASS.get(options_class, set())
    for field_name, type_ in own_fields:
        if field_name not in omitted and not dataclasses.is_dataclass(type_):
            lines.append(f"    {field_name}: {format_type(field_name, type_)}")
    classes[name] = "\n".join(lines) + "\n"
    return name


def get_own_fields(options_class: Any) -> list[tuple[str, Any]]:
    """Return the names and types of the fields that a class itself declares."""
    return [
        (field.name, field.type)
        for field in dataclasses.fields(options_class)
        if field.name in vars(options_class)["__annotations__"]
    ]


def format_type(name: str, type_hint: Any) -> str:
    """Return the annotation of an argument.

    It accepts what build_options of cli/functions.py converts: paths as strings, and any sequence
    for a tuple.
    """
    if name in DATA:
        return "Any"
    parts = ["Path"] if name in PATHS else []
    for type_ in get_value_types(type_hint):
        if type_ is Path:
            parts += ["str", "Path"]
        elif get_origin(type_) is tuple:
            parts += format_sequence(get_args(type_)[0])
        else:
            parts.append(format_plain_type(type_))
    return " | ".join(sorted(parts, key=lambda part: part == "None"))


def format_sequence(item: Any) -> list[str]:
    """Return the annotations of several values. A single text is a list of one text."""
    plain_item = format_plain_type(item)
    return [*([plain_item] if plain_item != "int" else []), f"Sequence[{plain_item}]"]


def format_plain_type(type_: Any) -> str:
    """Return the annotation of a Literal, None or a class."""
    if get_origin(type_) is Literal:
        return f"Literal[{', '.join(map(json.dumps, get_args(type_)))}]"
    return "None" if type_ is NoneType else type_.__name__


def main() -> None:
    """Write the module."""
    FILE.write_text(build_module(), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Recipes: YAML files of flags, whose values are read as on the command line.

read_recipe(Path("digits"), fields)     {"model": "vitcls-tiny", "epochs": 60.0, ...}
"""

import dataclasses
import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ..runtime.errors import format_error
from ..runtime.files import read_text


# Folders with the recipes that --config accepts by name: one in an installed package, one in a
# source checkout.
RECIPE_FOLDERS = (
    Path(__file__).parents[1] / "recipes",
    Path(__file__).parents[2] / "scripts" / "recipes",
)

# Flags of other training scripts -> parameters of this package
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
}

# What a recipe may write for a flag without a value, such as `--flip`: truth values of YAML 1.1
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
SETTINGS_TYPE = dict[str, Any] | None  # of a flag of several NAME=VALUE


# The recipes of studies (study_*.yaml) have other flags: scripts/study.py finds them by name.
def find_recipe(path: Path, pattern: str = "[!s]*.yaml") -> Path:
    """Find a recipe: a file, or a name in the package, such as `digits`.

    Raise ValueError with the names that match a pattern if there is none.
    """
    if path.is_file() or path.suffix:
        return path
    recipes = {file.stem: file for folder in RECIPE_FOLDERS for file in folder.glob(pattern)}
    if str(path) not in recipes:
        raise ValueError(
            f"there is no recipe {path}. Set `config` to a file, or to one of "
            f"{', '.join(sorted(recipes))}"
        )
    return recipes[str(path)]


class RecipeLoader(yaml.BaseLoader):
    """Reads every value as text, as on the command line: `no`, `010` and `1e-3` stay what they are."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        """Build a dict, and raise an error at a key that is there twice."""
        names = [name.value for name, _ in node.value]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise yaml.YAMLError(f"{repeated} is set twice")
        return super().construct_mapping(node, deep)


class SettingsLoader(yaml.SafeLoader):
    """Reads numbers, lists and words; also 1e-5, which is a text in YAML 1.1."""


SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"-?\d+e[-+]?\d+$"), list("-0123456789")
)


def parse_settings(texts: list[str]) -> dict[str, Any]:
    """Parse `drop_path_rate=0.1 head_type=mlp`."""
    if not all("=" in text for text in texts):
        raise ValueError(f"{' '.join(texts)} is not of the form NAME=VALUE")
    settings = dict(text.split("=", 1) for text in texts)
    return {name: yaml.load(settings[name], SettingsLoader) for name in settings}


# How tyro parses a flag that is a dict
SETTINGS = PrimitiveConstructorSpec(
    nargs="*",
    metavar="[NAME=VALUE ...]",
    instance_from_str=parse_settings,
    is_instance=lambda value: value is None or isinstance(value, dict),
    str_from_instance=lambda value: [f"{name}={each}" for name, each in (value or {}).items()],
)
REGISTRY = ConstructorRegistry()
REGISTRY.primitive_rule(lambda info: SETTINGS if info.type == SETTINGS_TYPE else None)


def read_recipe(path: Path, fields: Mapping[str, dataclasses.Field[Any]]) -> dict[str, Any]:
    """Read the values of flags in a recipe, by name.

    Raises:
        ValueError: if the file cannot be read, or a key or its value is not one of a flag. The
            message names the file and the key.
    """
    file = find_recipe(path)
    try:
        text = read_text(file)
        recipe = yaml.load(text, RecipeLoader) or {}
        typed_recipe = yaml.load(text, SettingsLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the recipe {file}: {format_error(error)}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"the recipe {file} must contain lines of the form flag: value")

    values: dict[str, Any] = {}
    for key, value in recipe.items():
        name = key.replace("-", "_")
        if name not in fields:
            raise ValueError(f"{file}: {describe_unknown_flag(key, fields)}")
        # a flag without a value keeps its default
        if value in ("", "~", "null"):
            continue
        try:
            # {drop_path_rate: 0.1} has types of its own
            is_dict = fields[name].type == SETTINGS_TYPE and isinstance(value, dict)
            values[name] = typed_recipe[key] if is_dict else parse_value(fields[name], value)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    return values


def parse_value(field: dataclasses.Field[Any], value: Any) -> Any:
    """Convert the text of a value, or the texts of a list, to the type of a flag, as tyro does.

    Raise ValueError with the choices of the flag if the value does not fit.
    """
    with REGISTRY:
        kind = PrimitiveTypeInfo.make(cast(Any, field.type), set())
        spec = cast(PrimitiveConstructorSpec[Any], ConstructorRegistry.get_primitive_spec(kind))
    try:
        if field.type is bool:
            return BOOLEANS[value.lower()]
        if spec.nargs == 1 and not isinstance(value, str):
            raise ValueError("several values instead of one")
        return spec.instance_from_str(value if isinstance(value, list) else [value])
    except (ValueError, KeyError, AttributeError):
        choices = ", ".join(list_choices(field))
        hint = f". Choose {choices}" if choices else ""
        raise ValueError(f"`{field.name}` cannot be {value}{hint}") from None


def list_choices(field: dataclasses.Field[Any]) -> list[str]:
    """List the choices of a flag that accepts only certain words."""
    hint = str(field.type)
    # a flag that also accepts other values, such as a size or `native`, has no list of choices
    is_choice = hint.startswith(("typing.Lit", "typing.Opt", "tuple[typing."))
    return re.findall(r"'(\w+)'", hint) if is_choice else []


def describe_unknown_flag(flag: str, names: Collection[str]) -> str:
    """Say that there is no such flag, and name the nearest one."""
    name = flag.removeprefix("--").replace("-", "_")
    close = [EQUIVALENT_FLAGS.get(name, ""), *difflib.get_close_matches(name, names, n=1)]
    hint = next((f". Did you mean `{each}`?" for each in close if each in names), "")
    return f"there is no flag {flag}{hint}"

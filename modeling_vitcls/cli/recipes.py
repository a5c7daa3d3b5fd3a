"""Recipes: YAML files of flags, which are the default values of a command.

read_recipe(Path("digits"), FinetuneOptions)     {"model": "vitcls-tiny", "epochs": 60.0, ...}
"""

import difflib
import re
from collections import Counter
from collections.abc import Collection, Hashable
from pathlib import Path
from typing import Any, ClassVar

import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

from ..runtime.errors import format_error
from ..runtime.files import read_text
from ..runtime.flags import Options, check_types, get_flag_fields


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
    "source": "model",
    "fp16": "mixed_precision",
    "bf16": "mixed_precision",
    "amp": "mixed_precision",
    "smoothing": "label_smoothing",
    "grad_accum_steps": "gradient_accumulation_steps",
    "initial_checkpoint": "model",
    "checkpoint_hist": "keep_checkpoints",
    "aa": "auto_augment",
    "cutmix": "augment",
    "reprob": "augment",
    "drop_path": "model_config",
    "scale": "crop_scale",
    # Without a counterpart (docs/coming-from.md), whatever names are similar
    **dict.fromkeys(
        "model_ema clip_grad grad_checkpointing vflip opt bce_loss aug_repeats".split(), ""
    ),
}

SETTINGS_TYPE = dict[str, Any] | None  # The type of a flag with several NAME=VALUE


def find_recipe(path: Path) -> Path:
    """Find a recipe: a file, or a name in the package, such as `digits`.

    Raise ValueError with the names in the package if there is none.
    """
    if path.is_file() or path.suffix:
        return path
    recipes = {file.stem: file for folder in RECIPE_FOLDERS for file in folder.glob("*.yaml")}
    if str(path) not in recipes:
        raise ValueError(
            f"there is no recipe {path}. Set `config` to a file, or to one of "
            f"{', '.join(sorted(recipes))}"
        )
    return recipes[str(path)]


class RecipeLoader(yaml.SafeLoader):
    """Reads YAML 1.2, in which `no` is a text and `1e-3` a number. PyYAML reads only YAML 1.1."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a dict, and raise an error at a key that is there twice."""
        names = Counter(str(name.value).replace("-", "_") for name, _ in node.value)
        for name, number in names.most_common(1):
            if number > 1:
                raise yaml.YAMLError(f"{name} is set twice")
        return super().construct_mapping(node, deep)


# `010` is a text: as a number, it would be 8 in YAML 1.1, and 10 in YAML 1.2
for kind, pattern in (
    ("null", r"(~|null|)$"),
    ("bool", r"(true|false|True|False)$"),
    ("int", r"[-+]?(0|[1-9]\d*)$"),
    ("float", r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$"),
):
    RecipeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(pattern), None)


def parse_settings(texts: list[str]) -> dict[str, Any]:
    """Parse `drop_path_rate=0.1 head_type=mlp`."""
    if not all("=" in text for text in texts):
        raise ValueError(f"{' '.join(texts)} is not of the form NAME=VALUE")
    settings = dict(text.split("=", 1) for text in texts)
    return {name: yaml.load(settings[name], RecipeLoader) for name in settings}


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


def read_recipe(path: Path, options_class: type[Options]) -> dict[str, Any]:
    """Read the values of flags in a recipe, by name.

    Raises:
        ValueError: if the file cannot be read, or a key or its value is not one of a flag. The
            message names the file and the key.
    """
    file = find_recipe(path)
    try:
        recipe = yaml.load(read_text(file), RecipeLoader) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the recipe {file}: {format_error(error)}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"the recipe {file} must contain lines of the form flag: value")

    fields = get_flag_fields(options_class)
    values: dict[str, Any] = {}
    for key, value in recipe.items():
        name = str(key).lstrip("-").replace("-", "_")
        if name not in fields:
            raise ValueError(f"{file}: {describe_unknown_flag(str(key), fields)}")
        # a flag without a value keeps its default
        if value is not None:
            values[name] = value
    try:
        check_types(options_class(**(dict.fromkeys(fields) | values)), values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return values


def describe_unknown_flag(flag: str, names: Collection[str]) -> str:
    """Say that there is no such flag, and name its counterpart or the nearest one, if there is one."""
    name = flag.removeprefix("--").replace("-", "_")
    close = difflib.get_close_matches(name, names, n=1)
    if name in EQUIVALENT_FLAGS:
        close = [EQUIVALENT_FLAGS[name]]
    hint = next((f". Did you mean `{each}`?" for each in close if each in names), "")
    return f"there is no flag {flag}{hint}"

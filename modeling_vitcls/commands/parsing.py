"""Shared by the scripts: recipe files and flags -> options.

    options = parse("FinetuneOptions")

A recipe is a YAML file of flags. It is read as if its flags stood first on the command line, so tyro checks both alike
and flags that follow override it. Nothing heavy is imported: a wrong flag is reported before torch is loaded.
"""

import dataclasses
import difflib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import tyro
import yaml


ON_ALL_PROCESSES = "on all processes"  # a note on such errors, from checkpoints.py


# Names of flags in other programs -> ours.
ABBREVIATIONS = {
    "lr": "learning_rate",
    "bs": "batch_size",
    "wd": "weight_decay",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "img_size": "image_size",
    "data": "dataset",
    "dataset_name": "dataset",
    "data_dir": "dataset",
    "model_name_or_path": "model",
    "output": "output_dir",
    "workers": "num_workers",
    "fp16": "mixed_precision",
    "bf16": "mixed_precision",
    "warmup_ratio": "warmup",
    "clip_grad": "max_gradient_norm",
    "max_grad_norm": "max_gradient_norm",
    "drop_path": "drop_path_rate",
    "smoothing": "label_smoothing",
}


@dataclass
class Recipe:
    """The one flag that has to be known before the others."""

    config: Path | None = None


def parse(options_class: str, arguments: list[str] | None = None) -> Any:
    """The named dataclass of options.py, filled from the command line. Exits with status 2 if it is wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    kind = getattr(options_module(), options_class)
    known = flag_names(kind)
    recipe, _ = tyro.cli(Recipe, args=arguments, return_unknown_args=True, add_help=False)
    check_abbreviations(arguments, known)
    if recipe.config is not None:
        arguments = [*recipe_flags(recipe.config, known), *arguments]
    return from_flags(kind, arguments, config=(tyro.conf.OmitArgPrefixes,))


def flag_names(options_class: type) -> set[str]:
    """Return the names of all flags of a dataclass, including its nested dataclasses: `batch_size`."""
    names: set[str] = set()
    for item in dataclasses.fields(options_class):
        names |= flag_names(item.type) if dataclasses.is_dataclass(item.type) else {item.name}
    return names


def check_abbreviations(arguments: list[str], known: set[str]) -> None:
    """Exit with status 2 if a flag is the usual abbreviation of another one: tyro compares only the spelling."""
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        full_name = ABBREVIATIONS.get(name)
        if argument.startswith("--") and name not in known and full_name in known:
            stop(f"error: there is no flag --{name.replace('_', '-')}: use --{str(full_name).replace('_', '-')}")


def from_flags(options_class: type, arguments: list[str] | None = None, **settings: Any) -> Any:
    """`tyro.cli`, whose older versions leave it to the caller to report flags that do not go together."""
    try:
        return tyro.cli(options_class, args=arguments, **settings)
    except ValueError as error:
        stop(f"error: {error}")


def recipe_flags(path: Path, known: set[str]) -> list[str]:
    """Return the flags of a recipe. Exits with status 2 if it cannot be read or has a key that is no flag."""
    try:
        text = path.read_text(encoding="utf-8")
        recipe = yaml.safe_load(text) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        stop(f"cannot read the recipe {path}: {' '.join(str(error).split())}")
    if not isinstance(recipe, dict):
        stop(f"the recipe {path} is no list of `flag: value` lines")
    for key, _ in yaml.compose(text).value if recipe else ():
        name = str(key.value).replace("-", "_")
        if name not in known and name.removeprefix("no_") not in known:
            close = ABBREVIATIONS.get(name) or next(iter(difflib.get_close_matches(name, known, n=1)), None)
            advice = f"use {close}" if close in known else "`--help` lists the flags"
            stop(f"error: {path}, line {key.start_mark.line + 1}: there is no flag {key.value}: {advice}")
    return [token for name, value in recipe.items() for token in flag(str(name), value)]


def flag(name: str, value: Any) -> list[str]:
    """One flag with its value, as on the command line."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def options_module() -> ModuleType:
    """Load the package's options.py by its path.

    Importing it as usual would run the package's __init__ first, which loads torch and transformers: many seconds
    before `--help` or a mistyped flag is answered.
    """
    name = "modeling_vitcls.options"
    if name in sys.modules:
        return sys.modules[name]
    package = importlib.util.find_spec("modeling_vitcls")
    if package is None or not package.submodule_search_locations:
        stop("the package modeling_vitcls is not installed: run `make setup`, or `pip install -e .` in its folder")
    path = Path(package.submodule_search_locations[0], "options.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the package then finds these very classes
    spec.loader.exec_module(module)
    return module


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the script with status 1 and the message alone where the user's input is at fault."""
    try:
        yield
    except (ValueError, OSError) as error:
        stop(f"error: {error}", status=1, on_all=ON_ALL_PROCESSES in getattr(error, "__notes__", ()))


def stop(message: str, status: int = 2, on_all: bool = True) -> NoReturn:
    """End the script, and say why. Status 2 is for a wrong flag.

    Args:
        on_all: whether all processes end for this reason, so that the first one speaks for them. Otherwise this one
            speaks for itself: it may be the only one.
    """
    process = os.environ.get("RANK", "0")
    if process == "0":
        print(message, file=sys.stderr)
    elif not on_all:
        print(f"process {process}: {message}", file=sys.stderr)
    raise SystemExit(status)

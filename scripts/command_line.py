"""Shared by the scripts: recipe files and flags -> options.

    options = parse("FinetuneOptions")

A recipe is a YAML file of flags. It is read as if its flags stood first on the command line, so tyro checks both alike
and flags that follow override it. Nothing heavy is imported: a wrong flag is reported before torch is loaded.
"""

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


ON_ALL_PROCESSES = "on all processes"  # a note on such errors, from training/checkpoints.py


@dataclass
class Recipe:
    """The one flag that has to be known before the others."""

    config: Path | None = None


def parse(options_class: str, arguments: list[str] | None = None) -> Any:
    """The named dataclass of training/options.py, filled from the command line. Exits with status 2 if it is wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    recipe, _ = tyro.cli(Recipe, args=arguments, return_unknown_args=True, add_help=False)
    if recipe.config is not None:
        arguments = [*recipe_flags(recipe.config), *arguments]
    return from_flags(getattr(options_module(), options_class), arguments, config=(tyro.conf.OmitArgPrefixes,))


def from_flags(options_class: type, arguments: list[str] | None = None, **settings: Any) -> Any:
    """`tyro.cli`, whose older versions leave it to the caller to report flags that do not go together."""
    try:
        return tyro.cli(options_class, args=arguments, **settings)
    except ValueError as error:
        stop(f"error: {error}")


def recipe_flags(path: Path) -> list[str]:
    """The flags that a recipe stands for. Exits with status 2 if it cannot be read."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        stop(f"cannot read the recipe {path}: {' '.join(str(error).split())}")
    if not isinstance(recipe, dict):
        stop(f"the recipe {path} is no list of `flag: value` lines")
    return [token for name, value in recipe.items() for token in flag(str(name), value)]


def flag(name: str, value: Any) -> list[str]:
    """One flag with its value, as on the command line."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def options_module(folder: str = "training") -> ModuleType:
    """The options.py in a folder of the package, loaded by its path, as is that of training, which others import.

    Importing it as usual would run the package's __init__ first, which loads torch and transformers: many seconds
    before `--help` or a mistyped flag is answered.
    """
    if folder != "training":
        options_module()
    name = f"modeling_vitcls.{folder}.options"
    if name in sys.modules:
        return sys.modules[name]
    package = importlib.util.find_spec("modeling_vitcls")
    if package is None or not package.submodule_search_locations:
        stop("the package modeling_vitcls is not installed: run `make setup`, or `pip install -e .` in its folder")
    path = Path(package.submodule_search_locations[0], folder, "options.py")
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

"""Parse flags and recipe files into options.

    options = parse_with_recipe(FinetuneOptions, ["--config", "digits", "--epochs", "3"])

A recipe is a YAML file of flags. The flags of a recipe are inserted before the flags on the command line, so that tyro
validates all flags and the command line overrides the recipe. Invalid flags are reported before torch is
imported.
"""

import difflib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import tyro
import yaml

from ..errors import is_raised_on_all_processes
from ..files import is_closed_pipe
from ..options import get_flag_names, to_arguments


PACKAGE_FOLDER = Path(__file__).parents[1]
# Folders with the recipes that --config accepts by name: one in an installed package, one in a source checkout.
RECIPE_FOLDERS = (PACKAGE_FOLDER / "recipes", PACKAGE_FOLDER.parent / "scripts" / "recipes")

# Flags of other training scripts -> equivalent flags in this package.
EQUIVALENT_FLAGS = {
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

# Flags whose names differ between subcommands. Each subcommand accepts both names.
FLAG_SYNONYMS = {"private": "hub_private", "hub_private": "private"}


@dataclass
class RecipeFlag:
    """Flag --config, which is parsed before all other flags."""

    config: Path | None = None


def parse_with_recipe(options_class: type, arguments: list[str], **tyro_settings: Any) -> Any:
    """Build options from flags and the recipe in --config. Exit with status 2 if a flag is invalid."""
    flag_names = get_flag_names(options_class)
    recipe_flag, _ = tyro.cli(RecipeFlag, args=arguments, return_unknown_args=True, add_help=False)
    reject_equivalent_flags(arguments, flag_names)
    if recipe_flag.config is not None:
        arguments = [*read_recipe(find_recipe(recipe_flag.config), flag_names), *arguments]
    return parse_flags(options_class, arguments, **tyro_settings, config=(tyro.conf.OmitArgPrefixes,))


def find_recipe(path: Path) -> Path:
    """Return `path` itself, or the path of the recipe in the package if `path` is a name, such as `digits`."""
    if path.exists() or path.suffix or path.name != str(path):
        return path
    recipe_files = (folder / f"{path}.yaml" for folder in RECIPE_FOLDERS)
    return next((file for file in recipe_files if file.is_file()), path)


def reject_equivalent_flags(arguments: list[str], flag_names: set[str]) -> None:
    """Exit with status 2 if a flag is in `EQUIVALENT_FLAGS`. The message contains the equivalent flag."""
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        equivalent_flag = EQUIVALENT_FLAGS.get(name)
        if argument.startswith("--") and name not in flag_names and equivalent_flag in flag_names:
            exit_with_message(
                f"error: unknown flag --{name.replace('_', '-')}; use --{str(equivalent_flag).replace('_', '-')}"
            )


def parse_flags(options_class: type, arguments: list[str], **tyro_settings: Any) -> Any:
    """Build options from flags. Exit with status 2 if a flag is invalid."""
    flag_names = get_flag_names(options_class)
    arguments = [rename_synonym(argument, flag_names) for argument in arguments]
    return tyro.cli(options_class, args=arguments, **tyro_settings)


def rename_synonym(argument: str, flag_names: set[str]) -> str:
    """Replace a flag with its synonym if only the synonym is in `flag_names`; return other arguments unchanged."""
    for prefix in ("--no-", "--"):
        name = argument.removeprefix(prefix).replace("-", "_")
        if argument.startswith(prefix) and name not in flag_names and FLAG_SYNONYMS.get(name) in flag_names:
            return f"{prefix}{FLAG_SYNONYMS[name].replace('_', '-')}"
    return argument


def read_recipe(path: Path, flag_names: set[str]) -> list[str]:
    """Read a recipe and return its flags. Exit with status 2 if the file cannot be read or a key is not a flag."""
    try:
        text = path.read_text(encoding="utf-8")
        recipe = yaml.safe_load(text) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        exit_with_message(f"error: cannot read the recipe {path}: {' '.join(str(error).split())}")
    if not isinstance(recipe, dict):
        exit_with_message(f"error: the recipe {path} must contain lines of the form `flag: value`")
    for key, _ in yaml.compose(text).value if recipe else ():
        name = str(key.value).replace("-", "_")
        if name not in flag_names and name.removeprefix("no_") not in flag_names:
            similar_flag = EQUIVALENT_FLAGS.get(name) or next(
                iter(difflib.get_close_matches(name, flag_names, n=1)), None
            )
            hint = f"use {similar_flag}" if similar_flag in flag_names else "`--help` lists the flags"
            exit_with_message(f"error: {path}, line {key.start_mark.line + 1}: unknown flag {key.value}; {hint}")
    return [argument for name, value in recipe.items() for argument in to_arguments(str(name), value)]


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Exit with status 1 and a one-line message if the block raises ValueError or OSError."""
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and is_closed_pipe(sys.stdout):
            raise  # cli.py handles closed pipes
        exit_with_message(f"error: {error}", status=1, is_on_all_processes=is_raised_on_all_processes(error))


def exit_with_message(message: str, status: int = 2, is_on_all_processes: bool = True) -> NoReturn:
    """Print a one-line message to stderr and exit. Status 2 means that a flag is invalid. If all processes exit with
    the message (`is_on_all_processes`), only the first process prints the message."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(message, file=sys.stderr)
    elif not is_on_all_processes:
        print(f"process {rank}: {message}", file=sys.stderr)
    raise SystemExit(status)

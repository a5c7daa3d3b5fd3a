"""The command line: subcommands, flags and recipe files -> options; help; errors of one line.

    name, options = parse_command_line(modules, ["finetune", "--config", "digits", "--epochs", "3"])

tyro parses the flags. A recipe is a YAML file of flags, which are inserted before the flags on the command line, so
that tyro validates all flags and the command line overrides the recipe. Invalid flags are reported before torch is
imported.
"""

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NoReturn, Union

import docstring_parser
import tyro
import yaml

from ..errors import is_raised_on_all_processes
from ..options import get_flag_fields, to_arguments


PACKAGE_FOLDER = Path(__file__).parents[1]
# Folders with the recipes that --config accepts by name: one in an installed package, one in a source checkout.
RECIPE_FOLDERS = (PACKAGE_FOLDER / "recipes", PACKAGE_FOLDER.parent / "scripts" / "recipes")

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

NOT_OF_TYPE = r"\1 requires \2, but got \3"
TYRO_CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)


def parse_command_line(modules: dict[str, ModuleType], arguments: list[str]) -> tuple[str, Any]:
    """Return the name of the subcommand and its options. `modules` maps names of subcommands to modules, whose
    docstrings start with the name and a summary, followed by examples.

    Print the help and exit with status 0 if the help is requested; exit with status 2 if the command line is invalid.
    """
    name, flags = arguments[0], arguments[1:]
    is_command = name in modules
    if is_command:
        options_class = modules[name].OPTIONS_CLASS
        common_flags = getattr(modules[name], "COMMON_FLAGS", None)
        if common_flags and {"--help", "-h"} & set(flags):
            print(format_short_help(name, options_class, common_flags))
            raise SystemExit(0)
        flags = ["--help" if flag == "--help-all" else flag for flag in flags]
        if "--help" not in flags:
            flags = prepare_flags(name, options_class, flags)
    elif not name.startswith("-"):
        similar = difflib.get_close_matches(name, modules, n=1, cutoff=0.5)
        hint = f"did you mean {similar[0]}?" if similar else f"choose from {', '.join(modules)}"
        exit_with_message(f"error: vitcls has no command {name}: {hint}")
    subcommands: list[Any] = []
    for command, module in modules.items():
        title, _, examples = str(module.__doc__).partition("\n\n")
        description = title.partition(": ")[2]
        if command == name:
            description = f"{textwrap.dedent(str(module.OPTIONS_CLASS.__doc__))}\n\n{examples}".strip()
        subcommands.append(
            Annotated[module.OPTIONS_CLASS, tyro.conf.subcommand(name=command, description=description)]
        )
    with one_line_errors():
        union: Any = Union[tuple(subcommands)]  # noqa: UP007  # the number of types is not known here
        return name, tyro.cli(union, prog="vitcls", args=[name, *flags], config=TYRO_CONFIG)


def prepare_flags(command: str, options_class: type, flags: list[str]) -> list[str]:
    """Insert the flags of a recipe, and check the names of all flags. Exit with status 2 if a flag is unknown or
    missing."""
    flag_fields = get_flag_fields(options_class)
    flag_names = set(flag_fields)
    has_recipes = "config" in flag_names and command != "study"  # a study file has a format of its own
    flag = "source" if "source" in flag_names else "model"
    if flags and not flags[0].startswith("-") and "paths" not in flag_names and flag in flag_names:
        exit_with_message(f"error: vitcls {command} has no positional arguments. Set --{flag} {flags[0]}")
    if has_recipes and (recipe := read_value(flags, "--config")) is not None:
        flags = [*read_recipe(find_recipe(Path(recipe))), *flags]
    names = [flag.partition("=")[0].removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")]
    for name in names:
        if not {name, name.removeprefix("no_")} & flag_names and not name.startswith("tyro_"):
            exit_with_message(
                f"error: vitcls {command} has no flag --{name.replace('_', '-')}; {hint(name, flag_names)}"
            )
    missing = [
        f"--{name.replace('_', '-')}"
        for name, field in flag_fields.items()
        if field.default is field.default_factory is dataclasses.MISSING and name not in names
    ]
    if missing:
        exit_with_message(
            f"error: vitcls {command} requires {', '.join(missing)}. `vitcls {command} --help` lists flags"
        )
    return flags


def hint(name: str, flag_names: set[str]) -> str:
    """Return what to use instead of an unknown flag."""
    if name == "revision" and "model" in flag_names:
        return "use --branch" if "branch" in flag_names else "to pin a commit, set --model ID@COMMIT"
    similar = EQUIVALENT_FLAGS.get(name) or next(iter(difflib.get_close_matches(name, flag_names, n=1)), None)
    return f"use --{similar.replace('_', '-')}" if similar in flag_names else "`--help` lists the flags"


def read_value(flags: list[str], flag: str) -> str | None:
    """Return the last value of a flag, given as `--flag value` or `--flag=value`; None if the flag is not given."""
    values = [flags[index + 1] for index in range(len(flags) - 1) if flags[index] == flag]
    values += [each.partition("=")[2] for each in flags if each.startswith(f"{flag}=")]
    return values[-1] if values else None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Replace tyro's error boxes with one line. Exit with status 2 after an error."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            yield
    except SystemExit as ended:
        if not ended.code:
            raise
        # A box has a title and, between horizontal lines, text; an ASCII terminal gets no vertical lines.
        plain_text = re.sub(r"\x1b\[[\d;]*m", "", output.getvalue())  # without colors
        _, *rows = [line.strip("│ ") for line in plain_text.splitlines()]
        rows = list(itertools.dropwhile(lambda row: not row.strip("─-"), rows))
        message = " ".join(itertools.takewhile(lambda row: row.strip("─-"), rows))
        message = message.partition(" Got errors:")[0]
        message = re.sub(r"^Error parsing (\w+Options: )?", "", message)
        type_error = re.compile(
            r"(--\S+): no type matching (?:{None}\|)?(.+) could be instantiated from \['(.*)'\]\.?"
        )
        exit_with_message(f"error: {type_error.sub(NOT_OF_TYPE, message)}")


# Help ----------------------------------------------------------------------------------------------------------------


def format_short_help(command: str, options_class: type, common_flags: dict[str, str]) -> str:
    """Format the help of the flags that are set most often, on one screen.

    Args:
        common_flags: Title of a group -> names of its flags, separated by spaces.
    """
    width = max(60, shutil.get_terminal_size().columns)
    texts = read_help_texts(options_class)
    lines = [f"usage: vitcls {command} --model M --dataset D --output-dir FOLDER [FLAGS]"]
    for title, names in common_flags.items():
        lines += ["", f"{title}:"]
        for name in names.split():
            first_sentence = re.split(r"(?<!al)[.:] ", " ".join(texts[name].split()))[0].rstrip(".")
            text = textwrap.shorten(first_sentence, width - 26, placeholder=" ...")
            lines.append(f"  --{name.replace('_', '-'):<22}{text}")
    rest = len(texts) - sum(len(names.split()) for names in common_flags.values())
    return "\n".join([*lines, "", f"`vitcls {command} --help-all` also shows the other {rest} flags."])


def read_help_texts(options_class: Any) -> dict[str, str]:
    """Return the docstrings below the fields of a dataclass, its base classes and its nested dataclasses."""
    texts: dict[str, str] = {}
    for base in reversed(options_class.__mro__[:-1]):
        parameters = docstring_parser.parse_from_object(base).params
        texts |= {parameter.arg_name: str(parameter.description) for parameter in parameters}
    for option in dataclasses.fields(options_class):
        if dataclasses.is_dataclass(option.type):
            texts |= read_help_texts(option.type)
    return texts


# Recipes -------------------------------------------------------------------------------------------------------------


def find_recipe(path: Path) -> Path:
    """Return `path` itself, or the path of the recipe in the package if `path` is a name, such as `digits`."""
    if path.is_file() or path.suffix or path.name != str(path):
        return path
    recipe_files = (folder / f"{path}.yaml" for folder in RECIPE_FOLDERS)
    return next((file for file in recipe_files if file.is_file()), path)


def read_recipe(path: Path) -> list[str]:
    """Read a recipe and return its flags. Exit with status 2 if the file cannot be read."""
    if not path.is_file() and not path.suffix:
        names = sorted({file.stem for folder in RECIPE_FOLDERS for file in folder.glob("[!s]*.yaml")})
        exit_with_message(f"error: there is no recipe {path}: set --config to a file, or to one of {', '.join(names)}")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        exit_with_message(f"error: cannot read the recipe {path}: {' '.join(str(error).split())}")
    if not isinstance(recipe, dict):
        exit_with_message(f"error: the recipe {path} must contain lines of the form `flag: value`")
    return [argument for name, value in recipe.items() for argument in to_arguments(str(name), value)]


# Errors and output of libraries --------------------------------------------------------------------------------------


def silence_libraries() -> None:
    """Hide the progress bars of weight loading, and transformers' tables about the loaded weights. Our commands check
    the weights, and log what was adapted in one line."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.get_logger("transformers.modeling_utils").addFilter(
        lambda record: "LOAD REPORT" not in record.getMessage()  # type: ignore[arg-type]  # logging accepts functions
    )


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Exit with status 1 and a one-line message if the block raises ValueError or OSError."""
    try:
        yield
    except (ValueError, OSError) as error:
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

"""The command line: subcommands, flags and recipe files -> options; help; errors of one line.

    name, options = parse_command_line(modules, ["finetune", "--config", "digits", "--epochs", "3"])

tyro parses the flags, and reports unknown flags and values of another type. A recipe is a YAML file
of flags, which are inserted before the flags on the command line, so that tyro validates all flags
and the command line overrides the recipe. Invalid flags are reported before torch is imported.
"""

import argparse
import dataclasses
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NoReturn, TypeVar, Union

import tyro
import yaml

from ..hub.local_paths import split_prefix
from ..runtime.errors import RunStopped, describe_error, is_raised_on_all_processes
from ..runtime.files import read_text
from ..runtime.flags import (
    EQUIVALENT_FLAGS,
    Options,
    get_flag_fields,
    list_choices,
    to_arguments,
    to_flags,
)


ScriptOptions = TypeVar("ScriptOptions", bound=Options)

PACKAGE_FOLDER = Path(__file__).parents[1]
# Folders with the recipes that --config accepts by name: one in an installed package, one in a
# source checkout.
RECIPE_FOLDERS = (PACKAGE_FOLDER / "recipes", PACKAGE_FOLDER.parent / "scripts" / "recipes")

TYRO_CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
# A parameter in an error: `batch_size` or `batch_size=64`
PARAMETER = re.compile(r"`([a-z]\w*)(?:=([^`]*))?`")


def parse_command_line(modules: dict[str, ModuleType], arguments: list[str]) -> tuple[str, Any]:
    """Return the name of the subcommand and its options.

    `modules` maps names of subcommands to modules, whose docstrings start with the name and a
    summary, followed by examples.

    Print the help and exit with status 0 if the help is requested; exit with status 2 if the
    command line is invalid.
    """
    name, flags = arguments[0], arguments[1:]
    if name in modules:
        options_class = modules[name].OPTIONS_CLASS
        common_flags = getattr(modules[name], "COMMON_FLAGS", None)
        if common_flags and {"--help", "-h"} & set(flags):
            print(format_short_help(name, options_class, common_flags))
            raise SystemExit(0)
        flags = ["--help" if flag == "--help-all" else flag for flag in flags]
        flags = insert_recipe(flags, get_flag_fields(options_class))
        check_is_set(flags)
        suggest_equivalent_flags(flags, get_flag_fields(options_class))

    subcommands: list[Any] = []
    for command, module in modules.items():
        title, _, examples = str(module.__doc__).partition("\n\n")
        description = title.partition(": ")[2]
        if command == name:
            description = (
                f"{textwrap.dedent(str(module.OPTIONS_CLASS.__doc__))}\n\n{examples}".strip()
            )
        subcommands.append(
            Annotated[
                module.OPTIONS_CLASS, tyro.conf.subcommand(name=command, description=description)
            ]
        )
    # the number of types is not known here
    union: Any = Union[tuple(subcommands)]  # noqa: UP007
    options = tyro.cli(
        union,
        prog="vitcls",
        args=[name, *flags],
        config=TYRO_CONFIG,
        console_outputs=os.environ.get("RANK", "0") == "0",
    )
    with exit_on_error(type(options), status=2):
        options.check()
    return name, options


def check_is_set(flags: list[str]) -> None:
    """Exit with status 2 if an argument is empty.

    It comes from a shell variable without a value, and as a path it would be the current folder.
    """
    for index, flag in enumerate(flags):
        if not flag.strip() or (flag.startswith("--") and flag.endswith("=")):
            text = flag.strip() or " ".join([*flags[max(0, index - 1) : index], "''"])
            exit_with_message(f"error: the value of {text} is empty. Set it, or remove the flag")


def insert_recipe(flags: list[str], flag_names: Collection[str]) -> list[str]:
    """Return the flags of the recipe in `--config`, followed by the other flags."""
    if "config" not in flag_names:
        return flags
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    path = parser.parse_known_args(flags)[0].config
    return flags if path is None else [*read_recipe(find_recipe(path)), *flags]


def suggest_equivalent_flags(flags: list[str], flag_names: Collection[str]) -> None:
    """Exit with status 2 if a flag is that of another training script, such as `--lr`.

    tyro suggests flags of similar spelling.
    """
    for flag in flags:
        name = flag.partition("=")[0].removeprefix("--").replace("-", "_")
        equivalent = EQUIVALENT_FLAGS.get(name)
        if flag.startswith("--") and equivalent is not None and equivalent in flag_names:
            exit_with_message(
                f"error: there is no flag {flag}; use --{equivalent.replace('_', '-')}"
            )


def check_paths(options: Options) -> None:
    """Raise ValueError if a local path does not exist, before libraries are imported.

    Models, sources and datasets are checked, and whether a name can be written to the files of a
    run.
    """
    values = to_flags(options)
    for name in ("model", "source", "teacher", "dataset"):
        value = values.get(name) or []
        for source in value if isinstance(value, list) else [value]:
            path = split_prefix(source)[1].partition("@")[0]
            if is_path(path) and not Path(path).exists() and not Path(source).exists():
                raise ValueError(f"there is no file or folder {path}. Check `{name}`")
    for name in ("output_dir", "output", "json", "per_image", "audit"):
        if isinstance(values.get(name), str):
            check_writable(name, Path(values[name]))
    for name in ("output_dir", "output", "dataset", "model"):
        value = values.get(name)
        # Python reads bytes of file names that are not UTF-8 as surrogates
        if isinstance(value, str) and value.encode(errors="ignore").decode() != value:
            raise ValueError(
                f"`{name}` is {value!a}, which is not valid UTF-8. Rename the folder, or set "
                "another one"
            )


def check_writable(name: str, output: Path) -> None:
    """Raise ValueError if a file or folder cannot be written, before the work is done."""
    for path in (output, *output.parents):
        # unlike Path.is_dir, these do not raise PermissionError
        if os.path.isdir(path):  # noqa: PTH112
            if os.access(path, os.W_OK):
                return
            reason = f"no permission to write to {path}"
        elif path != output and os.path.exists(path):  # noqa: PTH110
            reason = f"{path} is not a folder"
        else:
            continue
        raise ValueError(f"cannot write {output}: {reason}. Set a different `{name}`")


def is_path(source: str) -> bool:
    """Return whether a name can only be a local path.

    `runs` is the folder of the output in all examples.
    """
    if "://" in source or {"*", "?", "["} & set(source):
        return False
    parts = Path(source).parts
    return (
        Path(source).is_absolute()
        or source.startswith((".", "~"))
        or len(parts) > 2
        or parts[:1] == ("runs",)
    )


# Help ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FlagGroup:
    """Flags that `--help` lists together.

    Attributes:
        title: title of the group, and an example of its flags.
        texts: name of a flag -> a few words, with a default value only where the flag's own is
            None.
    """

    title: str
    texts: dict[str, str]


def format_short_help(command: str, options_class: type, groups: tuple[FlagGroup, ...]) -> str:
    """Format the flags that are set most often, with their choices and defaults, on one screen."""
    width = max(60, shutil.get_terminal_size().columns)
    fields = get_flag_fields(options_class)
    lines = [f"usage: vitcls {command} --model M --dataset D --output-dir FOLDER [FLAGS]"]
    for group in groups:
        lines += ["", group.title]
        for name, text in group.texts.items():
            flag = f"  --{name.replace('_', '-')}"
            words = f"{flag:<26}{text} {describe_values(fields[name])}"
            lines += textwrap.wrap(words, width, subsequent_indent=" " * 26, break_on_hyphens=False)
    rest = len(fields) - sum(len(group.texts) for group in groups)
    return "\n".join(
        [*lines, "", f"`vitcls {command} --help-all` also shows the other {rest} flags."]
    )


def describe_values(field: dataclasses.Field[Any]) -> str:
    """Return the choices and the default value of a flag in parentheses, if there are any."""
    choices = ", ".join(list_choices(field.type))
    has_default = isinstance(field.default, str | float | int) and not isinstance(
        field.default, bool
    )
    default = f"default {field.default}" if has_default else ""
    values = "; ".join(part for part in (choices, default) if part)
    return f"({values})" if values else ""


# Recipes ------------------------------------------------------------------------------------------


def find_recipe(path: Path) -> Path:
    """Return `path` itself, or the path of a recipe of the package by its name.

    `digits` is such a name.
    """
    if path.is_file() or path.suffix or path.name != str(path):
        return path
    recipe_files = (folder / f"{path}.yaml" for folder in RECIPE_FOLDERS)
    return next((file for file in recipe_files if file.is_file()), path)


def read_recipe(path: Path) -> list[str]:
    """Read a recipe and return its flags. Exit with status 2 if the file cannot be read."""
    if not path.suffix:
        check_recipe_exists(path, "recipe", "[!s]*.yaml")
    try:
        recipe = yaml.safe_load(read_text(path)) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        exit_with_message(f"error: cannot read the recipe {path}: {' '.join(str(error).split())}")
    if not isinstance(recipe, dict):
        exit_with_message(f"error: the recipe {path} must contain lines of the form `flag: value`")
    return [
        argument for name, value in recipe.items() for argument in to_arguments(str(name), value)
    ]


def check_recipe_exists(path: Path, kind: str, pattern: str) -> None:
    """Exit with status 2 if a file does not exist, and list the recipes that match a pattern."""
    if path.is_file():
        return
    names = sorted({file.stem for folder in RECIPE_FOLDERS for file in folder.glob(pattern)})
    exit_with_message(
        f"error: there is no {kind} {path}: set --config to a file, or to one of {', '.join(names)}"
    )


# Errors and output of libraries -------------------------------------------------------------------


def silence_libraries() -> None:
    """Hide the progress bars of weight loading, and transformers' tables about the loaded weights.

    Our commands check the weights, and log what was adapted in one line.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.get_logger("transformers.modeling_utils").addFilter(
        # logging accepts functions
        lambda record: "LOAD REPORT" not in record.getMessage()  # type: ignore[arg-type]
    )


@contextmanager
def exit_on_error(options_class: type[Options], status: int = 1) -> Iterator[None]:
    """Exit with a one-line message if the block raises ValueError or OSError, or a run is stopped."""
    is_on_all_processes = False
    try:
        yield
        return
    except RunStopped as stopped:
        status = stopped.exit_status
        is_on_all_processes = stopped.is_on_all_processes
        message = str(stopped)
    except (ValueError, OSError) as error:
        is_on_all_processes = status == 2 or is_raised_on_all_processes(error)
        message = describe_error(error)
        if isinstance(error, FileNotFoundError) and not has_working_directory():
            message = "the working directory no longer exists. Change to another folder"
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            raise
        message = (
            "no more threads can be started. Raise the limit of processes (ulimit -u) or of "
            "memory (ulimit -v), or end other programs"
        )
    prefix = "error: " if status in (1, 2) else ""  # otherwise a signal
    exit_with_message(f"{prefix}{add_flags(message, options_class)}", status, is_on_all_processes)


def has_working_directory() -> bool:
    """Return whether the working directory exists."""
    try:
        return Path.cwd().exists()
    except FileNotFoundError:
        return False


def add_flags(message: str, options_class: type[Options]) -> str:
    """Append the flags of the parameters that an error names.

    Errors name parameters, as Python does: "Set `num_workers=0` (--num-workers)".
    """
    flags = {
        f"--{'no-' if value == 'False' else ''}{name.replace('_', '-')}"
        for name, value in PARAMETER.findall(message)
        if name in get_flag_fields(options_class)
    }
    return f"{message} ({', '.join(sorted(flags))})" if flags else message


def run_script(
    options_class: type[ScriptOptions],
    run: Callable[[ScriptOptions], None],
    arguments: list[str] | None = None,
) -> None:
    """Run a program of scripts/ that is not a subcommand, with the same errors of one line.

    Args:
        options_class: The class of its options, whose fields are the flags.
        run: The program.
        arguments: The flags. Default: `sys.argv[1:]`.
    """
    options = tyro.cli(options_class, args=arguments, config=TYRO_CONFIG)
    with exit_on_error(options_class, status=2):
        options.check()
    silence_libraries()
    with exit_on_error(options_class):
        run(options)


def exit_with_message(message: str, status: int = 2, is_on_all_processes: bool = True) -> NoReturn:
    """Print a one-line message to stderr and exit.

    Status 2 means that a flag is invalid. If all processes exit with the message
    (`is_on_all_processes`), only the first process prints the message.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(message, file=sys.stderr)
    elif not is_on_all_processes:
        print(f"process {rank}: {message}", file=sys.stderr)
    raise SystemExit(status)

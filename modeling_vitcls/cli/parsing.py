"""The command line: subcommands, flags and recipe files -> options; help; errors of one line.

    name, options = parse_command_line(modules, ["finetune", "--config", "digits", "--epochs", "3"])

tyro parses the flags. A recipe is a YAML file of flags, which are inserted before the flags on the
command line, so that tyro validates all flags and the command line overrides the recipe. Invalid
flags are reported before torch is imported.
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
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, NoneType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import tyro
import yaml

from ..hub.local_paths import split_prefix
from ..runtime.errors import describe_error, format_error, is_raised_on_all_processes
from ..runtime.flags import (
    find_similar_flag,
    get_flag_fields,
    get_value_types,
    to_arguments,
    to_flags,
)
from ..runtime.messages import format_message
from .flag_messages import messages_name_flags


Options = TypeVar("Options")

PACKAGE_FOLDER = Path(__file__).parents[1]
# Folders with the recipes that --config accepts by name: one in an installed package, one in a
# source checkout.
RECIPE_FOLDERS = (PACKAGE_FOLDER / "recipes", PACKAGE_FOLDER.parent / "scripts" / "recipes")

NOT_OF_TYPE = r"\1 requires \2, but got \3"
TYRO_CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)


def parse_command_line(modules: dict[str, ModuleType], arguments: list[str]) -> tuple[str, Any]:
    """Return the name of the subcommand and its options.

    `modules` maps names of subcommands to modules, whose docstrings start with the name and a
    summary, followed by examples.

    Print the help and exit with status 0 if the help is requested; exit with status 2 if the
    command line is invalid.
    """
    name, flags = arguments[0], arguments[1:]
    is_command = name in modules
    flag_names: Collection[str] = ()
    if is_command:
        options_class = modules[name].OPTIONS_CLASS
        flag_names = get_flag_fields(options_class)
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
            description = (
                f"{textwrap.dedent(str(module.OPTIONS_CLASS.__doc__))}\n\n{examples}".strip()
            )
        subcommands.append(
            Annotated[
                module.OPTIONS_CLASS, tyro.conf.subcommand(name=command, description=description)
            ]
        )
    with messages_name_flags(flag_names), one_line_errors():
        # the number of types is not known here
        union: Any = Union[tuple(subcommands)]  # noqa: UP007
        options = tyro.cli(union, prog="vitcls", args=[name, *flags], config=TYRO_CONFIG)
    check_paths(options)
    return name, options


def prepare_flags(command: str, options_class: type, flags: list[str]) -> list[str]:
    """Insert the flags of a recipe, and check the names of all flags.

    Exit with status 2 if a flag is unknown or missing.
    """
    flag_fields = get_flag_fields(options_class)
    flag_names = set(flag_fields)
    flag = "source" if "source" in flag_names else "model"
    if flags and not flags[0].startswith("-") and "paths" not in flag_names and flag in flag_names:
        exit_with_message(
            f"error: vitcls {command} has no positional arguments. Set --{flag} {flags[0]}"
        )
    if "config" in flag_names and (recipes := read_values(flags, "--config")):
        flags = [*read_recipe(find_recipe(Path(recipes[-1]))), *flags]
    names = [
        flag.partition("=")[0].removeprefix("--").replace("-", "_")
        for flag in flags
        if flag.startswith("--")
    ]
    for name in names:
        if not {name, name.removeprefix("no_")} & flag_names and not name.startswith("tyro_"):
            exit_with_message(
                f"error: vitcls {command} has no flag --{name.replace('_', '-')}; "
                f"{hint(name, flag_names)}"
            )
    for name, field in flag_fields.items():
        check_choices(name, field.type, flags)
    missing = [
        f"--{name.replace('_', '-')}"
        for name, field in flag_fields.items()
        if field.default is field.default_factory is dataclasses.MISSING
        and name not in names
        and get_origin(field.type) is not Annotated  # positional; tyro reports a missing one
    ]
    if missing:
        exit_with_message(
            f"error: vitcls {command} requires {', '.join(missing)}. `vitcls {command} --help` "
            "lists flags"
        )
    return flags


def check_choices(name: str, type_hint: Any, flags: list[str]) -> None:
    """Exit with status 2 if a value of a flag is not one of its choices.

    The choices are listed in a fixed order.
    """
    choices = list_choices(type_hint)
    if not choices:
        return
    value_types = get_value_types(type_hint)
    allowed = {*choices, "None"} if NoneType in value_types else set(choices)
    has_several_values = any(get_origin(each) is tuple for each in value_types)
    flag = f"--{name.replace('_', '-')}"
    for value in read_values(flags, flag, has_several_values):
        if value not in allowed:
            exit_with_message(
                f"error: {flag} is {value}, but it must be one of {', '.join(choices)}"
            )


def list_choices(type_hint: Any) -> list[str]:
    """Return the choices of a flag; an empty list if it accepts other values as well."""
    value_types = [each for each in get_value_types(type_hint) if each is not NoneType]
    if len(value_types) == 1 and get_origin(value_types[0]) is tuple:  # several values
        value_types = [each for each in get_args(value_types[0]) if each is not Ellipsis]
    if not all(get_origin(each) is Literal for each in value_types):
        return []
    return [str(choice) for each in value_types for choice in get_args(each)]


def read_values(flags: list[str], flag: str, has_several_values: bool = False) -> list[str]:
    """Return all values of a flag, given as `--flag value ...` or `--flag=value`."""
    values: list[str] = []
    is_value = False
    for word in flags:
        if word.startswith("--"):
            name, separator, value = word.partition("=")
            is_value = name.replace("_", "-") == flag
            values += [value] if is_value and separator else []
        elif is_value:
            values.append(word)
            is_value = has_several_values  # otherwise, paths follow
    return values


def check_paths(options: Any) -> None:
    """Exit with a message if a local path does not exist, before libraries are imported.

    Models, sources and datasets are checked, and whether a name can be written to the files of a
    run.
    """
    values = to_flags(options)
    for name in ("model", "source", "teacher", "dataset"):
        value = values.get(name) or []
        for source in value if isinstance(value, list) else [value]:
            path = split_prefix(source)[1].partition("@")[0]
            if is_path(path) and not Path(path).exists() and not Path(source).exists():
                exit_with_message(
                    f"error: there is no file or folder {path}. Check --{name}", status=1
                )
    for name in ("output_dir", "output", "json", "per_image", "audit"):
        if isinstance(values.get(name), str):
            check_writable(name, Path(values[name]))
    for name in ("output_dir", "output", "dataset", "model"):
        value = values.get(name)
        # Python reads bytes of file names that are not UTF-8 as surrogates
        if isinstance(value, str) and value.encode(errors="ignore").decode() != value:
            exit_with_message(
                f"error: --{name.replace('_', '-')} {value!a} is not valid UTF-8. Rename the "
                "folder, or set another one",
                status=1,
            )


def check_writable(name: str, output: Path) -> None:
    """Exit with a message if a file or folder cannot be written, before the work is done."""
    reason = None
    for path in (output, *output.parents):
        # unlike Path.is_dir, these do not raise PermissionError
        if os.path.isdir(path):  # noqa: PTH112
            if not os.access(path, os.W_OK):
                reason = f"no permission to write to {path}"
            break
        if path != output and os.path.exists(path):  # noqa: PTH110
            reason = f"{path} is not a folder"
            break
    if reason is not None:
        exit_with_message(
            f"error: cannot write {output}: {reason}. Set a different --{name.replace('_', '-')}",
            status=1,
        )


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


def hint(name: str, flag_names: set[str]) -> str:
    """Return what to use instead of an unknown flag."""
    if name == "revision" and "model" in flag_names:
        return (
            "use --branch" if "branch" in flag_names else "to pin a commit, set --model ID@COMMIT"
        )
    similar = find_similar_flag(name, flag_names)
    return f"use --{similar.replace('_', '-')}" if similar else "`--help` lists the flags"


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
        if (error := find_own_error(ended)) is not None:
            exit_with_message(f"error: {format_error(error)}")
        # A box has a title and, between horizontal lines, text; an ASCII terminal gets no vertical
        # lines.
        plain_text = re.sub(r"\x1b\[[\d;]*m", "", output.getvalue())  # without colors
        _, *rows = [line.strip("│ ") for line in plain_text.splitlines()]
        rows = list(itertools.dropwhile(lambda row: not row.strip("─-"), rows))
        message = " ".join(itertools.takewhile(lambda row: row.strip("─-"), rows))
        message = message.partition(" Got errors:")[0]
        message = message.removeprefix("Error parsing ")
        type_error = re.compile(
            r"(--\S+): no type matching (?:{None}\|)?(.+) could be instantiated from \['(.*)'\]\.?"
        )
        exit_with_message(f"error: {type_error.sub(NOT_OF_TYPE, message)}")


def find_own_error(ended: BaseException) -> BaseException | None:
    """Return the error of the options' own checks that made tyro exit, if any."""
    error = ended.__context__
    while error is not None:
        frames = list(traceback.walk_tb(error.__traceback__))
        file = Path(frames[-1][0].f_code.co_filename) if frames else Path()
        if isinstance(error, ValueError) and PACKAGE_FOLDER in file.parents:
            return error
        error = error.__context__
    return None


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
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
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
def exit_on_error() -> Iterator[None]:
    """Exit with status 1 and a one-line message if the block raises ValueError or OSError."""
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, FileNotFoundError) and not has_working_directory():
            exit_with_message(
                "error: the working directory no longer exists. Change to another folder", status=1
            )
        exit_with_message(
            f"error: {describe_error(error)}",
            status=1,
            is_on_all_processes=is_raised_on_all_processes(error),
        )
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            raise
        exit_with_message(
            "error: no more threads can be started. Raise the limit of processes (ulimit -u) or of "
            "memory (ulimit -v), or end other programs",
            status=1,
            is_on_all_processes=False,
        )


def has_working_directory() -> bool:
    """Return whether the working directory exists."""
    try:
        return Path.cwd().exists()
    except FileNotFoundError:
        return False


def run_script(
    options_class: type[Options], run: Callable[[Options], None], arguments: list[str] | None = None
) -> None:
    """Run a program of scripts/ that is not a subcommand, with the same errors of one line.

    Args:
        options_class: A dataclass whose fields are the flags.
        run: The program.
        arguments: The flags. Default: `sys.argv[1:]`.
    """
    with messages_name_flags(get_flag_fields(options_class)):
        with one_line_errors():
            options = tyro.cli(options_class, args=arguments, config=TYRO_CONFIG)
        silence_libraries()
        with exit_on_error():
            run(options)


def exit_with_message(message: str, status: int = 2, is_on_all_processes: bool = True) -> NoReturn:
    """Print a one-line message, with flags for parameters, to stderr and exit.

    Status 2 means that a flag is invalid. If all processes exit with the message
    (`is_on_all_processes`), only the first process prints the message.
    """
    message = format_message(message)
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(message, file=sys.stderr)
    elif not is_on_all_processes:
        print(f"process {rank}: {message}", file=sys.stderr)
    raise SystemExit(status)

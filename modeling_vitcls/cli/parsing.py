"""The command line: subcommands, flags and recipe files -> options; help; errors of one line.

    name, options = parse_command_line(modules, ["finetune", "--config", "digits", "--epochs", "3"])

tyro parses the flags, and reports unknown flags and values of another type. A recipe is a YAML file
of flags, which are inserted before the flags on the command line: tyro validates all flags, and the
command line overrides the recipe. Invalid flags are reported before torch is imported.
"""

import argparse
import dataclasses
import difflib
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeVar, Union

import tyro
import yaml

from ..hub.local_paths import split_prefix
from ..runtime.errors import RunStopped, describe_error, format_error, is_raised_on_all_processes
from ..runtime.files import read_text
from ..runtime.flags import (
    Options,
    get_flag_fields,
    to_arguments,
    to_flags,
)


ScriptOptions = TypeVar("ScriptOptions", bound=Options)

# Folders with the recipes that --config accepts by name: one in an installed package, one in a
# source checkout.
RECIPE_FOLDERS = (
    Path(__file__).parents[1] / "recipes",
    Path(__file__).parents[2] / "scripts" / "recipes",
)

# Flags of other training scripts -> parameters of this package
EQUIVALENT_FLAGS = {
    "--lr": "learning_rate",
    "--bs": "batch_size",
    "--wd": "weight_decay",
    "--per-device-train-batch-size": "batch_size",
    "--num-train-epochs": "epochs",
    "--data": "dataset",
    "--data-dir": "dataset",
    "--model-name-or-path": "model",
    "--fp16": "mixed_precision",
    "--bf16": "mixed_precision",
}

# What a recipe may write for a flag without a value, such as `--flip`: truth values of YAML 1.1
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
POSITIONAL_ARGUMENTS = ("paths", "old", "new")
SETTINGS_FLAGS = ("model_config", "augment")  # flags of several NAME=VALUE
TYRO_CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
EXPONENT = re.compile(r"^(-?\d+)e")  # of a number that is a text in YAML
# A parameter in an error: `batch_size` or `batch_size=64`
PARAMETER = re.compile(r"`([a-z]\w*)(?:=([^`]*))?`")


def parse_command_line(modules: dict[str, ModuleType], arguments: list[str]) -> tuple[str, Any]:
    """Parse a command line into the name of the subcommand and its options.

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
        flags = name_arguments(flags, getattr(modules[name], "ARGUMENTS", ()))
        # tyro knows only --help, which lists all flags
        flags = ["--help" if flag == "--help-all" else flag for flag in flags]
        with exit_on_error(options_class, status=2):
            flags = insert_recipe(flags, add_arguments(options_class))
            check_flags(flags, get_flag_fields(options_class))

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
                add_arguments(module.OPTIONS_CLASS),
                tyro.conf.subcommand(name=command, description=description),
            ]
        )
    # the number of types is not known here
    union: Any = Union[tuple(subcommands)]  # noqa: UP007
    # All processes read the same command line, so one of them prints its errors.
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


def parse_settings(texts: list[str]) -> dict[str, Any]:
    """Parse `drop_path_rate=0.1 head_type=mlp`. The values are YAML, but 1e-5 is also a number."""
    if not all("=" in text for text in texts):
        raise ValueError(f"{' '.join(texts)} is not of the form NAME=VALUE")
    settings = dict(text.split("=", 1) for text in texts)
    return {name: yaml.safe_load(EXPONENT.sub(r"\1.0e", settings[name])) for name in settings}


# How tyro parses a flag that is a dict
SETTINGS = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="[NAME=VALUE ...]",
    instance_from_str=parse_settings,
    is_instance=lambda value: value is None or isinstance(value, dict),
    str_from_instance=lambda value: ["None"],
)


@cache  # the options of two command lines can be compared
def add_arguments(options_class: type[Options]) -> type[Options]:
    """Tell tyro in a subclass of the options what it has to know about some of the fields.

    These are arguments without a flag, such as the images, and flags that are a dict. The options of
    the library do not import tyro.
    """
    arguments: list[Any] = [
        (
            field.name,
            Annotated[field.type, SETTINGS]
            if field.name in SETTINGS_FLAGS
            else tyro.conf.Positional[field.type],  # type: ignore[misc, name-defined]
            dataclasses.field(default=field.default),
        )
        for field in dataclasses.fields(options_class)
        if field.name in (*POSITIONAL_ARGUMENTS, *SETTINGS_FLAGS)
    ]
    if not arguments:
        return options_class
    return dataclasses.make_dataclass(
        options_class.__name__, arguments, bases=(options_class,), frozen=True, kw_only=True
    )


def name_arguments(flags: list[str], names: Sequence[str]) -> list[str]:
    """Put names before the arguments at the start that have none: `convert MODEL OUTPUT`."""
    for index, name in enumerate(names):
        if flags[2 * index :] and not flags[2 * index].startswith("-"):
            flags = [*flags[: 2 * index], f"--{name}", *flags[2 * index :]]
    return flags


def insert_recipe(flags: list[str], options_class: type[Options]) -> list[str]:
    """Put the flags of the recipe in `--config` before the other flags."""
    fields = get_flag_fields(options_class)
    if "config" not in fields:
        return flags
    # argparse finds --config in both spellings, before tyro reports unknown flags
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    path = parser.parse_known_args(flags)[0].config
    # the last value of a flag counts, so the command line overrides the recipe
    return flags if path is None else [*read_recipe(path, fields), *flags]


def check_flags(flags: list[str], flag_names: Collection[str]) -> None:
    """Raise ValueError if an argument is empty, or is the flag of another program, such as `--lr`.

    tyro suggests flags of similar spelling.
    """
    for index, flag in enumerate(flags):
        # a shell variable has no value; as a path, "" would be the current folder
        if not flag.strip() or (flag.startswith("--") and flag.endswith("=")):
            name = flag.strip() or flags[max(0, index - 1)]
            raise ValueError(f"the value of {name} is empty. Set it, or remove the flag")
        equivalent = EQUIVALENT_FLAGS.get(flag.partition("=")[0].replace("_", "-"))
        if equivalent in flag_names:
            raise ValueError(f"there is no flag {flag}. Set `{equivalent}`")


def check_paths(options: Options) -> None:
    """Raise ValueError if a local path does not exist, before libraries are imported.

    Models, sources, datasets and lists are checked, and whether a name can be written to the files of a
    run.
    """
    values = to_flags(options)
    for name in ("model", "source", "teacher", "dataset", "list"):
        value = values.get(name) or []
        for source in value if isinstance(value, list) else [value]:
            path = split_prefix(source)[1].partition("@")[0]
            if is_path(path) and not Path(path).exists() and not Path(source).exists():
                raise ValueError(f"there is no file or folder {path}. Check `{name}`")
    for name in ("output_dir", "output", "json", "per_image"):
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
    output = output.absolute()
    # unlike Path.exists, os.path.exists does not raise PermissionError
    existing = next(path for path in (output, *output.parents) if os.path.exists(path))  # noqa: PTH110
    if existing != output and not existing.is_dir():
        raise ValueError(
            f"cannot write {output}: {existing} is not a folder. Set a different `{name}`"
        )
    if existing.is_dir() and not os.access(existing, os.W_OK):
        raise ValueError(
            f"cannot write {output}: no permission to write to {existing}. Set a different `{name}`"
        )


def is_path(source: str) -> bool:
    """Check whether a name can only be a local path.

    `runs` is the folder of the output in all examples.
    """
    if "://" in source or {"*", "?", "["} & set(source):
        return False
    parts = Path(source).parts
    return (
        Path(source).is_absolute()
        or Path(source).suffix.lower() in {".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt"}
        or source.startswith((".", "~"))
        or len(parts) > 2
        or parts[:1] == ("runs",)
    )


# Help ---------------------------------------------------------------------------------------------


def format_short_help(
    command: str, options_class: type[Options], groups: dict[str, dict[str, str]]
) -> str:
    """Format the flags that are set most often, with their choices and defaults, on one screen.

    `groups` maps the title of a group, with an example, to its flags, with a few words about each.
    """
    width = max(60, shutil.get_terminal_size().columns)
    fields = get_flag_fields(options_class)
    lines = [f"usage: vitcls {command} --model M --dataset D --output-dir FOLDER [FLAGS]"]
    for title, texts in groups.items():
        lines += ["", title]
        for name, text in texts.items():
            flag = f"  --{name.replace('_', '-')}"
            words = f"{flag:<26}{text} {describe_values(fields[name])}"
            lines += textwrap.wrap(words, width, subsequent_indent=" " * 26, break_on_hyphens=False)
    rest = len(fields) - sum(map(len, groups.values()))
    return "\n".join(
        [*lines, "", f"`vitcls {command} --help-all` also shows the other {rest} flags."]
    )


def describe_values(field: dataclasses.Field[Any]) -> str:
    """Show the choices and the default value of a flag in parentheses, if there are any."""
    hint = str(field.type)
    # a flag that also accepts other values, such as a size or `native`, has no list of choices
    is_choice = hint.startswith(("typing.", "tuple[typing."))
    choices = ", ".join(re.findall(r"'(\w+)'", hint)) if is_choice else ""
    has_default = isinstance(field.default, str | float | int) and not isinstance(
        field.default, bool
    )
    default = f"default {field.default}" if has_default else ""
    values = "; ".join(part for part in (choices, default) if part)
    return f"({values})" if values else ""


# Recipes ------------------------------------------------------------------------------------------


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


def read_recipe(path: Path, fields: Mapping[str, dataclasses.Field[Any]]) -> list[str]:
    """Read a recipe and return its flags.

    Raises:
        ValueError: if the file cannot be read, or a key or its value is not one of a flag. The
            message names the file and the key.
    """
    file = find_recipe(path)
    try:
        text = read_text(file)
        recipe, typed_recipe = yaml.load(text, RecipeLoader) or {}, yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the recipe {file}: {format_error(error)}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"the recipe {file} must contain lines of the form flag: value")

    flags: list[str] = []
    for name, value in recipe.items():
        field = fields.get(name.replace("-", "_"))
        if field is None:
            equivalent = EQUIVALENT_FLAGS.get(f"--{name.replace('_', '-')}")
            close = [equivalent or "", *difflib.get_close_matches(name, fields, n=1)]
            hint = next((f". Set `{each}`" for each in close if each in fields), "")
            raise ValueError(f"{file}: there is no flag {name}{hint}")
        # a flag without a value keeps its default
        if value in ("", "~", "null"):
            continue
        if field.name in SETTINGS_FLAGS:
            value = typed_recipe[name]
        elif "bool" in str(field.type):
            value = BOOLEANS.get(str(value).lower(), value)
        arguments = to_arguments(name, value)
        if not is_accepted(field, arguments):
            raise ValueError(f"{file}: {name} cannot be {value}")
        flags += arguments
    return flags


def is_accepted(field: dataclasses.Field[Any], arguments: list[str]) -> bool:
    """Check whether tyro can parse the arguments of one flag."""
    default = dataclasses.field(default=field.default)
    flag = dataclasses.make_dataclass("Flag", [(field.name, field.type, default)])  # type: ignore[list-item]
    # tyro prints the error itself, but without the file
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            tyro.cli(flag, args=arguments, config=TYRO_CONFIG)
        except SystemExit:
            return False
    return True


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
    """Exit with a one-line message if the block raises ValueError or OSError, or a run is stopped.

    Status 2 means that a flag is invalid. If all processes raise the error, the first one prints it.
    """
    try:
        yield
        return
    except RunStopped as stopped:
        status = stopped.exit_status
        message = str(stopped)
        is_on_all_processes = stopped.is_on_all_processes
    except (ValueError, OSError) as error:
        message = describe_error(error)
        is_on_all_processes = status == 2 or is_raised_on_all_processes(error)

    # Any other status means that a signal has ended the run, which is no error.
    if status in (1, 2):
        message = f"error: {message}"
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(add_flags(message, options_class), file=sys.stderr)
    elif not is_on_all_processes:
        print(f"process {rank}: {add_flags(message, options_class)}", file=sys.stderr)
    raise SystemExit(status)


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

"""The command line: subcommands, flags and recipe files -> options; help; errors of one line.

    name, options = parse_command_line(["finetune", "--config", "digits", "--epochs", "3"])

tyro parses the flags. The values of a recipe (recipes.py) are its defaults, so the command line overrides
them. Invalid flags are reported before torch is imported.
"""

import argparse
import dataclasses
import inspect
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_origin

import tyro

from ..runtime.errors import RunStopped, describe_error, is_raised_on_all_processes
from ..runtime.files import read_text, replace_control_characters
from ..runtime.flags import (
    Options,
    expand_home,
    get_flag_fields,
    names_of_flags,
    spell_flags,
)
from .commands import COMMANDS
from .recipes import REGISTRY, describe_unknown_flag, read_recipe


ScriptOptions = TypeVar("ScriptOptions", bound=Options)

HELP_FLAGS = {"-h", "--help", "--help-all"}
# The README's encoder, for a person who has none yet
FIRST_MODEL = "timm:vit_small_patch14_reg4_dinov2.lvd142m"
# tyro's --help lists all flags
OTHER_SPELLINGS = {"--help-all": "--help", "-o": "--output"}


def parse_command_line(arguments: list[str]) -> tuple[str, Any]:
    """Parse a command line into the name of the subcommand and its options.

    Print the help and exit with status 0 if the help is requested; exit with status 2 if the
    command line is invalid.
    """
    name, *flags = arguments
    if name not in COMMANDS:
        # tyro would explain each flag of an unknown command.
        print_commands(arguments[: 1 + name.startswith("--tyro")])
    options_class = get_options_class(name)

    with exit_on_error(options_class, status=2):
        if name == "finetune" and {"--help", "-h"} & set(flags):
            # The flags that are set most often, on one screen
            print(read_text(Path(__file__).with_name("finetune_help.txt")), end="")
            raise SystemExit(0)

        if name == "convert":
            flags = name_arguments(flags, {0: "--model", 2: "--output"})
        if "more_data" in get_flag_fields(options_class) and "--dataset" in flags:
            flags = name_arguments(flags, {flags.index("--dataset") + 2: "--more-data"})
        recipe = read_recipe_of_flags(flags, options_class)
        check_flags(name, flags, options_class, recipe)

        examples = str(inspect.getdoc(COMMANDS[name])).partition("\n\n")[2]
        options = run_tyro(
            options_class,
            prog=f"vitcls {name}",
            description=f"{inspect.cleandoc(options_class.__doc__)}\n\n{examples}".strip(),
            args=[OTHER_SPELLINGS.get(flag, flag) for flag in flags],
            default=recipe,
        )
        options.check()
        options.check_files()
    return name, options


def get_options_class(command: str) -> Any:
    """Read the class of the options of a command from its signature."""
    return COMMANDS[command].__annotations__["options"]


def print_commands(arguments: list[str]) -> None:
    """Print the help or the shell completion of all commands, or an error with their names; exit."""
    commands: list[Any] = []
    for name, command in COMMANDS.items():
        summary = str(command.__doc__).partition("\n")[0]
        subcommand = tyro.conf.subcommand(name=name, description=summary)
        commands.append(Annotated[get_options_class(name), subcommand])
    # The number of types is not known here
    union: Any = Union[tuple(commands)]  # noqa: UP007
    with exit_on_error(Options, status=2):
        run_tyro(union, prog="vitcls", args=arguments)


def run_tyro(kind: Any, **settings: Any) -> Any:
    """Parse flags with tyro. Raise ValueError with the text of its error, which tyro puts in a box."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            return tyro.cli(
                kind,
                config=(tyro.conf.OmitArgPrefixes,),
                registry=REGISTRY,
                # All processes of a run read the same command line, so one of them prints.
                console_outputs=os.environ.get("RANK", "0") == "0",
                **settings,
            )
    except SystemExit:
        if not printed.getvalue():  # After the help, or not the first process
            raise
        raise ValueError(shorten_error(printed.getvalue())) from None


def shorten_error(text: str) -> str:
    """Shorten an error of tyro to one line: without the box, its title, and the text of the flag."""
    text = re.sub("[│╰╯]", "", text.partition("\n")[2])
    # What follows is why each type of a union does not fit, or the text of the flag
    text = re.split("Got errors:|Argument helptext:", text)[0]
    parts = [" ".join(part.split()).rstrip(".") for part in re.split("[─-]{3,}", text)]
    return ". ".join(part for part in parts if part)


def name_arguments(flags: list[str], names: Mapping[int, str]) -> list[str]:
    """Put flags before the arguments at some places that have none: `convert MODEL OUTPUT`."""
    for place, name in names.items():
        if flags[place:] and not flags[place].startswith("-"):
            flags = [*flags[:place], name, *flags[place:]]
    return flags


def read_recipe_of_flags(flags: list[str], options_class: type[Options]) -> Any:
    """Read the recipe that `--config` names, as the default values of all flags, if it does."""
    # argparse finds the flag in both spellings, before tyro parses all of them
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    path = expand_home(parser.parse_known_args(flags)[0].config)
    fields = get_flag_fields(options_class)
    if path is None or "config" not in fields:
        return None
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    # tyro then requires the flags that the recipe lacks
    values: dict[str, Any] = dict.fromkeys(required, tyro.MISSING)
    return options_class(**values | read_recipe(path, options_class))


def check_flags(
    command: str, flags: list[str], options_class: type[Options], recipe: Options | None
) -> None:
    """Raise ValueError if a flag does not exist, has an empty value, is missing, or repeats a list.

    A shell variable that is not set makes an empty value, which would be the current folder as a path.
    """
    fields = get_flag_fields(options_class)
    given = set()
    previous = ""
    for flag in flags:
        if not flag.strip() or (flag.startswith("--") and flag.endswith("=")):
            raise ValueError(
                f"the value of {flag.strip() or previous} is empty. Set it, or remove the flag"
            )
        previous = flag
        if flag.startswith("--") and flag not in {"--", *HELP_FLAGS}:
            flag = flag.partition("=")[0]
            name = flag[2:].replace("-", "_")
            if name not in fields and name.removeprefix("no_") not in fields:
                raise ValueError(describe_unknown_flag(flag, fields))
            # tyro would keep the last values, as it does with a flag of one value
            is_list = name in fields and str(fields[name].type).startswith(("tuple", "dict"))
            if is_list and name in given:
                raise ValueError(f"`{name}` is set twice. Write all values after one")
            given.add(name)

    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING
        # Arguments have no flags, and tyro names them.
        and get_origin(field.type) is not Annotated
        and name not in given
        and getattr(recipe, name, tyro.MISSING) is tyro.MISSING
    ]
    if missing and not HELP_FLAGS.intersection(flags):
        first = flags[0] if flags else "-"
        # Such as `vitcls predict runs/mine photo.jpg`
        is_model = "model" in missing and not first.startswith("-") and not Path(first).is_file()
        hint = f". Did you mean `model={first!r}`?" if is_model else ""
        if command == "finetune" and "model" in missing:
            hint = f". A model to begin with: `model={FIRST_MODEL!r}`"
        names = ", ".join(f"`{name}`" for name in missing)
        raise ValueError(f"vitcls {command} requires {names}{hint}")


def check_outputs(options: Options) -> None:
    """Raise ValueError if an output cannot be written, or is an input, before libraries are imported."""
    values = (*vars(options).values(), *getattr(options, "paths", ()))
    named = [os.path.realpath(str(value)) for value in values]
    for name in ("output_dir", "output", "per_image"):
        output = getattr(options, name, None)
        if output is None:
            continue
        # Raises an error for bytes that are not UTF-8: no table can have the name.
        str(output).encode()
        output = output.absolute()
        existing = next(path for path in (output, *output.parents) if os.path.lexists(path))
        # Such as a disk that is not mounted. Path.exists may raise PermissionError
        if not os.path.exists(existing):  # noqa: PTH110
            raise ValueError(
                f"cannot write {output}: {existing} is a link to {existing.readlink()}, which does not exist. "
                f"Create it, or set a different `{name}`"
            )
        if existing != output and not existing.is_dir():
            raise ValueError(
                f"cannot write {output}: {existing} is not a folder. Set a different `{name}`"
            )
        if existing.is_dir() and not os.access(existing, os.W_OK):
            raise ValueError(
                f"cannot write {output}: no permission to write to {existing}. Set a different `{name}`"
            )
        if output.is_file() and named.count(os.path.realpath(output)) > 1:
            raise ValueError(f"`{name}` would replace {output}, which is an input. Set another one")


# Errors and output of libraries -------------------------------------------------------------------


def silence_libraries() -> None:
    """Hide the progress bars of weight loading, and transformers' tables about the loaded weights.

    Our commands check the weights, and log what was adapted in one line. In the lines of the log,
    parameters become flags.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.get_logger("transformers.modeling_utils").addFilter(
        # Logging accepts functions
        lambda record: "LOAD REPORT" not in record.getMessage()  # type: ignore[arg-type]
    )
    assert logging.lastResort is not None, "Python has it unless a program removes it"
    logging.lastResort.addFilter(spell_flags_of_record)


def spell_flags_of_record(record: logging.LogRecord) -> bool:
    """Write the parameters in a line of the log as flags."""
    record.msg, record.args = spell_flags(record.getMessage()), ()
    return True


@contextmanager
def exit_on_error(options_class: type[Options], status: int = 1) -> Iterator[None]:
    """Exit with a one-line message if the block raises ValueError or OSError, or a run is stopped.

    Status 2 means that a flag is invalid. If all processes raise the error, the first one prints it.
    """
    names_of_flags.update(get_flag_fields(options_class))
    try:
        yield
        return
    except RunStopped as stopped:
        status = stopped.exit_status
        message = spell_flags(str(stopped))
        is_on_all_processes = True
    except BrokenPipeError:  # The reader of the output has read enough
        raise
    except (ValueError, OSError) as error:
        message = spell_flags(describe_error(error))
        is_on_all_processes = status == 2 or is_raised_on_all_processes(error)
    finally:
        names_of_flags.clear()

    # Any other status means that a signal has ended the run, which is no error.
    if status in (1, 2):
        message = f"error: {replace_control_characters(message)}"
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(message, file=sys.stderr)
    elif not is_on_all_processes:
        print(f"process {rank}: {message}", file=sys.stderr)
    raise SystemExit(status)


def run_script(
    options_class: type[ScriptOptions],
    run: Callable[[ScriptOptions], None],
) -> None:
    """Run a program of scripts/ that is not a subcommand, with the same errors of one line.

    Args:
        options_class: The class of its options, whose fields are the flags.
        run: The program.
    """
    with exit_on_error(options_class, status=2):
        options = run_tyro(options_class)
        options.check()
    silence_libraries()
    with exit_on_error(options_class):
        run(options)

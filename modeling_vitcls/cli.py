"""The `vitcls` command: one program with a subcommand for each task.

    vitcls finetune --model vitcls-tiny --dataset path/to/images --output-dir runs/mine
    accelerate launch -m modeling_vitcls.cli finetune --model vitcls-tiny ...       several processes
    vitcls completion bash > ~/.local/share/bash-completion/completions/vitcls      shell completion

The scripts in scripts/ run the same subcommands. Flags are parsed before torch is imported, so that `vitcls --help`
and errors about flags are printed immediately. The subcommands are implemented in commands/. No file in the package
imports this file.
"""

import difflib
import importlib
import os
import shutil
import sys
import textwrap
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, NoReturn, Union

from .files import is_closed_pipe


SHELLS = ("bash", "zsh", "tcsh")


@dataclass(frozen=True)
class Command:
    """A subcommand of `vitcls`."""

    summary: str  # description in `vitcls --help`
    module: str  # name of the module in commands/
    has_recipe_flag: bool = False  # whether the subcommand accepts --config with a recipe of flags


COMMANDS = {
    "finetune": Command("Fine-tune a ViT on labeled images", "finetune", has_recipe_flag=True),
    "pretrain": Command(
        "Pre-train a ViT on images without labels (masked image modeling)", "pretrain", has_recipe_flag=True
    ),
    "evaluate": Command("Evaluate a model on labeled images", "evaluate", has_recipe_flag=True),
    "predict": Command("Predict the labels of images, or write their features", "predict"),
    "convert": Command("Convert a timm or transformers ViT, and write a parity report", "convert"),
    "inspect": Command("Write an HTML report on what the special tokens of a model do", "inspect_tokens"),
    "push": Command("Push a model to the Hub and verify the pushed commit", "push"),
    "export": Command("Export a model to PyTorch (.pt2), ONNX, OpenVINO or transformers.js", "export"),
    "benchmark": Command("Measure speed by backend and precision, next to timm and transformers", "benchmark"),
    "study": Command("Compare settings by fine-tuning with each combination of settings and seeds", "study"),
    "demo": Command("Serve a web page that shows the predictions and attention of a model", "demo"),
    "space": Command("Publish the demo as a Space on the Hub", "space"),
}
UTILITY_COMMANDS = {
    "env": "Print versions, devices and CPU kernels, for bug reports",
    "completion": f"Print a completion script for a shell: {', '.join(SHELLS)}",
}
EPILOG = "`vitcls COMMAND --help` lists the flags of a command. `vitcls --version` prints the version."


def main(arguments: list[str] | None = None) -> None:
    """Run a subcommand. Exit with status 2 if the command line is invalid.

    If the reader of the output closes the pipe (`vitcls env | head`), the program exits without a message.

    Args:
        arguments: The subcommand and its flags. Default: `sys.argv[1:]`.
    """
    try:
        run_command_line(arguments)
    except BrokenPipeError:
        if not is_closed_pipe(sys.stdout):
            raise
        raise SystemExit(1) from None
    finally:
        if is_closed_pipe(sys.stdout):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout at exit


def run_command_line(arguments: list[str] | None) -> None:
    """Run a subcommand, or print the help or the version."""
    name, *flags = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in COMMANDS:
        run_subcommand(name, flags)
    elif name in ("--help", "-h", "help"):
        print(format_help())
    elif name in ("--version", "-V"):
        from .version import __version__

        print(f"vitcls {__version__}")
    elif name == "env" and not flags:
        from .commands.env import format_environment

        print(format_environment())
    elif name == "completion" and len(flags) == 1 and flags[0] in SHELLS:
        print_completion(flags[0])
    else:
        exit_on_invalid_command(name)


def run_subcommand(name: str, flags: list[str]) -> None:
    """Parse the flags of a subcommand, register the Auto classes, and run the subcommand."""
    command, module = COMMANDS[name], load_module(name)
    from .commands.parsing import exit_on_error, parse_flags, parse_with_recipe

    _, _, examples = str(module.__doc__).partition("\n\n")
    description = f"{textwrap.dedent(str(module.OPTIONS_CLASS.__doc__))}\n\n{examples}".strip()
    parse = parse_with_recipe if command.has_recipe_flag else parse_flags
    options = parse(module.OPTIONS_CLASS, flags, prog=f"vitcls {name}", description=description)
    if hasattr(module, "check_options"):
        module.check_options(options)

    from .configuration_vitcls import ViTCLSConfig

    ViTCLSConfig.register_auto_classes()  # __init__.py does not register the classes in a CLI process
    with exit_on_error():
        module.run(options)


def load_module(name: str) -> ModuleType:
    """Import the module of a subcommand. Exit with status 1 if a library of the extra `cli` is not installed."""
    try:
        return importlib.import_module(f"modeling_vitcls.commands.{COMMANDS[name].module}")
    except ModuleNotFoundError as error:
        if error.name not in ("tyro", "yaml"):
            raise
        message = f"error: the vitcls command requires {error.name}: run pip install 'modeling_vitcls[cli]'"
        print(message, file=sys.stderr)
        raise SystemExit(1) from None


def format_help() -> str:
    """Format the output of `vitcls --help`."""
    width = max(20, shutil.get_terminal_size().columns)
    summaries = {name: command.summary for name, command in COMMANDS.items()} | UTILITY_COMMANDS
    indent = max(map(len, summaries)) + 4
    lines = [
        textwrap.fill(f"  {name:<{indent - 2}}{summary}", width, subsequent_indent=" " * indent)
        for name, summary in summaries.items()
    ]
    return "\n".join(["usage: vitcls COMMAND [FLAGS]", "", *lines, "", textwrap.fill(EPILOG, width)])


def exit_on_invalid_command(name: str) -> NoReturn:
    """Exit with status 2 and a one-line message about an invalid subcommand."""
    known_commands = [*COMMANDS, *UTILITY_COMMANDS]
    if name == "completion":
        message = f"error: vitcls completion requires the name of a shell: {', '.join(SHELLS)}"
    elif name == "env":
        message = "error: vitcls env accepts no flags"
    else:
        hint = f"choose from {', '.join(known_commands)}"
        if similar_commands := difflib.get_close_matches(name, known_commands, n=1, cutoff=0.5):
            hint = f"did you mean {similar_commands[0]}?"
        message = f"error: vitcls has no command {name}: {hint}"
    print(message, file=sys.stderr)
    raise SystemExit(2)


def print_completion(shell: str) -> None:
    """Print a shell completion script for all subcommands and flags."""
    modules = {name: load_module(name) for name in COMMANDS}
    import tyro

    subcommands: Any = tuple(
        Annotated[module.OPTIONS_CLASS, tyro.conf.subcommand(name, description=COMMANDS[name].summary)]
        for name, module in modules.items()
    )
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    tyro.cli(Union[subcommands], prog="vitcls", args=["--tyro-print-completion", shell], config=config)  # noqa: UP007


if __name__ == "__main__":
    main()

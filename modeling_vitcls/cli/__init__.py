"""The `vitcls` command: one program with a subcommand for each task.

    vitcls finetune --model vitcls-tiny --dataset path/to/images --output-dir runs/mine
    accelerate launch -m modeling_vitcls.cli finetune --model vitcls-tiny ...       several processes
    vitcls --tyro-print-completion bash                                             shell completion

    parsing.py   flags -> options; one-line errors and exit statuses
    recipes.py   recipes, which are the default values of flags
    commands.py  the commands as functions of options; export.py and demo.py have two of them
    api.py       the commands as Python functions, for notebooks

The options of a command are a flat dataclass whose fields are the flags, and whose `check` raises
ValueError if flags contradict each other. ValueErrors and OSErrors raised by commands are printed as
one-line messages. `vitcls --help` and errors about flags are printed before torch is imported. The
scripts in scripts/ run the same commands.
"""

import atexit
import gc
import os
import re
import signal
import sys
from pathlib import Path

from ..runtime.errors import describe_exhaustion, describe_installation


# Variables with the number of a process, and of all processes
LEFT_BY_LAUNCHERS = re.compile(
    r"(LOCAL_)?(RANK|WORLD_SIZE)|MPI_LOCAL(RANKID|NRANKS)|PMI_(RANK|SIZE)"
    r"|(OMPI|MV2)_COMM_WORLD_(LOCAL_)?(RANK|SIZE)"
)


def main(arguments: list[str] | None = None) -> None:
    """Run a subcommand, or print the help or the version.

    Exit with status 2 if the command line is invalid.

    Args:
        arguments: The subcommand and its flags. Default: `sys.argv[1:]`.
    """
    owns_process = arguments is None
    arguments = sys.argv[1:] if arguments is None else arguments
    prepare_streams()
    # A cluster, a notebook or a scheduler may leave these variables without a launcher. Then this is
    # the only process, and must not wait for others or stay silent.
    if "LOCAL_RANK" not in os.environ:
        os.environ.pop("RANK", None)
    if "MASTER_ADDR" not in os.environ:
        for name in [name for name in os.environ if LEFT_BY_LAUNCHERS.fullmatch(name)]:
            del os.environ[name]
    try:
        Path.cwd()
    except FileNotFoundError:
        print(
            "error: the working folder was removed. Change to another one, such as `cd ~`",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    try:
        try:
            run_command(arguments, owns_process)
        finally:
            # Here and not at exit, where Python could only print a traceback of a closed pipe
            sys.stdout.flush()
    except BrokenPipeError:  # The reader of the output has read enough: `vitcls demo --help | head`
        discard_output()
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            # Outputs appear when they are complete. A run with a checkpoint then names --resume.
            print(
                "interrupted by Ctrl-C. To start again or go on, repeat the command",
                file=sys.stderr,
            )
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:  # Raised again unless memory, files or space have run out
        message = describe_exhaustion(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        discard_output()
        raise SystemExit(1) from None


def prepare_streams() -> None:
    """Make both output streams accept every text.

    What is written to a stream that the caller has closed (`>&-`) is discarded. Characters that the
    encoding of a stream lacks are escaped, such as an umlaut in ASCII.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Discard what is still written to the standard output, which is flushed at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_command(arguments: list[str], owns_process: bool) -> None:
    """Parse the flags, import the libraries, and run the subcommand.

    If the command owns the process, nothing of the process is used afterwards. Exit with status 1 if the
    extra `cli` is not installed.
    """
    if arguments[:1] in (["--version"], ["-V"]):
        from ..version import __version__

        print(f"vitcls {__version__}")
        return

    try:
        from .commands import COMMANDS
        from .parsing import check_outputs, exit_on_error, parse_command_line, silence_libraries
    except ModuleNotFoundError as error:
        # Any other missing module is a fault of the installation, and its traceback is needed.
        if error.name not in ("tyro", "yaml"):
            raise
        message = f"the vitcls command requires {error.name}. {describe_installation('cli')}"
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from None

    # Flags and paths first: an error about them should not wait seconds for torch
    name, options = parse_command_line(arguments or ["--help"])
    with exit_on_error(type(options)):
        check_outputs(options)

    # Threads that wait for each other spin, which multiplies the CPU time, and also the time on the
    # clock, if other programs run. OpenMP's then sleep sooner, as libgomp decides itself if a process
    # has more threads than cores; OpenBLAS's do not pay off for matrices of features.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # 400,000 objects of the libraries stay until the end. The garbage collector would visit all of
    # them again and again, and at exit: a quarter of the CPU time of a short command.
    gc.disable()
    # Imports torch; __init__.py does not register the classes in the process of a command
    from ..model.configuration_vitcls import ViTCLSConfig

    if not ViTCLSConfig.is_registered:
        ViTCLSConfig.register_auto_classes()
    if owns_process:
        gc.freeze()
        # Commands import further libraries: visits after 700 new objects were 8% of a short run
        gc.set_threshold(50_000)
        # Triton would report frozen objects to stderr, after everything else has been done
        atexit.register(os.dup2, os.open(os.devnull, os.O_WRONLY), 2)
    gc.enable()
    with exit_on_error(type(options)):
        silence_libraries()
        COMMANDS[name](options)

"""Run the vitcls command, or parse its flags, in the test process."""

from contextlib import redirect_stderr
from io import StringIO
from typing import Any

from modeling_vitcls import cli
from modeling_vitcls.cli.parsing import parse_command_line


def run_here(*arguments: object) -> int:
    """Run `vitcls` in this process and return its exit status."""
    try:
        cli.main(list(map(str, arguments)))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def fail(*arguments: object, status: int = 1) -> str:
    """Run `vitcls`, which must end with this status, and return its error, which must be one line."""
    with redirect_stderr(StringIO()) as printed:
        assert run_here(*arguments) == status
    error = printed.getvalue()
    assert error.startswith("error: "), error
    assert error.count("\n") == 1, error
    return error


def parse_flags(command: str, flags: list[str]) -> Any:
    """Return the options of a command, from its flags and the recipe in --config."""
    _, options = parse_command_line([command, *flags])
    return options

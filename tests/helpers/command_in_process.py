"""Run the vitcls command, or parse its flags, in the test process."""

from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from helpers.accelerate_state import reset_accelerate
from modeling_vitcls import cli
from modeling_vitcls.cli.parsing import parse_command_line
from modeling_vitcls.runtime.files import read_json


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


def check_error(capsys: Any, *words: str) -> None:
    """Check that the last line of the errors has these words; libraries print warnings before it."""
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: "), error
    assert all(word in error for word in words), error


def finetune(model: object, photos: object, output: str | Path, *flags: str) -> dict[str, Any]:
    """Run `vitcls finetune` here; return results.json and, as "printed", what it printed.

    The output folder is "folder".
    """
    reset_accelerate()
    paths = ["--model", model, "--dataset", photos, "--output-dir", output]
    with redirect_stdout(StringIO()) as printed:
        assert run_here("finetune", *paths, "--num-workers", 0, "--no-report", *flags) == 0
    results = read_json(Path(output) / "results.json")
    return results | {"printed": printed.getvalue(), "folder": Path(output)}


def parse_flags(command: str, flags: list[str]) -> Any:
    """Return the options of a command, from its flags and the recipe in --config."""
    _, options = parse_command_line([command, *flags])
    return options

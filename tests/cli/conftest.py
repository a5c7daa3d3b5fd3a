"""A fixture for commands that end with an error of one line."""

from collections.abc import Callable

import pytest
from helpers.command_in_process import run_here


@pytest.fixture
def run_with_error(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs `vitcls`, and returns the line of its error."""

    def run_and_fail(*arguments: object, status: int = 1) -> str:
        capsys.readouterr()
        assert run_here(*map(str, arguments)) == status

        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return run_and_fail

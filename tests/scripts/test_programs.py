"""The programs of scripts/ that are not subcommands of `vitcls`: errors of one line."""

import pytest
from helpers.command_in_process import check_error
from helpers.scripts_in_process import run_in_process
from pytest import CaptureFixture


WRONG_FLAGS = [
    ("benchmark.py", "--rounds 0", "--rounds", 2),
    ("study.py", "--config scripts/studies/digits.yaml --output-dir out --jobs 0", "--jobs", 2),
    ("study.py", "--config digts.yaml --output-dir out", "digts.yaml", 1),
    ("push_space.py", "--model m --output o --private", "--private", 2),
]


@pytest.mark.parametrize(("script", "flags", "named", "status"), WRONG_FLAGS)
def test_a_wrong_flag_is_named_in_an_error_of_one_line(
    script: str, flags: str, named: str, status: int, capsys: CaptureFixture
) -> None:
    assert run_in_process(script, *flags.split()) == status
    check_error(capsys, named)

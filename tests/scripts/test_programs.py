"""The programs of scripts/ that are not subcommands of `vitcls`: errors of one line."""

import pytest
from helpers.scripts_in_process import run_in_process


WRONG_FLAGS = [
    ("benchmark.py", "--rounds 0", "--rounds"),
    ("study.py", "--config study_digits --output-dir out --jobs 0", "--jobs"),
    ("study.py", "--config study_digts --output-dir out", "study_digits"),
    ("push_space.py", "--model m --output o --private", "--private"),
]


@pytest.mark.parametrize(("script", "flags", "named"), WRONG_FLAGS)
def test_a_wrong_flag_is_named_in_an_error_of_one_line(
    script: str, flags: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_in_process(script, *flags.split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # libraries print warnings before
    assert error.startswith("error: ")
    assert named in error

"""Errors of other libraries in one line, and errors that all processes raise."""

import pytest

from modeling_vitcls.runtime.distributed import run_on_main
from modeling_vitcls.runtime.errors import format_error, is_raised_on_all_processes


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("a\n  b\tc ", "a b c"),
        ("", "ValueError"),
        ("\udcff.png", "\ufffd.png"),
        ("x" * 400, "x" * 400),
        ("x" * 401, "x" * 397 + "..."),
    ],
)
def test_messages_are_one_short_line(message: str, expected: str) -> None:
    assert format_error(ValueError(message)) == expected


def test_errors_of_the_main_process_are_marked() -> None:
    assert run_on_main(lambda: {"loss": 1.0}) == {"loss": 1.0}
    for error, is_marked in (
        (ValueError("wrong"), True),
        (OSError("full"), True),
        (TypeError("defect"), False),
    ):

        def fail(error: Exception = error) -> None:
            raise error

        assert not is_raised_on_all_processes(error)
        with pytest.raises(type(error), match=str(error)) as raised:
            run_on_main(fail)
        assert is_raised_on_all_processes(raised.value) is is_marked

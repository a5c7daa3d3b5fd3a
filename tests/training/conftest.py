"""All tests of training have a small dataset `digits`."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def use_few_digits(few_digits: None) -> None:
    """Let runs on digits be short."""

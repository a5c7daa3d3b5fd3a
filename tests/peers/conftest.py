"""Registers the pytest markers of transformers' own tests, which `--strict-markers` would refuse as unknown."""

import pytest

from .transformers_suite import marker_names


def pytest_configure(config: pytest.Config) -> None:
    for name in sorted(marker_names()):
        config.addinivalue_line("markers", f"{name}: of transformers' own tests")

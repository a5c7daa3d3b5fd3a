"""Register the pytest markers of transformers' tests, and seed their random inputs."""

import sys

import pytest

from peers.transformers_suite import PACKAGE, list_marker_names


def pytest_configure(config: pytest.Config) -> None:
    for name in sorted(list_marker_names()):
        config.addinivalue_line("markers", f"{name}: marker of transformers' tests")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if (common := sys.modules.get(f"{PACKAGE}.test_modeling_common")) is not None:
        common.global_rng.seed(item.nodeid)

"""Seed the random inputs of transformers' tests."""

import sys

import pytest

from peers.transformers_suite import PACKAGE


def pytest_runtest_setup(item: pytest.Item) -> None:
    if (common := sys.modules.get(f"{PACKAGE}.test_modeling_common")) is not None:
        common.global_rng.seed(item.nodeid)

"""Register the pytest markers of transformers' tests, and mark slow tests.

In `make test`, slow tests run completely in one class; other classes run only the variants that depend on the token
layout. `make test-all` runs all tests in all classes.
"""

import sys

import pytest

from peers.transformers_suite import PACKAGE, list_marker_names


COMPLETE_CLASS = "DistilledWithRegistersTest"
ONE_CLASS_TESTS = {"test_bc_torch_dtype"}
# Variants of the 25 attention tests that all classes run: every mask, dtype and kernel, but not every combination.
EAGER_MATCHES_SDPA = "test_eager_matches_sdpa_inference_"
ALL_CLASS_VARIANTS = {
    "fp32_pad_left_sdpa_kernels",
    "fp32_pad_right_sdpa_kernels",
    "fp32_pad_left_no_attn_mask_sdpa_kernels",
    "fp32_pad_left_output_attentions",
    "bf16_pad_left",
    "fp16_pad_right",
}


def pytest_configure(config: pytest.Config) -> None:
    for name in sorted(list_marker_names()):
        config.addinivalue_line("markers", f"{name}: marker of transformers' tests")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed the random inputs of transformers' tests."""
    if (common := sys.modules.get(f"{PACKAGE}.test_modeling_common")) is not None:
        common.global_rng.seed(item.nodeid)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if COMPLETE_CLASS not in item.nodeid and is_slow(item.name):
            item.add_marker(pytest.mark.slow)


def is_slow(name: str) -> bool:
    """Return whether `make test` runs a test of this name in one class only."""
    if name.startswith(EAGER_MATCHES_SDPA):
        _, case = name.removeprefix(EAGER_MATCHES_SDPA).split("_", 1)  # 08_fp32_pad_left_sdpa_kernels
        return case not in ALL_CLASS_VARIANTS
    return name in ONE_CLASS_TESTS

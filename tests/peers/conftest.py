"""Of transformers' own tests: their pytest markers, which `--strict-markers` would refuse, and which of them wait.

In `make test`, those that take long run whole in one class, and in the others as far as tokens have a part in them; in
`make test-all` they run in all.
"""

import sys

import pytest

from peers.transformers_suite import PACKAGE, marker_names


CHOSEN = "DistilledWithRegistersTest"
ONCE = {"test_bc_torch_dtype"}
# Of the 25 that compare attention: each mask, type and kernel, but not each with each.
EAGER_MATCHES_SDPA = "test_eager_matches_sdpa_inference_"
EVERYWHERE = {
    "fp32_pad_left_sdpa_kernels",
    "fp32_pad_right_sdpa_kernels",
    "fp32_pad_left_no_attn_mask_sdpa_kernels",
    "fp32_pad_left_output_attentions",
    "bf16_pad_left",
    "fp16_pad_right",
}


def pytest_configure(config: pytest.Config) -> None:
    for name in sorted(marker_names()):
        config.addinivalue_line("markers", f"{name}: of transformers' own tests")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Their random inputs are the same each time: they come from a generator of their own."""
    if (common := sys.modules.get(f"{PACKAGE}.test_modeling_common")) is not None:
        common.global_rng.seed(item.nodeid)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if CHOSEN not in item.nodeid and waits(item.name):
            item.add_marker(pytest.mark.slow)


def waits(name: str) -> bool:
    """Whether a test of this name runs in one class of `make test` only."""
    if name.startswith(EAGER_MATCHES_SDPA):
        _, case = name.removeprefix(EAGER_MATCHES_SDPA).split("_", 1)  # 08_fp32_pad_left_sdpa_kernels
        return case not in EVERYWHERE
    return name in ONCE

"""Checkpoints load, run and train with plain PyTorch if a private name of PyTorch is missing."""

import pytest
import torch

from modeling_vitcls import cpu_kernels_vitcls

from .altered_pytorch import Results, assert_same_results, load_with_altered_pytorch
from .source import KERNEL_FILE, find_private_names, is_private


# PyTorch itself requires these names: without them, `nn.Linear` fails.
NEEDED_BY_PYTORCH = {"torch._C"}


def list_private_names() -> list[str]:
    """Return the private names that the kernel file uses, and the private modules that contain them."""
    names = set()
    for name in find_private_names(KERNEL_FILE):
        parts = name.split(".")
        names |= {".".join(parts[:length]) for length in range(2, len(parts) + 1)}
    return sorted(filter(is_private, names))


NAMES = list_private_names()

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Return private name -> results without it."""
    return load_with_altered_pytorch(tmp_path_factory.mktemp("private_names"), NAMES)


def test_kernels_are_installed_if_nothing_is_missing(results: Results) -> None:
    """Without this check, the other tests would compare plain PyTorch with itself."""
    assert results["none"]["classes"] & {"CPULinear"}
    assert not {name for name in results["kernels_off"]["classes"] if name.startswith("CPU")}
    assert_same_results(results["none"], results["kernels_off"])
    if cpu_kernels_vitcls.MIN_MULTIPLICATIONS:
        assert "mkldnn::_linear_pointwise" in results["none"][f"{torch.float32}/operators"]


@pytest.mark.parametrize("name", sorted(set(NAMES) - NEEDED_BY_PYTORCH))
def test_a_checkpoint_loads_runs_and_trains_without(name: str, results: Results) -> None:
    assert_same_results(results[name], results["kernels_off"])


@pytest.mark.parametrize("name", sorted(NEEDED_BY_PYTORCH))
def test_pytorch_itself_requires(name: str, results: Results) -> None:
    assert name in NAMES and results[name]["torch_error"]

"""Fixtures of several core tests."""

from pathlib import Path
from typing import Any

import pytest
from helpers.warm_processes import OFFLINE, run_together
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_vitcls import cpu_kernels_vitcls


@pytest.fixture
def low_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enable the kernels for tiny models."""
    monkeypatch.setattr(
        cpu_kernels_vitcls, "MIN_MULTIPLICATIONS", dict.fromkeys(cpu_kernels_vitcls.MIN_MULTIPLICATIONS, 0)
    )


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace flash_attention_2, which requires a GPU, with SDPA for the same key masks [B, N]."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        assert mask is None or mask.shape == (len(key), key.shape[2])
        mask = None if mask is None else mask.bool()[:, None, None, :]
        attended = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=options["scaling"])
        return attended.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", attend)


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the results of two_processes.py."""
    folder = tmp_path_factory.mktemp("two_processes")
    worker = Path(__file__).with_name("two_processes.py")
    run_together(worker, folder, log=folder / "log", environment=OFFLINE)
    return folder

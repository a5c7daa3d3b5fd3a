"""Fixtures of several core tests."""

from typing import Any

import pytest
from pytest import MonkeyPatch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@pytest.fixture
def flash_attention(monkeypatch: MonkeyPatch) -> None:
    """Replace flash_attention_2, which requires a GPU, with SDPA for the same key masks [B, N]."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        assert mask is None or mask.shape == (len(key), key.shape[2])
        mask = None if mask is None else mask.bool()[:, None, None, :]
        attended = nn.functional.scaled_dot_product_attention(
            query, key, value, mask, scale=options["scaling"]
        )
        return attended.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", attend)

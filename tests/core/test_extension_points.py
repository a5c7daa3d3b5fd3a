"""Extension points: attention inputs, and kernels from the Hub."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import build_images, build_tiny_config, get_largest_difference, raises_one_line, randomize
from transformers.utils.import_utils import is_kernels_available

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel


# Attention -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qk_norm": True, "position_embedding_type": "rope_2d"},
        {"num_cls_tokens": 2, "cls_scopes": ["image", [2, 2, 0, 1]]},
    ],
    ids=["default", "rotary", "scopes"],
)
def test_recorded_attention(fields: dict[str, Any], implementation: str) -> None:
    """The weights computed from queries, keys and mask equal those of eager attention."""
    model = randomize(ViTCLSModel(build_tiny_config(num_register_tokens=2, **fields)))
    model.set_attn_implementation("eager")
    expected = model(build_images(), output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    recorded: list[tuple[Any, ...]] = []
    for layer in model.layers:
        layer.attention.recorder = lambda *values: recorded.append(values)
    model(build_images())
    assert len(recorded) == 2
    for (query, key, value, mask, scaling, attended), weights in zip(recorded, expected, strict=True):
        scores = query @ key.transpose(2, 3) * scaling
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        assert get_largest_difference(scores.softmax(-1), weights) <= 1e-5
        mixed = (weights @ value).transpose(1, 2)
        assert get_largest_difference(attended, mixed) <= 1e-5 * mixed.abs().max().item()


# Kernels from the Hub ------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return the folder of a saved classifier."""
    randomize(ViTCLSForImageClassification(build_tiny_config())).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@torch.no_grad()
def test_use_kernels(checkpoint: Path) -> None:
    """Without a mapping for `ViTCLSMLP`, nothing is replaced. Without the package `kernels`, the error is one line."""
    logits = ViTCLSForImageClassification.from_pretrained(checkpoint)(build_images()).logits
    if not is_kernels_available():
        with raises_one_line("Kernels are not available", "pip install kernels"):
            ViTCLSForImageClassification.from_pretrained(checkpoint, use_kernels=True)
        return
    model = ViTCLSForImageClassification.from_pretrained(checkpoint, use_kernels=True)
    assert model.use_kernels
    assert torch.equal(model(build_images()).logits, logits)

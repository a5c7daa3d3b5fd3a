"""Differential attention: its formula and its initial weights."""

import pytest
import torch
from helpers.tiny_models import (
    IMAGES,
    build_random,
    build_tiny_config,
    get_largest_difference,
)

from modeling_vitcls import ViTCLSModel


@torch.no_grad()
def test_differential_attention_is_equal_in_eager_and_fused_attention() -> None:
    """peers/test_from_timm.py compares it with that of timm."""
    model = build_random(ViTCLSModel, attention_type="differential", qk_norm=True)
    expected = model(IMAGES).last_hidden_state
    model.set_attn_implementation("eager")
    outputs = model(IMAGES, output_attentions=True)
    assert get_largest_difference(outputs.last_hidden_state, expected) <= 1e-5
    assert outputs.attentions[0].shape == (2, 2 * model.config.num_attention_heads, 17, 17)


def test_a_new_differential_model_starts_as_in_the_paper() -> None:
    attention = ViTCLSModel(build_tiny_config(attention_type="differential")).layers[0].attention
    assert attention.lambda_full.item() == pytest.approx(0.8)
    assert attention.head_norm.weight.mean().item() == pytest.approx(0.2)

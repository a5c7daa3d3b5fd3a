"""Differential attention: its formula and its initial weights."""

import pytest
import torch
from helpers.tiny_models import build_tiny_config, get_largest_difference, randomize

from modeling_vitcls import ViTCLSModel
from modeling_vitcls.model.variants_vitcls import ViTCLSDifferentialAttention


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_differential_attention_is_the_difference_of_two_maps(implementation: str) -> None:
    """Check equation 1 of arXiv 2410.05258, written out for each head."""
    config = build_tiny_config(
        attention_type="differential",
        attn_implementation=implementation,
        qk_norm=True,
        layer_norm_eps=0.1,
    )
    attention = randomize(ViTCLSDifferentialAttention(config))
    tokens = torch.randn(2, 5, config.hidden_size)
    heads = []
    width = config.head_dim
    for head in range(config.num_attention_heads):
        part = slice(head * width, (head + 1) * width)
        queries = map(
            attention.q_norm, attention.q_proj(tokens)[..., part].split(width // 2, dim=-1)
        )
        keys = map(attention.k_norm, attention.k_proj(tokens)[..., part].split(width // 2, dim=-1))
        maps = [
            (q @ k.mT / (width // 2) ** 0.5).softmax(-1) for q, k in zip(queries, keys, strict=True)
        ]
        mixed = (maps[0] - attention.lambda_full * maps[1]) @ attention.v_proj(tokens)[..., part]
        heads.append(
            mixed
            / (mixed.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            * attention.head_norm.weight
        )
    expected = attention.o_proj(torch.cat(heads, dim=-1))

    got, maps = attention(tokens)
    assert get_largest_difference(got, expected) <= 1e-5
    assert implementation == "sdpa" or maps.shape == (2, 2 * config.num_attention_heads, 5, 5)
    assert attention.q_norm.weight.data_ptr() != attention.k_norm.weight.data_ptr()


def test_a_new_differential_model_starts_as_in_the_paper() -> None:
    attention = ViTCLSModel(build_tiny_config(attention_type="differential")).layers[0].attention
    assert attention.lambda_full.item() == pytest.approx(0.8)
    assert attention.head_norm.weight.mean().item() == pytest.approx(0.2)

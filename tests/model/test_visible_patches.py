"""An encoder of some patches, as in MAE, has the states of one in which others are masked."""

from functools import partial
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    TOKENS,
    build_images,
    build_tiny_config,
    get_largest_difference,
    randomize,
)

from modeling_vitcls import ViTCLSModel
from modeling_vitcls.pretraining.mae import keep_patches


PREFIX = 6  # register tokens among them
MASK = torch.ones(2, PREFIX + 16, dtype=torch.long)
MASK[1, 8:14] = 0

# Sources of masks and positions; rotary positions may differ between layers and heads.
SOURCES: dict[str, dict[str, Any]] = {
    "learned": {},
    "rotary": {"position_embedding_type": "rope_2d"},
    "mixed rotary": {"position_embedding_type": "rope_mixed", "attention_head_size": 12},
    "scopes": {"cls_scopes": [[2, 2, 0, 1], [2, 2, 1, 0]]},
    "gates": {"gated_tokens": {"registers": 2}, "position_embedding_type": "sincos_2d"},
    "distances": {"relative_position_bias": "layer"},
    "no special tokens": {
        "num_cls_tokens": 0,
        "num_distillation_tokens": 0,
        "num_register_tokens": 0,
    }
    | {"pooling": "mean", "position_embedding_type": "rope_2d"},
}
CASES: list[Any] = [(source, "sdpa", None) for source in SOURCES]
CASES += [(source, "sdpa", MASK) for source in ("rotary", "scopes", "gates", "distances")]
CASES += [("scopes", "eager", None), ("gates", "eager", MASK)]
CASES += [("rotary", "flash_attention_2", MASK)]


@torch.no_grad()
@pytest.mark.usefixtures("flash_attention")
@pytest.mark.parametrize(("source", "implementation", "mask"), CASES)
def test_visible_patches_have_the_states_of_a_pass_that_masks_the_others(
    source: str, implementation: str, mask: torch.Tensor | None
) -> None:
    model = randomize(ViTCLSModel(build_tiny_config(**(TOKENS | SOURCES[source])))).eval()
    prefix = model.config.token_layout.num_prefix_tokens
    mask = None if mask is None else mask[:, PREFIX - prefix :]
    # `set_attn_implementation` requires the package of flash attention
    model.config._attn_implementation = implementation
    visible = torch.rand(2, 16).argsort(dim=1)[:, :10].sort(dim=1).values

    keep_visible = partial(keep_patches, kept_indices=visible, num_prefix_tokens=prefix)
    outputs = model(
        build_images(), attention_mask=mask, edit_inputs=keep_visible, output_hidden_states=True
    )

    visible_mask = torch.zeros(2, prefix + 16, dtype=torch.long)
    visible_mask[:, :prefix] = 1
    visible_mask.scatter_(1, visible + prefix, 1)
    visible_mask *= 1 if mask is None else mask
    expected = model(build_images(), attention_mask=visible_mask, output_hidden_states=True)

    places = torch.cat([torch.arange(prefix).expand(2, -1), visible + prefix], dim=1).unsqueeze(-1)
    for states, all_states in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        assert get_largest_difference(states, all_states.take_along_dim(places, dim=1)) <= 2e-5
    assert outputs.tokens["patches"].shape == (2, 10, 16)

"""Compare attention maps in the families that compute attention differently.

The maps of the source, of eager attention and of the recorder for fused attention must be equal,
and so must the rows of special tokens (`token_attention`).
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.tiny_models import build_images, get_largest_difference

from modeling_vitcls import convert_from_timm, convert_from_transformers
from modeling_vitcls.analysis.photo import trace_shown_tokens
from peers import test_from_timm as timm_cases
from peers.transformers_cases import CASES, build_inputs, get_encoder, images


LIMIT = 1e-5

# One case for each way to compute attention: tokens, masks, positions, biases, norms and numbers of
# heads.
REPRESENTATIVES = [
    "vit",
    "deit distilled",
    "mae",
    "ijepa",
    "registers",
    "dinov3",
    "sapiens2",
    "tipsv2",
    "internvl",
    "clip",
    "siglip",
    "siglip 2",
    "aimv2 native",
    "beit",
    "beit shared and per layer",
    "data2vec",
    "radio",
]


def check_maps(ours: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Check three ways to compute attention maps; return the maps [B, maps, N, N] per layer."""
    rows = ours.token_attention(pixels)  # [B, layer, map, special token, N]
    _, traced = trace_shown_tokens(ours, pixels)
    ours.set_attn_implementation("eager")
    maps = ours(pixels, output_attentions=True).attentions
    num_special = ours.config.token_layout.num_prefix_tokens
    for index, by_eager in enumerate(maps):
        assert by_eager.std() > 0.001, "the maps are too uniform for a comparison"
        expected = by_eager[:, :, :num_special]
        assert get_largest_difference(rows[:, index], expected) <= LIMIT
        if not ours.config.num_cls_tokens:
            patches = by_eager[:, :, num_special:].mean(dim=2, keepdim=True)
            expected = torch.cat([patches, expected], dim=2)
        assert get_largest_difference(traced[:, index], expected) <= LIMIT
    return maps


@pytest.mark.parametrize("name", REPRESENTATIVES)
@torch.no_grad()
def test_attention_maps_equal_those_of_transformers(name: str) -> None:
    case = replace(CASES[name], values=CASES[name].values | {"attn_implementation": "eager"})
    source = case.build()
    pixels = images(case.sizes[-1])
    maps = check_maps(convert_from_transformers(source), pixels)
    outputs = get_encoder(source)(**build_inputs(case, pixels), output_attentions=True)
    for ours, theirs in zip(maps, outputs.attentions, strict=True):
        assert get_largest_difference(ours, theirs) <= LIMIT


@pytest.mark.parametrize("name", timm_cases.REPRESENTATIVES)
@torch.no_grad()
def test_maps_of_timm_models_are_equal_in_eager_and_fused_attention(name: str) -> None:
    """The size differs from the native size."""
    model = timm_cases.peer(name, **timm_cases.TINY)
    size = timm_cases.pixels(model, timm_cases.RECTANGLE)
    model.set_input_size(img_size=size)
    check_maps(convert_from_timm(model), build_images(2, *size, model.in_chans))

"""`count_flops` compared with published numbers and with torch's counter."""

from typing import Any

import pytest
import torch
from helpers.tiny_models import Kind, build_images, each_kind
from torch.utils.flop_counter import FlopCounterMode

from modeling_vitcls import ViTCLSConfig, ViTCLSModel
from modeling_vitcls.inference.speed import count_flops


@pytest.mark.parametrize(
    "variant",
    [{}, {"attention_type": "differential", "fading_tokens": {"cls": 1}}],
    ids=str,
)
@each_kind
@torch.no_grad()
def test_flops_equal_those_of_torch(kind: Kind, variant: dict[str, Any]) -> None:
    model = kind.build(**variant, image_size=[32, 40], patch_size=[8, 4])
    assert model.config._attn_implementation == "sdpa"
    flops = count_flops(model)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(build_images(1, 32, 40))
    assert flops == counter.get_total_flops() > 0


def test_flops_of_vit_base_are_twice_its_published_multiply_adds() -> None:
    """ViT-B/16 at 224 pixels has 17.6 billion multiply-adds."""
    with torch.device("meta"):
        model = ViTCLSModel(ViTCLSConfig())
    assert round(count_flops(model) / 2e9, 1) == 17.6

"""Interventions in a forward pass, compared with models without the tokens and with other photos."""

from typing import Any

import pytest
import torch
from helpers.tiny_models import build_images, build_tiny_config, randomize

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.inference.interventions import intervene


PIXELS = build_images(6)


def build_classifier(**fields: Any) -> ViTCLSForImageClassification:
    config = build_tiny_config(num_labels=5, num_hidden_layers=3, **fields)
    return randomize(ViTCLSForImageClassification(config)).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_cls_tokens": 2, "cls_scopes": ["image", [2, 2, 0, 1]], "pooling": "mean"},
        {"attention_type": "differential", "layer_type": "post"},
        {"relative_position_bias": "layer", "_attn_implementation": "eager"},
        {"gated_tokens": {"registers": 1}},
    ],
    ids=str,
)
def test_a_hidden_token_is_as_if_it_were_not_there(fields: dict[str, Any]) -> None:
    model = build_classifier(**fields, num_register_tokens=2)
    expected = model.adapt(num_register_tokens=1)(PIXELS).logits
    with intervene(model, [model.config.token_layout.registers.stop - 1]):
        assert torch.allclose(model(PIXELS).logits, expected, atol=1e-5)
    assert not torch.allclose(model(PIXELS).logits, expected, atol=1e-5)


def test_a_token_is_hidden_in_the_named_layers_alone() -> None:
    model = build_classifier(num_register_tokens=1)
    with intervene(model, [1], layers=(2, 2)):
        received = model.token_attention(PIXELS)[..., 1].amax(dim=(0, 2, 3))
    assert (received == 0).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("pooling", "layers", "is_other"),
    [("cls", None, True), ("cls", (3, 3), True), ("cls", (1, 2), False), ("mean", None, False)],
)
def test_with_the_cls_token_of_another_photo_a_head_that_reads_it_answers_for_that_photo(
    pooling: str, layers: Any, is_other: bool
) -> None:
    model = build_classifier(pooling=pooling)
    logits = model(PIXELS).logits
    states = model(PIXELS, output_hidden_states=True).hidden_states
    with intervene(model, [0], [each.roll(1, dims=0) for each in states], layers):
        replaced = model(PIXELS).logits
    assert torch.allclose(replaced, logits.roll(1, dims=0), atol=1e-6) is is_other
    assert not torch.allclose(replaced, logits, atol=1e-6)

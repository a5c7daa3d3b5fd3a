"""Interventions in a forward pass, compared with models without the tokens and with other photos."""

from typing import Any

import pytest
import torch
from helpers.tiny_models import BLOCKS, build_images, build_tiny_config, randomize
from torch import Tensor

from modeling_vitcls import ViTCLSForImageClassification, pack
from modeling_vitcls.inference.interventions import continue_from, intervene
from modeling_vitcls.model.attention_masks_vitcls import compute_attention_rows, record_attention


PIXELS = build_images(6)


def build_classifier(**fields: Any) -> ViTCLSForImageClassification:
    config = build_tiny_config(num_labels=5, num_hidden_layers=3, **fields)
    return randomize(ViTCLSForImageClassification(config)).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "fields",
    [
        BLOCKS["scopes"] | {"pooling": "mean"},
        {"attention_type": "differential", "layer_type": "post"},
        {"relative_position_bias": "layer", "_attn_implementation": "eager"},
        {"fading_tokens": {"registers": 1}},
    ],
    ids=str,
)
def test_a_hidden_token_is_as_if_it_were_not_there(fields: dict[str, Any]) -> None:
    model = build_classifier(**fields, num_register_tokens=2)
    expected = model.adapt(num_register_tokens=1)(PIXELS).logits
    found = intervene(model, PIXELS, [model.config.token_layout.registers.stop - 1]).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(model(PIXELS).logits, expected, atol=1e-5)


def test_a_token_is_hidden_in_the_named_layers_alone() -> None:
    model = build_classifier(num_register_tokens=1)
    received: list[float] = []

    def record(layer: int, query: Tensor, key: Tensor, mask: Any, scaling: float) -> None:
        attention = compute_attention_rows(query[:, :, :2], key, mask, scaling)
        received.append(attention[..., 1].amax().item())

    with record_attention(model, range(3), record):
        intervene(model, PIXELS, [1], layers=(2, 2))
    assert [each == 0 for each in received] == [False, True, False]


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
    sources = [each.roll(1, dims=0) for each in states]
    replaced = intervene(model, PIXELS, [0], sources, layers).logits
    assert torch.allclose(replaced, logits.roll(1, dims=0), atol=1e-6) is is_other
    assert not torch.allclose(replaced, logits, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"layer_type": "post"}], ids=str)
def test_a_packed_model_has_the_outputs_of_the_model(fields: dict[str, Any]) -> None:
    model = build_classifier(**fields, num_register_tokens=1)
    states = model(PIXELS, output_hidden_states=True).hidden_states
    for sources in (None, [each.roll(1, dims=0) for each in states]):
        expected = intervene(model, PIXELS, [1], sources).logits
        found = intervene(pack(model), PIXELS, [1], sources).logits
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        BLOCKS["scopes"],
        {"relative_position_bias": "layer", "_attn_implementation": "eager"},
        {"position_embedding_type": "rope_2d", "num_distillation_tokens": 1},
        {"position_embedding_type": "rope_mixed", "fading_tokens": {"registers": 1}},
    ],
    ids=str,
)
def test_patches_that_are_left_out_are_as_if_they_were_hidden(fields: dict[str, Any]) -> None:
    model = build_classifier(**fields, num_register_tokens=1)
    photo, num_special = PIXELS[:1], model.config.token_layout.num_prefix_tokens
    states = model(photo, output_hidden_states=True).hidden_states
    shown = torch.stack([torch.randperm(16)[:7] for _ in range(3)])
    is_shown = torch.zeros(3, 16, dtype=torch.long).scatter(1, shown, 1)
    mask = torch.nn.functional.pad(is_shown, (num_special, 0), value=1)
    expected = model(photo.expand(3, -1, -1, -1), attention_mask=mask).logits
    found = continue_from(model, photo, states[:1], shown).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert "forward" not in vars(model.vitcls.layers)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_photo_that_keeps_its_patches_has_its_outputs(layers: int) -> None:
    heads = {"added": {"labels": ["a", "b"], "pooling": "mean", "pooled_layers": [-3, -1]}}
    model = build_classifier(position_embedding_type="rope_2d", num_register_tokens=1)
    model = randomize(model.adapt(extra_heads=heads)).eval().requires_grad_(False)
    expected = model(PIXELS[:1], output_hidden_states=True)
    states = expected.hidden_states[: layers + 1]
    model.vitcls.layers = torch.nn.ModuleList(model.vitcls.layers)
    found = continue_from(model, PIXELS[:1], states, torch.arange(16).flip(0)[None])
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    assert torch.allclose(found.task_logits["added"], expected.task_logits["added"], atol=1e-5)

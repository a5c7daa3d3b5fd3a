"""Interventions in a forward pass, compared with models without the tokens and with other photos."""

from typing import Any

import pytest
import torch
from helpers.tiny_models import build_images, build_tiny_config, raises_one_line, randomize
from torch import Tensor

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.inference.interventions import (
    can_leave_out_patches,
    collect_states,
    hide,
    leave_out_patches,
    replace,
)


PIXELS = build_images(6)


def build_classifier(**fields: Any) -> ViTCLSForImageClassification:
    config = build_tiny_config(**{"num_labels": 5, "num_hidden_layers": 3} | fields)
    return randomize(ViTCLSForImageClassification(config)).eval()


def classify(model: Any, pixels: Tensor = PIXELS) -> Tensor:
    with torch.no_grad():
        return model(pixels).logits


@pytest.mark.parametrize(
    "fields",
    [
        {"num_distillation_tokens": 1},
        {"num_cls_tokens": 2, "cls_scopes": ["image", [2, 2, 0, 1]], "pooling": "mean"},
        {"attention_type": "differential", "layer_type": "post"},
        {"relative_position_bias": "layer", "_attn_implementation": "eager"},
        {"position_embedding_type": "rope_2d"},
        {"gated_tokens": {"registers": 1}},
    ],
    ids=str,
)
def test_a_hidden_token_is_as_if_it_were_not_there(fields: dict[str, Any]) -> None:
    model = build_classifier(**fields, num_register_tokens=2)
    last_register = model.config.token_layout.num_prefix_tokens - 1
    for tokens, number in (([last_register], 1), ("registers", 0)):
        expected = classify(model.adapt(num_register_tokens=number).eval())
        with hide(model, tokens):
            assert torch.allclose(classify(model), expected, atol=1e-5)
        assert not torch.allclose(classify(model), expected, atol=1e-5)


def test_a_token_is_hidden_in_the_named_layers_alone() -> None:
    model = build_classifier(num_register_tokens=2)
    register = model.config.token_layout.registers.start

    def mask_key(attention: Any, args: tuple) -> tuple:
        states, *others = args
        mask = torch.ones(1, 1, states.shape[1], states.shape[1], dtype=torch.bool)
        mask[..., register] = False
        return states, mask, *others[1:]

    handle = model.vitcls.layers[1].attention.register_forward_pre_hook(mask_key)
    expected = classify(model)
    handle.remove()
    with hide(model, [register], layers=(2, 2)):
        assert torch.allclose(classify(model), expected, atol=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_with_the_cls_token_of_another_photo_a_head_that_reads_it_answers_for_that_photo(
    pooling: str,
) -> None:
    model = build_classifier(pooling=pooling, num_register_tokens=1, num_distillation_tokens=1)
    logits = classify(model)
    states = collect_states(model, PIXELS)
    with replace(model, "cls", states):
        assert torch.allclose(classify(model), logits, atol=1e-6)
    with replace(model, [0, 1], states.roll(1, dims=0)):
        replaced = classify(model)
    assert torch.allclose(replaced, logits.roll(1, dims=0), atol=1e-6) is (pooling == "cls")
    assert not torch.allclose(replaced, logits, atol=1e-6)
    assert torch.equal(classify(model), logits)


def test_a_token_is_replaced_from_the_first_to_the_last_of_the_named_layers() -> None:
    model = build_classifier(num_register_tokens=1)
    own = collect_states(model, PIXELS)
    with replace(model, "registers", own.roll(1, dims=0), layers=(2, 2)):
        found = collect_states(model, PIXELS)
    (register,) = range(9)[model.config.token_layout.registers]
    is_other = [
        torch.allclose(found[:, layer, register], own[:, layer, register].roll(1, dims=0))
        for layer in (1, 2, 3)  # at 0, it is the same for all photos
    ]
    assert is_other == [True, True, False]


def test_unknown_tokens_and_layers_are_named() -> None:
    model = build_classifier(num_register_tokens=1)
    with raises_one_line("no special tokens 'distillation'", "cls, registers"):
        hide(model, "distillation").__enter__()
    with raises_one_line("tokens=[2]", "2 special tokens"):
        hide(model, [2]).__enter__()
    with raises_one_line("layers 0 to 2", "1 to 3"):
        hide(model, "cls", layers=(0, 2)).__enter__()


@pytest.mark.parametrize(
    "fields",
    [
        {"pooling": "mean"},
        {"pooling": "mean", "position_embedding_type": "rope_2d"},
        {"pooling": "mean", "position_embedding_type": "rope_mixed"},
        {"num_register_tokens": 2, "gated_tokens": {"registers": 2}},
    ],
    ids=str,
)
def test_patches_that_stay_keep_their_positions(fields: dict[str, Any]) -> None:
    """The same as patches that no token attends to, and that no head reads."""
    model = build_classifier(**fields)
    num_special = model.config.token_layout.num_prefix_tokens
    shown = torch.stack([torch.randperm(16)[:7].sort().values for _ in PIXELS])
    with leave_out_patches(model, shown):
        found = model.vitcls(PIXELS).last_hidden_state

    mask = torch.ones(len(PIXELS), num_special + 16, dtype=torch.long)
    mask[:, num_special:] = 0
    mask.scatter_(1, num_special + shown, 1)
    expected = model.vitcls(PIXELS, attention_mask=mask).last_hidden_state
    patches = expected[torch.arange(len(PIXELS))[:, None], num_special + shown]
    assert torch.allclose(found[:, num_special:], patches, atol=1e-5)
    assert torch.allclose(found[:, :num_special], expected[:, :num_special], atol=1e-5)


def test_models_that_count_on_the_whole_grid_leave_out_no_patches() -> None:
    assert can_leave_out_patches(build_tiny_config())
    for fields in (
        {"relative_position_bias": "shared"},
        {"pooling": "attention"},
        {"num_cls_tokens": 2, "cls_scopes": ["image", [2, 2, 0, 1]]},
    ):
        assert not can_leave_out_patches(build_tiny_config(**fields)), fields

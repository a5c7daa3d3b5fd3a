"""Effects of special tokens, compared with direct computations."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    build_images,
    build_tiny_config,
)
from helpers.varied_models import center_logits

from modeling_vitcls import (
    ViTCLSForImageClassification,
)
from modeling_vitcls.analysis.ablation import (
    MIN_CHANGE,
    MIN_IMAGES,
    NUM_NULL_DRAWS,
    Effect,
    compute_ablations,
    compute_effect,
    compute_size,
    gather_outputs,
    predict_labels,
)
from modeling_vitcls.analysis.token_use import TokenUse
from modeling_vitcls.frozen.targets import OneLabelTarget
from modeling_vitcls.inference.image_pass import ImageBatch


PIXELS = build_images(6)


UNLABELED = [ImageBatch(PIXELS[:4]), ImageBatch(PIXELS[4:])]


def build_classifier(**fields: Any) -> ViTCLSForImageClassification:
    # many labels, so that predictions differ
    config = build_tiny_config(num_labels=12, num_hidden_layers=3, **fields)
    return center_logits(ViTCLSForImageClassification(config), PIXELS).eval()


@pytest.mark.parametrize(
    "fields",
    [
        {"num_distillation_tokens": 1},
        {"num_cls_tokens": 2, "cls_scopes": ["image", [2, 2, 0, 1]], "pooling": "mean"},
        {"attention_type": "differential", "layer_type": "post"},
        {"relative_position_bias": "layer", "_attn_implementation": "eager"},
    ],
    ids=str,
)
def test_hiding_tokens_equals_a_model_without_them(fields: dict[str, Any]) -> None:
    model = build_classifier(**fields, num_register_tokens=2)
    found = compute_ablations(model, TokenUse(model.config), UNLABELED)
    for name, number in (("register 2", 1), ("all register tokens", 0)):
        without = model.adapt(num_register_tokens=number).eval()
        with torch.no_grad():
            outputs = [list(each(PIXELS).logits) for each in (model, without)]
        expected = compute_effect(*outputs, OneLabelTarget)
        assert found[name][""].size == pytest.approx(expected.size, rel=1e-4)
        assert found[name][""].changed == expected.changed


def test_tokens_that_a_head_does_not_read_are_compared_with_redrawn_ones() -> None:
    model = build_classifier(num_register_tokens=3)
    outputs = torch.stack(gather_outputs(model, UNLABELED)[""])
    labels = predict_labels(list(outputs), OneLabelTarget)
    batches = [ImageBatch(PIXELS[:4], labels[:4]), ImageBatch(PIXELS[4:], labels[4:])]
    found = compute_ablations(model, TokenUse(model.config), batches)
    # the model is unchanged
    assert torch.equal(torch.stack(gather_outputs(model, UNLABELED)[""]), outputs)
    assert found["CLS"][""].null_sizes == ()
    assert found["CLS"][""].accuracies is not None
    assert found["CLS"][""].accuracies[0] == 1
    for name in ("register 1", "register 3", "all register tokens"):
        assert len(found[name][""].null_sizes) == NUM_NULL_DRAWS, name
        assert found[name][""].num_images == len(PIXELS), name


# Effects in numbers -------------------------------------------------------------------------------


def test_an_effect_has_its_size_and_its_intervals() -> None:
    before = list(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    after = list(torch.tensor([[2.0, 0.0], [4.0, 2.0]]))

    found = compute_effect(before, after, OneLabelTarget)
    assert found.changed == 0.5
    assert found.size == 2.0
    assert found.num_images == 2
    assert found.interval == pytest.approx((0.0, 8**0.5))

    same = compute_effect(before, before, OneLabelTarget)
    assert same.changed == 0.0
    assert same.size == 0.0
    assert same.interval == (0.0, 0.0)


def test_rounding_errors_of_constant_logits_are_no_effect() -> None:
    constant = torch.full((2, 2), 100.0)
    assert compute_size(list(constant), list(constant + 1e-5)) < MIN_CHANGE


EFFECT = Effect(0.5, (0.4, 0.6), MIN_IMAGES, 0.2, null_sizes=(0.5,) * 8)


@pytest.mark.parametrize(
    ("changes", "comparison"),
    [
        ({}, "no more"),  # equals its limit
        ({"size": 0.9}, "more"),
        ({"drop": (0.04, 0.3)}, "costs accuracy"),
        ({"drop": (0.0, 0.3)}, "no more"),
        ({"size": 0.9, "changed": 0.0}, "no change"),
        ({"null_sizes": ()}, "read by a head"),
        ({"num_images": MIN_IMAGES - 1}, "under 16 images"),
    ],
)
def test_an_effect_is_compared_with_that_of_a_random_token(
    changes: dict[str, Any], comparison: str
) -> None:
    assert replace(EFFECT, **changes).comparison == comparison

"""Effects of special tokens, compared with direct computations."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    LAYOUTS,
    build_images,
    build_tiny_config,
    get_largest_difference,
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
    collect_mean_states,
    compute_ablations,
    compute_effect,
    compute_size,
    gather_outputs,
    predict_labels,
    replace_by_means,
)
from modeling_vitcls.analysis.token_use import TokenUse
from modeling_vitcls.inference.image_pass import ImageBatch
from modeling_vitcls.inference.targets import OneLabelTarget
from modeling_vitcls.model.attention_masks_vitcls import build_attention_mask


PIXELS = build_images(6)


UNLABELED = [ImageBatch(PIXELS[:4]), ImageBatch(PIXELS[4:])]


def build_classifier(**fields: Any) -> ViTCLSForImageClassification:
    # many labels, so that predictions differ
    config = build_tiny_config(num_labels=12, num_hidden_layers=3, **fields)
    return center_logits(ViTCLSForImageClassification(config), PIXELS).eval()


def collect_means(model: Any) -> torch.Tensor:
    """Return the mean states of the special tokens, [L + 1, S, D]."""
    indices = range(model.config.token_layout.num_prefix_tokens)
    return collect_mean_states(model, UNLABELED, indices)[0]


@torch.no_grad()
def compute_logits(model: Any, index: int | None, means: torch.Tensor) -> torch.Tensor:
    """Return the logits [B, labels], computed layer by layer.

    The token is replaced by its means in the embeddings and after each layer.
    """
    encoder = model.vitcls
    grid = encoder.embeddings.patch_embeddings.get_grid_size(PIXELS)
    states = encoder.embeddings(PIXELS, grid, None)
    if index is not None:
        states[:, index] = means[0, index].float()
    mask = build_attention_mask(
        model.config, states, None, grid, encoder.relative_position_bias, encoder.gates
    )
    position_embeddings = (
        None if encoder.rotary_positions is None else encoder.rotary_positions(grid, states)
    )
    for layer, mean in zip(encoder.layers, means[1:], strict=True):
        states = layer(states, mask, position_embeddings)
        if index is not None:
            states[:, index] = mean[index].float()
    sequence = encoder.layernorm(states)
    logits = model.classifier(encoder.pooler(sequence))
    if model.distillation_classifier is None:
        return logits
    distilled = sequence[:, model.config.token_layout.distillation].mean(dim=1)
    return (logits + model.distillation_classifier(distilled)) / 2


@pytest.mark.parametrize(
    "fields",
    [
        *(LAYOUTS[name] for name in ("one_cls", "no_cls", "several_of_each")),
        {"num_cls_tokens": 2, "cls_scopes": ["image", [2, 2, 0, 1]]},
        {"attention_type": "differential", "layer_type": "post", "num_register_tokens": 2},
    ],
    ids=str,
)
def test_replacing_a_token_by_its_mean_equals_a_computation_layer_by_layer(
    fields: dict[str, Any],
) -> None:
    """Effects are the changes of these outputs."""
    model = build_classifier(**fields)
    means = collect_means(model)
    found = compute_ablations(model, TokenUse(model.config), UNLABELED)
    before = compute_logits(model, None, means)
    names = TokenUse(model.config).names

    assert [name for name in found if not name.startswith("all ")] == names
    scale = (before - before.mean(dim=0)).square().mean().sqrt()
    for index, name in enumerate(names):
        after = compute_logits(model, index, means)
        with replace_by_means(model, TokenUse(model.config), [index], means[:, [index]]):
            found_logits = torch.stack(gather_outputs(model, UNLABELED)[""])
        assert get_largest_difference(found_logits, after) <= 1e-5
        change = ((after - before).square().mean().sqrt() / scale).item()
        assert found[name][""].size == pytest.approx(change, abs=1e-5)
        changed = (after.argmax(-1) != before.argmax(-1)).float().mean().item()
        assert found[name][""].changed == pytest.approx(changed)


def test_tokens_that_a_head_does_not_read_are_compared_with_redrawn_ones() -> None:
    model = build_classifier(num_register_tokens=3)
    outputs = torch.stack(gather_outputs(model, UNLABELED)[""])
    labels = predict_labels(list(outputs), OneLabelTarget)
    batches = [ImageBatch(PIXELS[:4], labels[:4]), ImageBatch(PIXELS[4:], labels[4:])]
    found = compute_ablations(model, TokenUse(model.config), batches)
    # the model is unchanged
    assert torch.equal(torch.stack(gather_outputs(model, UNLABELED)[""]), outputs)
    assert found["CLS"][""].null_sizes == ()
    for name in ("register 1", "register 3", "all register tokens"):
        assert len(found[name][""].null_sizes) == NUM_NULL_DRAWS, name
        assert found[name][""].num_images == len(PIXELS), name
    assert found["register 1"][""].redraw_drop is not None


# Effects in numbers -------------------------------------------------------------------------------


def test_an_effect_has_its_size_and_its_intervals() -> None:
    before = list(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    after = list(torch.tensor([[2.0, 0.0], [4.0, 2.0]]))

    found = compute_effect(before, after, OneLabelTarget)
    assert found.changed == 0.5
    assert found.size == 2.0
    assert found.num_images == 2
    assert found.changed_interval == pytest.approx((0.0945, 0.9055), abs=1e-4)  # Wilson
    assert found.interval == pytest.approx((0.0, 8**0.5))
    assert found.is_measurable
    assert not found.is_beyond_limit

    same = compute_effect(before, before, OneLabelTarget)
    assert same.changed == 0.0
    assert same.size == 0.0
    assert same.interval == (0.0, 0.0)
    assert not same.is_measurable


def test_rounding_errors_of_constant_logits_are_no_effect() -> None:
    constant = torch.full((2, 2), 100.0)
    assert compute_size(list(constant), list(constant + 1e-5)) < MIN_CHANGE


EFFECT = Effect(0.5, (0.4, 0.6), MIN_IMAGES, 0.2, (0.1, 0.3), null_sizes=(0.5,) * 8)


@pytest.mark.parametrize(
    ("changes", "comparison"),
    [
        ({}, "no more"),  # equals its limit
        ({"size": 0.9}, "more"),
        ({"redraw_drop": (0.2, 0.3)}, "more"),  # a random token costs accuracy
        ({"redraw_drop": (0.04, 0.3)}, "no more"),
        ({"size": 0.9, "changed": 0.0}, "no change"),
        ({"null_sizes": ()}, "read by a head"),
        ({"num_images": MIN_IMAGES - 1}, "under 16 images"),
    ],
)
def test_an_effect_is_compared_with_that_of_a_random_token(
    changes: dict[str, Any], comparison: str
) -> None:
    assert replace(EFFECT, **changes).comparison == comparison

"""Attribution, compared with references on full eager attention maps."""

from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    BLOCKS,
    LAYOUTS,
    TASKS,
    assert_no_recording,
    build_images,
    build_tiny_config,
    get_largest_difference,
    randomize,
)

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
)
from modeling_vitcls.analysis.attribution import trace_attention
from modeling_vitcls.inference.prediction_rows import get_logits_by_task


TOLERANCE = 1e-5
LAYERS = {"num_hidden_layers": 3}

# Fields that change the layers or the attention masks.
KINDS_OF_LAYERS: dict[str, dict[str, Any]] = {
    "rope": BLOCKS["rope"],
    "scopes": BLOCKS["scopes"],
    "parallel": {"layer_type": "parallel"},
    "post-norm": {"layer_type": "post"},
    "gates": {"num_cls_tokens": 2, "num_register_tokens": 1, "gated_tokens": {"registers": 1}},
    "differential": {"attention_type": "differential"},
}

# Tokens that the head uses: fields, and the share of each token; "p" is the share of each patch.
HEADS: dict[str, tuple[dict[str, Any], list[float], str]] = {
    "cls and distillation": (LAYOUTS["cls_distillation_registers"], [1, 1, 0, 0, 0, 0], ""),
    "cls and mean": ({"pooling": "cls_mean", "num_register_tokens": 1}, [1, 0], "all"),
    "largest of the patches": ({"pooling": "max"}, [0], "those with a maximum"),
    "attention pooling of all": (
        {"pooling": "attention", "attention_pool_tokens": "all"},
        [1],
        "all",
    ),
    "two of three": (
        {"num_cls_tokens": 3, "cls_pooling": "concat", "pooled_cls_tokens": [2, 0]},
        [1, 0, 1],
        "",
    ),
}


def build_classifier(**fields: Any) -> ViTCLSForImageClassification:
    return randomize(ViTCLSForImageClassification(build_tiny_config(**LAYERS | fields)))


def run_eager(model: Any, pixels: torch.Tensor) -> Any:
    """Return the outputs with full attention maps, and restore the model."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    outputs = model(pixels, output_attentions=True)
    model.set_attn_implementation(implementation)
    return outputs


def compute_attribution(
    model: Any, pixels: torch.Tensor, label: int, task: str = ""
) -> torch.Tensor:
    trace = trace_attention(model, pixels, needs_gradients=True)
    return trace.compute_attribution(get_logits_by_task(trace.outputs)[task], label)


def compute_relevance(
    model: Any, pixels: torch.Tensor, target: int, task: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the definition, with gradients of the maps: R = I; R = R + E[(gradient x map)+] R.

    Returns R - I, and the last hidden state.
    """
    outputs = run_eager(model, pixels.clone().requires_grad_())
    logits = outputs.logits if task is None else outputs.logits[task]
    gradients = torch.autograd.grad(logits[:, target].sum(), outputs.attentions)
    identity = torch.eye(gradients[0].shape[-1])
    relevance = identity.expand(len(pixels), -1, -1)
    for maps, gradient in zip(outputs.attentions, gradients, strict=True):
        relevance = relevance + (maps * gradient).clamp(min=0).mean(dim=1).detach() @ relevance
    return relevance - identity, model.base_model(pixels).last_hidden_state


def expand_shares(special: list[float], patches: str, sequence: torch.Tensor) -> torch.Tensor:
    """Return the share of each token that the head uses, [B, N]."""
    of_patches = torch.zeros(sequence.shape[:2])[:, len(special) :]
    if patches == "all":
        of_patches += 1
    elif patches:
        of_patches.scatter_(1, sequence[:, len(special) :].argmax(dim=1), 1.0)
    of_patches /= of_patches.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.cat([torch.tensor(special).float().expand(len(sequence), -1), of_patches], dim=1)


def assert_same_relevance(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare within a tolerance that is relative to the largest value if it is small."""
    assert expected.max() > 0
    assert get_largest_difference(found, expected) <= TOLERANCE * min(1, 10 * expected.max().item())


# Attribution --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "special", "patches"), HEADS.values(), ids=HEADS)
def test_attribution_starts_at_the_tokens_that_the_head_reads(
    fields: dict[str, Any], special: list[float], patches: str
) -> None:
    model = build_classifier(**fields)
    found = compute_attribution(model, build_images(2, 24, 56), 1)
    relevance, sequence = compute_relevance(model, build_images(2, 24, 56), target=1)
    expected = (expand_shares(special, patches, sequence)[:, None] @ relevance).squeeze(1)
    assert_same_relevance(found, expected)
    assert found.min() >= 0
    assert not found.requires_grad


@pytest.mark.parametrize("fields", KINDS_OF_LAYERS.values(), ids=KINDS_OF_LAYERS)
def test_attribution_equals_a_reference_for_every_kind_of_layers(
    fields: dict[str, Any],
) -> None:
    model = build_classifier(**fields)
    found = compute_attribution(model, build_images(), 2)
    assert_same_relevance(found, compute_relevance(model, build_images(), target=2)[0][:, 0])


def test_attribution_starts_at_every_pooled_layer() -> None:
    """The relevance of a CLS token that is read twice is the sum of both paths."""
    model = build_classifier(num_hidden_layers=2, pooled_layers=[1, 2])
    found = compute_attribution(model, build_images(), 1)
    first = torch.eye(17)[:1].expand(2, 1, -1)
    maps = []
    trace = trace_attention(model, build_images(), needs_gradients=True)
    logits = trace.outputs.logits[:, 1].sum()
    for layer in trace.layers:
        (gradient,) = torch.autograd.grad(logits, layer.attention_output, retain_graph=True)
        map_gradient = gradient.transpose(1, 2) @ layer.value.transpose(2, 3)
        maps.append((map_gradient * layer.compute_weights()).clamp(min=0).mean(dim=1))
    above = first + first @ maps[1] + first  # read in layer 2, then in layer 1
    expected = above + above @ maps[0] - 2 * first

    assert get_largest_difference(found, expected[:, 0]) <= TOLERANCE


def test_attribution_of_a_task_starts_at_its_cls_token() -> None:
    """Each task reads its own CLS token. Tasks are in alphabetical order."""
    model = randomize(
        ViTCLSForMultiTaskClassification(build_tiny_config(**LAYERS, num_cls_tokens=2, tasks=TASKS))
    )
    for place, task in enumerate(["age", "species"]):
        found = compute_attribution(model, build_images(), 1, task)
        assert_same_relevance(found, compute_relevance(model, build_images(), 1, task)[0][:, place])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_may_be_frozen_and_gradients_disabled(mode: Any) -> None:
    expected = compute_attribution(build_classifier(), build_images(), 0)
    model = build_classifier().requires_grad_(False)
    pixels = build_images()
    with mode():
        found = compute_attribution(model, pixels, 0)
    assert get_largest_difference(found, expected) <= TOLERANCE
    assert not pixels.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_no_recording(model)

"""Measurements of one photo, compared with the model: predictions, attributions, features, maps."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import build_tiny_config, get_largest_difference, randomize
from PIL import Image
from sklearn.decomposition import PCA

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
)
from modeling_vitcls.analysis.attribution import trace_attention
from modeling_vitcls.analysis.maps import extract_patch_maps
from modeling_vitcls.analysis.photo import decompose_patches, match_colors, measure_photo
from modeling_vitcls.analysis.token_use import find_token_use
from modeling_vitcls.data.labels import get_heads
from modeling_vitcls.inference.prediction_rows import get_logits_by_task


PROCESSOR = ViTCLSImageProcessor(
    size={"shortest_edge": 40}, do_center_crop=True, crop_size={"height": 32, "width": 40}
)
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8))
PIXELS = PROCESSOR(PHOTO, return_tensors="pt")["pixel_values"]
TOKENS: dict[str, Any] = {"num_register_tokens": 2, "num_hidden_layers": 3}


def compute_attribution(model: Any, target: int) -> torch.Tensor:
    trace = trace_attention(model, PIXELS, needs_gradients=True)
    return extract_patch_maps(
        trace.compute_attribution(trace.outputs.logits, target)[0],
        model.config,
        PIXELS.shape[-2:],
    )


@torch.no_grad()
def test_predictions_maps_and_norms_are_those_of_the_model() -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(num_labels=5, **TOKENS)))
    found = measure_photo(model, PROCESSOR, PHOTO, find_token_use(model))
    # the crop of 40 x 60 pixels, twice as large
    assert found.visible_region == (20, 8, 100, 72)

    outputs = model(PIXELS, output_hidden_states=True)
    rows = extract_patch_maps(model.token_attention(PIXELS)[0], model.config, (32, 40))
    probabilities, indices = outputs.logits[0].softmax(dim=0).topk(3)
    expected = zip(indices.tolist(), probabilities.tolist(), strict=True)
    assert found.predictions[None] == [
        (f"LABEL_{i}", pytest.approx(value)) for i, value in expected
    ]
    assert get_largest_difference(found.maps, rows) < 1e-5
    for norms, states in zip(found.norms, outputs.hidden_states[1:], strict=True):
        assert get_largest_difference(norms.flatten(), states[0, 3:].norm(dim=-1)) < 1e-5
    for each, index in zip(found.attributions, indices.tolist(), strict=True):
        assert each.label[0] == f"LABEL_{index}"
        assert get_largest_difference(each.values, compute_attribution(model, index)) < 1e-5
        assert each.rest is None


@torch.no_grad()
def test_without_cls_tokens_the_first_maps_are_the_mean_over_the_patches() -> None:
    config = build_tiny_config(num_cls_tokens=0, pooling="mean", num_register_tokens=2)
    config._attn_implementation = "eager"
    model = randomize(ViTCLSModel(config))
    found = measure_photo(model, PROCESSOR, PHOTO, find_token_use(model))
    assert found.token_names[0] == "patch mean"
    attentions = model(PIXELS, output_attentions=True).attentions
    for maps, attention in zip(found.maps[:, :, 0], attentions, strict=True):
        assert get_largest_difference(maps.flatten(1), attention[0, :, 2:, 2:].mean(dim=1)) < 1e-5


def test_added_tasks_have_the_attributions_of_a_model_for_the_task() -> None:
    heads: dict[str, dict[str, Any]] = {
        "weather": {"labels": ["rain", "snow", "sun"], "pooled_layers": [-2, -1]},
        "tags": {"labels": ["old", "new"], "problem_type": "multi_label_classification"},
    }
    config = build_tiny_config(num_labels=5, extra_heads=heads, pooled_layers=[-2, -1], **TOKENS)
    model = randomize(ViTCLSForImageClassification(config))
    found = measure_photo(model, PROCESSOR, PHOTO, find_token_use(model))
    assert list(found.predictions) == [None, "tags", "weather"]
    (first, *_) = (each for each in found.attributions if each.task == "weather")
    alone = compute_attribution(
        model.select_task("weather"), heads["weather"]["labels"].index(first.label[0])
    )
    assert get_largest_difference(first.values, alone) < 1e-5


def test_a_rotated_photo_is_upright_and_pixels_without_a_patch_are_not_covered() -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config()))
    photo = PHOTO.copy()
    photo.getexif()[0x0112] = 6  # the EXIF tag of the orientation: rotate clockwise
    crop = {"height": 36, "width": 32}  # 4 rows of patches, and 4 additional rows of pixels
    processor = ViTCLSImageProcessor(
        size={"shortest_edge": 40}, do_center_crop=True, crop_size=crop
    )
    found = measure_photo(model, processor, photo, find_token_use(model))
    assert np.array_equal(np.asarray(found.image), np.rot90(np.asarray(PHOTO), -1))
    # of 80 x 120 pixels, twice as large as resized
    assert found.visible_region == (8, 24, 72, 88)


# Scores -------------------------------------------------------------------------------------------

TASK_HEADS = {"weather": {"labels": ["rain", "snow", "sun"], "pooling": "cls_mean"}}
TAG_HEADS: dict[str, Any] = {
    "tags": {
        "labels": ["old", "new", "red"],
        "pooling": ["mean", "cls_mean"],
        "pooled_layers": [-3, -1],
        "problem_type": "multi_label_classification",
        "threshold": 0.0,
    }
}
ADDED_CLASSES = {
    "more": {"labels": ["LABEL_3", "LABEL_4"], "pooling": "mean", "adds_classes": True}
}

# Classifiers that read the patches, and what beside the patches contributes to a score.
LINEAR_CLASSIFIERS: dict[str, tuple[dict[str, Any], str]] = {
    "mean": ({"pooling": "mean"}, "bias"),
    "cls_mean": ({"pooling": "cls_mean"}, "CLS, bias"),
    "several layers": ({"pooling": "cls_mean", "pooled_layers": [-3, -1]}, "CLS, bias"),
    "several CLS tokens": (
        {"pooling": "cls_mean", "num_cls_tokens": 3, "cls_pooling": "concat"},
        "CLS, bias",
    ),
    "distillation head": (
        {"pooling": "mean", "num_distillation_tokens": 1},
        "distillation, bias",
    ),
    "tags": (
        {"pooling": "mean", "problem_type": "multi_label_classification"},
        "bias",
    ),
    "tasks": (
        {"pooling": "cls_mean", "tasks": {"age": 3, "species": 4}, "num_cls_tokens": 2},
        "CLS, bias",
    ),
    "added task": ({"extra_heads": TASK_HEADS}, "CLS, bias"),
    "added tags": ({"pooling": "mean", "extra_heads": TAG_HEADS}, "CLS, bias"),
    "added classes": ({"pooling": "cls_mean", "extra_heads": ADDED_CLASSES}, "CLS, bias"),
}


def compute_logits(model: Any, factors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute the logits by task, with the patches that the heads read multiplied by `factors` [P]."""
    encoder = model.vitcls
    patches = model.config.token_layout.patches
    normalize = encoder.normalize

    def multiply(states: torch.Tensor) -> torch.Tensor:
        tokens = normalize(states).clone()
        tokens[:, patches] *= factors[:, None]
        return tokens

    encoder.normalize = multiply
    try:
        return get_logits_by_task(model(PIXELS, compute_all_tokens=True))
    finally:
        del encoder.normalize


@torch.no_grad()
@pytest.mark.parametrize(
    ("fields", "rest_name"), LINEAR_CLASSIFIERS.values(), ids=LINEAR_CLASSIFIERS
)
def test_a_map_and_the_rest_add_up_to_the_score(fields: dict[str, Any], rest_name: str) -> None:
    """The rest is the score without patches, and a patch contributes what is lost without it."""
    model_class = (
        ViTCLSForMultiTaskClassification if "tasks" in fields else ViTCLSForImageClassification
    )
    if "tasks" not in fields:
        fields = {"num_labels": 5} | fields
    model: Any = randomize(model_class(build_tiny_config(**TOKENS | fields)))
    found = measure_photo(model, PROCESSOR, PHOTO, find_token_use(model))
    heads = get_heads(model.config)
    every_patch = torch.ones(found.norms[0].numel())
    but_first = every_patch.clone()
    but_first[0] = 0
    whole, without_first, without = (
        compute_logits(model, factors) for factors in (every_patch, but_first, 0 * every_patch)
    )
    exact = [each for each in found.attributions if each.rest is not None]
    assert {each.task for each in exact} >= set(fields.get("tasks", ()))
    assert found.main_attribution is exact[0]
    assert found.rest_name == rest_name
    for each in exact:
        task = each.task or ""
        index = heads[task].labels.index(each.label[0])
        logit = whole[task][0, index].item()
        assert each.rest == pytest.approx(without[task][0, index].item(), abs=1e-5)
        assert each.values.sum().item() + each.rest == pytest.approx(logit, abs=1e-5)
        lost = logit - without_first[task][0, index].item()
        assert each.values[0, 0].item() == pytest.approx(lost, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {"pooling": "cls"},
        {"pooling": "attention"},
        {"pooling": "max"},
        {"pooling": "mean", "head_type": "mlp"},
        {"pooling": "mean", "pooled_norm": True},
    ],
    ids=lambda fields: "_".join(map(str, fields.values())),
)
def test_a_head_that_is_not_linear_in_patches_has_no_map_that_adds_up(fields: Any) -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**TOKENS | fields)))
    found = measure_photo(model, PROCESSOR, PHOTO, find_token_use(model))
    assert found.main_attribution is None
    is_unread = "does not read" in found.name_attention()
    assert is_unread == (fields["pooling"] != "cls")


# Colors -------------------------------------------------------------------------------------------


def test_colors_are_the_principal_components() -> None:
    """The signs of the components are arbitrary, and the colors of outliers are limited."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.arange(12, 0, -1).float() ** 2
    features = torch.randn(4, 5, 12, generator=generator) * scales + 3
    expected = PCA(3).fit(features.flatten(0, 1).numpy())
    colors, shares = decompose_patches(features)
    assert shares == pytest.approx(expected.explained_variance_ratio_, rel=1e-4)
    components = expected.transform(features.flatten(0, 1).numpy())
    for color, component in zip(colors.flatten(0, 1).numpy().T, components.T, strict=True):
        assert abs(np.corrcoef(color, component)[0, 1]) > 0.98


@pytest.mark.filterwarnings("error")
def test_few_patches_and_equal_patches_have_colors_too() -> None:
    """For example, the patches of a black image are equal."""
    colors, _ = decompose_patches(torch.randn(1, 2, 4))
    assert colors.isfinite().all()
    assert (colors[..., 2] == 0.5).all()
    equal, _ = decompose_patches(torch.ones(3, 4, 8))
    assert equal.isfinite().all()
    assert len(equal.flatten(0, 1).unique(dim=0)) == 1
    one = torch.rand(2, 1, 1, 3)
    assert torch.equal(match_colors(one, 1), one)

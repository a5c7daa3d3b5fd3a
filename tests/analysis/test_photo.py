"""Measurements of one photo, compared with the model: predictions, attributions, features, maps."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.photo_folders import draw_noise
from helpers.tiny_models import build_random, build_tiny_config, get_largest_difference, randomize
from PIL import Image
from pytest import approx
from sklearn.decomposition import PCA

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
)
from modeling_vitcls.analysis.maps import extract_patch_maps
from modeling_vitcls.analysis.photo import color_patches, measure_photo
from modeling_vitcls.analysis.token_use import find_token_use
from modeling_vitcls.frozen.class_statistics import ClassStatistics


PROCESSOR = ViTCLSImageProcessor(
    size={"shortest_edge": 40}, do_center_crop=True, crop_size={"height": 32, "width": 40}
)
PHOTO = draw_noise((80, 120))[0]
PIXELS = PROCESSOR(PHOTO, return_tensors="pt")["pixel_values"]
TOKENS: dict[str, Any] = {"num_register_tokens": 2, "num_hidden_layers": 3}


@torch.no_grad()
def test_predictions_maps_and_norms_are_those_of_the_model() -> None:
    model = build_random(ViTCLSForImageClassification, num_labels=5, **TOKENS)
    found = measure_photo(model, PROCESSOR, PHOTO, find_token_use(model))
    # the crop of 40 x 60 pixels, twice as large
    assert found.visible_region == (20, 8, 100, 72)

    outputs = model(PIXELS, output_hidden_states=True)
    rows = extract_patch_maps(model.token_attention(PIXELS)[0], model.config, (32, 40))
    probabilities, indices = outputs.logits[0].softmax(dim=0).topk(3)
    expected = zip(indices.tolist(), probabilities.tolist(), strict=True)
    assert found.predictions[None] == [(f"LABEL_{i}", approx(value)) for i, value in expected]
    assert get_largest_difference(found.maps, rows) < 1e-5
    for norms, states in zip(found.norms, outputs.hidden_states[1:], strict=True):
        assert get_largest_difference(norms.flatten(), states[0, 3:].norm(dim=-1)) < 1e-5
    assert [each.label for each in found.attributions] == found.predictions[None]


@torch.no_grad()
def test_without_cls_tokens_the_first_maps_are_the_mean_over_the_patches() -> None:
    config = build_tiny_config(num_cls_tokens=0, pooling="mean", num_register_tokens=2)
    config._attn_implementation = "eager"
    model = randomize(ViTCLSModel(config))
    found = measure_photo(model, PROCESSOR, PHOTO, find_token_use(model))
    assert found.tokens[0].name == "patch mean"
    attentions = model(PIXELS, output_attentions=True).attentions
    for maps, attention in zip(found.maps[:, :, 0], attentions, strict=True):
        assert get_largest_difference(maps.flatten(1), attention[0, :, 2:, 2:].mean(dim=1)) < 1e-5


def test_a_photo_at_another_image_size_is_not_unknown() -> None:
    """The threshold is one of the features at the size of the training."""
    model = build_random(ViTCLSForImageClassification, pooling="cls")
    numbers = np.random.normal(size=(39, model.config.hidden_size))
    labels = np.arange(39) % model.config.num_labels
    ClassStatistics.fit({(-1, "cls"): numbers}, labels, model.config.num_labels).set_in_model(model)
    model.config.distance_threshold = 0.0
    for size, is_unknown in ((32, True), (40, False)):
        processor = ViTCLSImageProcessor(size=size)
        assert (
            measure_photo(model, processor, PHOTO, find_token_use(model)).is_unknown is is_unknown
        )


def test_a_rotated_photo_is_upright_and_pixels_without_a_patch_are_not_covered() -> None:
    model = build_random(ViTCLSForImageClassification)
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


# What a score loses without parts -----------------------------------------------------------------

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

# Classifiers, and the special tokens that they read
CLASSIFIERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "cls": ({"pooling": "cls"}, ["CLS"]),
    "mean": ({"pooling": "mean"}, []),
    "max": ({"pooling": "max"}, []),
    "mlp": ({"pooling": "cls_mean", "head_type": "mlp"}, ["CLS"]),
    "several layers": ({"pooling": "cls_mean", "pooled_layers": [-3, -1]}, ["CLS"]),
    "several CLS tokens": (
        {"pooling": "cls", "num_cls_tokens": 3, "pooled_cls_tokens": [0, 2], "cls_pooling": "mean"},
        ["CLS 1", "CLS 3"],
    ),
    "distillation head": ({"pooling": "mean", "num_distillation_tokens": 1}, ["distillation"]),
    "tags": ({"pooling": "mean", "problem_type": "multi_label_classification"}, []),
    "tasks": (
        {"pooling": "cls", "tasks": {"age": 3, "species": 4}, "num_cls_tokens": 2},
        ["CLS age", "CLS species"],
    ),
    "added task": ({"pooling": "mean", "extra_heads": TASK_HEADS}, ["CLS"]),
    "added tags": ({"pooling": "mean", "extra_heads": TAG_HEADS}, ["CLS"]),
    "added classes": ({"pooling": "mean", "extra_heads": ADDED_CLASSES}, []),
}


@torch.no_grad()
@pytest.mark.parametrize(("fields", "read"), CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_every_shown_label_has_a_map_and_read_tokens_are_named(
    fields: dict[str, Any], read: list[str]
) -> None:
    model_class = (
        ViTCLSForMultiTaskClassification if "tasks" in fields else ViTCLSForImageClassification
    )
    if "tasks" not in fields:
        fields = {"num_labels": 5} | fields
    model: Any = build_random(model_class, **TOKENS | fields)
    found = measure_photo(model, PROCESSOR, PHOTO, find_token_use(model))
    shown = [(task, label) for task, labels in found.predictions.items() for label in labels[:3]]
    assert [(each.task, each.label) for each in found.attributions] == shown
    assert {tuple(each.values.shape) for each in found.attributions} == {(4, 5)}
    names = [token.name for token in found.tokens if token.is_read]
    assert [name for name in names if name != "patch mean"] == read


@torch.no_grad()
@pytest.mark.parametrize(
    ("photo", "patch_size"),
    [(Image.new("RGB", (60, 40), "green"), 8), (PHOTO, 32)],
    ids=["one color", "one part"],
)
def test_a_photo_without_parts_has_no_map(photo: Image.Image, patch_size: int) -> None:
    model = build_random(ViTCLSForImageClassification, patch_size=patch_size, num_labels=5)
    processor = ViTCLSImageProcessor(size=32)
    found = measure_photo(model, processor, photo, find_token_use(model))
    assert found.attributions == []
    assert len(found.predictions[None]) == 3


# Colors -------------------------------------------------------------------------------------------


def test_colors_are_the_principal_components() -> None:
    """The signs of the components are arbitrary, and the colors of outliers are limited."""
    scales = torch.arange(12, 0, -1).float() ** 2
    features = torch.randn(4, 5, 12) * scales + 3
    expected = PCA(3).fit(features.flatten(0, 1).numpy())
    (colors,), shares = color_patches(features[None], 0)
    assert shares == approx([expected.explained_variance_ratio_.sum()], rel=1e-4)
    components = expected.transform(features.flatten(0, 1).numpy())
    for color, component in zip(colors.flatten(0, 1).numpy().T, components.T, strict=True):
        assert abs(np.corrcoef(color, component)[0, 1]) > 0.98


def test_rotated_features_of_another_layer_have_the_same_colors() -> None:
    features = torch.randn(4, 5, 3)
    rotation = torch.linalg.qr(torch.randn(3, 3)).Q
    colors, _ = color_patches(torch.stack([features, 2 * features @ rotation]), 0)
    assert torch.allclose(*colors, atol=1e-4)


@pytest.mark.filterwarnings("error")
def test_few_patches_and_equal_patches_have_colors_too() -> None:
    """For example, the patches of a black image are equal."""
    colors, _ = color_patches(torch.randn(2, 1, 2, 4), 0)
    assert colors.isfinite().all()
    assert (colors[..., 2] == 0.5).all()
    equal, _ = color_patches(torch.ones(1, 3, 4, 8), 0)
    assert equal.isfinite().all()
    assert len(equal.flatten(0, 2).unique(dim=0)) == 1
    assert color_patches(torch.rand(2, 1, 1, 3), 1)[0].isfinite().all()

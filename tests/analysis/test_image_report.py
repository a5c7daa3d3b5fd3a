"""The report on one image, compared with the functions for predictions, maps and patch features."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import TASKS, build_tiny_config, get_largest_difference, randomize
from PIL import Image

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
)
from modeling_vitcls.analysis.attribution import trace_attention
from modeling_vitcls.analysis.image_report import build_image_report, compute_patch_colors
from modeling_vitcls.analysis.maps import VisibleRegion, extract_patch_maps


PROCESSOR = ViTCLSImageProcessor(
    size={"shortest_edge": 40}, do_center_crop=True, crop_size={"height": 32, "width": 40}
)
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8))
PIXELS = PROCESSOR(PHOTO, return_tensors="pt")["pixel_values"]
TOKENS: dict[str, Any] = {"num_register_tokens": 2, "num_hidden_layers": 3}


def test_added_tasks_have_a_prediction_and_the_attribution_of_a_model_for_the_task() -> None:
    heads: dict[str, dict[str, Any]] = {
        "weather": {
            "labels": ["rain", "snow", "sun"],
            "pooling": ["mean", "cls"],
            "pooled_layers": [-2, -1],
        },
        "tags": {"labels": ["old", "new"], "problem_type": "multi_label_classification"},
    }
    config = build_tiny_config(num_labels=5, extra_heads=heads, pooled_layers=[-2, -1], **TOKENS)
    model = randomize(ViTCLSForImageClassification(config))
    report = build_image_report(model, PROCESSOR, PHOTO)

    assert [each.task for each in report.predictions] == [None, "tags", "weather"]
    assert len(report.predictions[2].labels) == 3
    for index in (1, 2):
        alone = model.select_task(report.predictions[index].task)
        rows = trace_attention(alone, PIXELS, needs_gradients=True).compute_attribution()[0]
        expected = extract_patch_maps(rows, model.config, (32, 40))
        assert get_largest_difference(report.attributions[index], expected) < 1e-5


def test_maps_and_features_of_an_image_equal_those_of_the_model() -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(num_labels=5, **TOKENS)))
    report = build_image_report(model, PROCESSOR, PHOTO, "photo", "cat", "wrong")
    assert (report.name, report.truth, report.kind) == ("photo", "cat", "wrong")
    assert np.array_equal(np.asarray(report.image), np.asarray(PHOTO))
    # the crop of 40 x 60 pixels, twice as large
    assert report.visible_region == VisibleRegion(20, 8, 100, 72)

    rows = model.token_attention(PIXELS)[0]
    expected = extract_patch_maps(rows, model.config, (32, 40))
    assert get_largest_difference(report.attention, expected) < 1e-5

    (attribution,) = report.attributions
    rows = trace_attention(model, PIXELS, needs_gradients=True).compute_attribution()[0]
    assert (
        get_largest_difference(attribution, extract_patch_maps(rows, model.config, (32, 40))) < 1e-5
    )

    with torch.no_grad():
        states = model.vitcls(PIXELS, output_hidden_states=True).hidden_states[1:]
        probabilities, indices = model(PIXELS).logits[0].softmax(dim=0).topk(3)

    (prediction,) = report.predictions
    assert [name for name, _ in prediction.labels] == [
        f"LABEL_{index}" for index in indices.tolist()
    ]
    assert [value for _, value in prediction.labels] == pytest.approx(
        probabilities.tolist(), abs=1e-5
    )
    assert (prediction.task, prediction.top_label) == (None, f"LABEL_{indices[0]}")
    for features, state in zip(report.features, states, strict=True):
        assert get_largest_difference(features.flatten(0, 1), state[0, 3:]) < 1e-5
    assert not report.features.requires_grad


def test_a_rotated_photograph_is_upright_and_pixels_without_a_patch_are_not_covered() -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config()))
    photograph = PHOTO.copy()
    photograph.getexif()[0x0112] = 6  # the EXIF tag of the orientation: rotate clockwise
    crop = {"height": 36, "width": 32}  # 4 rows of patches, and 4 additional rows of pixels
    processor = ViTCLSImageProcessor(
        size={"shortest_edge": 40}, do_center_crop=True, crop_size=crop
    )
    report = build_image_report(model, processor, photograph)
    assert np.array_equal(np.asarray(report.image), np.rot90(np.asarray(PHOTO), -1))
    # of 80 x 120 pixels, twice as large as resized
    assert report.visible_region == VisibleRegion(8, 24, 72, 88)


def test_several_labels_are_predicted_from_one_half() -> None:
    """The most probable label is named even if no label is predicted."""
    config = build_tiny_config(num_labels=5, problem_type="multi_label_classification")
    model = randomize(ViTCLSForImageClassification(config))
    with torch.no_grad():
        logits = model(PIXELS).logits[0]
        for threshold, num_labels in ((logits.sort().values[:2].mean(), 4), (logits.max() + 1, 0)):
            model.classifier.bias -= threshold
            (prediction,) = build_image_report(model, PROCESSOR, PHOTO).predictions
            model.classifier.bias += threshold
            order = logits.argsort(descending=True)[:num_labels]
            assert [name for name, _ in prediction.labels] == [f"LABEL_{index}" for index in order]
            values = (logits[order] - threshold).sigmoid()
            assert [value for _, value in prediction.labels] == pytest.approx(
                values.tolist(), abs=1e-5
            )
            assert prediction.top_label == f"LABEL_{logits.argmax()}"


def test_each_task_has_a_prediction_and_an_attribution() -> None:
    model = randomize(
        ViTCLSForMultiTaskClassification(build_tiny_config(num_cls_tokens=2, tasks=TASKS))
    )
    report = build_image_report(model, PROCESSOR, PHOTO)
    assert [prediction.task for prediction in report.predictions] == ["age", "species"]

    for prediction, attribution in zip(report.predictions, report.attributions, strict=True):
        with torch.no_grad():
            index = model(PIXELS).logits[prediction.task][0].argmax()
        assert prediction.top_label == prediction.labels[0][0] == f"LABEL_{index}"
        rows = trace_attention(model, PIXELS, needs_gradients=True).compute_attribution(
            task=prediction.task
        )[0]
        assert (
            get_largest_difference(attribution, extract_patch_maps(rows, model.config, (32, 40)))
            < 1e-5
        )


def draw_features(*sizes: tuple[int, int], width: int = 12) -> list[torch.Tensor]:
    """Return random features whose components have different sizes."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.arange(width, 0, -1).float() ** 2
    return [torch.randn(*size, width, generator=generator) * scales + 3 for size in sizes]


def test_colors_are_the_principal_components() -> None:
    """The components are of the patches of all images, up to sign, scaled between two quantiles."""
    features = draw_features((4, 5), (3, 2))
    rows = torch.cat([one.flatten(0, 1) for one in features]).double().numpy()
    centered = rows - rows.mean(axis=0)
    directions = np.linalg.svd(centered, full_matrices=False)[2][:3]
    components = centered @ directions.T
    colors = compute_patch_colors(features)

    assert [tuple(one.shape) for one in colors] == [(4, 5, 3), (3, 2, 3)]
    found = torch.cat([one.flatten(0, 1) for one in colors]).double().numpy()
    for channel in range(3):
        candidates = []
        for sign in (1, -1):
            low, high = np.quantile(sign * components[:, channel], (0.02, 0.98))
            candidates.append(((sign * components[:, channel] - low) / (high - low)).clip(0, 1))
        assert min(np.abs(found[:, channel] - one).max() for one in candidates) < 1e-4
    for small, one in zip(
        compute_patch_colors([image / 1e4 for image in features]), colors, strict=True
    ):
        assert torch.allclose(small, one, atol=1e-4)


@pytest.mark.filterwarnings("error")
def test_few_patches_and_equal_patches_have_colors_too() -> None:
    """For example, the patches of a black image are equal."""
    (colors,) = compute_patch_colors([torch.randn(1, 2, 4)])
    assert colors.isfinite().all()
    assert (colors[..., 2] == 0.5).all()
    (equal,) = compute_patch_colors([torch.ones(3, 4, 8)])
    assert equal.isfinite().all()
    assert len(equal.flatten(0, 1).unique(dim=0)) == 1

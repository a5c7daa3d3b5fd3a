"""Rows of predictions: probabilities of labels, and rows of images without a prediction."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import TASKS, build_images, build_random

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)
from modeling_vitcls.data.labels import get_heads
from modeling_vitcls.inference.prediction_rows import (
    FeatureColumns,
    LabelColumns,
    build_checked_rows,
    try_predict,
)


def predict(columns: Any, pixels: torch.Tensor) -> list[dict[str, Any]]:
    """Return the rows of a batch of images."""
    return build_checked_rows(columns, try_predict(columns.predict, pixels), len(pixels))


@pytest.mark.parametrize(
    ("model_class", "fields", "features"),
    [
        (ViTCLSForImageClassification, {}, None),
        (ViTCLSForImageClassification, {"problem_type": "multi_label_classification"}, None),
        (ViTCLSForMultiTaskClassification, {"num_cls_tokens": 2, "tasks": TASKS}, None),
        (ViTCLSModel, {"num_register_tokens": 2}, "registers"),
        (ViTCLSModel, {}, "mean"),
    ],
    ids=["one label", "several labels", "several tasks", "tokens", "features"],
)
def test_an_image_without_a_finite_output_does_not_affect_other_images(
    model_class: Any, fields: dict[str, Any], features: str | None
) -> None:
    model = build_random(model_class, **fields)
    threshold = 0.0 if "problem_type" in fields else None
    columns = (
        FeatureColumns(model, [features], "float32")
        if features
        else LabelColumns(model, get_heads(model.config, threshold), 2)
    )
    pixels = build_images(3)
    expected = predict(columns, pixels)
    pixels[1, 0, 0, 0] = torch.nan
    rows = predict(columns, pixels)
    assert rows[0].keys() == columns.columns.keys()
    np.testing.assert_equal(rows[::2], expected[::2])
    assert rows[1] == {"error": "the model output is not finite. Set a different `mixed_precision`"}


def test_a_feature_too_large_for_float16_names_its_dtype() -> None:
    model = build_random(ViTCLSModel)
    model.layernorm.weight.data.mul_(1e6)
    (row,) = predict(FeatureColumns(model, ["cls"], "float16"), build_images(1))
    assert "`feature_dtype='float32'`" in row["error"]


def test_one_task_without_a_finite_output_is_an_error() -> None:
    model = build_random(ViTCLSForMultiTaskClassification, num_cls_tokens=2, tasks=TASKS)
    model.classifiers["task_age"].bias.data[1] = torch.inf
    rows = predict(LabelColumns(model, get_heads(model.config), 1), build_images(2))
    assert [row.keys() for row in rows] == [{"error"}] * 2
    assert all("not finite" in row["error"] for row in rows)

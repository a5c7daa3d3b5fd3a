"""Rows of predictions: probabilities of labels, and rows of images without a prediction."""

from typing import Any

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
    columns: Any = (
        FeatureColumns(model, [features], "float32")
        if features
        else LabelColumns(model, get_heads(model.config, threshold), 2)
    )
    pixels = build_images(3)
    pixels[1, 0, 0, 0] = torch.nan
    first, second, third = predict(columns, pixels)

    assert second == {"error": "the model output is not finite. Set a different `mixed_precision`"}

    for row, index in ((first, 0), (third, 2)):
        assert row.keys() == columns.columns.keys()
        (alone,) = predict(columns, pixels[index : index + 1])
        for name, value in alone.items():
            if isinstance(value, str):
                assert row[name] == value
            elif not (isinstance(value, list) and isinstance(value[0], str)):
                torch.testing.assert_close(
                    torch.tensor(row[name]), torch.tensor(value), atol=1e-5, rtol=0
                )


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


def test_images_of_an_unsupported_shape_are_errors() -> None:
    columns = FeatureColumns(build_random(ViTCLSModel), ["cls"], "float32")
    rows = predict(columns, build_images(2, channels=4))
    assert len(rows) == 2
    assert all("requires 3 channel" in row["error"] for row in rows)

"""Rows of predictions: probabilities of labels, and rows of images without a prediction."""

from typing import Any

import pytest
import torch
from helpers.tiny_models import TASKS, build_images, build_tiny_config, randomize

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)
from modeling_vitcls.inference.prediction_rows import (
    build_prediction_columns,
    build_rows,
    select_probable_labels,
    select_top_labels,
    try_predict,
)


NAMES = ["ant", "bee", "cat", "dog"]


def predict(columns: Any, pixels: torch.Tensor) -> list[dict[str, Any]]:
    """Return the rows of a batch of images."""
    return build_rows(columns, try_predict(columns, pixels), len(pixels))


def test_the_most_probable_labels_come_first() -> None:
    logits = torch.tensor([[0.5, 3.0, -1.0, 2.0], [1.0, 0.0, 4.0, -2.0]])
    for dtype in (torch.float32, torch.bfloat16):  # probabilities are computed in float32
        top = select_top_labels(logits.to(dtype), NAMES, 2)
        assert [[name for name, _ in image] for image in top] == [["bee", "dog"], ["cat", "ant"]]
        expected = logits.double().softmax(dim=1)
        for image, row in zip(top, expected, strict=True):
            for name, probability in image:
                assert probability == pytest.approx(row[NAMES.index(name)].item(), abs=1e-6)
    assert [len(image) for image in select_top_labels(logits, NAMES, 9)] == [4, 4]


def test_labels_with_the_probability_of_the_threshold_are_predicted() -> None:
    logits = torch.tensor([[0.0, 3.0, -0.1, 2.0], [-9.0, -8.0, -7.0, -6.0]])
    first, second = select_probable_labels(logits, NAMES, 0.5)
    assert [name for name, _ in first] == ["bee", "dog", "ant"]
    assert second == []
    expected = [1 / (1 + 2.718281828459045**-logit) for logit in (3.0, 2.0, 0.0)]
    assert [probability for _, probability in first] == pytest.approx(expected, abs=1e-6)
    names = list(map(str, range(100)))
    (equal,) = select_probable_labels(torch.ones(1, 100), names, 0.5)
    assert [name for name, _ in equal] == names


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
    model = randomize(model_class(build_tiny_config(**fields)))
    columns = build_prediction_columns(model, 2, 0.0, features and [features])
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


def test_one_task_without_a_finite_output_is_an_error() -> None:
    model = randomize(
        ViTCLSForMultiTaskClassification(build_tiny_config(num_cls_tokens=2, tasks=TASKS))
    )
    with torch.no_grad():
        model.classifiers["task_age"].bias[1] = torch.inf
    rows = predict(build_prediction_columns(model, 1, 0.5, None), build_images(2))
    assert [row.keys() for row in rows] == [{"error"}] * 2


def test_images_of_an_unsupported_shape_are_errors() -> None:
    columns = build_prediction_columns(
        randomize(ViTCLSModel(build_tiny_config())), None, 0.5, ["cls"]
    )
    rows = predict(columns, build_images(2, channels=4))
    assert len(rows) == 2
    assert all("requires 3 channel" in row["error"] for row in rows)


def test_names_are_in_the_order_of_their_indices() -> None:
    names = {2: "cat", 0: "ant", 1: "bee"}
    label2id = {name: index for index, name in names.items()}
    config = build_tiny_config(id2label=names, label2id=label2id)
    columns: Any = build_prediction_columns(ViTCLSForImageClassification(config), None, 0.5, None)
    rows = columns.build_rows({"": torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])})
    assert [row["label"] for row in rows] == ["bee", "ant"]

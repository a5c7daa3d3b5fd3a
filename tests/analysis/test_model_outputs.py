"""Outputs of a model for many images: labels, chance accuracy and features.

tests/analysis/test_ablation.py tests the predictions of classifiers.
"""

from typing import Any

import pytest
import torch
from helpers.tiny_models import TASKS, build_images, build_tiny_config, randomize

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel
from modeling_vitcls.analysis.model_outputs import (
    Predictions,
    collect_outputs,
    count_images,
    encode_label,
    encode_labels,
)
from modeling_vitcls.heads_vitcls import IGNORED_LABEL


def build_predictions(predicted: list[list[int]], labels: list[list[int]]) -> Predictions:
    return Predictions(torch.zeros(len(predicted), 2), torch.tensor(predicted), torch.tensor(labels))


# Chance --------------------------------------------------------------------------------------------------------------


def test_a_task_without_labels_does_not_change_chance() -> None:
    unknown = IGNORED_LABEL
    found = build_predictions([[0, 1]] * 4, [[0, unknown], [0, unknown], [1, unknown], [unknown, unknown]])
    assert found.compute_chance() == pytest.approx(2 / 3) == pytest.approx(found.compute_accuracy())


def test_each_image_with_a_known_label_counts_as_one_image() -> None:
    """Chance is 1/2. The standard error is 1/8 for 16 images and 1/4 for the 4 images in which both labels are known;
    the number of labels, 20, is not the number of images."""
    unknown = IGNORED_LABEL
    labels = [[0, 0], [1, 1]] * 2 + [[0, unknown], [1, unknown], [unknown, 0], [unknown, 1]] * 3 + [[unknown] * 2]
    for num_wrong, is_better in ((4, True), (5, False)):  # 0.8 and 0.75, compared with 0.5 + 2 / 8
        predicted = [[0 if label == unknown else label for label in row] for row in labels]
        for index in range(num_wrong):
            column = 0 if labels[4 + index][0] != unknown else 1
            predicted[4 + index][column] = 1 - predicted[4 + index][column]
        found = build_predictions(predicted, labels)
        assert found.compute_chance() == 0.5
        assert found.compute_accuracy() == pytest.approx(1 - num_wrong / 20)
        assert found.is_better_than_chance() is is_better


# Features ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "has_pooler"),
    [({"num_cls_tokens": 2, "num_register_tokens": 1}, True), ({"num_register_tokens": 1}, False)],
)
def test_features_are_the_tokens_and_the_pooled_vector(fields: dict[str, Any], has_pooler: bool) -> None:
    model = randomize(ViTCLSModel(build_tiny_config(**fields, pooling="max"), add_pooling_layer=has_pooler))
    batches = [build_images(2), build_images(1, seed=1)]
    found = collect_outputs(model, lambda: [(batch, None) for batch in batches])
    with torch.no_grad():
        outputs = [model(batch) for batch in batches]
    tokens = {name: torch.cat([output.tokens[name] for output in outputs]) for name in ("cls", "patches")}
    maximum, mean = tokens["patches"].amax(dim=1, keepdim=True), tokens["patches"].mean(dim=1, keepdim=True)
    expected = tokens | {"pooled": maximum if has_pooler else mean}
    assert set(found) == set(expected) and count_images(found) == 3
    for name, vectors in expected.items():
        assert torch.allclose(torch.stack(found[name].vectors), vectors, atol=1e-6), name


def test_encoders_without_cls_tokens_have_no_cls_features() -> None:
    model = randomize(ViTCLSModel(build_tiny_config(num_cls_tokens=0, pooling="mean")))
    found = collect_outputs(model, lambda: [(build_images(), None)])
    assert set(found) == {"pooled", "patches"}


# Labels --------------------------------------------------------------------------------------------------------------


MULTI_LABEL: dict[str, Any] = {"problem_type": "multi_label_classification"}
MULTI_TASK: dict[str, Any] = {"num_cls_tokens": 2, "tasks": TASKS}


@pytest.mark.parametrize(
    ("fields", "label", "expected"),
    [
        ({}, 2, [2]),
        ({}, None, [IGNORED_LABEL]),
        (MULTI_LABEL, [0.0, 1.0, 1.0], [0, 1, 1]),
        (MULTI_LABEL, 2, [0, 0, 1]),  # the only label of the image
        (MULTI_LABEL, None, [IGNORED_LABEL] * 3),
        (MULTI_LABEL, -100, [IGNORED_LABEL] * 3),
        ({"num_labels": 1}, 0, [1]),
        ({"num_labels": 1}, 1, [0]),
        ({"num_labels": 1}, None, [IGNORED_LABEL]),
        ({"num_labels": 1}, [0.0], [0]),
        (MULTI_TASK, {"species": 3, "age": 1}, [1, 3]),
        (MULTI_TASK, {"species": 3}, [IGNORED_LABEL, 3]),
        (MULTI_TASK, None, [IGNORED_LABEL] * 2),
    ],
)
def test_labels_of_datasets_are_converted(fields: dict[str, Any], label: Any, expected: list[int]) -> None:
    assert encode_label(label, build_tiny_config(**fields)).tolist() == expected


def test_labels_of_a_dataset_are_one_tensor() -> None:
    classifier = ViTCLSForImageClassification(build_tiny_config())
    found = encode_labels([2, None, 0], classifier)
    assert found is not None and found.tolist() == [[2], [IGNORED_LABEL], [0]]
    assert encode_labels(None, classifier) is None


def test_labels_of_some_batches_only_are_no_labels() -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config()))
    found = collect_outputs(model, lambda: [(build_images(2), torch.tensor([0, 1])), (build_images(1), None)])[""]
    assert found.labels is None and found.compute_accuracy() is None and len(found) == 3


@pytest.mark.parametrize("problem_type", [None, "regression"])
def test_models_that_are_not_classifiers_have_no_labels(problem_type: str | None) -> None:
    """Such labels cannot be encoded as class indices."""
    config = build_tiny_config(problem_type=problem_type)
    model = ViTCLSForImageClassification(config) if problem_type else ViTCLSModel(config)
    assert encode_labels([[0.5, 1.5, 2.5], {"species": 1}, None], model) is None

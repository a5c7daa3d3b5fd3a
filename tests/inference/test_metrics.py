"""Metrics: comparisons with direct computations, for each kind of labels."""

from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from helpers.evaluation_results import close, compute_outputs
from helpers.evaluation_worker import CLASSES, NUM_IMAGES, SPACES
from numpy.random import default_rng
from pytest import MonkeyPatch
from torch import nn
from torchmetrics.functional.classification import (
    multiclass_calibration_error,
    multilabel_average_precision,
)

from modeling_vitcls.data.labels import OneLabel, PerTask, SeveralLabels
from modeling_vitcls.evaluation.evaluator import build_predictions
from modeling_vitcls.inference.image_pass import ImageOutputs
from modeling_vitcls.inference.metrics import (
    METRICS,
    measure,
    measure_one_label,
    select_scalars,
)
from modeling_vitcls.inference.stated_result import build_class_tables


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_equal_logits_are_no_right_answers_among_the_top_five() -> None:
    """A collapsed model would have 100%."""
    names = list(map(str, range(100)))
    assert (
        measure_one_label(names, np.zeros((100, 100), np.float32), np.arange(100))["top_5_accuracy"]
        == 0.05
    )


def test_metrics_of_one_label_per_image_equal_scikit_learn(by_one_process: dict[str, Any]) -> None:
    metrics = by_one_process["single"]
    outputs, labels = compute_outputs("single")
    labels = np.array(labels)
    answers = outputs.logits.argmax(1).numpy()

    right = answers == labels
    assert 0 < right.sum() < metrics["num_images"] == NUM_IMAGES
    assert metrics["accuracy"] == close(right.mean())

    top_5 = sklearn.metrics.top_k_accuracy_score(labels, outputs.logits, k=5, labels=range(7))
    assert metrics["top_5_accuracy"] == close(top_5)
    assert metrics["balanced_accuracy"] == close(
        sklearn.metrics.balanced_accuracy_score(labels, answers)
    )
    assert metrics["macro_f1"] == close(sklearn.metrics.f1_score(labels, answers, average="macro"))
    probabilities = outputs.logits.softmax(dim=1)
    error = multiclass_calibration_error(probabilities, torch.tensor(labels), 7, n_bins=15)
    assert metrics["calibration_error"] == close(error.item())
    assert metrics["loss"] == close(
        nn.functional.cross_entropy(outputs.logits, torch.tensor(labels)).item()
    )

    expected = sklearn.metrics.confusion_matrix(labels, answers, labels=range(7))
    assert metrics["confusion_matrix"] == expected.tolist()
    interval = scipy.stats.binomtest(int(right.sum()), NUM_IMAGES).proportion_ci(method="wilson")
    assert metrics["accuracy_interval"] == [close(interval.low), close(interval.high)]
    assert_per_class(metrics["per_class"], np.eye(7)[labels], np.eye(7)[answers])


def assert_per_class(
    measured: list[dict[str, Any]], truth: np.ndarray, answers: np.ndarray
) -> None:
    """Check recall, precision and F1 of each class; None for 0 / 0.

    The values are 0 or 1 per image and class [N, L].
    """
    expected = sklearn.metrics.precision_recall_fscore_support(truth, answers, zero_division=np.nan)
    assert [row["name"] for row in measured] == CLASSES
    for row, precision, recall, f1, support in zip(measured, *expected, strict=True):
        assert row["images"] == support
        for key, value in (("precision", precision), ("recall", recall), ("f1", f1)):
            assert row[key] == (None if np.isnan(value) else close(value)), (row, key)


def test_each_head_has_its_own_metrics(by_one_process: dict[str, Any]) -> None:
    outputs, labels = compute_outputs("single")
    for name in ("cls", "distillation"):
        right = outputs[f"{name}_logits"].argmax(1) == torch.tensor(labels)
        assert by_one_process["single"][f"{name}_accuracy"] == close(right.float().mean().item())
    answers = {
        name: tuple(outputs[f"{name}logits"].argmax(1).tolist())
        for name in ("", "cls_", "distillation_")
    }
    assert len(set(answers.values())) == 3  # otherwise, swapped heads would not be detected


@pytest.mark.filterwarnings("ignore:No positive samples")
def test_metrics_of_several_labels_per_image_equal_scikit_learn(
    by_one_process: dict[str, Any],
) -> None:
    metrics = by_one_process["multi_label"]
    outputs, labels = compute_outputs("multi_label")
    truth = SPACES["multi_label"].collate(labels).numpy()
    probabilities = outputs.logits.sigmoid().numpy()
    answers = (probabilities > 0.5).astype(int)
    precisions = multilabel_average_precision(
        outputs.logits, torch.tensor(truth, dtype=torch.int64), 7, average=None
    ).tolist()[:6]

    assert metrics["mean_average_precision"] == close(np.mean(precisions))
    assert metrics["micro_f1"] == close(sklearn.metrics.f1_score(truth, answers, average="micro"))
    assert metrics["macro_f1"] == close(sklearn.metrics.f1_score(truth, answers, average="macro"))
    assert metrics["exact_match"] == close((truth == answers).all(1).mean())

    loss = nn.functional.binary_cross_entropy_with_logits(
        outputs.logits, torch.tensor(truth, dtype=torch.float32)
    )
    assert metrics["loss"] == close(loss.item())
    assert metrics["num_images"] == NUM_IMAGES
    assert_per_class(metrics["per_class"], truth, answers)

    assert [row["average_precision"] for row in metrics["per_class"]] == [
        *map(close, precisions),
        None,
    ]  # no image has the last class


def test_metrics_of_tasks_use_labeled_images_only(by_one_process: dict[str, Any]) -> None:
    metrics = by_one_process["multi_task"]
    outputs, labels = compute_outputs("multi_task")
    expected = []
    for task, names in SPACES["multi_task"].columns.items():
        truth = np.array([-1 if label[task] is None else label[task] for label in labels])
        known = truth >= 0
        logits = outputs.logits[task].numpy()[known]
        expected.append(measure_one_label(names, logits, truth[known]))
        own = metrics["tasks"][task]
        assert own["num_images"] == known.sum()
        assert own["accuracy"] == close(expected[-1]["accuracy"])
        assert own["loss"] == close(expected[-1]["loss"])
    species, age = (metrics["tasks"][task]["num_images"] for task in ("species", "age"))
    assert species < age == metrics["num_images"] == NUM_IMAGES
    assert metrics["accuracy"] == close(np.mean([each["accuracy"] for each in expected]))
    assert metrics["loss"] == close(sum(each["loss"] for each in expected))


def test_a_task_without_labeled_images_has_no_effect() -> None:
    space = PerTask({"age": ["old", "young"], "species": CLASSES})
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    labels = np.array([[0, -100], [0, -100], [-100, -100]])
    values = measure(space, np.hstack([logits, np.zeros((3, 7))]), labels)
    age, species = values["tasks"].values()
    assert values["accuracy"] == age["accuracy"] == 0.5
    assert species["accuracy"] is None
    assert [each["num_images"] for each in (values, age, species)] == [3, 2, 0]
    assert values["loss"] == age["loss"]


def test_a_single_tag_has_an_average_precision() -> None:
    logits = np.array([[1.0], [-1.0], [2.0]])
    labels = np.array([[1.0], [0.0], [0.0]])
    values = measure(SeveralLabels({"label": ["a"]}), logits, labels)
    assert values["mean_average_precision"] == values["per_class"][0]["average_precision"] == 0.5


def test_a_single_class_is_measured() -> None:
    values = measure(OneLabel({"label": ["a"]}), np.zeros((2, 1)), np.zeros(2, np.int64))
    assert values["accuracy"] == 1
    assert values["calibration_error"] == 0
    assert values["confusion_matrix"] == [[2]]


def test_images_are_counted_if_no_prediction_is_right() -> None:
    logits = np.tile([1.0, 0.0], (8, 1))
    values = measure(OneLabel({"label": ["a", "b"]}), logits, np.ones(8, np.int64))
    assert build_class_tables(values)["Each class"][1]["Right"] == "0 of 8"


def test_a_metric_that_is_not_a_number_is_no_result(monkeypatch: MonkeyPatch) -> None:
    """As the kappa of a single class: NaN is no JSON, and would be printed as nan%."""
    monkeypatch.setattr(
        "modeling_vitcls.inference.metrics.compute_calibration_error", lambda *_: float("nan")
    )
    rows = np.arange(3)
    outputs = ImageOutputs(labels=0 * rows, indices=rows, names=rows, groups=rows, logits=np.eye(3))
    metrics = build_predictions(OneLabel({"label": ["a", "b", "c"]}), outputs).metrics
    assert metrics["calibration_error"] is None
    assert metrics["accuracy"] == close(1 / 3)


def test_every_metric_is_described() -> None:
    """Without a row of `METRICS`, it would be in results.json, but in no table, card or report."""
    generator = default_rng(0)
    names = list("abcdefg")
    logits = generator.normal(size=(60, 3 * len(names)))  # of a model with two heads
    labels = generator.integers(len(names), size=60)
    measured = measure(OneLabel({"label": names}), logits, labels)
    measured |= measure(
        SeveralLabels({"label": names}), logits[:, :7], generator.integers(2, size=(60, 7))
    )
    names_of_metrics = select_scalars(measured).keys() | measured["per_class"][0].keys()
    described = {name for name in names_of_metrics if not name.endswith("loss")}
    assert described - {"num_images", "num_right", "images", "name"} == METRICS.keys()

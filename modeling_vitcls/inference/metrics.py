"""Metrics of logits on labeled images, for each kind of labels.

    measure(label_space, logits, labels)    a dict with numbers first, then lists
    METRICS                                 how each is named, formatted and compared

The labels are in the format of data/labels.py. Undefined values (0 / 0) are None, or NaN until
they are rounded. Evaluator (evaluator.py) and frozen runs compute the logits.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, log_softmax, softmax
from scipy.stats import binned_statistic
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)

from ..data.labels import LabelKind, LabelSpace, PerTask, SeveralLabels
from ..model.heads_vitcls import IGNORED_LABEL
from .intervals import compute_proportion_interval


MAX_MATRIX_CLASSES = 200  # Maximum number of classes for which a confusion matrix is computed

# Kind of labels -> metric that selects the best checkpoint of a run.
SELECTION_METRICS: dict[LabelKind, str] = {
    "single_label_classification": "accuracy",
    "multi_label_classification": "mean_average_precision",
    "multi_task": "accuracy",
}

MetricValues = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """How a metric is named and formatted."""

    title: str  # In tables, cards and reports
    count_text: str = ""  # Words after the count of a metric that counts images
    # From 0 to 1, written as a percentage; others, such as Cohen's kappa, as numbers
    is_share: bool = True


METRICS = {
    "accuracy": Metric("Accuracy", count_text="right"),
    "top_5_accuracy": Metric("Top-5 accuracy"),
    "balanced_accuracy": Metric("Balanced accuracy"),
    "cls_accuracy": Metric("Accuracy, CLS head"),
    "distillation_accuracy": Metric("Accuracy, distillation head"),
    "mean_average_precision": Metric("Mean average precision"),
    "micro_f1": Metric("F1, micro average"),
    "macro_f1": Metric("F1, macro average"),
    "exact_match": Metric(
        "Exact match (all classes of an image are correct)", count_text="right with all labels"
    ),
    "calibration_error": Metric("Calibration error"),
    # of each class, in the table of classes
    "recall": Metric("Recall", count_text="recognized"),
    "precision": Metric("Precision"),
    "f1": Metric("F1"),
    "average_precision": Metric("Average precision"),
}

# The result of an evaluator without images
NOTHING_MEASURED: MetricValues = {"num_images": 0, "num_unreadable_images": 0}


def measure(
    label_space: LabelSpace,
    logits: np.ndarray,
    labels: np.ndarray,
    threshold: float = 0.5,
    groups: np.ndarray | None = None,
) -> MetricValues:
    """Measure the logits of images, as the function for the kind of labels describes.

    Args:
        label_space: labels of the model.
        logits: [N, L]; of several tasks, side by side. The logits of two heads follow the
            returned ones: [N, 3 * L].
        labels: [N] or, with several labels or tasks, [N, L] or [N, tasks].
        threshold: probability from which one of several labels is predicted.
        groups: [N]; the images of a group count once in the intervals (default: each image is one).
    """
    if isinstance(label_space, PerTask):
        return measure_tasks(label_space, logits, labels, groups)
    if isinstance(label_space, SeveralLabels):
        return measure_several_labels(label_space.names, logits, labels > 0.5, threshold, groups)
    return measure_one_label(label_space.names, logits, labels, groups)


def measure_one_label(
    names: Sequence[str],
    logits: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None = None,
) -> MetricValues:
    """Measure the classifier of one label per image. Images with the label -100 are ignored.

    accuracy                top-1 accuracy
    loss                    cross-entropy, without label smoothing
    top_5_accuracy          top-5 accuracy, if there are more than five classes
    cls_accuracy, distillation_accuracy     accuracy of each head, if the model has two heads and no added classes
    cls_loss, distillation_loss, mean_loss  cross-entropy of each of the two, and of their mean
    balanced_accuracy       mean recall of the classes that have images
    macro_f1                mean F1 of the classes that have images or predictions
    calibration_error       expected calibration error with 15 bins (Guo et al. 2017, arXiv 1706.04599)
    num_images
    num_right               number of images that are predicted correctly
    accuracy_interval       95% confidence interval [low, high]
    per_class               name, number of images, recall, precision and F1 of each class
    confusion_matrix        rows are true classes, columns are predictions; omitted for more than 200 classes

    Without images, there is only their number, and None as accuracy.
    """
    is_known = labels != IGNORED_LABEL
    labels = labels[is_known]
    groups = None if groups is None else groups[is_known]
    num_images = len(labels)
    num_classes = len(names)
    if not num_images:
        return {"accuracy": None, "num_images": 0}
    logits, *heads = np.split(logits[is_known], logits.shape[1] // num_classes, axis=1)
    predictions = logits.argmax(axis=1)
    is_right = predictions == labels
    num_right = int(is_right.sum())
    per_class = measure_classes(names, labels, predictions)

    values: MetricValues = {
        "accuracy": float(is_right.mean()),
        "loss": compute_mean_loss(logits, labels),
    }
    if num_classes > 5:
        # Stable, as `argmax` is: of equal logits, the first ones count
        top_5 = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        values["top_5_accuracy"] = float((top_5 == labels[:, None]).any(axis=1).mean())
    if heads:
        cls, distillation = heads
        values |= {
            "cls_accuracy": float((cls.argmax(axis=1) == labels).mean()),
            "distillation_accuracy": float((distillation.argmax(axis=1) == labels).mean()),
            "cls_loss": compute_mean_loss(cls, labels),
            "distillation_loss": compute_mean_loss(distillation, labels),
            "mean_loss": compute_mean_loss((cls + distillation) / 2, labels),
        }
    values |= {
        "balanced_accuracy": compute_mean([row["recall"] for row in per_class]),
        "macro_f1": compute_mean([row["f1"] for row in per_class]),
        "calibration_error": compute_calibration_error(logits, labels),
        "num_images": num_images,
        "num_right": num_right,
        "accuracy_interval": compute_proportion_interval(num_right, num_images, groups),
        "per_class": per_class,
    }
    if num_classes <= MAX_MATRIX_CLASSES:
        matrix = confusion_matrix(labels, predictions, labels=range(num_classes))
        values["confusion_matrix"] = matrix.tolist()
    return values


def measure_several_labels(
    names: Sequence[str],
    logits: np.ndarray,
    labels: np.ndarray,
    threshold: float,
    groups: np.ndarray | None,
) -> MetricValues:
    """Measure the classifier of several labels per image; the labels are a mask [N, L].

    mean_average_precision  mean over the classes that have images
    micro_f1, macro_f1      F1 over all predictions; mean F1 of the classes
    exact_match             fraction of images for which all classes are predicted correctly
    loss                    binary cross-entropy, mean over images and classes
    num_images
    exact_match_interval    95% confidence interval [low, high]
    per_class               name, number of images, average precision, recall, precision and F1 of each class
    """
    probabilities = expit(logits)
    predictions = probabilities >= threshold
    per_class = measure_classes(names, labels, predictions)
    for row, scores, is_true in zip(per_class, probabilities.T, labels.T, strict=True):
        average_precision = average_precision_score(is_true, scores) if row["images"] else None
        row["average_precision"] = average_precision
    is_exact = (predictions == labels).all(axis=1)
    return {
        "mean_average_precision": compute_mean([row["average_precision"] for row in per_class]),
        "micro_f1": f1_score(labels, predictions, average="micro", zero_division=np.nan),
        "macro_f1": compute_mean([row["f1"] for row in per_class]),
        "exact_match": float(is_exact.mean()),
        "loss": compute_mean_loss(logits, labels),
        "num_images": len(labels),
        "exact_match_interval": compute_proportion_interval(
            int(is_exact.sum()), len(labels), groups
        ),
        "per_class": per_class,
    }


def measure_tasks(
    label_space: PerTask, logits: np.ndarray, labels: np.ndarray, groups: np.ndarray | None
) -> MetricValues:
    """Measure the classifiers of several tasks.

    accuracy                mean over the tasks that have labeled images
    loss                    sum over the tasks, as in training
    num_images              number of images
    tasks                   the metrics of each task, of the images that have its label (`measure_one_label`)
    """
    task_metrics = {}
    start = 0  # First of the logits of a task
    for (task, names), own_labels in zip(label_space.columns.items(), labels.T, strict=True):
        own_logits = logits[:, start : start + len(names)]
        task_metrics[task] = measure_one_label(names, own_logits, own_labels, groups)
        start += len(names)
    return join_tasks(task_metrics, len(labels))


def join_tasks(task_metrics: Mapping[str, MetricValues], num_images: int) -> MetricValues:
    """Join the metrics of tasks, as `measure_tasks` describes them."""
    return {
        "accuracy": compute_mean([metrics.get("accuracy") for metrics in task_metrics.values()]),
        "loss": sum(metrics.get("loss", 0.0) for metrics in task_metrics.values()),
        "num_images": num_images,
        "tasks": dict(task_metrics),
    }


def get_task_metrics(results: MetricValues) -> dict[str, MetricValues]:
    """Get the metrics of each task; without tasks, the only key is ""."""
    return results.get("tasks") or {"": results}


def drop_intervals(results: MetricValues) -> None:
    """Remove the intervals of images that were seen in training: the error is larger than they say."""
    for metrics in get_task_metrics(results).values():
        for name in [*metrics]:
            if name.endswith("_interval"):
                del metrics[name]


def select_scalars(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, int | float]:
    """Select the scalar metrics, in their original order, with a prefix of the flat names of a log."""
    return {
        f"{prefix}{name}": value
        for name, value in metrics.items()
        if isinstance(value, int | float)
    }


# Helpers ------------------------------------------------------------------------------------------


def measure_classes(
    names: Sequence[str], labels: np.ndarray, predictions: np.ndarray
) -> list[MetricValues]:
    """Measure the recall, precision and F1 of each class; None where one is 0 / 0.

    Labels and predictions are indices [N] of one label, or masks [N, L].
    """
    measured = precision_recall_fscore_support(
        labels, predictions, labels=range(len(names)), zero_division=np.nan
    )
    columns = [np.where(np.isnan(each), None, each).tolist() for each in measured]  # type: ignore[attr-defined]
    return [
        {"name": name, "images": int(images), "recall": recall, "precision": precision, "f1": f1}
        for name, precision, recall, f1, images in zip(names, *columns, strict=True)
    ]


def compute_mean_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Average the log losses of images in double precision: of one label [N], or of a mask [N, L]."""
    return float(compute_losses(logits.astype(np.float64), labels).mean())


def compute_losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute the log losses [N] of images: of one label [N], or the mean over a mask [N, L]."""
    if labels.ndim == 1:
        return -log_softmax(logits, axis=1)[np.arange(len(labels)), labels]
    with np.errstate(invalid="ignore"):  # NaN for images that no fold left out
        return (np.logaddexp(0, logits) - labels * logits).mean(axis=1)


def compute_calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Compute the expected calibration error in 15 bins (Guo et al. 2017, arXiv 1706.04599)."""
    confidences = softmax(logits, axis=1).max(axis=1)
    gaps = (logits.argmax(axis=1) == labels) - confidences
    sums = binned_statistic(confidences, gaps, "sum", 15, (0, 1)).statistic
    return float(np.abs(sums).sum() / len(labels))


def compute_mean(values: list[float | None]) -> float | None:
    """Average the values that are not None; the result is None if all are."""
    defined_values = [value for value in values if value is not None]
    return sum(defined_values) / len(defined_values) if defined_values else None


def round_floats(value: Any) -> Any:
    """Round all floats to six decimals, also in nested lists and dicts; NaN is not a result: None."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, list):
        return [round_floats(item) for item in value]
    if isinstance(value, dict):
        return {name: round_floats(item) for name, item in value.items()}
    return value

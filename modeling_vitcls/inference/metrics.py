"""Metrics on labeled images for each kind of labels, and metrics of masked autoencoders.

    METRICS[label_space.kind](label_space, device)   .update(outputs, labels) per batch, then .compute() once

`update` expects the labels of G images in the format of data/labels.py, and the outputs of B >= G
images; only the first G outputs are used. `compute` returns a dict with numbers first, then lists.
Undefined values (0 / 0) are None.

torchmetrics accumulates the values over batches and processes. All processes must call `compute`,
and a process without images must call `update` with 0 labels. evaluator.py selects the images.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import (
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MultilabelAveragePrecision,
)

from ..data.labels import LabelKind, LabelSpace, PerTask
from ..model.heads_vitcls import IGNORED_LABEL
from .intervals import compute_proportion_interval


MAX_MATRIX_CLASSES = 200  # Maximum number of classes for which a confusion matrix is computed

# Accuracy metric of a head -> name of the model output with the logits of the head.
HEAD_OUTPUTS = {"cls_accuracy": "cls_logits", "distillation_accuracy": "distillation_logits"}

# Cross-entropy of the CLS head, of the distillation head, and of the mean of their logits
HEAD_LOSSES = ("cls_loss", "distillation_loss", "mean_loss")

MetricValues = dict[str, Any]

# The result of an evaluator without images
NOTHING_MEASURED: MetricValues = {"num_images": 0, "num_unreadable_images": 0}


def select_scalars(metrics: Mapping[str, Any]) -> dict[str, int | float]:
    """Select the scalar metrics, in their original order, for logging and comparison."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


class SingleLabelMetrics:
    """Metrics of single-label classification.

    accuracy                top-1 accuracy
    top_5_accuracy          top-5 accuracy, if there are more than five classes
    balanced_accuracy       mean recall of the classes that have images
    macro_f1                mean F1 of the classes that have images or predictions
    calibration_error       expected calibration error with 15 bins (Guo et al. 2017, arXiv 1706.04599)
    cls_accuracy, distillation_accuracy     accuracy of each head, if the model has two heads
    cls_loss, distillation_loss, mean_loss  cross-entropy of each of the two, and of their mean
    loss                    cross-entropy, without label smoothing
    num_images
    accuracy_interval       95% confidence interval [low, high]
    per_class               name, number of images, recall, precision and F1 of each class
    confusion_matrix        rows are true classes, columns are predictions; omitted for more than 200 classes
    """

    def __init__(self, label_space: LabelSpace, device: torch.device) -> None:
        self.names = label_space.names
        num_classes = len(self.names)
        self.counts = ClassCounts(num_classes).to(device)
        calibration_error = MulticlassCalibrationError(num_classes, validate_args=False)
        self.calibration_error = calibration_error.to(device)
        names = ["loss", "top_5_accuracy", *HEAD_OUTPUTS, *HEAD_LOSSES]
        self.means = {name: build_aggregator(MeanMetric, device) for name in names}
        self.confusion_matrix = None
        if num_classes <= MAX_MATRIX_CLASSES:
            confusion_matrix = MulticlassConfusionMatrix(num_classes, validate_args=False)
            self.confusion_matrix = confusion_matrix.to(device)

    def update(self, outputs: Any, labels: torch.Tensor) -> None:
        """Update the metrics with logits [B, L], also of each of two heads, and labels [G]."""
        self.update_logits(outputs.logits, labels)
        if outputs.distillation_logits is not None:
            is_known = labels != IGNORED_LABEL
            labels = labels[is_known]  # [G]
            heads = [
                getattr(outputs, name)[: len(is_known)][is_known].float()
                for name in HEAD_OUTPUTS.values()
            ]
            for name, logits in zip(HEAD_OUTPUTS, heads, strict=True):
                self.means[name].update((logits.argmax(dim=1) == labels).float())
            for name, logits in zip(HEAD_LOSSES, [*heads, sum(heads) / 2], strict=True):
                losses = nn.functional.cross_entropy(logits, labels, reduction="none")
                self.means[name].update(losses)

    def update_logits(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Update the metrics with logits [B, L] and labels [G].

        Images with the label -100 are ignored.
        """
        is_known = labels != IGNORED_LABEL
        logits = logits[: len(labels)][is_known].float()  # [G, L]
        labels = labels[is_known]
        predictions = logits.argmax(dim=1)  # [G]
        num_classes = len(self.names)

        self.counts.update(
            num_correct=torch.bincount(labels[predictions == labels], minlength=num_classes),
            num_predicted=torch.bincount(predictions, minlength=num_classes),
            num_images=torch.bincount(labels, minlength=num_classes),
        )
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        self.means["loss"].update(losses)
        # Probabilities are passed, because torchmetrics does not apply softmax to logits that are
        # all in [0, 1].
        self.calibration_error.update(logits.softmax(dim=1), labels)

        if num_classes > 5:
            is_among_5 = (logits.topk(5).indices == labels[:, None]).any(dim=1)
            self.means["top_5_accuracy"].update(is_among_5.float())
        if self.confusion_matrix is not None:
            self.confusion_matrix.update(predictions, labels)

    def compute(self) -> MetricValues:
        counts = self.counts.compute().tolist()
        num_correct, _, num_images = map(sum, counts)
        class_metrics = compute_class_metrics(self.names, counts)

        # Without two heads or more than five classes, some were never updated
        means = {
            name: to_number(metric.compute())
            for name, metric in self.means.items()
            if metric.update_called
        }
        values: MetricValues = {
            "accuracy": safe_divide(num_correct, num_images),
            **means,
            "balanced_accuracy": compute_mean([row["recall"] for row in class_metrics]),
            "macro_f1": compute_mean([row["f1"] for row in class_metrics]),
            "calibration_error": to_number(self.calibration_error.compute()),
            "num_images": num_images,
            "accuracy_interval": compute_proportion_interval(num_correct, num_images),
            "per_class": class_metrics,
        }
        if self.confusion_matrix is not None:
            matrix = self.confusion_matrix.compute()  # A scalar for one class
            values["confusion_matrix"] = matrix.reshape(len(self.names), -1).tolist()
        return values


class MultiLabelMetrics:
    """Metrics of multi-label classification. A class is predicted from the `threshold` on.

    mean_average_precision  mean over the classes that have images
    micro_f1, macro_f1      F1 over all predictions; mean F1 of the classes
    exact_match             fraction of images for which all classes are predicted correctly
    exact_match_interval    95% confidence interval [low, high]
    loss                    binary cross-entropy, mean over images and classes
    num_images
    per_class               name, number of images, average precision, recall, precision and F1 of each class

    To compute the average precision, probabilities and labels are stored: 12 MB for 1,000 images
    and 1,000 classes.
    """

    threshold = 0.5

    def __init__(self, label_space: LabelSpace, device: torch.device) -> None:
        self.names = label_space.names
        self.counts = ClassCounts(len(self.names)).to(device)
        average_precision = MultilabelAveragePrecision(
            len(self.names), average=None, validate_args=False
        )
        self.average_precision = average_precision.to(device)
        self.exact_match = build_aggregator(MeanMetric, device)
        self.loss = build_aggregator(MeanMetric, device)
        self.num_images = build_aggregator(SumMetric, device)

    def update(self, outputs: Any, labels: torch.Tensor) -> None:
        """Update the metrics with logits [B, L] and labels [G, L], which are 0 or 1."""
        logits = outputs.logits[: len(labels)].float()
        # torchmetrics does not apply sigmoid to logits that are all in [0, 1]
        probabilities = logits.sigmoid()
        predictions = probabilities >= self.threshold
        targets = labels > 0.5  # [G, L]

        self.counts.update((predictions & targets).sum(0), predictions.sum(0), targets.sum(0))
        self.average_precision.update(probabilities, targets.long())
        self.exact_match.update((predictions == targets).all(dim=1).float())
        losses = nn.functional.binary_cross_entropy_with_logits(
            logits, labels.float(), reduction="none"
        )
        self.loss.update(losses.mean(dim=1))
        self.num_images.update(len(labels))

    def compute(self) -> MetricValues:
        counts = self.counts.compute().tolist()
        num_correct, num_predicted, num_true = map(sum, counts)
        class_metrics = compute_class_metrics(self.names, counts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchmetrics warns about classes without images
            # A scalar for one class
            average_precisions = self.average_precision.compute().reshape(-1).tolist()

        exact_match = to_number(self.exact_match.compute())
        num_images = int(self.num_images.compute())
        for row, average_precision in zip(class_metrics, average_precisions, strict=True):
            row["average_precision"] = average_precision if row["images"] else None
        return {
            "mean_average_precision": compute_mean(
                [row["average_precision"] for row in class_metrics]
            ),
            "micro_f1": safe_divide(2 * num_correct, num_predicted + num_true),
            "macro_f1": compute_mean([row["f1"] for row in class_metrics]),
            "exact_match": exact_match,
            "loss": to_number(self.loss.compute()),
            "num_images": num_images,
            "exact_match_interval": compute_proportion_interval(
                round((exact_match or 0.0) * num_images), num_images
            ),
            "per_class": class_metrics,
        }


class MultiTaskMetrics:
    """Metrics of multi-task classification, and each task's `SingleLabelMetrics` as `TASK_...`.

    accuracy                mean over the tasks that have labeled images
    loss                    sum over the tasks, as in training
    num_images              number of images; `TASK_num_images` excludes images without a label for the task
    """

    def __init__(self, label_space: PerTask, device: torch.device) -> None:
        self.tasks = {
            task: SingleLabelMetrics(labels, device) for task, labels in label_space.tasks.items()
        }
        self.num_images = build_aggregator(SumMetric, device)

    def update(self, outputs: Any, labels: torch.Tensor) -> None:
        """Update the metrics with logits {task: [B, L]} and labels [G, tasks].

        Missing labels are -100.
        """
        for (task, metrics), own_labels in zip(self.tasks.items(), labels.unbind(1), strict=True):
            metrics.update_logits(outputs.logits[task], own_labels)
        self.num_images.update(len(labels))

    def compute(self) -> MetricValues:
        task_metrics = {task: metrics.compute() for task, metrics in self.tasks.items()}
        return merge_tasks(task_metrics, int(self.num_images.compute()))


def merge_tasks(task_metrics: Mapping[str, MetricValues], num_images: int) -> MetricValues:
    """Merge the metrics of tasks, as `MultiTaskMetrics` describes them."""
    values = {
        "accuracy": compute_mean([metrics.get("accuracy") for metrics in task_metrics.values()]),
        "loss": sum(metrics.get("loss") or 0.0 for metrics in task_metrics.values()),
        "num_images": num_images,
    }
    task_values = {
        f"{task}_{name}": value
        for task, metrics in task_metrics.items()
        for name, value in metrics.items()
    }
    return values | select_scalars(task_values) | task_values


METRICS: dict[LabelKind, type[Any]] = {
    "single_label_classification": SingleLabelMetrics,
    "multi_label_classification": MultiLabelMetrics,
    "multi_task": MultiTaskMetrics,
}

# Kind of labels -> metric that selects the best checkpoint of a run.
SELECTION_METRICS: dict[LabelKind, str] = {
    "single_label_classification": "accuracy",
    "multi_label_classification": "mean_average_precision",
    "multi_task": "accuracy",
}


# Helpers ------------------------------------------------------------------------------------------


class ClassCounts(Metric):
    """Three counts per class [3, L]: correct predictions, all predictions, and images.

    The counting metrics of torchmetrics do not support empty batches and build a matrix [L, L] at
    each update.
    """

    full_state_update = False
    counts: torch.Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state(
            "counts", torch.zeros(3, num_classes, dtype=torch.long), dist_reduce_fx="sum"
        )

    def update(
        self, num_correct: torch.Tensor, num_predicted: torch.Tensor, num_images: torch.Tensor
    ) -> None:
        """Add the counts [L] of one batch."""
        self.counts += torch.stack([num_correct, num_predicted, num_images])

    def compute(self) -> torch.Tensor:
        """Stack the three counts of each class as one tensor [3, L]."""
        return self.counts


def build_aggregator(metric_class: type[MeanMetric | SumMetric], device: torch.device) -> Any:
    """Build a mean or sum metric whose result is NaN if any value is NaN.

    The metric is float64 if the device supports float64, so that the order of batches hardly
    affects the result.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return metric_class(nan_strategy="disable").set_dtype(dtype).to(device)


def compute_class_metrics(names: list[str], counts: list[list[int]]) -> list[MetricValues]:
    """Compute the recall, precision and F1 of each class from the counts of `ClassCounts`."""
    return [
        {
            "name": name,
            "images": num_images,
            "recall": safe_divide(num_correct, num_images),
            "precision": safe_divide(num_correct, num_predicted),
            "f1": safe_divide(2 * num_correct, num_images + num_predicted),
        }
        for name, num_correct, num_predicted, num_images in zip(names, *counts, strict=True)
    ]


def safe_divide(numerator: int, denominator: int) -> float | None:
    """Divide; the result is None if the denominator is 0."""
    return numerator / denominator if denominator else None


def compute_mean(values: list[float | None]) -> float | None:
    """Average the values that are not None; the result is None if all are."""
    defined_values = [value for value in values if value is not None]
    return sum(defined_values) / len(defined_values) if defined_values else None


def to_number(value: torch.Tensor) -> float | None:
    """Convert a one-element tensor; NaN and infinity, which JSON lacks, become None."""
    return value.item() if value.isfinite() else None

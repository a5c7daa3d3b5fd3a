"""Sentences of a card about the measured limitations of a model."""

from collections.abc import Iterator
from typing import Any

from ..configuration_vitcls import ViTCLSConfig
from ..inference.metric_tables import CLASS_COLUMNS, format_name, format_percent


def describe_limitations(results: dict[str, Any], config: ViTCLSConfig) -> list[str]:
    """Return sentences about the measured limitations of the model."""
    sentences = [*describe_accuracy_intervals(results, config), *describe_weakest_classes(results, config)]
    calibration_error = results.get("calibration_error")
    if calibration_error is not None:
        sentences.append(
            f"The predicted confidence differs from the accuracy by {100 * calibration_error:.2f} percentage points "
            "on average (calibration error)."
        )
    if calibration := results.get("calibration"):
        sentences[-1] += (
            f" Before the logits were divided by the temperature {calibration['temperature']:.2f}, it was "
            f"{100 * calibration['calibration_error_before']:.2f}. The temperature was fitted to "
            f"{calibration['num_images']:,} images that are not reported."
        )
    return sentences


def describe_accuracy_intervals(results: dict[str, Any], config: ViTCLSConfig) -> Iterator[str]:
    """Yield a sentence about the confidence interval of each accuracy."""
    for task in config.task_labels() or [""]:
        prefix = f"{task}_" if task else ""
        interval = results.get(f"{prefix}accuracy_interval")
        if interval is not None:
            task_phrase = f" of {task}" if task else ""
            num_images = results.get(f"{prefix}num_images", results["num_images"])
            yield (
                f"The accuracy{task_phrase} was measured on {num_images:,} images. The 95% confidence interval is "
                f"{format_percent(interval[0])} to {format_percent(interval[1])}."
            )


def describe_weakest_classes(results: dict[str, Any], config: ViTCLSConfig) -> Iterator[str]:
    """Yield one sentence per task about the class with the lowest recall or average precision, unless all classes of
    the task have the same value."""
    for task in config.task_labels() or [""]:
        prefix = f"{task}_" if task else ""
        rows = results.get(f"{prefix}per_class") or []
        key = "average_precision" if rows and "average_precision" in rows[0] else "recall"
        measured_indices = [index for index, row in enumerate(rows) if row[key] is not None]
        if len({rows[index][key] for index in measured_indices}) < 2:
            continue
        weakest_index = min(measured_indices, key=lambda index: rows[index][key])
        matrix = results.get(f"{prefix}confusion_matrix") if key == "recall" else None
        row, confusion_phrase = rows[weakest_index], describe_confusion(matrix, rows, weakest_index)
        image_count_text = f"{row['images']:,} {'image' if row['images'] == 1 else 'images'}"
        yield (
            f"The weakest {f'class of {task}' if task else 'class'} is {format_name(row['name'])}: "
            f"{CLASS_COLUMNS[key].lower()} {format_percent(row[key])} on {image_count_text}{confusion_phrase}."
        )


def describe_confusion(matrix: list[list[int]] | None, rows: list[dict[str, Any]], true_index: int) -> str:
    """Return a phrase about the most frequent wrong prediction for a class; empty if there is no matrix or no wrong
    prediction."""
    if matrix is None:
        return ""
    error_counts = [0 if index == true_index else count for index, count in enumerate(matrix[true_index])]
    num_errors = max(error_counts)
    if not num_errors:
        return ""
    predicted_name = format_name(rows[error_counts.index(num_errors)]["name"])
    return f", {num_errors:,} of which {'was' if num_errors == 1 else 'were'} predicted as {predicted_name}"

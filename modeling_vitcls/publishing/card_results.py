"""Measured results in a card: table rows, and sentences about the limitations of the model."""

from collections.abc import Iterator
from typing import Any

from ..configuration_vitcls import ViTCLSConfig
from ..files import replace_control_characters


METRIC_NAMES = {
    "accuracy": "Accuracy",
    "top_5_accuracy": "Top-5 accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "cls_accuracy": "Accuracy, CLS head",
    "distillation_accuracy": "Accuracy, distillation head",
    "mean_average_precision": "Mean average precision",
    "micro_f1": "F1, micro average",
    "macro_f1": "F1, macro average",
    "exact_match": "Exact match (all classes of an image are correct)",
    "calibration_error": "Calibration error",
}
CLASS_COLUMNS = {"recall": "Recall", "precision": "Precision", "f1": "F1", "average_precision": "Average precision"}
CONFIDENCE_LEVEL = 0.95  # confidence level of all intervals, as in inference/metrics.py
MAX_CLASSES_IN_TABLE = 20
MAX_NAME_LENGTH = 100  # maximum length of a name in a card, in characters


def get_metric_names(results: dict[str, Any], config: ViTCLSConfig) -> dict[str, str]:
    """Return a dict that maps the keys of the measured metrics to their names. Metrics over all tasks come first."""
    names = METRIC_NAMES | {
        f"{task}_{key}": f"{task}: {label}" for task in config.task_labels() for key, label in METRIC_NAMES.items()
    }
    return {key: name for key, name in names.items() if results.get(key) is not None}


def build_metric_rows(results: dict[str, Any], config: ViTCLSConfig) -> list[list[str]]:
    """Return the name and the value of each measured metric, with the confidence interval if available."""
    rows = []
    for key, name in get_metric_names(results, config).items():
        interval = results.get(f"{key}_interval")  # [low, high]
        suffix = f" (95% interval: {format_percent(interval[0])} to {format_percent(interval[1])})" if interval else ""
        rows.append([name, format_percent(results[key]) + suffix])
    return rows


def build_class_tables(results: dict[str, Any], config: ViTCLSConfig) -> dict[str, list[dict[str, str]]]:
    """Return a dict that maps table titles to rows, for each task with at most `MAX_CLASSES_IN_TABLE` classes."""
    titles = {"": "Per class"} | {f"{task}_": f"{task}, per class" for task in config.task_labels()}
    tables = {title: results.get(f"{prefix}per_class", []) for prefix, title in titles.items()}
    return {
        title: [build_class_row(row) for row in rows]
        for title, rows in tables.items()
        if 0 < len(rows) <= MAX_CLASSES_IN_TABLE
    }


def build_class_row(metrics: dict[str, Any]) -> dict[str, str]:
    """Return a dict that maps column names to table cells for one class."""
    metric_cells = {
        CLASS_COLUMNS[key]: format_percent(value) for key, value in metrics.items() if key not in ("name", "images")
    }
    return {"Class": format_name(metrics["name"]), "Images": f"{metrics['images']:,}", **metric_cells}


def format_percent(value: float | None) -> str:
    """Return a fraction as a percentage, or a dash for None."""
    return "–" if value is None else f"{value:.2%}"


# Measured limitations ------------------------------------------------------------------------------------------------


def describe_limitations(results: dict[str, Any], config: ViTCLSConfig) -> list[str]:
    """Return sentences about the measured limitations of the model."""
    sentences = [*describe_accuracy_intervals(results, config), *describe_weakest_classes(results, config)]
    calibration_error = results.get("calibration_error")
    if calibration_error is not None:
        sentences.append(
            f"The predicted confidence differs from the accuracy by {100 * calibration_error:.2f} percentage points "
            "on average (calibration error)."
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


def format_name(name: str) -> str:
    """Return a name from a dataset as inline Markdown code on one line, with at most 100 characters."""
    name = replace_control_characters(name).replace("`", "'")
    return f"`{name if len(name) <= MAX_NAME_LENGTH else f'{name[: MAX_NAME_LENGTH - 1]}…'}`"

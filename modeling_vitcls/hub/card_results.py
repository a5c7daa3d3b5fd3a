"""Measured values as a card shows them: rows of the tables, and sentences about where the model is weakest."""

from collections.abc import Iterator
from typing import Any

from ..configuration_vitcls import ViTCLSConfig


METRIC_NAMES = {
    "accuracy": "Accuracy",
    "top_5_accuracy": "Top-5 accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "cls_accuracy": "Accuracy, CLS head",
    "distillation_accuracy": "Accuracy, distillation head",
    "mean_average_precision": "Mean average precision",
    "micro_f1": "F1, over all answers",
    "macro_f1": "F1, mean over the classes",
    "exact_match": "Images with every class right",
    "calibration_error": "Calibration error",
}
CLASS_COLUMNS = {
    "recall": "Recall",
    "precision": "Precision",
    "f1": "F1",
    "average_precision": "Average precision",
}
CONFIDENCE = 0.95  # of the intervals, see inference/metrics.py
MOST_CLASSES_SHOWN = 20


def metric_names(results: dict[str, Any], config: ViTCLSConfig) -> dict[str, str]:
    """What the measured metrics are called: over all, then of each task where there are several."""
    names = METRIC_NAMES | {
        f"{task}_{key}": f"{task}: {label}" for task in config.task_labels() for key, label in METRIC_NAMES.items()
    }
    return {key: name for key, name in names.items() if results.get(key) is not None}


def interval(results: dict[str, Any], key: str) -> list[float] | None:
    """The confidence interval [low, high] of a metric, where it has one."""
    return results.get(f"{key}_interval")


def metric_rows(results: dict[str, Any], config: ViTCLSConfig) -> list[list[str]]:
    """Name and value of each measured metric, with its confidence interval where there is one."""
    rows = []
    for key, name in metric_names(results, config).items():
        known = interval(results, key)
        between = f" (95 % interval: {percent(known[0])} to {percent(known[1])})" if known else ""
        rows.append([name, percent(results[key]) + between])
    return rows


def class_tables(results: dict[str, Any], config: ViTCLSConfig) -> dict[str, list[dict[str, str]]]:
    """A title and one row per class, for each task that has few classes."""
    titles = {"": "Per class"} | {f"{task}_": f"{task}, per class" for task in config.task_labels()}
    tables = {title: results.get(f"{prefix}per_class", []) for prefix, title in titles.items()}
    return {
        title: [class_row(row) for row in rows]
        for title, rows in tables.items()
        if 0 < len(rows) <= MOST_CLASSES_SHOWN
    }


def class_row(measured: dict[str, Any]) -> dict[str, str]:
    """The metrics of one class by the name of their column."""
    values = {CLASS_COLUMNS[key]: percent(value) for key, value in measured.items() if key not in ("name", "images")}
    return {"Class": measured["name"], "Images": f"{measured['images']:,}", **values}


def percent(value: float | None) -> str:
    """A part of one; a dash where it is not known."""
    return "–" if value is None else f"{value:.2%}"


# Limits that were measured -------------------------------------------------------------------------------------------


def measured_limits(results: dict[str, Any], config: ViTCLSConfig) -> list[str]:
    """What the measurements say about where not to trust the model, in sentences."""
    return [*uncertainty(results, config), *weakest_classes(results, config), *calibration(results)]


def uncertainty(results: dict[str, Any], config: ViTCLSConfig) -> Iterator[str]:
    """How exactly the metrics are known."""
    for task in config.task_labels() or [""]:
        prefix = f"{task}_" if task else ""
        known = interval(results, f"{prefix}accuracy")
        if known is not None:
            of_task = f" of {task}" if task else ""
            num_images = results.get(f"{prefix}num_images", results["num_images"])
            yield (
                f"The accuracy{of_task} was measured on {num_images:,} images, which tells it no closer than between "
                f"{percent(known[0])} and {percent(known[1])} (95 % confidence)."
            )


def weakest_classes(results: dict[str, Any], config: ViTCLSConfig) -> Iterator[str]:
    """The class that did worst, of each task, unless none did worse than the others."""
    for task in config.task_labels() or [""]:
        prefix = f"{task}_" if task else ""
        rows = results.get(f"{prefix}per_class") or []
        key = "average_precision" if rows and "average_precision" in rows[0] else "recall"
        measured = [index for index, row in enumerate(rows) if row["images"] and row[key] is not None]
        values = {rows[index][key] for index in measured}
        if len(values) < 2:
            continue
        worst = min(measured, key=lambda index: rows[index][key])
        matrix = results.get(f"{prefix}confusion_matrix") if key == "recall" else None
        row, taken_for = rows[worst], mistaken(matrix, rows, worst)
        images = f"{row['images']:,} {'image' if row['images'] == 1 else 'images'}"
        yield (
            f"The weakest {f'class of {task}' if task else 'class'} is {quoted(row['name'])}: "
            f"{CLASS_COLUMNS[key].lower()} {percent(row[key])} on {images}{taken_for}."
        )


def mistaken(matrix: list[list[int]] | None, rows: list[dict[str, Any]], index: int) -> str:
    """What the images of a class were most often mistaken for; empty where that is not known."""
    if matrix is None:
        return ""
    mistakes = [0 if place == index else count for place, count in enumerate(matrix[index])]
    most = max(range(len(mistakes)), key=mistakes.__getitem__)
    return f", {mistakes[most]:,} of which it took for {quoted(rows[most]['name'])}" if mistakes[most] else ""


def calibration(results: dict[str, Any]) -> Iterator[str]:
    """How far its confidence can be believed."""
    error = results.get("calibration_error")
    if error is not None:
        yield f"Its confidence differs from how often it is right by {percent(error)} on average (calibration error)."


def quoted(name: str) -> str:
    """A class name in a sentence of Markdown."""
    return f"`{name.replace('`', '')}`"

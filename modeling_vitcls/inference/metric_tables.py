"""Measured metrics as tables: a row of each metric with its interval, and a row of each class."""

from collections.abc import Callable, Iterator
from typing import Any

from ..runtime.files import replace_control_characters
from .metrics import METRICS, MetricValues, get_task_metrics
from .stated_result import format_value, state_result


MAX_CLASSES = 30  # In a table
MAX_NAME_LENGTH = 100  # Maximum length of a name in a card, in characters

Tables = dict[str, list[dict[str, Any]]]  # Title -> rows, whose keys are the header


def list_metrics(results: MetricValues) -> Iterator[tuple[MetricValues, str, str]]:
    """List the metrics in a table: where each is measured, its key there, and its title.

    The metrics of all tasks together come first, then each task's metrics, with its name.
    """
    for title, metrics in {"": results, **list_titles(results)}.items():
        for key, metric in METRICS.items():
            if metrics.get(key) is not None:
                yield metrics, key, f"{title}{metric.title}"


def list_titles(results: MetricValues) -> dict[str, MetricValues]:
    """List the metrics of each task by the begin of its titles; without tasks, it is ""."""
    return {
        f"{task}: " if task else "": metrics for task, metrics in get_task_metrics(results).items()
    }


def build_metric_rows(results: MetricValues) -> list[list[str]]:
    """List the name of each measured metric, and its value as `state_result` says it."""
    return [
        [name, state_result(metrics, key, format_name)]
        for metrics, key, name in list_metrics(results)
    ]


def build_class_tables(
    results: MetricValues, format_label: Callable[[str], str] = replace_control_characters
) -> Tables:
    """Build a table of the classes that have images, for each task.

    If there are many classes, the table has those with most wrong predictions. `format_label` formats their names.
    """
    tables = {}
    for title, metrics in list_titles(results).items():
        classes = [row for row in metrics.get("per_class", []) if row["images"]]
        name = "Each class"
        if len(classes) > MAX_CLASSES:
            name = f"The {MAX_CLASSES} classes with most wrong predictions"
            classes.sort(key=lambda row: row["images"] * (row["recall"] - 1))
        if classes:
            tables[title + name] = [
                build_class_row(metrics, row, format_label) for row in classes[:MAX_CLASSES]
            ]
    return tables


def build_class_row(
    metrics: MetricValues, row: dict[str, Any], format_label: Callable[[str], str]
) -> dict[str, str]:
    """Build the row of a class, one of `per_class` of the metrics, in a table."""
    num_images = row["images"]
    cells = {
        "Class": format_label(row["name"]),
        "Right": f"{round(row['recall'] * num_images):,} of {num_images:,}",
    }
    for key in ("precision", "f1", "average_precision"):
        if key in row:
            cells[METRICS[key].title] = format_value(key, row[key], num_images)
    if matrix := metrics.get("confusion_matrix"):
        index = metrics["per_class"].index(row)
        mistakes = [*matrix[index]]
        mistakes[index] = 0
        most = max(mistakes)
        other = metrics["per_class"][mistakes.index(most)]["name"]
        cells["Most often taken for"] = f"{format_label(other)} ({most:,})" if most else "–"
    return cells


def format_small_percent(value: float) -> str:
    """Format a positive fraction as a percentage with three decimals, never as 0."""
    return f"{value:.3%}" if value >= 1e-5 else "less than 0.001%"


def format_name(name: str) -> str:
    """Format a name from a dataset as inline Markdown code on one line.

    It has at most 100 characters.
    """
    name = replace_control_characters(name).replace("`", "'")
    return f"`{name if len(name) <= MAX_NAME_LENGTH else f'{name[: MAX_NAME_LENGTH - 1]}…'}`"

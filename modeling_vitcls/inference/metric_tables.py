"""Measured metrics as tables: names, rows with confidence intervals, and a table of classes."""

from collections.abc import Iterator

from ..runtime.files import replace_control_characters
from .metrics import MetricValues, get_task_metrics
from .stated_result import format_percent, state_result


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
CLASS_COLUMNS = {
    "recall": "Recall",
    "precision": "Precision",
    "f1": "F1",
    "average_precision": "Average precision",
}
MAX_CLASSES_IN_TABLE = 20
NUM_CONFUSIONS = 3
MAX_NAME_LENGTH = 100  # Maximum length of a name in a card, in characters


def list_metrics(results: MetricValues) -> Iterator[tuple[MetricValues, str, str]]:
    """List the metrics in a table: where each is measured, its key there, and its title.

    The metrics of all tasks together come first, then each task's metrics, with its name.
    """
    for title, metrics in {"": results, **list_titles(results)}.items():
        for key, name in METRIC_NAMES.items():
            if metrics.get(key) is not None:
                yield metrics, key, f"{title}{name}"


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


def build_class_tables(results: MetricValues) -> dict[str, list[dict[str, str]]]:
    """Build the rows of each table of classes, by title.

    Tasks with more than `MAX_CLASSES_IN_TABLE` classes have no table.
    """
    tables = {}
    for title, metrics in list_titles(results).items():
        rows = metrics.get("per_class", [])
        if 0 < len(rows) <= MAX_CLASSES_IN_TABLE:
            tables[f"{title}Per class"] = [
                {
                    "Class": format_name(row["name"]),
                    "Images": f"{row['images']:,}",
                    **{
                        column: format_percent(row[key], metrics["num_images"])
                        for key, column in CLASS_COLUMNS.items()
                        if key in row
                    },
                }
                for row in rows
            ]
    return tables


def describe_confusions(results: MetricValues) -> list[str]:
    """Name the most frequent confusions of each task in a line, if there are any."""
    lines = []
    for title, metrics in list_titles(results).items():
        names = [format_name(row["name"]) for row in metrics.get("per_class", [])]
        pairs = [
            (count, f"{names[label]} as {names[prediction]} ({count:,})")
            for label, counts in enumerate(metrics.get("confusion_matrix", []))
            for prediction, count in enumerate(counts)
            if count and label != prediction
        ]
        pairs.sort(key=lambda pair: -pair[0])
        if pairs:
            texts = ", ".join(text for _, text in pairs[:NUM_CONFUSIONS])
            lines.append(f"{title}Confusions, most frequent: {texts}")
    return lines


def format_small_percent(value: float) -> str:
    """Format a positive fraction as a percentage with three decimals, never as 0."""
    return f"{value:.3%}" if value >= 1e-5 else "less than 0.001%"


def format_name(name: str) -> str:
    """Format a name from a dataset as inline Markdown code on one line.

    It has at most 100 characters.
    """
    name = replace_control_characters(name).replace("`", "'")
    return f"`{name if len(name) <= MAX_NAME_LENGTH else f'{name[: MAX_NAME_LENGTH - 1]}…'}`"

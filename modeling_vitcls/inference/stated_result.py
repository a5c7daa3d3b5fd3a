"""A result in words and tables, the same at every door: terminal, report, card, `evaluate` and additions.

    66 of 80 right; about 83% of new photos (72 to 93)      with a 95% interval
    20 of 24 right (95%: 64 to 93%)                         fewer than 30 images: no estimate
    66 of 80 right (82%)                                    no interval: they trained the encoder
    57 of 80 right. No estimate: ...                        a person believes the model (data/answers.py)

The count is what was seen. The estimate of a cross-validation is corrected for the choice among
candidates, so it may differ from the count. Percentages have decimals from 1,000 images on.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from ..data.splits import MAX_CLASS_RATIO
from ..runtime.errors import format_name_list
from ..runtime.files import replace_control_characters
from .intervals import MIN_CORRECTED_IMAGES
from .metrics import METRICS, MetricValues, get_task_metrics


MIN_DECIMAL_IMAGES = 1_000
FEW_PHOTOS = 10  # A class with fewer is hardly learned or measured
MIN_GUESS_GAIN = 0.05  # Share of the largest class above equal shares, from which it is stated


@dataclass(frozen=True)
class Measurement:
    """The result of one task. As text, it is a part of the printed result.

    Attributes:
        task: name of the task; "" if there is only one.
        metric: name of the metric of the result.
        metrics: of the images that have a label of the task (inference/metrics.py). There is no interval
            for images that trained the encoder: their error is larger than any interval says.
        num_folds: number of folds of the cross-validation; 0 for held-out images.
    """

    task: str
    metric: str
    metrics: MetricValues
    num_folds: int = 0

    @property
    def statement(self) -> str:
        """The result, as it is said at every door."""
        text = state_result(self.metrics, self.metric)
        # What is counted needs no name
        if counts_images(self.metrics, self.metric):
            return text
        return f"{self.metric.replace('_', ' ')} {text}"

    @property
    def method(self) -> str:
        """How the result was measured."""
        text = f"Measured on {self.metrics['num_images']:,} held-out images"
        if self.num_folds:
            text = f"Estimated by {self.num_folds}-fold cross-validation"
        if number := self.metrics.get("num_uncounted"):
            text += f" without the {number:,} photos that a model was unsure about, which are only trained on"
        if f"{self.metric}_interval" not in self.metrics or self.metrics.get("no_estimate"):
            return f"{text}, without an interval"
        if self.metrics["num_images"] < MIN_CORRECTED_IMAGES:
            return text
        is_corrected = self.num_folds and self.metric == "accuracy"
        correction = ", corrected for the choice of the classifier" if is_corrected else ""
        return f"{text}, with a 95% interval{correction}"

    def __str__(self) -> str:
        return f"{self.task}: {self.statement}. {self.method}".removeprefix(": ")


def state_result(
    metrics: MetricValues,
    name: str = "accuracy",
    format_label: Callable[[str], str] = replace_control_characters,
) -> str:
    """State a metric with its 95% interval and, for the accuracy, what guessing reaches.

    Args:
        metrics: with the metric, `num_images`, and, if they were measured, the interval [low, high],
            `num_right` and `per_class` (metrics.py).
        name: of the metric.
        format_label: formats the name of a class.
    """
    value, num_images = metrics[name], metrics["num_images"]
    text = format_metric(name, value, num_images)
    bounds = None
    if interval := metrics.get(f"{name}_interval"):
        low, high = (format_metric(name, each, num_images).removesuffix("%") for each in interval)
        bounds = f"{low} to {high}"
    if not counts_images(metrics, name):
        return text if bounds is None else f"{text} ({bounds})"

    # The value may be corrected for the choice of a classifier
    num_right = metrics.get("num_right", round(value * num_images))
    count = f"{num_right:,} of {num_images:,} {METRICS[name].count_text}"
    if reason := metrics.get("no_estimate"):
        text = f"{count}. No estimate: {reason}"
    elif num_images < MIN_CORRECTED_IMAGES:
        text = count if bounds is None else f"{count} (95%: {bounds}%)"
    elif bounds is None:
        text = f"{count} ({text})"
    else:
        text = f"{count}; about {text} of new photos ({bounds})"
    if name == "accuracy" and metrics.get("per_class"):
        text += compare_with_guess(metrics, format_label)
    return text


def read_addition(record: Mapping[str, Any], name: str = "") -> Measurement:
    """Read the result of an added task or of added classes from its record in results.json."""
    result = record["result"]
    return Measurement(name, next(iter(result)), result, result["num_folds"])


def state_addition(record: Mapping[str, Any]) -> str:
    """State the result of an added task or of added classes, if it was measured."""
    if "result" not in record:
        reason = record.get("missing_reason", "each class has one image or one group")
        return f"not measured, because {reason}"
    return str(read_addition(record))


def compare_with_guess(metrics: MetricValues, format_label: Callable[[str], str]) -> str:
    """Say what always saying the largest class reaches; "" if the classes have about equal sizes."""
    rows = [row for row in metrics["per_class"] if row["images"]]
    largest = max(rows, key=itemgetter("images"))
    num_images = metrics["num_images"]
    share = largest["images"] / num_images
    text = f"always saying {format_label(largest['name'])}: {largest['images']:,} of {num_images:,}"
    if metrics["accuracy"] <= round(share, 6):
        return f", no better than {text}"
    return f"; {text}" if share > 1 / len(rows) + MIN_GUESS_GAIN else ""


def counts_images(metrics: MetricValues, name: str) -> bool:
    """Check whether a metric is a part of the images. A mean over tasks is none."""
    return bool(METRICS[name].count_text) and not metrics.get("tasks")


def format_metric(name: str, value: float | None, num_images: int) -> str:
    """Format a metric as its row of `METRICS` says: as a percentage, or with three decimals."""
    if METRICS[name].is_share or value is None:
        return format_percent(value, num_images)
    return f"{value:.3f}"


def format_percent(value: float | None, num_images: int) -> str:
    """Format a part of the images as a percentage; None is a dash.

    100% means all images, and 0% none.
    """
    if value is None:
        return "–"
    step, decimals = (0.001, 1) if num_images >= MIN_DECIMAL_IMAGES else (0.01, 0)
    if 0 < value < 1:
        value = min(max(value, step), 1 - step)
    return f"{value:.{decimals}%}"


def describe_classes(metrics: MetricValues, class_ratio: float) -> str | None:
    """Describe the result by metrics that large classes do not dominate, if the sizes differ."""
    if class_ratio <= MAX_CLASS_RATIO or not metrics.get("per_class"):
        return None
    rows = [row for row in metrics["per_class"] if row["images"]]
    worst = min(rows, key=lambda row: row["recall"])
    values = (metrics["balanced_accuracy"], metrics["macro_f1"], worst["recall"])
    accuracy, f1, recall = (format_percent(value, metrics["num_images"]) for value in values)
    few = f", measured on {worst['images']} of its photos: {FEW_PHOTOS} or more would help"
    if worst["images"] >= FEW_PHOTOS:
        few = ""
    return (
        f"of different sizes: balanced accuracy {accuracy}, macro F1 {f1}, lowest recall {recall} "
        f"({worst['name']}{few}). `class_balance='weights'` gives all classes the same weight"
    )


# Metrics as tables --------------------------------------------------------------------------------


MAX_CLASSES = 30  # In a table
MAX_NAME_LENGTH = 100  # Maximum length of a name in a card, in characters

Tables = dict[str, list[dict[str, Any]]]  # Title -> rows, whose keys are the header


def list_metrics(results: MetricValues) -> Iterator[tuple[MetricValues, str, str]]:
    """List the metrics in a table: where each is measured, its key there, and its title.

    The mean over all tasks comes first, then each task's metrics, with its name.
    """
    whole = "mean of the tasks: " if results.get("tasks") else ""
    for title, metrics in {whole: results, **list_titles(results)}.items():
        for key, metric in METRICS.items():
            if metrics.get(key) is not None:
                yield metrics, key, f"{title}{metric.title}"


def list_titles(results: MetricValues) -> dict[str, MetricValues]:
    """List the metrics of each task by the begin of its titles; without tasks, it is ""."""
    return {
        f"{task}: " if task else "": metrics for task, metrics in get_task_metrics(results).items()
    }


def build_metric_table(
    results: MetricValues, format_label: Callable[[str], str] = replace_control_characters
) -> Tables:
    """Build the table of the measured metrics, with their values as `state_result` says them."""
    return {
        "Metrics": [
            {"Metric": name, "Value (95% interval)": state_result(metrics, key, format_label)}
            for metrics, key, name in list_metrics(results)
        ]
    }


def build_class_tables(
    results: MetricValues, format_label: Callable[[str], str] = replace_control_characters
) -> Tables:
    """Build a table of the classes that have images or predictions, for each task.

    If there are many classes, the table has those with most wrong predictions. `format_label` formats their names.
    """
    tables = {}
    for title, metrics in list_titles(results).items():
        classes = [row for row in metrics.get("per_class", []) if row["f1"] is not None]
        name = "Each class"
        if len(classes) > MAX_CLASSES:
            name = f"The {MAX_CLASSES} classes with most wrong predictions"
            classes.sort(key=lambda row: row["images"] * ((row["recall"] or 0) - 1))
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
        "Right": f"{round((row['recall'] or 0) * num_images):,} of {num_images:,}",
    }
    for key in ("precision", "f1", "average_precision"):
        if key in row:
            cells[METRICS[key].title] = format_percent(row[key], num_images)
    if matrix := metrics.get("confusion_matrix"):
        index = metrics["per_class"].index(row)
        mistakes = [*matrix[index]]
        mistakes[index] = 0
        most = max(mistakes)
        others = [
            format_label(each["name"])
            for each, number in zip(metrics["per_class"], mistakes, strict=True)
            if number == most
        ]
        text = f"{format_name_list(others, 2)} ({most:,}{' each' * (len(others) > 1)})"
        cells["Most often taken for"] = text if most else "–"
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

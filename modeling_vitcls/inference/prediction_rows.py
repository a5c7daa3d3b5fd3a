"""Predictions of a model as rows with named columns.

model                       columns
one label per image         label, probability, label_2, probability_2, ... up to --top-k
several labels per image    labels, probabilities: lists
several tasks               <task>_label, <task>_probability, <task>_label_2, ...
any, with --features        features: a list of D numbers, or one such list for each of several tokens

`index` (the number in the input) and `image` come before them, `error` after. How rows are written is in
outputs.py.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import torch
from transformers import PreTrainedModel

from ..configuration_vitcls import ViTCLSConfig
from ..data.labels import is_multi_label
from .inputs import Prepared


Row = dict[str, Any]
Precision = Callable[[], AbstractContextManager]  # returns the context manager of each forward pass


class AnswerColumns(Protocol):
    """The requested outputs of a model, and their conversion to columns."""

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """Names and types of the columns."""

    def values(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the model outputs for images [B, C, H, W] by name, [B, ...] `float32` each."""

    def rows(self, values: dict[str, torch.Tensor]) -> list[Row]:
        """Return the columns of each image."""


def build_answers(model: PreTrainedModel, top_k: int | None, threshold: float, features: str | None) -> AnswerColumns:
    """Build the output columns of a model.

    Raises:
        ValueError: if the model does not support the requested labels or features.
    """
    config: Any = model.config
    if features is not None:
        return TokenFeatures(model, features)
    if config.tasks:
        return TaskLabels(model, {name: TopLabels(names, top_k, name) for name, names in config.task_labels().items()})
    if not config.num_labels or config.problem_type == "regression":
        raise ValueError("this model has no labels to predict: fine-tune it on labelled images, or ask for features")
    names = [config.id2label[index] for index in range(config.num_labels)]
    if is_multi_label(config):
        return SeveralLabels(model, names, top_k, threshold)
    return OneLabel(model, TopLabels(names, top_k))


def answer(
    batches: Iterator[list[Prepared]], answers: AnswerColumns, device: torch.device, precision: Precision
) -> Iterator[Row]:
    """Yield a row for each image, in order."""
    nothing = dict.fromkeys(answers.columns)
    for batch in batches:
        answered: dict[int, Row] = {}
        known = {image.record.index: image.pixels for image in batch if image.pixels is not None}
        for images in by_shape(known):
            rows = answers_to(torch.stack(list(images.values())).to(device), answers, precision)
            answered |= dict(zip(images, rows, strict=True))
        for image in batch:
            index = image.record.index
            yield {
                "index": index,
                "image": image.record.name,
                **nothing,
                "error": image.error,
                **answered.get(index, {}),
            }


def by_shape(pixels: Mapping[int, torch.Tensor]) -> list[dict[int, torch.Tensor]]:
    """Group images [C, H, W] by shape, because an image processor may keep the aspect ratio."""
    groups: dict[torch.Size, dict[int, torch.Tensor]] = {}
    for number, image in pixels.items():
        groups.setdefault(image.shape, {})[number] = image
    return list(groups.values())


def answers_to(pixel_values: torch.Tensor, answers: AnswerColumns, precision: Precision) -> list[Row]:
    """Return a row for each image [B, C, H, W], with an error if the model raises one or its output overflows."""
    try:
        with torch.inference_mode(), precision():
            values = answers.values(pixel_values)
    except ValueError as error:  # sizes or channels that do not fit
        return [{"error": str(error)}] * len(pixel_values)
    finite = torch.stack([value.flatten(1).isfinite().all(dim=1) for value in values.values()]).all(dim=0)  # [B]
    overflow = {"error": "the model's output is not finite: try another --mixed-precision"}
    rows = answers.rows(values)
    return [row if is_finite else overflow for row, is_finite in zip(rows, finite.tolist(), strict=True)]


# Labels --------------------------------------------------------------------------------------------------------------


Label = tuple[str, float]  # name and probability
THRESHOLD = 0.5  # default minimum probability of a predicted label in multi-label classification


def most_probable(logits: torch.Tensor, names: list[str], count: int) -> list[list[Label]]:
    """Return the `count` most probable labels of each image from single-label logits [B, labels]."""
    top = logits.float().softmax(dim=1).topk(min(count, len(names)), dim=1)  # [B, count] twice
    return named(top.indices, top.values, names)


def all_probable(logits: torch.Tensor, names: list[str], threshold: float = THRESHOLD) -> list[list[Label]]:
    """Return the labels of each image with a probability of at least `threshold`, the most probable first.

    Args:
        logits: multi-label logits [B, labels].
        names: the label names.
        threshold: minimum probability.
    """
    ordered = logits.float().sigmoid().sort(dim=1, descending=True, stable=True)  # [B, labels] twice
    return [
        [(name, probability) for name, probability in image if probability >= threshold]
        for image in named(ordered.indices, ordered.values, names)
    ]


def named(indices: torch.Tensor, probabilities: torch.Tensor, names: list[str]) -> list[list[Label]]:
    """Return the labels of each image from indices and probabilities, [B, count] each."""
    return [
        [(names[index], probability) for index, probability in zip(*image, strict=True)]
        for image in zip(indices.tolist(), probabilities.tolist(), strict=True)
    ]


class TopLabels:
    """The most probable labels of one set, as columns."""

    def __init__(self, names: list[str], top_k: int | None, task: str | None = None) -> None:
        self.names = names
        self.count = min(top_k or 1, len(names))
        prefix = "" if task is None else f"{task}_"
        endings = ["", *(f"_{place}" for place in range(2, self.count + 1))]
        self.pairs = [(f"{prefix}label{ending}", f"{prefix}probability{ending}") for ending in endings]
        self.columns: dict[str, pa.DataType] = {}
        for label, probability in self.pairs:
            self.columns |= {label: pa.string(), probability: pa.float32()}

    def rows(self, logits: torch.Tensor) -> list[Row]:
        """Return the columns of each image from logits [B, labels]."""
        return [self.row(labels) for labels in most_probable(logits, self.names, self.count)]

    def row(self, labels: list[Label]) -> Row:
        """Return the columns of one image."""
        row: Row = {}
        for (label_column, probability_column), (label, probability) in zip(self.pairs, labels, strict=True):
            row |= {label_column: label, probability_column: probability}
        return row


@dataclass
class OneLabel:
    """Output columns of a single-label classifier."""

    model: PreTrainedModel
    labels: TopLabels

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """label, probability, ..."""
        return self.labels.columns

    def values(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits [B, labels]."""
        return {"logits": self.model(pixel_values).logits.float()}

    def rows(self, values: dict[str, torch.Tensor]) -> list[Row]:
        """Return the most probable labels."""
        return self.labels.rows(values["logits"])


@dataclass
class TaskLabels:
    """Output columns of a multi-task classifier."""

    model: PreTrainedModel
    tasks: dict[str, TopLabels]

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """The columns of all tasks."""
        return {name: kind for labels in self.tasks.values() for name, kind in labels.columns.items()}

    def values(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits [B, labels] of each task."""
        return {name: logits.float() for name, logits in self.model(pixel_values).logits.items()}

    def rows(self, values: dict[str, torch.Tensor]) -> list[Row]:
        """Return the most probable labels of each task."""
        by_task = [labels.rows(values[name]) for name, labels in self.tasks.items()]
        return [{name: value for row in rows for name, value in row.items()} for rows in zip(*by_task, strict=True)]


class SeveralLabels:
    """Output columns of a multi-label classifier: up to `top_k` labels with probabilities of at least `threshold`."""

    def __init__(self, model: PreTrainedModel, names: list[str], top_k: int | None, threshold: float) -> None:
        self.columns = {"labels": pa.list_(pa.string()), "probabilities": pa.list_(pa.float32())}
        self.model = model
        self.names = names
        self.top_k = top_k
        self.threshold = threshold

    def values(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits [B, labels]."""
        return {"logits": self.model(pixel_values).logits.float()}

    def rows(self, values: dict[str, torch.Tensor]) -> list[Row]:
        """Return the predicted labels, the most probable first."""
        rows = []
        for labels in all_probable(values["logits"], self.names, self.threshold):
            chosen = labels[: self.top_k]
            rows.append({"labels": [name for name, _ in chosen], "probabilities": [value for _, value in chosen]})
        return rows


# Features ------------------------------------------------------------------------------------------------------------


class TokenFeatures:
    """Tokens of the last hidden state: `cls`, `registers`, `distillation`, or the `mean` of the patches."""

    def __init__(self, model: PreTrainedModel, kind: str) -> None:
        config: Any = model.config
        self.encoder = model.base_model
        self.kind = kind
        self.count = 1 if kind == "mean" else number_of_tokens(config, kind)
        one = pa.list_(pa.float32())
        self.columns = {"features": one if self.count == 1 else pa.list_(one)}

    def values(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return features [B, D], or [B, n, D] if there are several tokens."""
        tokens = self.encoder(pixel_values).tokens
        if self.kind == "mean":
            return {"features": tokens["patches"].mean(dim=1).float()}
        chosen = tokens[self.kind].float()  # [B, n, D]
        return {"features": chosen[:, 0] if self.count == 1 else chosen}

    def rows(self, values: dict[str, torch.Tensor]) -> list[Row]:
        """Return one array per image, or a list with one array per token."""
        features = values["features"].cpu().numpy()
        return [{"features": image if self.count == 1 else list(image)} for image in features]


def number_of_tokens(config: ViTCLSConfig, group: str) -> int:
    """Return the number of tokens in a group of special tokens.

    Raises:
        ValueError: if the group has no tokens.
    """
    counts = dict(zip(("cls", "distillation", "registers"), config.token_counts, strict=True))
    if not counts[group]:
        known = ", ".join([*(name for name, count in counts.items() if count), "mean"])
        raise ValueError(f"this model has no {group} tokens: set --features to one of {known}")
    return counts[group]

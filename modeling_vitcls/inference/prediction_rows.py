"""Predictions of a model as rows with named columns.

model                       columns
one label per image         label, probability, label_2, probability_2, ... up to --top-k; distance (to the nearest
                            class) and unknown, if the model has class statistics
several labels per image    labels, probabilities: lists
several or added tasks      the same for each task: <task>_label, <task>_probability, ...
any, with --features        features: a list of D numbers, or one list per token if there are several tokens;
                            several features have a column each, such as `cls` and `mean@6`

The first columns are `index` (index in the input) and `image`, and the last columns are `checksum`,
`trained`, `note` and `error`.
outputs.py writes the rows. Each kind of model has a class with the attribute `columns`, a dict of
column types. The method `predict` returns a dict of `float32` outputs [B, ...] for images [B, C, H,
W], and `build_rows` converts the outputs to rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..model.configuration_vitcls import ExtraHead
from ..model.token_layout_vitcls import TokenLayout
from ..speed.packed import can_trim_last_layer
from .features import FrozenEncoder, States
from .image_pass import find_finite
from .token_names import count_tokens


Row = dict[str, Any]
Outputs = dict[str, Tensor]  # By name, for the images of a batch
DISTANCE = "distance"  # Column and output with the distance to the nearest class


# Labels -------------------------------------------------------------------------------------------


Label = tuple[str, float]  # Name and probability
# Default minimum probability of a predicted label in multi-label classification
DEFAULT_THRESHOLD = 0.5


def get_logits_by_task(outputs: Any) -> Outputs:
    """Map each task to its logits [B, num_labels]. The task of a classifier has an empty name."""
    logits = getattr(outputs, "logits", {})
    by_task = logits if isinstance(logits, dict) else {"": logits}
    return {**by_task, **(getattr(outputs, "task_logits", None) or {})}


@dataclass(frozen=True)
class TaskColumns:
    """The columns of a task.

    Attributes:
        task: its name; the task of a classifier has an empty name.
        head: its labels.
        top_k: maximum number of labels of an image. Default: one or, with several labels per image,
            all.
    """

    task: str
    head: ExtraHead
    top_k: int | None

    def name_column(self, name: str) -> str:
        """Name a column of the task."""
        return f"{self.task}_{name}" if self.task else name


class OneLabelColumns(TaskColumns):
    """The columns of the most probable labels of a task, of which an image has one."""

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Column -> type, of each label and its probability: without an end, then with _2, _3, ..."""
        types: dict[str, pa.DataType] = {}
        for rank in range(min(self.top_k or 1, len(self.head.labels))):
            end = f"_{rank + 1}" if rank else ""
            types[self.name_column(f"label{end}")] = pa.string()
            types[self.name_column(f"probability{end}")] = pa.float32()
        return types

    def select(self, logits: Tensor) -> list[list[Label]]:
        """Select the `top_k` most probable labels of each image in order, given logits [B, L]."""
        return rank_labels(self.head, logits.float().softmax(dim=1), self.top_k or 1)

    def build_values(self, logits: Tensor) -> dict[str, list[Any]]:
        """Build the values of each column."""
        rows = [chain.from_iterable(labels) for labels in self.select(logits)]
        return dict(zip(self.types, map(list, zip(*rows, strict=True)), strict=True))

    def read(self, row: Row) -> list[Label]:
        """Read the labels of a row."""
        values = [row[name] for name in self.types]
        return list(zip(values[::2], values[1::2], strict=True))


class SeveralLabelsColumns(TaskColumns):
    """The columns of a task of which an image has any number of labels, two lists."""

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Column -> type, of the labels and of their probabilities."""
        return {
            self.name_column("labels"): pa.list_(pa.string()),
            self.name_column("probabilities"): pa.list_(pa.float32()),
        }

    def select(self, logits: Tensor) -> list[list[Label]]:
        """Select the labels of each image, given logits [B, L]: whose probability is high enough."""
        lowest = DEFAULT_THRESHOLD if self.head.threshold is None else self.head.threshold
        # Not `value >= lowest`: probabilities that are not numbers are found later, with the image
        return [
            [(label, value) for label, value in labels if not value < lowest]
            for labels in rank_labels(self.head, logits.float().sigmoid())
        ]

    def build_values(self, logits: Tensor) -> dict[str, list[Any]]:
        """Build the values of each column."""
        images = [labels[: self.top_k] for labels in self.select(logits)]
        lists = [[[pair[part] for pair in labels] for labels in images] for part in (0, 1)]
        return dict(zip(self.types, lists, strict=True))

    def read(self, row: Row) -> list[Label]:
        """Read the labels of a row."""
        return list(zip(*(row[name] for name in self.types), strict=True))


TASK_COLUMNS: dict[str, type[OneLabelColumns] | type[SeveralLabelsColumns]] = {
    "single_label_classification": OneLabelColumns,
    "multi_label_classification": SeveralLabelsColumns,
}


def build_task_columns(
    heads: Mapping[str, ExtraHead], top_k: int | None
) -> dict[str, OneLabelColumns | SeveralLabelsColumns]:
    """Build the columns of each task, for the kind of its labels."""
    return {
        task: TASK_COLUMNS[head.problem_type](task, head, top_k) for task, head in heads.items()
    }


def rank_labels(
    head: ExtraHead, probabilities: Tensor, num_labels: int | None = None
) -> list[list[Label]]:
    """Sort the labels of each image by their probabilities [B, L], the most probable first."""
    ranked = probabilities.sort(dim=1, descending=True, stable=True)
    values = ranked.values[:, :num_labels].tolist()
    indices = ranked.indices[:, :num_labels].tolist()
    return [
        [(head.labels[index], value) for index, value in zip(*image, strict=True)]
        for image in zip(indices, values, strict=True)
    ]


class LabelColumns:
    """Output columns of a classifier and of added tasks: the most probable labels.

    With several labels per image, these are labels with probabilities of at least the threshold.

    Args:
        model: The model.
        heads: Labels and threshold of each task. The task of a classifier has an empty name.
        top_k: Maximum number of labels per image. Default: one or, with several labels per image,
            all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        heads: Mapping[str, ExtraHead],
        top_k: int | None,
    ) -> None:
        self.model = model
        self.tasks = build_task_columns(heads, top_k)
        self.columns: dict[str, pa.DataType] = {}
        for columns in self.tasks.values():
            self.columns |= columns.types
        # The layers that the distance reads; none without class statistics of these weights
        if getattr(model, "distance_layers", ()):
            self.columns[DISTANCE] = pa.float32()
            if model.config.distance_threshold is not None:
                self.columns["unknown"] = pa.bool_()

    def predict(self, pixel_values: Tensor) -> Outputs:
        """Compute the logits [B, num_labels] of each task."""
        return self.select(self.model(pixel_values))

    def read(self, encoder: FrozenEncoder, states: States) -> Outputs:
        """Compute what `predict` does, of images that have passed the encoder."""
        return self.select(encoder.apply_heads(states))

    def select(self, outputs: Any) -> Outputs:
        """Select the logits of each task, and the distance."""
        logits = get_logits_by_task(outputs)
        tensors = {task: logits[task].float() for task in self.tasks}
        if DISTANCE in self.columns:
            tensors[DISTANCE] = outputs.distance.float()[:, None]
        return tensors

    def build_rows(self, outputs: Outputs) -> list[Row]:
        """Build one row per image with the most probable labels."""
        values: dict[str, Sequence[Any]] = {}
        for task, columns in self.tasks.items():
            values |= columns.build_values(outputs[task])
        if DISTANCE in self.columns:
            values[DISTANCE] = outputs[DISTANCE][:, 0].tolist()
        if "unknown" in self.columns:
            threshold = self.model.config.distance_threshold
            values["unknown"] = [distance > threshold for distance in values[DISTANCE]]
        return build_rows(values)

    def build_arrays(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """Build an array of each column. Without a prediction, it has None, or NaN for a number."""
        return {
            name: pa.array([row[name] for row in rows], kind).to_numpy(zero_copy_only=False)
            for name, kind in self.columns.items()
        }


# Features -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Feature:
    """The tokens of a group, or the mean of the patches, of a layer after the final norm."""

    name: str
    group: str
    layer: int | None  # Number of the layer, starting from 1; None for the last layer
    num_tokens: int

    @classmethod
    def from_name(cls, name: str, config: Any) -> "Feature":
        """Parse a name such as `cls` or `cls@6`.

        Raise ValueError if the model has no such tokens or layer.
        """
        token_counts = count_tokens(config) | {"mean": 1}
        group, _, layer = name.partition("@")
        choices = [choice for choice, count in token_counts.items() if count]
        layers = [str(number + 1) for number in range(config.num_hidden_layers)]
        if group not in choices or (layer or layers[0]) not in layers:
            raise ValueError(
                f"`features={name!r}` requires tokens and a layer of the model, which has only "
                f"{', '.join(choices)} and {len(layers)} layers. Set "
                f"`features='{choices[0]}@{len(layers)}'`"
            )
        return cls(name, group, int(layer) if layer else None, token_counts[group])

    def select(self, layout: TokenLayout, layer_tokens: Mapping[int, Tensor]) -> Tensor:
        """Select the feature [B, D], or [B, n, D] if there are n > 1 tokens.

        Args:
            layout: of the tokens.
            layer_tokens: layer -> tokens [B, N, D] after the final norm.
        """
        tokens = layer_tokens[self.layer or max(layer_tokens)]
        group = "patches" if self.group == "mean" else self.group
        tokens = tokens[:, getattr(layout, group)]
        if self.group == "mean":
            return tokens.mean(dim=1)
        return tokens[:, 0] if self.num_tokens == 1 else tokens


class FeatureColumns:
    """Output columns with features.

    A single feature is in `features`; several have one column each, such as `cls` and `mean@6`.
    Raise ValueError if the model has no such tokens.
    """

    def __init__(self, model: PreTrainedModel, names: Sequence[str], dtype: str) -> None:
        self.encoder: Any = model.base_model
        columns = ["features"] if len(names) == 1 else names
        self.features = {
            column: Feature.from_name(name, model.config)
            for column, name in zip(columns, names, strict=True)
        }
        self.dtype = dtype
        arrow_type = pa.type_for_alias(dtype)
        self.columns = {}
        for name, feature in self.features.items():
            self.columns[name] = pa.list_(arrow_type)  # A feature of one token is one list
            if feature.num_tokens > 1:
                self.columns[name] = pa.list_(self.columns[name])

    def predict(self, pixel_values: Tensor) -> Outputs:
        """Compute each feature as [B, D], or [B, n, D] if there are n > 1 tokens."""
        layers = {feature.layer for feature in self.features.values()} - {None}
        outputs = self.encoder(
            pixel_values,
            output_layers={*layers, len(self.encoder.layers)},
            num_output_tokens=None if layers else self.count_special_tokens(),
        )
        return self.select(outputs.layer_tokens)

    def read(self, encoder: FrozenEncoder, states: States) -> Outputs:
        """Compute what `predict` does, of images that have passed the encoder."""
        return self.select(encoder.get_layer_tokens(states))

    def select(self, layer_tokens: Mapping[int, Tensor]) -> Outputs:
        """Select each feature, in the type of the output."""
        config: Any = self.encoder.config
        return {
            name: feature.select(config.token_layout, layer_tokens).to(getattr(torch, self.dtype))
            for name, feature in self.features.items()
        }

    def count_special_tokens(self) -> int | None:
        """Count the leading special tokens that contain all features; None if patches do.

        The last layer computes only these tokens.
        """
        config: Any = self.encoder.config
        groups = {feature.group for feature in self.features.values()}
        if groups & {"mean", "patches"} or not can_trim_last_layer(config):
            return None
        return max(getattr(config.token_layout, group).stop for group in groups)

    def build_rows(self, outputs: Outputs) -> list[Row]:
        """Build one row per image with the features.

        A feature is one array, or a list with one array per token.
        """
        values: dict[str, Sequence[Any]] = {}
        for name, output in outputs.items():
            array = output.cpu().numpy()
            values[name] = list(array) if array.ndim == 2 else [list(tokens) for tokens in array]
        return build_rows(values)

    def build_arrays(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """Stack the features of rows by name: [B, D], or [B, n, D] if there are n > 1 tokens.

        The features of a row with an error are NaN.
        """
        config: Any = self.encoder.config
        arrays: dict[str, np.ndarray] = {}
        for column, feature in self.features.items():
            shape = (len(rows), feature.num_tokens, config.hidden_size)
            array = np.full(shape, np.nan, self.dtype)
            for index, row in enumerate(rows):
                if row["error"] is None:
                    array[index] = row[column]
            arrays[feature.name] = array[:, 0] if feature.num_tokens == 1 else array
        return arrays


# Rows ---------------------------------------------------------------------------------------------


PredictionColumns = LabelColumns | FeatureColumns


def build_rows(values: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Build a row for each image, given the values of each column."""
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


@torch.inference_mode()
def try_predict(predict: Callable[[Tensor], Outputs], pixel_values: Tensor) -> Outputs | str:
    """Compute the outputs [B, ...] for images [B, C, H, W].

    If the model does not support the images, return the reason.
    """
    try:
        return predict(pixel_values)
    except ValueError as error:  # Sizes or channels that the model does not support
        return str(error)


def build_checked_rows(
    columns: PredictionColumns, outputs: Outputs | str | None, num_images: int
) -> list[Row]:
    """Build a row for each image, given what `try_predict` returns; without images, None."""
    if not isinstance(outputs, dict):
        return [{"error": outputs}] * num_images
    message = "the model output is not finite. Set a different `mixed_precision`"
    if isinstance(columns, FeatureColumns) and columns.dtype == "float16":
        message = (
            "a feature is not finite, or above 65,504, the largest number in float16. Set "
            "`feature_dtype='float32'`"
        )
    overflow_row = {"error": message}
    rows = columns.build_rows(outputs)
    are_finite = find_finite(outputs).tolist()
    return [
        row if is_finite else overflow_row for row, is_finite in zip(rows, are_finite, strict=True)
    ]

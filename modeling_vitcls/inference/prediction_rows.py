"""Predictions of a model as rows with named columns.

model                       columns
one label per image         label, probability, label_2, probability_2, ... up to --top-k; distance (to the nearest
                            class) and unknown, if the model has class statistics
several labels per image    labels, probabilities: lists
several or added tasks      the same for each task: <task>_label, <task>_probability, ...
any, with --features        features: a list of D numbers, or one list per token if there are several tokens;
                            several features have a column each, such as `cls` and `mean@6`

The first columns are `index` (index in the input) and `image`, and the last column is `error`.
outputs.py writes the rows. Each kind of model has a class with the attribute `columns`, a dict of
column types. The method `predict` returns a dict of `float32` outputs [B, ...] for images [B, C, H,
W], and `build_rows` converts the outputs to rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from transformers import PreTrainedModel

from ..model.extra_heads_vitcls import ExtraHead
from ..model.token_layout_vitcls import COUNT_FIELDS
from .image_pass import find_finite


Row = dict[str, Any]
DISTANCE = "distance"  # Column and output with the distance to the nearest class


# Labels -------------------------------------------------------------------------------------------


Label = tuple[str, float]  # Name and probability
# Default minimum probability of a predicted label in multi-label classification
DEFAULT_THRESHOLD = 0.5


def has_several_labels(head: ExtraHead) -> bool:
    """Check whether an image has any number of the labels of a head."""
    return head.problem_type == "multi_label_classification"


def select_labels(
    logits: torch.Tensor, head: ExtraHead, max_labels: int | None
) -> list[list[Label]]:
    """Select the most probable labels of each image in order, given logits [B, num_labels].

    If images have several labels, they are those whose probability is at least the threshold of the
    head.
    """
    lowest = 0.0
    if has_several_labels(head):
        lowest = DEFAULT_THRESHOLD if head.threshold is None else head.threshold
        probabilities = logits.float().sigmoid()
    else:
        probabilities = logits.float().softmax(dim=1)

    ranked = probabilities.sort(dim=1, descending=True, stable=True)
    values = ranked.values[:, :max_labels].tolist()
    indices = ranked.indices[:, :max_labels].tolist()
    labels = []
    for image_values, image_indices in zip(values, indices, strict=True):
        pairs = zip(image_values, image_indices, strict=True)
        # Not `value >= lowest`: probabilities that are not numbers are found later, with the image
        labels.append([(head.labels[index], value) for value, index in pairs if not value < lowest])
    return labels


def get_logits_by_task(outputs: Any) -> dict[str, torch.Tensor]:
    """Map each task to its logits [B, num_labels]. The task of a classifier has an empty name."""
    logits = getattr(outputs, "logits", {})
    by_task = logits if isinstance(logits, dict) else {"": logits}
    return {**by_task, **(getattr(outputs, "task_logits", None) or {})}


def name_column(task: str, name: str) -> str:
    """Name a column of a task. The task of a classifier has an empty name."""
    return f"{task}_{name}" if task else name


def list_endings(head: ExtraHead, top_k: int | None) -> list[str]:
    """List how the columns of the most probable labels end: "", "_2", "_3", ..."""
    return ["", *(f"_{rank}" for rank in range(2, min(top_k or 1, len(head.labels)) + 1))]


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
        self.top_k = top_k
        self.heads = heads
        # The layers that the distance reads; none without class statistics of these weights
        self.has_distance = bool(getattr(model, "distance_layers", ()))
        self.columns: dict[str, pa.DataType] = {}

        for task, head in self.heads.items():
            if has_several_labels(head):
                self.columns[name_column(task, "labels")] = pa.list_(pa.string())
                self.columns[name_column(task, "probabilities")] = pa.list_(pa.float32())
            else:
                for end in list_endings(head, top_k):
                    self.columns[name_column(task, f"label{end}")] = pa.string()
                    self.columns[name_column(task, f"probability{end}")] = pa.float32()

        if self.has_distance:
            self.columns[DISTANCE] = pa.float32()
        if self.has_distance and model.config.distance_threshold is not None:
            self.columns["unknown"] = pa.bool_()

    def predict(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the logits [B, num_labels] of each task."""
        outputs: Any = self.model(pixel_values)
        logits = get_logits_by_task(outputs)
        tensors = {task: logits[task].float() for task in self.heads}
        if self.has_distance:
            tensors[DISTANCE] = outputs.distance.float()[:, None]
        return tensors

    def build_rows(self, outputs: dict[str, torch.Tensor]) -> list[Row]:
        """Build one row per image with the most probable labels."""
        values: dict[str, Sequence[Any]] = {}
        for task, head in self.heads.items():
            max_labels = None if has_several_labels(head) else 1
            images = select_labels(outputs[task], head, self.top_k or max_labels)
            names = [[name for name, _ in labels] for labels in images]
            probabilities = [[value for _, value in labels] for labels in images]
            if has_several_labels(head):
                values[name_column(task, "labels")] = names
                values[name_column(task, "probabilities")] = probabilities
            else:
                for rank, end in enumerate(list_endings(head, self.top_k)):
                    values[name_column(task, f"label{end}")] = [each[rank] for each in names]
                    values[name_column(task, f"probability{end}")] = [
                        each[rank] for each in probabilities
                    ]

        if self.has_distance:
            values[DISTANCE] = outputs[DISTANCE][:, 0].tolist()
        if "unknown" in self.columns:
            threshold = self.model.config.distance_threshold
            values["unknown"] = [distance > threshold for distance in values[DISTANCE]]
        return build_rows({name: values[name] for name in self.columns})


# Features -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Feature:
    """The tokens of a group, or the mean of the patches, of a layer after the final norm."""

    group: str
    layer: int | None  # Number of the layer, starting from 1; None for the last layer
    num_tokens: int

    @classmethod
    def from_name(cls, name: str, config: Any) -> "Feature":
        """Parse a name such as `cls` or `cls@6`.

        Raise ValueError if the model has no such tokens or layer.
        """
        token_counts = {
            **dict(zip(COUNT_FIELDS, config.token_counts, strict=True)),
            "mean": 1,
            "patches": math.prod(config.grid_size),
        }
        group, _, layer = name.partition("@")
        choices = [choice for choice, count in token_counts.items() if count]
        layers = [str(number + 1) for number in range(config.num_hidden_layers)]
        if group not in choices or (layer or layers[0]) not in layers:
            raise ValueError(
                f"`features={name!r}` requires tokens and a layer of the model, which has only "
                f"{', '.join(choices)} and {len(layers)} layers. Set "
                f"`features='{choices[0]}@{len(layers)}'`"
            )
        return cls(group, int(layer) if layer else None, token_counts[group])

    def select(self, encoder: Any, outputs: Any) -> torch.Tensor:
        """Select the feature [B, D], or [B, n, D] if there are n > 1 tokens."""
        tokens = outputs.last_hidden_state
        if self.layer is not None:
            tokens = outputs.hidden_states[self.layer]
            tokens = tokens if encoder.layernorm is None else encoder.layernorm(tokens)
        group = "patches" if self.group == "mean" else self.group
        tokens = tokens[:, getattr(encoder.config.token_layout, group)]
        if self.group == "mean":
            return tokens.mean(dim=1)
        return tokens[:, 0] if self.num_tokens == 1 else tokens


class FeatureColumns:
    """Output columns with features.

    A single feature is in `features`; several have one column each, such as `cls` and `mean@6`.
    Raise ValueError if the model has no such tokens.
    """

    def __init__(self, model: PreTrainedModel, names: Sequence[str], dtype: str) -> None:
        self.encoder = model.base_model
        columns = ["features"] if len(names) == 1 else names
        self.features = {
            column: Feature.from_name(name, model.config)
            for column, name in zip(columns, names, strict=True)
        }
        self.dtype = getattr(torch, dtype)
        arrow_type = pa.type_for_alias(dtype)
        self.columns = {}
        for name, feature in self.features.items():
            self.columns[name] = pa.list_(arrow_type)  # A feature of one token is one list
            if feature.num_tokens > 1:
                self.columns[name] = pa.list_(self.columns[name])

    def predict(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute each feature as [B, D], or [B, n, D] if there are n > 1 tokens."""
        has_layers = any(feature.layer is not None for feature in self.features.values())
        num_tokens = None if has_layers else self.count_special_tokens()
        outputs = self.encoder(
            pixel_values, output_hidden_states=has_layers, num_output_tokens=num_tokens
        )
        return {
            name: feature.select(self.encoder, outputs).to(self.dtype)
            for name, feature in self.features.items()
        }

    def count_special_tokens(self) -> int | None:
        """Count the leading special tokens that contain all features; None if patches do.

        The last layer computes only these tokens.
        """
        config: Any = self.encoder.config
        groups = {feature.group for feature in self.features.values()}
        if groups & {"mean", "patches"} or not config.can_trim_last_layer:
            return None
        return max(getattr(config.token_layout, group).stop for group in groups)

    def build_rows(self, outputs: dict[str, torch.Tensor]) -> list[Row]:
        """Build one row per image with the features.

        A feature is one array, or a list with one array per token.
        """
        values: dict[str, Sequence[Any]] = {}
        for name, output in outputs.items():
            array = output.cpu().numpy()
            values[name] = list(array) if array.ndim == 2 else [list(tokens) for tokens in array]
        return build_rows(values)


# Rows ---------------------------------------------------------------------------------------------


PredictionColumns = LabelColumns | FeatureColumns


def build_rows(values: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Build a row for each image, given the values of each column."""
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


@torch.inference_mode()
def try_predict(
    columns: PredictionColumns, pixel_values: torch.Tensor
) -> dict[str, torch.Tensor] | str:
    """Compute the outputs [B, ...] for images [B, C, H, W].

    If the model does not support the images, return the reason.
    """
    try:
        return columns.predict(pixel_values)
    except ValueError as error:  # Sizes or channels that the model does not support
        return str(error)


def build_checked_rows(
    columns: PredictionColumns, outputs: dict[str, torch.Tensor] | str | None, num_images: int
) -> list[Row]:
    """Build a row for each image, given what `try_predict` returns; without images, None."""
    if not isinstance(outputs, dict):
        return [{"error": outputs}] * num_images
    message = "the model output is not finite. Set a different `mixed_precision`"
    if isinstance(columns, FeatureColumns) and columns.dtype == torch.float16:
        message = (
            "a feature is not finite, or above 65,504, the largest number in float16. Set "
            "`feature_dtype='float32'` (`dtype` of `EmbedImages`)"
        )
    overflow_row = {"error": message}
    rows = columns.build_rows(outputs)
    are_finite = find_finite(outputs, num_images).tolist()
    return [
        row if is_finite else overflow_row for row, is_finite in zip(rows, are_finite, strict=True)
    ]

"""Outputs of a model for many images, by name: `Predictions` of the tasks of a classifier, `Features` of an encoder.

A classifier with one task has one output, named "". All files in this folder determine predictions with
`predict_labels`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..configuration_vitcls import ViTCLSConfig
from ..data.labels import is_multi_label
from ..heads_vitcls import IGNORED_LABEL
from ..inference.prediction_rows import DEFAULT_THRESHOLD
from .model_utils import evaluation_mode, get_classifier_or_encoder, is_classifier


# Callable that returns batches: pixel_values [B, C, H, W] on the model's device, and labels or None. Labels are [B, A]
# with the columns of all tasks (see `Predictions`), or [B] if A is 1. Each call returns the same batches.
Batches = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor | None]]]
Outputs = dict[str, Any]  # name of a task or a feature -> `Predictions` or `Features`

MIN_IMAGES = 16  # minimum number of images required to judge an effect


@dataclass(frozen=True)
class Predictions:
    """Predictions of one task for all images."""

    logits: torch.Tensor  # [images, labels]
    predicted: torch.Tensor  # [images, 1], class indices; [images, labels] with values 0 or 1 for a multi-label model
    labels: torch.Tensor | None  # same shape as `predicted`; IGNORED_LABEL if unknown; None if no label is known

    def __len__(self) -> int:
        return len(self.predicted)

    @property
    def is_known(self) -> torch.Tensor:
        """Return a mask with the shape of `predicted` of the known labels."""
        return torch.zeros_like(self.predicted).bool() if self.labels is None else self.labels != IGNORED_LABEL

    def compute_accuracy(self) -> float | None:
        """Return the fraction of correct predictions among images with known labels, or None if no label is known."""
        if self.labels is None or not bool(self.is_known.any()):
            return None
        return (self.predicted == self.labels)[self.is_known].float().mean().item()

    def compute_chance(self) -> float | None:
        """Return the accuracy of predicting the most frequent label of each column, or None if no label is known."""
        if self.labels is None or self.compute_accuracy() is None:
            return None
        columns = [column[column != IGNORED_LABEL] for column in self.labels.unbind(dim=1)]
        counts = [column.unique(return_counts=True)[1].max().item() for column in columns if len(column)]
        return sum(counts) / sum(map(len, columns))

    def is_better_than_chance(self) -> bool | None:
        """Return whether the accuracy exceeds chance by more than 2 standard errors, or None if no label is known."""
        accuracy, chance = self.compute_accuracy(), self.compute_chance()
        if accuracy is None or chance is None:
            return None
        return accuracy > chance + 2 * math.sqrt(chance * (1 - chance) / int(self.is_known.any(dim=1).sum()))


@dataclass(frozen=True)
class Features:
    """One kind of features of an encoder: one tensor [vectors, D] per image."""

    vectors: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self.vectors)


@torch.no_grad()
def collect_outputs(model: Any, batches: Batches, hidden_indices: Sequence[int] = ()) -> Outputs:
    """Return the outputs for all images, on the CPU. The tokens at the sequence indices `hidden_indices` are hidden
    from attention."""
    batch_outputs, module = [], get_classifier_or_encoder(model)
    with evaluation_mode(model):
        for pixel_values, labels in batches():
            mask = build_hiding_mask(model, pixel_values, hidden_indices) if hidden_indices else None
            batch_outputs.append(extract_outputs(model, module(pixel_values, attention_mask=mask), labels))
    return join_outputs(batch_outputs)


def extract_outputs(model: Any, outputs: Any, labels: torch.Tensor | None = None) -> Outputs:
    """Return the outputs of a batch, on the CPU. `outputs` is the output of the classifier, or of the encoder inside
    any other model. The features of an encoder are "cls" and "distillation" (if there are such tokens), "pooled" (the
    pooler's output, or the mean of the patches) and "patches".

    Raises:
        ValueError: if the shape of the labels does not match the predictions.
    """
    config = model.config
    if not is_classifier(model):
        layout, states = config.token_layout, outputs.last_hidden_state
        pooled = getattr(outputs, "pooler_output", None)
        pooled = states[:, layout.patches].mean(dim=1) if pooled is None else pooled
        features = {
            "cls": states[:, layout.cls],
            "distillation": states[:, layout.distillation],
            "pooled": pooled.unsqueeze(1),
            "patches": states[:, layout.patches],
        }
        return {name: Features(list(rows.float().cpu())) for name, rows in features.items() if rows.shape[1]}
    logits_by_task = outputs.logits if isinstance(outputs.logits, dict) else {"": outputs.logits}
    predicted = {task: predict_labels(logits, config).cpu() for task, logits in logits_by_task.items()}
    num_columns = sum(columns.shape[1] for columns in predicted.values())
    label_columns: Sequence[torch.Tensor | None] = [None] * len(predicted)
    if labels is not None:
        shape = [len(next(iter(predicted.values()))), num_columns]
        if len(labels) != shape[0] or labels.numel() != math.prod(shape):
            raise ValueError(
                f"The predictions have shape {shape} [images, labels per image], but the labels have shape "
                f"{list(labels.shape)}. Pass one label per prediction."
            )
        label_columns = labels.cpu().view(shape).split([columns.shape[1] for columns in predicted.values()], dim=1)
    return {
        task: Predictions(logits.float().cpu(), predicted[task], columns)
        for (task, logits), columns in zip(logits_by_task.items(), label_columns, strict=True)
    }


def join_outputs(batches: Sequence[Outputs]) -> Outputs:
    """Return the outputs of all batches. Raise ValueError if there are no batches."""
    if not batches:
        raise ValueError("Ablation requires at least one image, but there are no images. Pass one or more images.")
    joined: Outputs = {}
    for name, first in batches[0].items():
        parts = [batch[name] for batch in batches]
        if isinstance(first, Features):
            joined[name] = Features([row for part in parts for row in part.vectors])
            continue
        labels = None if any(part.labels is None for part in parts) else torch.cat([part.labels for part in parts])
        logits, predicted = (torch.cat([getattr(part, key) for part in parts]) for key in ("logits", "predicted"))
        joined[name] = Predictions(logits, predicted, labels)
    return joined


def count_images(outputs: Outputs) -> int:
    """Return the number of images."""
    return len(next(iter(outputs.values())))


def build_hiding_mask(model: Any, pixel_values: torch.Tensor, hidden_indices: Sequence[int]) -> torch.Tensor:
    """Return an attention mask [B, N] that hides the tokens at sequence indices `hidden_indices` from all tokens."""
    shape = len(pixel_values), count_tokens(model, pixel_values)
    mask = torch.ones(shape, dtype=torch.long, device=pixel_values.device)
    mask[:, list(hidden_indices)] = 0
    return mask


def count_tokens(model: Any, pixel_values: torch.Tensor) -> int:
    """Return the number of tokens of each image in a batch [B, C, H, W]."""
    grid_size = model.base_model.embeddings.patch_embeddings.get_grid_size(pixel_values)
    return model.config.token_layout.get_num_tokens(*grid_size)


# Labels --------------------------------------------------------------------------------------------------------------


def predict_labels(logits: torch.Tensor, config: ViTCLSConfig) -> torch.Tensor:
    """Return the predicted labels (`Predictions.predicted`) for the logits [B, labels] of a task. A multi-label model
    predicts each label whose probability is at least DEFAULT_THRESHOLD."""
    if is_multi_label(config):
        return (logits.float().sigmoid() >= DEFAULT_THRESHOLD).long()
    return logits.argmax(dim=-1, keepdim=True)


def encode_label(label: Any, config: ViTCLSConfig) -> torch.Tensor:
    """Return a dataset label (data/images.py) as a tensor [A] with the columns of all tasks. None becomes
    IGNORED_LABEL. A class index for a multi-label model means that only this label applies."""
    if config.tasks:
        task_labels = label or {}
        return torch.tensor([task_labels.get(task, IGNORED_LABEL) for task in config.task_labels()])
    if not is_multi_label(config):
        return torch.tensor([IGNORED_LABEL if label is None else int(label)])
    if isinstance(label, list | tuple):
        return torch.tensor([int(value) for value in label])
    if label is None or label < 0:
        return torch.full((config.num_labels or 0,), IGNORED_LABEL)
    return torch.tensor([int(index == label) for index in range(config.num_labels or 0)])


def encode_labels(labels: Sequence[Any] | None, model: Any) -> torch.Tensor | None:
    """Return dataset labels as a tensor [images, A], or None if `labels` is None or the model is not a classifier."""
    if labels is None or not is_classifier(model):
        return None
    return torch.stack([encode_label(label, model.config) for label in labels])

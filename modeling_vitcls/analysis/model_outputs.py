"""Outputs of a model for many images: `Predictions` of a classifier, or `Features` of any other model.

All files in this folder determine predictions with `get_predicted_labels`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.neighbors import NearestNeighbors

from ..configuration_vitcls import ViTCLSConfig
from ..data.labels import is_multi_label
from ..heads_vitcls import IGNORED_LABEL
from ..inference.prediction_rows import DEFAULT_THRESHOLD
from .model_utils import evaluation_mode, get_classifier_or_encoder, is_classifier


# Callable that returns batches: pixel_values [B, C, H, W] on the model's device, and labels or None. Labels are [B, A]
# (see `Predictions`), or [B] if A is 1. Each call returns the same batches.
Batches = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor | None]]]

MIN_IMAGES = 16  # minimum number of images required to judge an effect
NUM_NEIGHBORS = 5  # number of nearest neighbors for the comparison of features


@dataclass(frozen=True)
class Predictions:
    """Predictions of a classifier for all images."""

    logits: torch.Tensor  # [images, labels], all tasks concatenated
    # [images, A], class indices. A is 1 for a single-label model and the number of tasks for a multi-task model (in
    # the order of `config.task_labels()`). For a multi-label model, A is the number of labels, and values are 0 or 1.
    predicted: torch.Tensor
    labels: torch.Tensor | None  # same shape as `predicted`; IGNORED_LABEL if unknown; None if no label is known

    def __len__(self) -> int:
        return len(self.predicted)

    def select(self, indices: Sequence[int]) -> "Predictions":
        """Return the predictions for the images at `indices`."""
        rows = list(indices)
        return Predictions(self.logits[rows], self.predicted[rows], None if self.labels is None else self.labels[rows])

    def compute_accuracy(self) -> float | None:
        """Return the fraction of correct predictions among images with known labels, or None if no label is known."""
        if self.labels is None or not bool((self.labels != IGNORED_LABEL).any()):
            return None
        return (self.predicted == self.labels)[self.labels != IGNORED_LABEL].float().mean().item()

    def compute_majority_accuracy(self) -> float | None:
        """Return the accuracy of predicting the most frequent label of each column, or None if no label is known."""
        if self.labels is None or self.compute_accuracy() is None:
            return None
        known_labels = [column[column != IGNORED_LABEL] for column in self.labels.unbind(dim=1)]
        counts = [column.unique(return_counts=True)[1].max().item() for column in known_labels if len(column)]
        return sum(counts) / sum(map(len, known_labels))

    def is_better_than_chance(self) -> bool | None:
        """Return whether the accuracy exceeds chance by more than 2 standard errors, or None if no label is known."""
        accuracy, chance = self.compute_accuracy(), self.compute_majority_accuracy()
        if self.labels is None or accuracy is None or chance is None:
            return None
        num_images = int((self.labels != IGNORED_LABEL).any(dim=1).sum())
        return accuracy > chance + 2 * math.sqrt(chance * (1 - chance) / num_images)


@dataclass(frozen=True)
class Features:
    """Features of an encoder: name -> one tensor [vectors, D] per image. The names are "cls" (if there are CLS
    tokens), "pooled" (the pooler's output, or the mean of the patches) and "patches"."""

    vectors: dict[str, list[torch.Tensor]]

    def __len__(self) -> int:
        return len(self.vectors["patches"])

    def select(self, indices: Sequence[int]) -> "Features":
        """Return copies of the features of the images at `indices`, so that the other features can be freed."""
        return Features({name: [rows[index].clone() for index in indices] for name, rows in self.vectors.items()})

    def find_neighbors(self) -> list[set[int]] | None:
        """Return the indices of the NUM_NEIGHBORS most similar other images for each image, or None if there are
        fewer than MIN_IMAGES images. Images are compared by their CLS tokens or, without CLS tokens, by pooled
        features."""
        if len(self) < MIN_IMAGES:
            return None
        rows = torch.stack([row.flatten() for row in self.vectors.get("cls", self.vectors["pooled"])]).numpy()
        neighbors = NearestNeighbors(n_neighbors=NUM_NEIGHBORS, metric="cosine").fit(rows)
        return [set(row) for row in neighbors.kneighbors(return_distance=False).tolist()]


@torch.no_grad()
def collect_outputs(model: Any, batches: Batches, hidden_indices: Sequence[int] = ()) -> Any:
    """Return `Predictions` of a classifier or `Features` of any other model for all images, on the CPU. The tokens at
    the sequence indices `hidden_indices` are hidden from attention."""
    batch_outputs, module = [], get_classifier_or_encoder(model)
    with evaluation_mode(model):
        for pixel_values, labels in batches():
            mask = build_hiding_mask(model, pixel_values, hidden_indices) if hidden_indices else None
            batch_outputs.append(extract_outputs(model, module(pixel_values, attention_mask=mask), labels))
    return join_outputs(batch_outputs)


def collect_predictions(model: Any, batches: Batches) -> Predictions:
    """Return the model's predictions for all images, on the CPU.

    Raises:
        ValueError: if the model has no classifier, there are no images, or labels have the wrong shape.
    """
    if not is_classifier(model):
        raise ValueError(
            "Ablation requires predictions, but this model has no classifier. Use a model with a classifier."
        )
    return collect_outputs(model, batches)


def extract_outputs(model: Any, outputs: Any, labels: torch.Tensor | None = None) -> Any:
    """Return `Predictions` or `Features` of a batch, on the CPU. `outputs` is the output of the classifier, or of the
    encoder inside any other model."""
    if not is_classifier(model):
        features = extract_features(outputs, model.config)
        return Features({name: list(vectors.float().cpu()) for name, vectors in features.items()})
    task_logits = list(outputs.logits.values()) if isinstance(outputs.logits, dict) else [outputs.logits]
    predicted = get_predicted_labels(task_logits, model.config).cpu()
    logits = torch.cat(task_logits, dim=-1).float().cpu()
    return Predictions(logits, predicted, None if labels is None else reshape_labels(labels, predicted))


def join_outputs(batches: Sequence[Any]) -> Any:
    """Return `Predictions` or `Features` of all batches. Raise ValueError if there are no batches."""
    if not batches:
        raise ValueError("Ablation requires at least one image, but there are no images. Pass one or more images.")
    if isinstance(batches[0], Features):
        names = batches[0].vectors
        return Features({name: [row for batch in batches for row in batch.vectors[name]] for name in names})
    labels = [batch.labels for batch in batches]
    return Predictions(
        torch.cat([batch.logits for batch in batches]),
        torch.cat([batch.predicted for batch in batches]),
        None if any(batch_labels is None for batch_labels in labels) else torch.cat(labels),
    )


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


def extract_features(outputs: Any, config: ViTCLSConfig) -> dict[str, torch.Tensor]:
    """Return the features [B, vectors, D] in the output of an encoder, by name (`Features`)."""
    layout, states = config.token_layout, outputs.last_hidden_state
    pooled = getattr(outputs, "pooler_output", None)
    if pooled is None:
        pooled = states[:, layout.patches].mean(dim=1)
    features = {"cls": states[:, layout.cls], "pooled": pooled.unsqueeze(1), "patches": states[:, layout.patches]}
    return {name: vectors for name, vectors in features.items() if vectors.shape[1]}


# Labels --------------------------------------------------------------------------------------------------------------


def get_predicted_labels(task_logits: list[torch.Tensor], config: ViTCLSConfig) -> torch.Tensor:
    """Return the predicted labels [B, A] (`Predictions.predicted`) for the logits [B, labels] of each task. A
    multi-label model predicts each label whose probability is at least DEFAULT_THRESHOLD."""
    if is_multi_label(config):
        return (task_logits[0].float().sigmoid() >= DEFAULT_THRESHOLD).long()
    return torch.stack([logits.argmax(dim=-1) for logits in task_logits], dim=-1)


def encode_label(label: Any, config: ViTCLSConfig) -> torch.Tensor:
    """Return a dataset label (data/images.py) as a tensor [A] (`Predictions.labels`). None becomes IGNORED_LABEL. A
    class index for a multi-label model means that only this label applies."""
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


def reshape_labels(labels: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Return labels [B, A] or [B] as [B, A] on the CPU. Raise ValueError if the shape of the labels does not match the
    predictions."""
    if labels.shape not in (predicted.shape, predicted.shape[:1]) or labels.numel() != predicted.numel():
        raise ValueError(
            f"The predictions have shape {list(predicted.shape)} [images, labels per image], but the labels have "
            f"shape {list(labels.shape)}. Pass one label per prediction."
        )
    return labels.cpu().view_as(predicted)

"""Training objectives.

    batch -> inputs of the model and labels -> model -> loss per kind of labels (-> distillation from a teacher)

Every loss is a mean over the images of the batch, and the terms of different images are independent, so that
accumulated batches have exactly the loss of one large batch.

The loss of the distillation token against a teacher follows DeiT (Touvron et al. 2021, arXiv 2012.12877, section 4):

    total = (1 - alpha) * loss of the CLS head on the labels + alpha * distillation loss

The teacher is in teacher.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.batches import Normalizer
from ..heads_vitcls import IGNORED_LABEL


Batch = dict[str, Any]
Losses = dict[str, torch.Tensor]
Objective = Callable[[nn.Module, Batch], Losses]  # returns "loss", which is minimized, and losses to log
LabelLoss = Callable[[Any, Any], torch.Tensor]  # computes the mean loss from logits and labels


# Model inputs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PixelInputs:
    """Convert batches with pixels [B, C, H, W], from 0 to 255, to normalized model inputs, optionally mixed."""

    normalize: Normalizer
    mixer: Callable[[Any, Any], tuple[Any, Any]] | None = None

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with the model's `inputs`; `pixels` and `labels` are mixed if there is a mixer."""
        if self.mixer is not None:
            pixels, labels = self.mixer(batch["pixels"], batch["labels"])
            batch = batch | {"pixels": pixels, "labels": labels}
        return batch | {"inputs": {"pixel_values": self.normalize(batch["pixels"])}}


def get_feature_inputs(batch: Batch) -> Batch:
    """Return the batch with its cached features as `inputs` (linear probing)."""
    return batch | {"inputs": {"features": batch["features"]}}


# Losses of a head, by kind of labels ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SingleLabelLoss:
    """Cross-entropy of logits [B, L] against classes [B] or probabilities [B, L]."""

    label_smoothing: float
    class_weights: torch.Tensor | None = None  # [L], 1 on average

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean over the images. The mean of weighted terms is not normalized by the sum of the weights, so
        that the terms stay independent."""
        terms = nn.functional.cross_entropy(
            logits.float(), labels, label_smoothing=self.label_smoothing, reduction="none"
        )  # [B]
        if self.class_weights is None:
            return terms.mean()
        weights = labels @ self.class_weights if labels.is_floating_point() else self.class_weights[labels]
        return (weights * terms).mean()


@dataclass(frozen=True)
class MultiLabelLoss:
    """Binary cross-entropy of logits [B, L] against 0 or 1 for each label [B, L], averaged over images
    and labels."""

    label_smoothing: float

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        targets = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
        return nn.functional.binary_cross_entropy_with_logits(logits.float(), targets)


@dataclass(frozen=True)
class MultiTaskLoss:
    """Sum over tasks of the cross-entropy of {task: logits [B, L]} against {task: classes [B]}; the label -100 is
    ignored.

    The mean of each task is over all images of the batch, so that accumulated batches have the loss of one large
    batch. `ViTCLSForMultiTaskClassification` (used by Trainer) divides by the number of labeled images instead. Both
    losses are equal if no labels are missing.
    """

    label_smoothing: float

    def __call__(self, logits: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the sum over tasks of the mean over all images; the loss of an image without a label is 0."""
        settings: dict[str, Any] = {
            "label_smoothing": self.label_smoothing,
            "ignore_index": IGNORED_LABEL,
            "reduction": "none",
        }
        terms = [nn.functional.cross_entropy(logits[task].float(), labels[task], **settings).mean() for task in logits]
        return torch.stack(terms).sum()


# Objectives ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classification:
    """Label loss, averaged over the heads. Without a teacher, the distillation head is trained on the labels like the
    class head (DeiT, arXiv 2012.12877, table 3, "no distillation")."""

    inputs: Callable[[Batch], Batch]
    label_loss: LabelLoss

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        batch = self.inputs(batch)
        outputs = model(**batch["inputs"])
        losses = [self.label_loss(logits, batch["labels"]) for logits in get_supervised_logits(outputs)]
        return {"loss": torch.stack(losses).mean()}


@dataclass(frozen=True)
class Distillation:
    """Distillation (DeiT, section 4): the CLS head is trained on labels, and the distillation head is trained on a
    teacher's logits for the same pixels."""

    inputs: Callable[[Batch], Batch]
    label_loss: LabelLoss
    compute_teacher_logits: Callable[[Batch], torch.Tensor]  # returns logits [B, L]
    kind: str
    alpha: float
    tau: float

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        """Return the loss of one batch on the model's device, and the losses of both heads."""
        batch = self.inputs(batch)
        outputs = model(**batch["inputs"])
        label_loss = self.label_loss(outputs.cls_logits, batch["labels"])
        teacher_loss = compute_distillation_loss(
            self.kind, outputs.distillation_logits, self.compute_teacher_logits(batch), self.tau
        )
        loss = (1 - self.alpha) * label_loss + self.alpha * teacher_loss
        return {"loss": loss, "label_loss": label_loss, "distillation_loss": teacher_loss}


@dataclass(frozen=True)
class MaskedImageModeling:
    """Reconstruction of masked patches; the model computes the loss (MAE, SimMIM)."""

    normalize: Normalizer
    mask_generator: Callable[[int, torch.device], torch.Tensor]  # masks [B, patches]; True: masked

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        pixels = batch["pixels"]
        masks = self.mask_generator(len(pixels), pixels.device)
        return {"loss": model(pixel_values=self.normalize(pixels), bool_masked_pos=masks).loss}


def get_supervised_logits(outputs: Any) -> list[Any]:
    """Return the logits to compare with labels: the logits of each head, or one dictionary for all tasks."""
    if isinstance(outputs.logits, dict):
        return [outputs.logits]
    return [logits for logits in (outputs.cls_logits, outputs.distillation_logits) if logits is not None]


def compute_distillation_loss(
    kind: str, student_logits: torch.Tensor, teacher_logits: torch.Tensor, tau: float
) -> torch.Tensor:
    """Return the mean loss of the distillation head's logits [B, L] against the teacher's logits [B, L], a `float32`
    scalar. Raise ValueError if the kind is unknown, or the logits have different shapes.

    "hard" is the cross-entropy against the teacher's predicted label (equation 3). "soft" is tau² times the
    Kullback-Leibler divergence between the softened probabilities of teacher and student (equation 2): the sum of
    p_teacher * log(p_teacher / p_student) (Hinton et al. 2015, arXiv 1503.02531). The factor tau² keeps the size of
    the gradients independent of the temperature tau.
    """
    if kind not in ("soft", "hard"):
        raise ValueError(f"unknown distillation {kind!r}. Use soft or hard")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"the teacher's logits have the shape {tuple(teacher_logits.shape)}, but the student's logits have "
            f"{tuple(student_logits.shape)}. Use a teacher with the same labels"
        )
    student, teacher = student_logits.float(), teacher_logits.float()
    if kind == "hard":
        return nn.functional.cross_entropy(student, teacher.argmax(dim=-1))
    student, teacher = ((logits / tau).log_softmax(dim=-1) for logits in (student, teacher))
    return tau**2 * nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)

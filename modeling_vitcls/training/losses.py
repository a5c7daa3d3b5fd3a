"""What the loop minimises.

    batch -> inputs of the model and labels -> model -> loss per kind of labels (-> distillation from a teacher)

Every loss is a mean over the pictures of the batch, of terms that do not depend on the other pictures, so that
accumulated batches add up to exactly the large one.

Losses of the distillation token against a teacher (DeiT, Touvron et al. 2021, arXiv 2012.12877, section 4).

    total = (1 - alpha) * loss of the CLS head against the labels + alpha * distillation_loss

Each is a mean over the pictures of the batch, of terms that do not depend on the other pictures. The teacher itself is
in teacher.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..data.batches import Normaliser
from ..heads_vitcls import IGNORED_LABEL


Batch = dict[str, Any]
Losses = dict[str, torch.Tensor]
Objective = Callable[[nn.Module, Batch], Losses]  # "loss" is minimised, the others are logged
LabelLoss = Callable[[Any, Any], torch.Tensor]  # answers of a head, labels -> mean loss


# From batches to what a model takes ----------------------------------------------------------------------------------


class PixelInputs:
    """Pixels [B, C, H, W] of 0 to 255, mixed where a mixer is given; the model takes them normalised."""

    def __init__(self, normalise: Normaliser, mixer: Callable[[Any, Any], tuple[Any, Any]] | None = None) -> None:
        self.normalise = normalise
        self.mixer = mixer

    def __call__(self, batch: Batch) -> Batch:
        """The batch with `inputs` for the model, and `pixels` and `labels` as they were mixed."""
        if self.mixer is not None:
            pixels, labels = self.mixer(batch["pixels"], batch["labels"])
            batch = batch | {"pixels": pixels, "labels": labels}
        return batch | {"inputs": {"pixel_values": self.normalise(batch["pixels"])}}


def feature_inputs(batch: Batch) -> Batch:
    """The batch with its cached features as `inputs` (linear probing)."""
    return batch | {"inputs": {"features": batch["features"]}}


# Losses of a head, by kind of labels ---------------------------------------------------------------------------------


class SingleLabelLoss:
    """Cross-entropy of logits [B, L] against classes [B] or probabilities [B, L]."""

    def __init__(self, label_smoothing: float, class_weights: torch.Tensor | None = None) -> None:
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights  # [L], 1 on average

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean over the pictures; weighted terms are not divided by their weights, which would couple them."""
        terms = nn.functional.cross_entropy(
            logits.float(), labels, label_smoothing=self.label_smoothing, reduction="none"
        )  # [B]
        if self.class_weights is None:
            return terms.mean()
        weights = labels @ self.class_weights if labels.is_floating_point() else self.class_weights[labels]
        return (weights * terms).mean()


class MultiLabelLoss:
    """Binary cross-entropy of logits [B, L] against 0 or 1 for each label [B, L], averaged over the labels."""

    def __init__(self, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean over pictures and labels."""
        targets = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
        return nn.functional.binary_cross_entropy_with_logits(logits.float(), targets)


class MultiTaskLoss:
    """Sum over tasks of the cross-entropy of {task: logits [B, L]} against {task: classes [B]}; -100 is left out."""

    def __init__(self, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, logits: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sum of the tasks' means over all pictures, those without a label for the task counting as 0."""
        terms = [
            nn.functional.cross_entropy(
                logits[task].float(),
                labels[task],
                label_smoothing=self.label_smoothing,
                ignore_index=IGNORED_LABEL,
                reduction="none",
            ).mean()
            for task in logits
        ]
        return torch.stack(terms).sum()


# Objectives ----------------------------------------------------------------------------------------------------------


class Classification:
    """The labels' loss, averaged over the heads: a distillation head without a teacher learns, as the class head
    does, from the labels (DeiT, arXiv 2012.12877, table 3, "no distillation")."""

    def __init__(self, inputs: Callable[[Batch], Batch], label_loss: LabelLoss) -> None:
        self.inputs = inputs
        self.label_loss = label_loss

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        """The loss of one batch on the model's device."""
        batch = self.inputs(batch)
        outputs = model(**batch["inputs"])
        losses = [self.label_loss(answer, batch["labels"]) for answer in answers(outputs)]
        return {"loss": torch.stack(losses).mean()}


class Distillation:
    """CLS learns from labels, the distillation token from a teacher that sees the same pixels (DeiT, section 4)."""

    def __init__(
        self,
        inputs: Callable[[Batch], Batch],
        label_loss: LabelLoss,
        teacher: Callable[[Batch], torch.Tensor],
        kind: str,
        alpha: float,
        tau: float,
    ) -> None:
        self.inputs = inputs
        self.label_loss = label_loss
        self.teacher = teacher  # batch -> logits [B, L]
        self.kind = kind
        self.alpha = alpha
        self.tau = tau

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        """The loss of one batch on the model's device, and its two parts."""
        batch = self.inputs(batch)
        outputs = model(**batch["inputs"])
        label_loss = self.label_loss(outputs.cls_logits, batch["labels"])
        from_teacher = distillation_loss(self.kind, outputs.distillation_logits, self.teacher(batch), self.tau)
        loss = (1 - self.alpha) * label_loss + self.alpha * from_teacher
        return {"loss": loss, "label_loss": label_loss, "distillation_loss": from_teacher}


class MaskedImages:
    """Reconstruction of hidden patches; the model has the loss (MAE, SimMIM)."""

    def __init__(self, normalise: Normaliser, choose_masks: Callable[[int, torch.device], torch.Tensor]) -> None:
        self.normalise = normalise
        self.choose_masks = choose_masks  # batch size, device -> [B, patches], true where hidden

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        """The loss of one batch on the model's device."""
        pixels = batch["pixels"]
        masks = self.choose_masks(len(pixels), pixels.device)
        return {"loss": model(pixel_values=self.normalise(pixels), bool_masked_pos=masks).loss}


def answers(outputs: Any) -> list[Any]:
    """The answers that labels teach: of each head, or of all tasks together."""
    if isinstance(outputs.logits, dict):
        return [outputs.logits]
    return [logits for logits in (outputs.cls_logits, outputs.distillation_logits) if logits is not None]


def distillation_loss(
    kind: str, student_logits: torch.Tensor, teacher_logits: torch.Tensor, tau: float
) -> torch.Tensor:
    """Mean loss of the distillation head's logits [B, L] against the teacher's [B, L]; a scalar, `float32`.

    Args:
        kind: "hard": against the teacher's most probable label; "soft": against its probabilities.
        tau: temperature of "soft"; "hard" has none.

    Raises:
        ValueError: for an unknown kind, or logits of different shapes.
    """
    if kind not in LOSSES:
        raise ValueError(f"unknown distillation {kind!r}: use {' or '.join(LOSSES)}")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"the teacher's logits have the shape {tuple(teacher_logits.shape)} and the student's "
            f"{tuple(student_logits.shape)}: give a teacher of the same labels"
        )
    return LOSSES[kind](student_logits.float(), teacher_logits.float(), tau)


def hard_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, tau: float) -> torch.Tensor:
    """Cross-entropy against the teacher's answer (equation 3)."""
    return nn.functional.cross_entropy(student_logits, teacher_logits.argmax(dim=-1))


def soft_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, tau: float) -> torch.Tensor:
    """tau² times the divergence of the student's softened probabilities from the teacher's (equation 2).

    The teacher's are the reference: sum of p_teacher * log(p_teacher / p_student) (Hinton et al. 2015, arXiv
    1503.02531). tau² keeps the size of the gradients when tau changes.
    """
    student = nn.functional.log_softmax(student_logits / tau, dim=-1)
    teacher = nn.functional.log_softmax(teacher_logits / tau, dim=-1)
    return tau**2 * nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {"soft": soft_loss, "hard": hard_loss}

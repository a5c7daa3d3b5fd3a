"""Training objectives.

    batch -> model inputs and labels -> model -> loss for the kind of labels (-> distillation from a teacher)

Every loss is a mean over images, and the loss of one image does not depend on other images. The mean loss of
accumulated batches is therefore equal to the loss of one large batch, up to rounding.

The loss with a teacher and labels follows DeiT (Touvron et al. 2021, arXiv 2012.12877, section 4):

    total = (1 - alpha) * loss of the CLS head on the labels + alpha * distillation loss

teacher.py implements the teachers, and distillation.py the distillation of their features without labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.batches import Batch, Normalizer
from ..heads_vitcls import IGNORED_LABEL


Losses = dict[str, torch.Tensor]
Objective = Callable[[nn.Module, Batch], Losses]  # returns the "loss" to minimize, and other losses to log
LabelLossFunction = Callable[[Any, Any], torch.Tensor]  # computes the mean loss from logits and labels


# Model inputs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PixelTransform:
    """Transform that converts pixels [B, C, H, W] in [0, 255] to normalized model inputs. If `mixer` is set, images
    and labels are mixed first."""

    normalize: Normalizer
    mixer: Callable[[Any, Any], tuple[Any, Any]] | None = None
    num_output_tokens: int | None = None  # number of tokens that the last layer computes; default: all

    def __call__(self, batch: Batch) -> Batch:
        """Return a copy of the batch that also contains the model's `inputs`."""
        if self.mixer is not None:
            pixels, labels = self.mixer(batch["pixels"], batch["labels"])
            batch = batch | {"pixels": pixels, "labels": labels}
        inputs = {"pixel_values": self.normalize(batch["pixels"]), "num_output_tokens": self.num_output_tokens}
        return batch | {"inputs": inputs}


# Losses of a head, by kind of labels ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SingleLabelLoss:
    """Cross-entropy of logits [B, L] against classes [B] or probabilities [B, L]."""

    label_smoothing: float
    class_weights: torch.Tensor | None = None  # class weights [L] with a mean of 1

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean loss over images. Weighted losses are not divided by the sum of the weights, because the
        loss of one image would otherwise depend on the labels of other images."""
        image_losses = nn.functional.cross_entropy(
            logits.float(), labels, label_smoothing=self.label_smoothing, reduction="none"
        )  # [B]
        if self.class_weights is None:
            return image_losses.mean()
        image_weights = labels @ self.class_weights if labels.is_floating_point() else self.class_weights[labels]
        return (image_weights * image_losses).mean()


@dataclass(frozen=True)
class MultiLabelLoss:
    """Binary cross-entropy of logits [B, L] against binary labels [B, L], averaged over images and labels."""

    label_smoothing: float

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        targets = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
        return nn.functional.binary_cross_entropy_with_logits(logits.float(), targets)


@dataclass(frozen=True)
class MultiTaskLoss:
    """Sum over tasks of the cross-entropy of {task: logits [B, L]} against {task: classes [B]}; the label -100 is
    ignored.

    The loss of each task is averaged over all images of the batch, so that the mean loss of accumulated batches equals
    the loss of one large batch. In contrast, `ViTCLSForMultiTaskClassification`, which Trainer uses, averages over the
    labeled images. The two losses are equal if no labels are missing.
    """

    label_smoothing: float

    def __call__(self, logits: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the sum of the mean losses of all tasks. The loss of an image without a label is 0."""
        loss = nn.CrossEntropyLoss(ignore_index=IGNORED_LABEL, label_smoothing=self.label_smoothing, reduction="none")
        return torch.stack([loss(logits[task].float(), labels[task]).mean() for task in logits]).sum()


# Objectives ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassificationObjective:
    """Label loss, averaged over the heads. The CLS head and the distillation head are trained on the labels (DeiT,
    arXiv 2012.12877)."""

    prepare_batch: Callable[[Batch], Batch]  # adds the model's "inputs"
    label_loss: LabelLossFunction

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        batch = self.prepare_batch(batch)
        outputs = model(**batch["inputs"])
        if isinstance(outputs.logits, dict):  # multi-task model
            return {"loss": self.label_loss(outputs.logits, batch["labels"])}
        head_logits = [logits for logits in (outputs.cls_logits, outputs.distillation_logits) if logits is not None]
        return {"loss": torch.stack([self.label_loss(logits, batch["labels"]) for logits in head_logits]).mean()}


@dataclass(frozen=True)
class DistillationObjective:
    """Distillation from the outputs of teachers for the same pixels, with or without labels.

    With labels (DeiT, section 4), the CLS head is trained on labels, and the distillation head on a teacher's logits.
    Without labels, the model's outputs are trained on the features of several teachers (distillation.py).
    """

    prepare_batch: Callable[[Batch], Batch]  # adds the model's "inputs"
    compute_targets: Callable[[Batch], Any]  # returns the outputs of the teachers
    distillation_loss: Callable[[Any, Any], torch.Tensor]  # mean loss from the model's outputs and targets
    label_loss: LabelLossFunction | None = None
    alpha: float = 1.0  # weight of the distillation loss; the weight of the label loss is 1 - alpha

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        """Return the total loss, and its parts if there are labels, of a batch that is on the model's device."""
        batch = self.prepare_batch(batch)
        outputs = model(**batch["inputs"])
        distillation_loss = self.distillation_loss(outputs, self.compute_targets(batch))
        if self.label_loss is None:
            return {"loss": distillation_loss}
        label_loss = self.label_loss(outputs.cls_logits, batch["labels"])
        loss = (1 - self.alpha) * label_loss + self.alpha * distillation_loss
        return {"loss": loss, "label_loss": label_loss, "distillation_loss": distillation_loss}


def compute_distillation_loss(
    kind: str, student_logits: torch.Tensor, teacher_logits: torch.Tensor, tau: float
) -> torch.Tensor:
    """Return the mean loss of the distillation head's logits [B, L] against the teacher's logits [B, L], as a
    `float32` scalar.

    The "hard" loss is the cross-entropy against the teacher's predicted label (equation 3). The "soft" loss is tau²
    times the Kullback-Leibler divergence between the softened probabilities of teacher and student (equation 2). This
    divergence is the sum of p_teacher * log(p_teacher / p_student) (Hinton et al. 2015, arXiv 1503.02531). The factor
    tau² keeps the magnitude of the gradients roughly independent of the temperature tau.
    """
    student_logits, teacher_logits = student_logits.float(), teacher_logits.float()
    if kind == "hard":
        return nn.functional.cross_entropy(student_logits, teacher_logits.argmax(dim=-1))
    student_log_probs = (student_logits / tau).log_softmax(dim=-1)
    teacher_log_probs = (teacher_logits / tau).log_softmax(dim=-1)
    return tau**2 * nn.functional.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)

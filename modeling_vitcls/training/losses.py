"""Training objectives.

    batch -> model inputs and labels -> model -> loss for the kind of labels (-> distillation from a teacher)

Every loss is a mean over images, and the loss of one image does not depend on other images. The
mean loss of accumulated batches is therefore equal to the loss of one large batch, up to rounding.

With a teacher, half of the loss is of the labels and half of the teacher:

    total = 0.5 * loss of the CLS head on the labels + 0.5 * distillation loss

The distillation loss is of the distillation head, if there is one (DeiT, Touvron et al. 2021, arXiv
2012.12877, section 4), or of the CLS head, too (Hinton et al. 2015, arXiv 1503.02531).

teacher.py implements the teachers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..data.augmentation import build_mixer
from ..data.batches import Batch, Normalizer
from ..data.sampling import compute_class_weights
from ..data.splits import TrainingData
from ..model.heads_vitcls import compute_distillation_loss
from .options import FinetuneOptions
from .teacher import Teacher


Losses = dict[str, Tensor]
# Returns the "loss" to minimize, and other losses to log
Objective = Callable[[nn.Module, Batch], Losses]


# Losses of a head, by kind of labels --------------------------------------------------------------


def compute_single_label_loss(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Compute the mean cross-entropy of logits [B, L] and classes [B] or probabilities [B, L].

    The loss of an image with the label -100 is 0.

    Losses that are weighted with `class_weights` [L], whose mean is 1, are not divided by the sum
    of the weights, because the loss of one image would otherwise depend on the labels of other
    images.
    """
    # [B]
    image_losses = nn.functional.cross_entropy(
        logits.float(), labels, label_smoothing=label_smoothing, reduction="none"
    )
    if class_weights is None:
        return image_losses.mean()
    image_weights = labels @ class_weights if labels.is_floating_point() else class_weights[labels]
    return (image_weights * image_losses).mean()


def compute_multi_label_loss(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Compute the mean binary cross-entropy of logits [B, L] against binary labels [B, L]."""
    targets = labels * (1 - label_smoothing) + label_smoothing / 2
    return nn.functional.binary_cross_entropy_with_logits(logits.float(), targets)


def compute_multi_task_loss(
    logits: dict[str, Tensor], labels: Tensor, label_smoothing: float
) -> Tensor:
    """Sum the cross-entropies of {task: logits [B, L]} and classes [B, tasks].

    The loss of an image with the label -100 is 0.

    The loss of each task is averaged over all images of the batch, so the mean loss of accumulated
    batches equals the loss of one large batch. In contrast, `ViTCLSForMultiTaskClassification`,
    which Trainer uses, averages over the labeled images. The two losses are equal if no labels are
    missing.
    """
    pairs = zip(logits.values(), labels.unbind(dim=1), strict=True)
    losses = [compute_single_label_loss(own, classes, label_smoothing) for own, classes in pairs]
    return torch.stack(losses).sum()


# Objective ----------------------------------------------------------------------------------------


def compute_batch_losses(
    model: Any,
    batch: Batch,
    *,
    normalize: Callable[[Tensor], Tensor],
    compute_label_loss: Callable[[Any, Any], Tensor],
    mixer: Callable[[Any, Any], tuple[Any, Any]] | None = None,
    compute_teacher_loss: Callable[[Tensor, Batch], Tensor] | None = None,
) -> Losses:
    """Compute the loss of a batch on the model's device and, with a teacher, its parts.

    The label loss is averaged over the CLS head and the distillation head. With a teacher, the
    distillation head is trained on the teacher's logits instead; a model without this head learns
    from labels and teacher with its only one.

    Args:
        normalize: of the pixels.
        compute_label_loss: mean loss from logits and labels.
        mixer: mixes images and labels.
        compute_teacher_loss: mean distillation loss from the logits that learn from the teacher and
            the batch; None without a teacher.
    """
    if mixer is not None:
        pixels, mixed_labels = mixer(batch["pixels"], batch["labels"])
        batch = batch | {"pixels": pixels, "labels": mixed_labels}

    labels = batch["labels"]
    outputs = model(pixel_values=normalize(batch["pixels"]))
    if isinstance(outputs.logits, dict):  # Multi-task model
        return {"loss": compute_label_loss(outputs.logits, labels)}

    cls_loss = compute_label_loss(outputs.cls_logits, labels)
    second_logits = outputs.distillation_logits
    if compute_teacher_loss is not None:
        student_logits = outputs.cls_logits if second_logits is None else second_logits
        teacher_loss = compute_teacher_loss(student_logits, batch)
        loss = (cls_loss + teacher_loss) / 2
        return {"loss": loss, "label_loss": cls_loss, "distillation_loss": teacher_loss}
    if second_logits is None:
        return {"loss": cls_loss}
    return {"loss": (cls_loss + compute_label_loss(second_logits, labels)) / 2}


def build_objective(
    options: FinetuneOptions,
    data: TrainingData,
    teacher: Teacher | None,
    normalize: Normalizer,
    accelerator: Accelerator,
) -> Objective:
    """Build the label loss, combined with the distillation loss if a teacher is set."""
    labels = data.label_space
    mixer = None
    cutmix = float((options.augment or {}).get("cutmix", 0))
    if options.mixup or cutmix:
        mixer = build_mixer(options.mixup, cutmix, len(labels.names))
    class_weights = None
    if options.class_balance == "weights":
        class_weights = compute_class_weights(data.train.labels, len(labels.names))
        class_weights = class_weights.to(accelerator.device)
    functions: dict[str, Callable[..., Tensor]] = {
        "single_label_classification": partial(
            compute_single_label_loss, class_weights=class_weights
        ),
        "multi_label_classification": compute_multi_label_loss,
        "multi_task": compute_multi_task_loss,
    }
    objective = partial(
        compute_batch_losses,
        normalize=normalize,
        compute_label_loss=partial(functions[labels.kind], label_smoothing=options.label_smoothing),
        mixer=mixer,
    )
    if teacher is None:
        return objective

    def compute_teacher_loss(logits: Tensor, batch: Batch) -> Tensor:
        # Accelerate runs only the prepared model under autocast by itself, and the teacher is not
        # one.
        with accelerator.autocast():
            teacher_logits = teacher(batch["pixels"])
        return compute_distillation_loss(logits, teacher_logits, options.distillation)

    return partial(objective, compute_teacher_loss=compute_teacher_loss)

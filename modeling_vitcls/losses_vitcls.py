"""The losses. That of a classifier honours `num_items_in_batch`, which Trainer passes when it accumulates gradients
and can count the labels (not where they are a dict of tasks, nor where there are none).

transformers' own `loss_function` guesses the kind of problem from the labels and writes the guess into the
configuration; here nothing is written, and a guess that could be wrong is an error.
"""

import torch
from torch import nn

from .configuration_vitcls import ViTCLSConfig


IGNORED_LABEL = -100


def classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    config: ViTCLSConfig,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Loss of logits [B, C] against labels, by `config.problem_type`.

    - integer labels [B]: cross-entropy; -100 is ignored;
    - float labels with "single_label_classification": cross-entropy against probabilities [B, C] (mixup, CutMix);
    - float labels with "multi_label_classification": binary cross-entropy, one label per class [B, C];
    - "regression", or a single output: mean squared error.

    Args:
        num_items_in_batch: labels over all accumulated batches, to divide by in place of this batch's own.

    Raises:
        ValueError: for a label beyond the classes, or float labels without a `problem_type` that says what they mean.
    """
    labels = labels.to(logits.device)
    if logits.shape[-1] != config.num_labels or not config.num_labels:
        raise ValueError("labels were given and the model has no classifier: set num_labels")
    problem_type = config.problem_type or ("regression" if config.num_labels == 1 else None)
    if problem_type == "regression":
        require_shape(labels.view(labels.shape[0], -1), logits)
        squared = nn.functional.mse_loss(logits.float().view(-1), labels.float().view(-1), reduction="sum")
        return squared / _items(labels, num_items_in_batch)
    if problem_type == "multi_label_classification":
        require_shape(labels, logits)
        binary = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum")
        return binary / _items(labels, num_items_in_batch)
    if not labels.is_floating_point():
        return cross_entropy(logits, labels, num_items_in_batch)
    if problem_type is None:
        raise ValueError(
            'float labels need config.problem_type: "single_label_classification" for class probabilities, '
            '"multi_label_classification" for several labels per image'
        )
    require_shape(labels, logits)
    soft = nn.functional.cross_entropy(logits.float(), labels.float(), reduction="sum")
    return soft * labels.shape[-1] / _items(labels, num_items_in_batch)  # items count every entry of [B, C]


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    task: str = "the model",
) -> torch.Tensor:
    """Cross-entropy of logits [B, C] against classes [B]; -100 is ignored, and a batch of nothing else gives 0.

    Raises:
        ValueError: for another number of labels than images, or one beyond the classes (checked on the CPU, where it
            costs nothing).
    """
    if labels.numel() != logits.shape[0]:
        raise ValueError(
            f"labels have shape {list(labels.shape)} and there are {logits.shape[0]} images: give one class per image"
        )
    labels = labels.reshape(-1).long()
    check_labels(labels, logits.shape[-1], task)
    total = nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    return total / (labels != IGNORED_LABEL).sum().clamp(min=1)


def check_labels(labels: torch.Tensor, num_labels: int, task: str) -> None:
    """Raise ValueError if a class label is not in [0, num_labels) and not -100."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    unknown = labels[((labels < 0) | (labels >= num_labels)) & (labels != IGNORED_LABEL)]
    if unknown.numel():
        raise ValueError(
            f"unknown label id {unknown[0].item()}: {task} has {num_labels} labels, 0 to {num_labels - 1}"
        )


def require_shape(labels: torch.Tensor, logits: torch.Tensor) -> None:
    """Raise ValueError if labels that go with every logit have another shape."""
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels have shape {list(labels.shape)} and the logits {list(logits.shape)}: make them equal"
        )


def masked_pixel_loss(
    reconstruction: torch.Tensor, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor, config: ViTCLSConfig
) -> torch.Tensor:
    """Mean loss over the masked pixels, in float32.

    Sources: SimMIM, arXiv 2111.09886, section 3.5; MAE, arXiv 2111.06377, section 3.

    Args:
        reconstruction: prediction [B, C, H, W].
        pixel_values: images [B, C, H, W].
        bool_masked_pos: [B, rows * columns], true where a patch was masked.
    """
    predicted = _to_patches(reconstruction, config).float()  # [B, rows * columns, pixels of a patch]
    target = _to_patches(pixel_values, config).float()
    if config.norm_pixel_target:
        unbiased = int(target.shape[-1] > 1)
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True, correction=unbiased)
        target = (target - mean) / (variance + 1e-6).sqrt()
    distance = (predicted - target).abs() if config.mim_loss == "l1" else (predicted - target) ** 2
    mask = bool_masked_pos.bool().to(distance.dtype)
    return (distance.mean(dim=-1) * mask).sum() / mask.sum().clamp(min=1)


def _to_patches(pixels: torch.Tensor, config: ViTCLSConfig) -> torch.Tensor:
    patch_height, patch_width = config.patch_height_width
    patches = pixels.unfold(2, patch_height, patch_height).unfold(3, patch_width, patch_width)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # [B, rows * columns, C * height * width]


def _items(labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | int:
    return labels.numel() if num_items_in_batch is None else num_items_in_batch

"""The losses. Each honours `num_items_in_batch`, which Trainer passes when it accumulates gradients.

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
    problem_type = config.problem_type or ("regression" if config.num_labels == 1 else None)
    if problem_type == "regression":
        squared = nn.functional.mse_loss(logits.float().view(-1), labels.float().view(-1), reduction="sum")
        return squared / _items(labels, num_items_in_batch)
    if problem_type == "multi_label_classification":
        binary = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum")
        return binary / _items(labels, num_items_in_batch)
    if not labels.is_floating_point():
        return cross_entropy(logits, labels, num_items_in_batch)
    if problem_type is None:
        raise ValueError(
            'float labels need config.problem_type: "single_label_classification" for class probabilities, '
            '"multi_label_classification" for several labels per image'
        )
    soft = nn.functional.cross_entropy(logits.float(), labels.float(), reduction="sum")
    return soft * labels.shape[-1] / _items(labels, num_items_in_batch)  # items count every entry of [B, C]


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy of logits [B, C] against classes [B]; -100 is ignored, and a batch of nothing else gives 0.

    Raises:
        ValueError: for a label beyond the classes (checked on the CPU, where it costs nothing).
    """
    labels = labels.view(-1)
    check_labels(labels, logits.shape[-1])
    total = nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    return total / (labels != IGNORED_LABEL).sum().clamp(min=1)


def check_labels(labels: torch.Tensor, num_labels: int) -> None:
    """Raise ValueError if a class label is not in [0, num_labels) and not -100."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    unknown = labels[((labels < 0) | (labels >= num_labels)) & (labels != IGNORED_LABEL)]
    if unknown.numel():
        raise ValueError(
            f"unknown label id {unknown[0].item()}: the model has {num_labels} labels, 0 to {num_labels - 1}"
        )


def masked_pixel_loss(
    reconstruction: torch.Tensor, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor, config: ViTCLSConfig
) -> torch.Tensor:
    """Mean loss over the masked pixels (SimMIM, arXiv 2111.09886, section 3.5; MAE, arXiv 2111.06377, section 3).

    Args:
        reconstruction: prediction [B, C, H, W].
        pixel_values: images [B, C, H, W].
        bool_masked_pos: [B, rows * columns], true where a patch was masked.
    """
    predicted = _to_patches(reconstruction, config)  # [B, rows * columns, pixels of a patch]
    target = _to_patches(pixel_values, config).to(predicted.dtype)
    if config.norm_pixel_target:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    distance = (predicted - target).abs() if config.mim_loss == "l1" else (predicted - target) ** 2
    mask = bool_masked_pos.to(distance.dtype)
    return (distance.mean(dim=-1) * mask).sum() / mask.sum().clamp(min=1)


def _to_patches(pixels: torch.Tensor, config: ViTCLSConfig) -> torch.Tensor:
    patch_height, patch_width = config.patch_height_width
    patches = pixels.unfold(2, patch_height, patch_height).unfold(3, patch_width, patch_width)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # [B, rows * columns, C * height * width]


def _items(labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | int:
    return labels.numel() if num_items_in_batch is None else num_items_in_batch

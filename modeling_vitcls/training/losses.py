"""What the loop minimises: functions of the model and a batch on the device."""

from collections.abc import Callable

import torch
from torch import nn

from .batches import Normaliser


def classification_loss(
    normalise: Normaliser, label_smoothing: float
) -> Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]:
    """Cross-entropy against `labels` [B], averaged over the heads: a distillation head without a teacher learns, as
    the class head does, from the labels (DeiT, arXiv 2012.12877, table 3, "no distillation")."""

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        outputs = model(pixel_values=normalise(batch["pixels"]))
        heads = [logits for logits in (outputs.cls_logits, outputs.distillation_logits) if logits is not None]
        losses = [
            nn.functional.cross_entropy(logits.float(), batch["labels"], label_smoothing=label_smoothing)
            for logits in heads
        ]
        return torch.stack(losses).mean()

    return loss

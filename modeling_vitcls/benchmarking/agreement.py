"""Nothing is measured unless both sides give the same outputs, so that no speed is bought with wrong numbers."""

from collections.abc import Callable

import torch


Answer = Callable[[torch.Tensor], torch.Tensor]  # images [B, C, H, W] -> logits [B, labels]

# Largest difference of logits, as a part of the largest logit.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@torch.inference_mode()
def check_agreement(ours: Answer, theirs: Answer, pixel_values: torch.Tensor, name: str) -> float:
    """The largest absolute difference of the logits.

    Raises:
        ValueError: if it exceeds the limit, or is no number.
    """
    found, wanted = ours(pixel_values).float(), theirs(pixel_values).float()
    if found.shape != wanted.shape:
        raise ValueError(f"{name}: outputs are {list(found.shape)} and {list(wanted.shape)}: they cannot be compared")
    difference = (found - wanted).abs().max().item()
    limit = LIMITS[pixel_values.dtype] * wanted.abs().max().item()
    if not difference <= limit:
        raise ValueError(
            f"{name}: the outputs differ by {difference:.2g}, more than {limit:.2g}: these models do not do the same "
            "work, so their speed is not compared"
        )
    return difference

"""Small models whose predictions differ between images."""

from typing import Any

import torch

from scripts.tools.random_weights import randomize_weights


@torch.no_grad()
def center_logits(model: Any, pixels: torch.Tensor) -> Any:
    """Fill a classifier with random weights, and center its logits for these images [B, C, H, W].

    Without centering, random weights often predict the same class for all images.
    """
    randomize_weights(model)
    by_task = model(pixels).logits
    heads = (
        dict(zip(by_task, model.classifiers.values(), strict=True))
        if isinstance(by_task, dict)
        else {}
    )
    for task, head in (heads or {None: model.classifier}).items():
        head.bias -= (by_task if task is None else by_task[task]).mean(dim=0)
    return model

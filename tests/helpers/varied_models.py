"""What tests of the analysis share: small models whose answers differ from image to image, and their statistics."""

from typing import Any

import torch
from torch import nn

from modeling_vitcls.analysis.token_statistics import Findings, TokenStatistics
from modeling_vitcls.conversion.random_weights import randomize_weights


@torch.no_grad()
def with_varied_answers(model: Any, pixels: torch.Tensor) -> Any:
    """A classifier with random weights whose logits of these images [B, C, H, W] have a mean of 0: no class wins all.

    Random weights alone often give all images the same answer.
    """
    randomize_weights(model)
    by_task = model(pixels).logits
    heads = dict(zip(by_task, model.classifiers.values(), strict=True)) if isinstance(by_task, dict) else {}
    for task, head in (heads or {None: model.classifier}).items():
        shift(head, (by_task if task is None else by_task[task]).mean(dim=0))
    return model


def collect_findings(model: Any, *batches: torch.Tensor) -> Findings:
    """Statistics over batches of images [B, C, H, W]."""
    statistics = TokenStatistics(model)
    for pixels in batches:
        statistics.update(pixels)
    return statistics.compute()


def shift(head: nn.Linear, logits: torch.Tensor) -> None:
    """Take these logits [labels] from a head's bias."""
    head.bias -= logits

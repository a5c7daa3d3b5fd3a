"""An exponential moving average of the trained weights (Polyak and Juditsky 1992; in ViTs, DeiT section 6).

It lives beside the model as a list of tensors, in the order of the trained parameters, so that it works alike for
one process, DDP and sharded models.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ema:
    """The average: `shadow`, one tensor for each trained parameter of the model."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.shadow = [parameter.detach().clone() for parameter in self.trained]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps (from 1). Early on the average is shorter, so that it forgets the
        initial weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self.shadow, self.trained, step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights inside this block, and its own again after it."""
        own = [parameter.detach().clone() for parameter in self.trained]
        self.load(self.shadow)
        try:
            yield
        finally:
            self.load(own)

    @torch.no_grad()
    def load(self, weights: list[torch.Tensor]) -> None:
        """Put weights into the model."""
        for parameter, weight in zip(self.trained, weights, strict=True):
            parameter.copy_(weight)

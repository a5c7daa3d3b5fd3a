"""One optimiser step of accumulated gradients: PyTorch's optimiser makes it in parts, DeepSpeed's engine in one go.

updates = build_updates(accelerator, model, optimizer, max_gradient_norm)
updates.backward(loss)                 for each accumulated batch
norm = updates.step(check, look)       after the last of them
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from . import zero


class Updates(Protocol):
    """Gradients, and what they do to the weights."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add a batch's gradients; they are divided by the accumulation steps."""

    def step(self, check: Callable[[float], None], look: Callable[[], None]) -> float:
        """Clip the gradients, change the weights; returns the norm of all gradients before they were clipped.

        Args:
            check: takes that norm; what it raises ends the step.
            look: called when gradients are there, before the weights change.
        """


class OptimizerUpdates:
    """With PyTorch's optimiser: one process, DDP, FSDP2."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, max_gradient_norm: float
    ) -> None:
        self.accelerator = accelerator
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer
        self.max_gradient_norm = max_gradient_norm

    def backward(self, loss: torch.Tensor) -> None:
        """See `Updates`."""
        self.accelerator.backward(loss)

    def step(self, check: Callable[[float], None], look: Callable[[], None]) -> float:
        """See `Updates`. `look` sees clipped gradients."""
        norm = float(self.accelerator.clip_grad_norm_(self.trained, self.max_gradient_norm))
        check(norm)
        look()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


class EngineUpdates:
    """With DeepSpeed's engine, which clips, steps and forgets the gradients in one call."""

    def __init__(self, accelerator: Accelerator, engine: Any) -> None:
        self.accelerator = accelerator
        self.engine = engine

    def backward(self, loss: torch.Tensor) -> None:
        """See `Updates`."""
        self.engine.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
        self.engine.backward(loss)

    def step(self, check: Callable[[float], None], look: Callable[[], None]) -> float:
        """See `Updates`. The norm is known once the weights have changed; `look` sees gradients as they are."""
        check(0.0)  # the losses
        look()
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        norm = norm if norm >= 0 else math.nan  # DeepSpeed's -1
        check(norm)
        return norm


def build_updates(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, max_gradient_norm: float
) -> Updates:
    """The one that goes with what `Accelerator.prepare` returned."""
    if zero.is_used(accelerator):
        return EngineUpdates(accelerator, model)
    return OptimizerUpdates(accelerator, model, optimizer, max_gradient_norm)

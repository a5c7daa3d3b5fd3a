"""One optimiser step of accumulated gradients: PyTorch's optimiser makes it in parts, DeepSpeed's engine in one go.

updates = build_updates(accelerator, model, optimizer, max_gradient_norm)
updates.backward(loss)                 for each accumulated batch
norm = updates.step(check, look)       after the last of them

How parameters are updated: groups for AdamW, and the learning rate at each step.

An exponential moving average of the trained weights (Polyak and Juditsky 1992; in ViTs, DeiT section 6).

It lives beside the model as a list of tensors, in the order of the trained parameters, so that it works alike for
one process, DDP and sharded models.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .. import distributed
from ..options import TrainingOptions


DECAYED_MODULES = (nn.Linear, nn.Conv2d)


def build_optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    """AdamW over the trained parameters, in its fused implementation."""
    groups = parameter_groups(model, options.weight_decay, options.layer_decay)
    return torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Parameters by depth and decay.

    Weights of linear and convolution layers decay; biases, norms, tokens, positions and scales do not. Each group has
    `lr_scale`, its factor of the learning rate: `layer_decay` to the power of the layers behind it (BEiT, arXiv
    2106.08254, appendix).
    """
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, DECAYED_MODULES)}
    depth_of = depths(model)
    last = max(depth_of.values())
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if id(parameter) in decayed else 0.0
            groups[layer_decay ** (last - depth_of[name]), decay].append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def depths(model: nn.Module) -> dict[str, int]:
    """How deep each parameter stands: 0 for tokens, positions and patches, then the layers, then norm and heads."""
    names = [name for name, _ in model.named_parameters()]
    layers = {name: int(found[1]) for name in names if (found := re.search(r"\blayers\.(\d+)\.", name))}
    behind = max(layers.values(), default=-1) + 2
    return {name: layers[name] + 1 if name in layers else 0 if "embeddings." in name else behind for name in names}


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give each group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


def learning_rate_at(step: int, num_steps: int, options: TrainingOptions) -> float:
    """The learning rate of a step (from 0): a linear rise over `warmup` of the steps, then a cosine down to 0."""
    warmup_steps = round(options.warmup * num_steps)
    if step < warmup_steps:
        return options.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    return options.learning_rate * (1 + math.cos(math.pi * progress)) / 2


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
    if distributed.uses_deepspeed(accelerator):
        return EngineUpdates(accelerator, model)
    return OptimizerUpdates(accelerator, model, optimizer, max_gradient_norm)


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

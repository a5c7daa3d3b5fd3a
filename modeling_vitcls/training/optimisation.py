"""How parameters are updated: groups for AdamW, and the learning rate at each step."""

import math
import re
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from .options import TrainingOptions


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

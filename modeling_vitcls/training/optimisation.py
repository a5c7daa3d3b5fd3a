"""How parameters are updated: groups for AdamW, and the learning rate at each step."""

import math
from typing import Any

from torch import nn

from .options import TrainingOptions


DECAYED_MODULES = (nn.Linear, nn.Conv2d)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights of linear and convolution layers with decay; biases, norms, tokens, positions and scales without."""
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, DECAYED_MODULES)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if id(parameter) in decayed], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if id(parameter) not in decayed], "weight_decay": 0.0},
    ]


def learning_rate_at(step: int, num_steps: int, options: TrainingOptions) -> float:
    """The learning rate of a step (from 0): a linear rise over `warmup` of the steps, then a cosine down to 0."""
    warmup_steps = round(options.warmup * num_steps)
    if step < warmup_steps:
        return options.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    return options.learning_rate * (1 + math.cos(math.pi * progress)) / 2

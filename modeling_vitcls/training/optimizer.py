"""Parameter groups of AdamW, the learning rate of each step, and the mean of the first and last weights."""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def build_parameter_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float = 1.0,
    new_tokens: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Group parameters by depth and weight decay.

    Weight decay applies to weights of linear and convolutional layers, but not to biases, norms,
    tokens, position embeddings or scales. The learning rate of each group is multiplied by
    `lr_scale`, which is `layer_decay ** (max_depth - depth)` for a group at `depth` (BEiT, arXiv
    2106.08254, appendix), or 1 for the parameters in `new_tokens`, which the checkpoint lacks.
    """
    weight_decay_ids = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }
    depths = get_parameter_depths(model)
    max_depth = max(depths.values())
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if id(parameter) in weight_decay_ids else 0.0
            scale = layer_decay ** (max_depth - depths[name])
            groups[1.0 if name in new_tokens else scale, decay].append(parameter)

    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def get_parameter_depths(model: nn.Module) -> dict[str, int]:
    """Find the depth of each parameter, for the layer decay.

    It is 0 for tokens, position embeddings and patch embeddings; 1, 2, ... for the layers; that of the
    last layer for the final norm, as in timm; and the next number for the heads.
    """
    names = [name for name, _ in model.named_parameters()]
    layer_indices = {
        name: int(match[1]) for name in names if (match := re.search(r"\blayers\.(\d+)\.", name))
    }
    head_depth = max(layer_indices.values(), default=-1) + 2

    depths = {name: 0 if "embeddings." in name else head_depth for name in names}
    depths |= {name: head_depth - 1 for name in names if "vitcls.layernorm." in name}
    return depths | {name: index + 1 for name, index in layer_indices.items()}


def get_learning_rate(step: int, num_steps: int, peak: float, warmup: float) -> float:
    """Compute the learning rate at `step`, from 0: linear warmup, then cosine decay to 0.

    `peak` is the highest rate, and `warmup` the fraction of the steps before it.
    """
    num_warmup_steps = round(warmup * num_steps)
    if step < num_warmup_steps:
        return peak * (step + 1) / num_warmup_steps
    progress = (step - num_warmup_steps) / (num_steps - num_warmup_steps)
    return peak * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def average_with_start(
    model: nn.Module,
    start: Mapping[str, Tensor],
    fraction: float,
    new_tokens: Collection[str],
) -> None:
    """Replace the trained weights with the mean of the weights before and after the steps.

    What the steps learned is then added to what the encoder knew before (WiSE-FT, Wortsman et al.
    2021, arXiv 2109.01903). With 0.5, and all labels, no draw of our study lost (model_cards/studies/finetuning.md).

    Args:
        model: model with the weights of the last step.
        start: the trainable weights before the first step, by name.
        fraction: part of the start in the mean.
        new_tokens: names of the parameters that started at nothing, and stay as they are.
    """
    for name, initial in start.items():
        # LoRA's B is 0 at the start, so A as it is makes the merged weights the mean
        if ".lora_A." not in name and name not in new_tokens:
            model.get_parameter(name).lerp_(initial, fraction)

"""Random values for every parameter, to test a conversion or a speed without a checkpoint.

A newly initialized model can hide conversion errors, because biases are zero and LayerScale values
may be only 1e-5. The random values keep activations close to 1 in magnitude, so that an absolute
limit on differences is meaningful.
"""

import re
from typing import TypeVar

import torch
from torch import nn


Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def randomize_weights(model: Model) -> Model:
    """Fill a model in place with random values, and return it in eval mode.

    Repeated calls give the same values.

    Scales (norms, LayerScale, variances) are uniformly distributed from 0.5 to 1.5. Other values
    are normally distributed with mean 0 and these standard deviations: 1 / sqrt(fan in) for weights
    of linear and convolution layers, 0.2 for biases, 0.1 for the lambdas of differential attention
    (whose products are exponentiated), and 0.5 for other tensors (tokens, position embeddings, bias
    tables). Non-persistent buffers are left unchanged.
    """
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in tensors:
            if not tensor.is_floating_point() or name in module._non_persistent_buffers_set:
                continue

            values = torch.empty(tensor.shape, dtype=torch.float32)
            std = get_std(module, name, tensor)
            if std is None:
                values.uniform_(0.5, 1.5, generator=generator)
            else:
                values.normal_(std=std, generator=generator)
            tensor.copy_(values)
    return model.eval()


def get_std(module: nn.Module, name: str, tensor: torch.Tensor) -> float | None:
    """Return the standard deviation of the random values of a tensor, or None for a scale.

    Scales are uniformly distributed.
    """
    if name.startswith("lambda_"):
        return 0.1
    is_vector_scale = tensor.ndim == 1 and re.search("weight|lambda|gamma|scale", name)
    if "std" in name or "var" in name or is_vector_scale:
        return None
    if "bias" in name and tensor.ndim == 1:
        return 0.2
    if isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention) and tensor.ndim >= 2:
        return float(tensor[0].numel() ** -0.5)
    return 0.5

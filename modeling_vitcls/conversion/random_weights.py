"""Random values for every weight of a model, for conversions that are tried without a checkpoint.

Fresh models hide mistakes: zero biases and positions, LayerScales of 1e-5. Values here keep activations near 1, which
makes an absolute limit on differences meaningful. Buffers that are derived and not saved stay as they are.
"""

import torch
from torch import nn


@torch.no_grad()
def random_fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a model in place, the same way for the same seed; returns it in eval mode.

    Weights that multiply sums are normal with 1 / sqrt(fan in), scales (norms, LayerScale, variances) uniform from 0.5
    to 1.5, biases normal with 0.2, and all else (tokens, positions, tables) normal with 0.5. The lambdas of
    differential attention, whose products are exponentiated, are normal with 0.1.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, tensor in own_tensors(module).items():
            values = torch.empty(tensor.shape, dtype=torch.float32)
            if is_scale(name, tensor):
                values.uniform_(0.5, 1.5, generator=generator)
            else:
                values.normal_(std=standard_deviation(module, name, tensor), generator=generator)
            tensor.copy_(values)
    return model.eval()


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved floating-point buffers of one module, without its children's."""
    derived = module._non_persistent_buffers_set
    buffers = {name: buffer for name, buffer in module.named_buffers(recurse=False) if name not in derived}
    tensors = dict(module.named_parameters(recurse=False)) | buffers
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def is_scale(name: str, tensor: torch.Tensor) -> bool:
    """Factors, which must not be near zero: norms' weights, LayerScale, variances and standard deviations."""
    if name.startswith("lambda_"):
        return False
    if "std" in name or "var" in name:
        return True
    return tensor.ndim == 1 and any(part in name for part in ("weight", "lambda", "gamma", "scale"))


def standard_deviation(module: nn.Module, name: str, tensor: torch.Tensor) -> float:
    """What keeps activations near 1."""
    if name.startswith("lambda_"):
        return 0.1
    if "bias" in name and tensor.ndim == 1:
        return 0.2
    multiplies = isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention)
    if multiplies and tensor.ndim >= 2:
        return tensor[0].numel() ** -0.5
    return 0.5

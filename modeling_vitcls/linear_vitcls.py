"""Linear layers, those with the activation behind them, and that of patches: on CPUs by what multiplies fastest there.

    AVX-512                 oneDNN in float32, for whatever is not tiny; in inference also in bfloat16, where GELU is
                            computed while the results are in the cache, and patches are projected by one product
    no bfloat16, float16    float32, rounded: half_precision_vitcls.py
    otherwise               what nn.Linear and nn.Conv2d do; on AVX2 MKL is 15 % faster than oneDNN

Exports, other devices and kinds of weight (quantised, sharded) get what nn.Linear and nn.Conv2d do, and so do
compilers in place of oneDNN. The numbers are the same within rounding.
"""

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import is_autocast_enabled, is_grad_enabled, nn
from torch._C import _len_torch_dispatch_stack
from torch.compiler import is_compiling
from torch.jit import is_tracing
from transformers.activations import GELUActivation

from .half_precision_vitcls import dtype_of_product, is_emulated, product_in_float32
from .onednn_vitcls import (
    HAS_AVX512,
    HAS_BFLOAT16,
    HAS_ONEDNN,
    differentiable_product,
    is_transformed,
    product,
    product_of_gelu,
)


# Multiplications from which on oneDNN is faster, by dtype and whether there may be a backward pass; never elsewhere.
LEAST_WORK: dict[tuple[torch.dtype, bool], int] = {}
if HAS_AVX512 and HAS_ONEDNN:
    LEAST_WORK |= {(torch.float32, False): 1_500_000, (torch.float32, True): 8_000_000}
if HAS_BFLOAT16:
    LEAST_WORK[torch.bfloat16, False] = 0


class Linear(nn.Linear):
    """nn.Linear, [..., in] -> [..., out]."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Apply weight and bias."""
        if suits_onednn(self, inputs):
            own = self._parameters  # as attributes they take ten times as long to find
            multiply: Callable[..., torch.Tensor] = differentiable_product if is_grad_enabled() else product
            return multiply(inputs, own["weight"], own["bias"])
        if is_emulated(inputs) and is_plain(self):
            return product_in_float32(inputs, self.weight, self.bias)
        return super().forward(inputs)


class PatchProjection(nn.Conv2d):
    """A convolution with stride = kernel size and no padding, [B, C, H, W] -> [B, out, rows, columns]."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Project each patch; pixels beyond the last whole one are left out."""
        if images.dtype == torch.bfloat16 and suits_onednn(self, images):
            multiply: Callable[..., torch.Tensor] = product
        elif is_emulated(images) and is_plain(self):
            multiply = product_in_float32
        else:
            return super().forward(images)
        height, width = self.kernel_size
        rows, columns = images.shape[2] // height, images.shape[3] // width
        patches = images[:, :, : rows * height, : columns * width]
        patches = patches.unflatten(3, (columns, width)).unflatten(2, (rows, height))  # [B, C, rows, h, columns, w]
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [B, rows, columns, C * h * w]
        return multiply(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def activated(
    linear: nn.Module, activation: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor
) -> torch.Tensor:
    """`activation(linear(inputs))`, [..., in] -> [..., out], faster where there is no backward pass."""
    if not is_gelu_beside(linear, activation) or is_grad_enabled() or is_recorded():
        return activation(linear(inputs))
    if suits_onednn(linear, inputs):
        return product(inputs, linear.weight, linear.bias, "gelu")
    return torch.ops.aten.gelu_(linear(inputs))  # in place: new memory costs more than the function


def contracted(
    linear: nn.Module, activation: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor
) -> torch.Tensor | None:
    """`linear(activation(inputs))` for a backward pass that keeps the inputs alone, [..., in] -> [..., out].

    None where this is not the fastest way.
    """
    if not is_gelu_beside(linear, activation) or not suits_onednn(linear, inputs):
        return None
    return product_of_gelu(inputs, linear.weight, linear.bias)


def as_autocast_will(inputs: torch.Tensor) -> torch.Tensor:
    """The inputs in the dtype that autocast multiplies in: several projections keep them once, not each for itself."""
    if inputs.dtype != torch.float32 or inputs.is_meta:
        return inputs
    return inputs.to(dtype_of_product(inputs))


def suits_onednn(linear: nn.Linear | nn.Conv2d, inputs: torch.Tensor) -> bool:
    """Whether oneDNN may compute this product, and is faster: of plain tensors of one dtype on the CPU, with nobody
    who records, counts or transforms operators."""
    least_work = LEAST_WORK.get((inputs.dtype, is_grad_enabled()))
    if least_work is None or not inputs.is_cpu or is_recorded() or not is_plain(linear):
        return False
    weight: torch.Tensor = linear._parameters["weight"]  # type: ignore[assignment]
    return (
        weight.dtype == inputs.dtype
        and inputs.numel() * len(weight) >= least_work
        and not (_len_torch_dispatch_stack() or is_autocast_enabled("cpu") or is_transformed())
    )


def is_gelu_beside(linear: nn.Module, activation: Callable[[torch.Tensor], torch.Tensor]) -> TypeGuard[Linear]:
    """Whether both are plain, the activation is GELU, and nobody listens to either."""
    is_gelu = type(activation) is GELUActivation and not has_hooks(activation)
    return is_gelu and type(linear) is Linear and not has_hooks(linear)


def is_plain(linear: nn.Linear | nn.Conv2d) -> bool:
    """Whether weight and bias are its own, and tensors of numbers: not quantised, sharded or computed from others."""
    own = linear._parameters
    return type(own.get("weight")) is nn.Parameter and "bias" in own  # though it may be None


def is_recorded() -> bool:
    """Whether operators become a program, which may run elsewhere."""
    return is_compiling() or is_tracing()


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to, or has replaced, the forward pass of this very module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)

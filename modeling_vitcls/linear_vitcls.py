"""Linear layers, those with the activation behind them, and that of patches: on CPUs by what multiplies fastest there.

    AVX-512, inference      oneDNN. PyTorch hands float32 to MKL, which reaches half of its speed on AMD's processors;
                            GELU is computed while the results are in the cache; patches are projected by one product
    no bfloat16, float16    float32, rounded: half_precision_vitcls.py
    otherwise               what nn.Linear and nn.Conv2d do; on AVX2 MKL is 15 % faster than oneDNN

Exports, other devices and kinds of weight (quantised, sharded) get what nn.Linear and nn.Conv2d do, and so do
compilers in place of oneDNN. The numbers are the same within rounding.
"""

from collections.abc import Callable

import torch
from torch import is_autocast_enabled, is_grad_enabled, nn
from torch._C import _len_torch_dispatch_stack
from torch.compiler import is_compiling
from torch.jit import is_tracing
from transformers.activations import GELUActivation

from .half_precision_vitcls import dtype_of_product, is_emulated, product_in_float32


HAS_AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
HAS_BFLOAT16 = HAS_AVX512 and HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
DTYPES = {torch.float32: HAS_AVX512 and HAS_ONEDNN, torch.bfloat16: HAS_BFLOAT16}  # whether oneDNN is to be used


class Linear(nn.Linear):
    """nn.Linear, [..., in] -> [..., out]."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Apply weight and bias."""
        if suits_onednn(self, inputs):
            own = self._parameters  # as attributes they take ten times as long to find
            return product(inputs, own["weight"], own["bias"])
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


def product(
    inputs: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, activation: str = "none"
) -> torch.Tensor:
    """oneDNN's `activation(inputs @ weight.T + bias)`, [..., in] and [out, in] -> [..., out]; "gelu" is exact."""
    return torch.ops.mkldnn._linear_pointwise.default(inputs, weight, bias, activation, [], "none")


def activated(
    linear: nn.Module, activation: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor
) -> torch.Tensor:
    """`activation(linear(inputs))`: [..., in] -> [..., out]."""
    is_gelu = type(activation) is GELUActivation and not has_hooks(activation)
    if not is_gelu or type(linear) is not Linear or has_hooks(linear) or is_grad_enabled() or is_recorded():
        return activation(linear(inputs))
    if suits_onednn(linear, inputs):
        return product(inputs, linear.weight, linear.bias, "gelu")
    return torch.ops.aten.gelu_(linear(inputs))  # in place: new memory costs more than the function


def as_autocast_will(inputs: torch.Tensor) -> torch.Tensor:
    """The inputs in the dtype that autocast multiplies in: several projections keep them once, not each for itself."""
    if inputs.dtype != torch.float32 or inputs.is_meta:
        return inputs
    return inputs.to(dtype_of_product(inputs))


def suits_onednn(linear: nn.Linear | nn.Conv2d, inputs: torch.Tensor) -> bool:
    """Whether oneDNN may compute this product: plain tensors of one dtype on the CPU, no gradients, and nobody who
    records or counts operators."""
    if is_grad_enabled() or not DTYPES.get(inputs.dtype, False) or not inputs.is_cpu:
        return False
    return (
        is_plain(linear)
        and linear._parameters["weight"].dtype == inputs.dtype  # type: ignore[union-attr]
        and not (is_recorded() or _len_torch_dispatch_stack() or is_autocast_enabled("cpu"))
    )


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

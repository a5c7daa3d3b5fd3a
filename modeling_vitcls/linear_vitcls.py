"""Linear layers, those with the activation behind them, and that of patches: in inference on CPUs by oneDNN, fused.

    Linear             PyTorch hands float32 to MKL, which reaches half of oneDNN's speed on AMD's processors; bfloat16
                       goes to oneDNN anyway, with a few operators around it that this saves
    activated          GELU is computed while the results are still in the processor's cache
    PatchProjection    a convolution whose windows do not overlap is a product; in bfloat16 that is up to twice as fast

Wherever gradients, a compiler, another device, dtype or kind of weight (quantised, sharded), or a hook is involved, it
is what nn.Linear or nn.Conv2d does. The numbers are the same within rounding.
"""

from collections.abc import Callable

import torch
from torch import is_autocast_enabled, is_grad_enabled, nn
from torch._C import _len_torch_dispatch_stack
from torch.compiler import is_compiling
from torch.jit import is_tracing
from transformers.activations import GELUActivation


IS_X86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")  # where this was measured
HAS_ONEDNN = IS_X86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
HAS_BFLOAT16 = HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
DTYPES = {torch.float32: HAS_ONEDNN, torch.bfloat16: HAS_BFLOAT16}


class Linear(nn.Linear):
    """nn.Linear, [..., in] -> [..., out]."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Apply weight and bias."""
        if suits_onednn(self, inputs):
            return product(inputs, self.weight, self.bias)
        return super().forward(inputs)


class PatchProjection(nn.Conv2d):
    """A convolution with stride = kernel size and no padding, [B, C, H, W] -> [B, out, rows, columns]."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Project each patch; pixels beyond the last whole one are left out."""
        if images.dtype != torch.bfloat16 or not suits_onednn(self, images):
            return super().forward(images)
        height, width = self.kernel_size
        rows, columns = images.shape[2] // height, images.shape[3] // width
        patches = images[:, :, : rows * height, : columns * width]
        patches = patches.unflatten(3, (columns, width)).unflatten(2, (rows, height))  # [B, C, rows, h, columns, w]
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [B, rows, columns, C * h * w]
        return product(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def product(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str = "none"
) -> torch.Tensor:
    """oneDNN's `activation(inputs @ weight.T + bias)`, [..., in] and [out, in] -> [..., out]; "gelu" is exact."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, activation, [], "none")


def activated(
    linear: nn.Module, activation: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor
) -> torch.Tensor:
    """`activation(linear(inputs))`: [..., in] -> [..., out]."""
    is_gelu = type(activation) is GELUActivation and not has_hooks(activation)
    if is_gelu and type(linear) is Linear and suits_onednn(linear, inputs):
        return product(inputs, linear.weight, linear.bias, "gelu")
    return activation(linear(inputs))


def as_autocast_will(inputs: torch.Tensor) -> torch.Tensor:
    """The inputs in the dtype that autocast multiplies in: several projections keep them once, not each for itself."""
    if inputs.dtype != torch.float32 or inputs.is_meta or not is_autocast_enabled(inputs.device.type):
        return inputs
    return inputs.to(torch.get_autocast_dtype(inputs.device.type))


def suits_onednn(linear: nn.Linear | nn.Conv2d, inputs: torch.Tensor) -> bool:
    """Whether oneDNN may compute this product: plain tensors of one dtype on the CPU, no gradients, no hooks, and
    nobody who records or counts operators."""
    weight = linear.weight
    return (
        not is_grad_enabled()
        and inputs.is_cpu
        and DTYPES.get(inputs.dtype, False)
        and inputs.dtype == weight.dtype
        and type(weight) is nn.Parameter
        and not (is_compiling() or is_tracing() or _len_torch_dispatch_stack() or is_autocast_enabled("cpu"))
        and not has_hooks(linear)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to, or has replaced, the forward pass of this very module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))

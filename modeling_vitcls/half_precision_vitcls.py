"""Products of bfloat16 and float16 on CPUs that cannot multiply them: in float32, and rounded.

PyTorch multiplies them there number by number, 8 times as slowly as float32; and a checkpoint saved in bfloat16 is
loaded in bfloat16. Sums are float32 in both ways, so the numbers are the same within rounding. What is kept for the
backward pass stays in half precision.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .linear_gradients_vitcls import LinearFunction, gradients


IS_X86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")  # where this was measured
QUESTIONS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
# PyTorch may have been built without oneDNN, which knows the processor: then nothing is done here.
EMULATED = {
    dtype
    for dtype, question in QUESTIONS.items()
    if IS_X86 and not getattr(torch.ops.mkldnn, question, lambda: True)()
}


def is_emulated(inputs: torch.Tensor) -> bool:
    """Whether PyTorch would multiply them in a dtype that this CPU has no instructions for."""
    return bool(EMULATED) and inputs.is_cpu and dtype_of_product(inputs) in EMULATED and not is_exporting()


def is_exporting() -> bool:
    """Whether operators become a program that may run on another machine."""
    # torch before 2.14 answers `is_exporting()` with yes while it compiles
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()


def dtype_of_product(inputs: torch.Tensor) -> torch.dtype:
    """The dtype in which linear layers multiply: autocast's, or that of their inputs."""
    if inputs.dtype == torch.float64 or not torch.is_autocast_enabled(inputs.device.type):
        return inputs.dtype
    return torch.get_autocast_dtype(inputs.device.type)


def in_float32(
    function: Callable[..., torch.Tensor], first: torch.Tensor, *others: torch.Tensor | None
) -> torch.Tensor:
    """`function(first, *others)` of the numbers in half precision, computed in float32, and rounded."""
    dtype = dtype_of_product(first)
    with torch.autocast("cpu", enabled=False):
        return function(*(widened(each, dtype) for each in (first, *others))).to(dtype)


def widened(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Numbers of a dtype as float32; a mask of booleans, or none, as it is."""
    return tensor.to(dtype).float() if tensor is not None and tensor.is_floating_point() else tensor


linear_in_float32 = partial(in_float32, nn.functional.linear)


def product_in_float32(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`inputs @ weight.T + bias`, [..., in] and [out, in] -> [..., out], in the dtype of nn.Linear's."""
    dtype = dtype_of_product(inputs)
    return ProductInFloat32.apply(inputs.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


class ProductInFloat32(LinearFunction):
    """A linear layer of half precision whose products, also those of its gradients, are computed in float32."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[..., in], [out, in] and [out] -> [..., out]."""
        return linear_in_float32(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of inputs, weight and bias, as far as they are needed."""
        inputs, weight, bias = ctx.saved_tensors
        return gradients(linear_in_float32, ctx.needs_input_grad, inputs, weight, bias, grad)

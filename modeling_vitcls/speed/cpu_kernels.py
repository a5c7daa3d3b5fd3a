"""Products and attention of CPUs, and all private names of PyTorch that the package uses.

    VITCLS_CPU_KERNELS=0                          environment variable: models stay plain
    torch.backends.mkldnn.flags(enabled=False)    plain PyTorch while the context is active

    reorder_weight, select_linear    weights in the order in which oneDNN reads them: bfloat16 where
                                  the CPU multiplies it, float32 with AVX-512 but not AMX
    attend                        bfloat16 with avx512_bf16 but not AMX: a few heads at a time

If a private name is missing, models stay plain. docs/speed.md has the times of whole models.
"""

import os
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import capture_outputs


# Private PyTorch APIs, used only in this file. If an API is missing, models stay plain.
try:
    from torch._C import _functorch, _len_torch_dispatch_stack, _nn
    from torch.autograd import forward_ad
    from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

    count_dispatch_modes = _len_torch_dispatch_stack
    gelu_in_place: Any = _nn.gelu_  # type: ignore[attr-defined]
    peek_functorch_stack = _functorch.peek_interpreter_stack
    # None in builds without oneDNN
    onednn_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    onednn_reorder: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    # In float32, MKL is as fast as oneDNN or faster on CPUs with AMX.
    HAS_AMX = torch.cpu._is_amx_tile_supported()
    HAS_AVX512_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()

    def is_functorch_active() -> bool:
        """Check whether torch.func or forward-mode AD is active."""
        return peek_functorch_stack() is not None or forward_ad._current_level >= 0

    is_functorch_active()
    HAS_PRIVATE_NAMES = True
except (ImportError, AttributeError):
    HAS_PRIVATE_NAMES = HAS_AMX = HAS_AVX512_BFLOAT16 = False


# Conditions ---------------------------------------------------------------------------------------
def can_use_cpu_kernels() -> bool:
    """Check that VITCLS_CPU_KERNELS is not 0 and that PyTorch has all required private APIs."""
    return os.environ.get("VITCLS_CPU_KERNELS") != "0" and HAS_PRIVATE_NAMES


def must_be_plain() -> bool:
    """Check for what only plain PyTorch does: compilation, tracing, torch.func; or the switch."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or not torch.backends.mkldnn.enabled
        or is_functorch_active()
    )


def list_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """List the hooks of forward and backward passes."""
    return [
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    ]


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Check for hooks: they are not run if the modules are not called."""
    return has_global_hooks() or has_own_hooks(modules)


def has_own_hooks(modules: Iterable[nn.Module]) -> bool:
    """Check for hooks of the modules themselves; profilers set hooks for all modules."""
    # transformers leaves hooks that record attention weights, which SDPA does not have
    return any(
        getattr(hook, "__module__", None) != capture_outputs.__module__
        for hook in chain.from_iterable(map(list_hooks, modules))
    )


# Linear layers ------------------------------------------------------------------------------------
def reorder_weight(weight: Tensor, inputs: Tensor) -> Tensor:
    """Reorder a weight [out, in] once if oneDNN is then the fastest.

    Args:
        weight: of a layer.
        inputs: [B, N, D], of all layers. The weight is reordered for the rows of one image: the bits
            must not depend on the size of the first batch.
    """
    if (
        weight.is_cpu
        and weight.dtype in REORDERED_DTYPES
        and inputs.shape[2] >= MIN_REORDERED_WIDTH
    ):
        return onednn_reorder(weight.contiguous(), inputs.shape[1])
    return weight


def select_linear(is_reordered: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Select the functions of a linear layer, and of one with the exact GELU.

    They take inputs [..., in], the weight and the bias or None, and return [..., out].
    """
    if is_reordered:
        return partial(multiply_reordered, "none"), partial(multiply_reordered, "gelu")
    return nn.functional.linear, multiply_with_gelu


def multiply_reordered(
    activation: str, inputs: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Compute a linear layer with a weight in the order of oneDNN, in its dtype."""
    return onednn_linear(inputs.to(weight.dtype), weight, bias, activation, [], "none")


def multiply_with_gelu(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a linear layer and GELU, in place if autograd does not need its input.

    To allocate memory for the output would take longer.
    """
    outputs = nn.functional.linear(inputs, weight, bias)
    return nn.functional.gelu(outputs) if torch.is_grad_enabled() else gelu_in_place(outputs)


def is_onednn_correct(dtype: torch.dtype) -> bool:
    """Try oneDNN's operators on this CPU, and compare them with PyTorch."""
    # Fake tensors, as in torch.compile, have no values to compare.
    if count_dispatch_modes():
        return True
    inputs, weight = (
        torch.linspace(-1, 1, rows * 16, dtype=dtype, device="cpu").view(rows, 16)
        for rows in (4, 8)
    )
    expected = inputs.float() @ weight.float().T
    try:
        with torch.no_grad():
            found = multiply_reordered("none", inputs, onednn_reorder(weight, 4), None)
            return torch.allclose(found.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
    except Exception:  # Operators may raise any exception on untested processors
        return False


HAS_ONEDNN = (
    HAS_PRIVATE_NAMES
    and torch.backends.mkldnn.is_available()
    and None not in (onednn_linear, onednn_reorder)
)
# Calls of reordered weights take longer, more than narrow layers gain.
MIN_REORDERED_WIDTH = 128
# The dtypes of weights that are reordered
REORDERED_DTYPES: set[torch.dtype] = set()
if HAS_ONEDNN and torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
    if (HAS_AMX or HAS_AVX512_BFLOAT16) and is_onednn_correct(torch.bfloat16):
        REORDERED_DTYPES.add(torch.bfloat16)
    if not HAS_AMX and is_onednn_correct(torch.float32):
        REORDERED_DTYPES.add(torch.float32)


# Attention ----------------------------------------------------------------------------------------
# Chunked attention stores its weights for the backward pass, which takes memory
MAX_CHUNKED_KEYS = 1200
# Number of attention scores per chunk and thread: 1 MiB in bfloat16, about one L2 cache
SCORES_PER_THREAD = 2**19


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Compute attention [B, n, heads, head_dim] in chunks where that is faster, else with SDPA.

    Args:
        query: [B, heads, n, head_dim].
        key, value: [B, heads, N, head_dim].
    """
    if attention_mask is None and can_chunk_attention(query, key):
        return attend_in_chunks(query, key, value, scaling)
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, scale=scaling
    )
    return output.transpose(1, 2)


def can_chunk_attention(query: Tensor, key: Tensor) -> bool:
    """Check that `attend_in_chunks` is faster than SDPA. With AMX, it is slower."""
    return (
        HAS_AVX512_BFLOAT16
        and not HAS_AMX
        and query.dtype == torch.bfloat16
        and query.is_cpu
        and key.shape[2] <= MAX_CHUNKED_KEYS
    )


def attend_in_chunks(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Compute softmax(query @ key.T * scaling) @ value, a few heads at a time.

    The scores of a few heads stay in the cache. They are rounded to the dtype of the inputs before
    the softmax, as in transformers' eager attention. Subtracting the mean of the keys makes scores
    smaller, so that less is lost by rounding, and does not change the softmax.

    The shapes are as in `attend`.
    """
    key = key - key.mean(dim=2, keepdim=True)
    query = query * scaling
    scores_per_head = query.shape[2] * key.shape[2]
    # The size is a number of heads, of all images.
    chunk_size = max(1, SCORES_PER_THREAD * torch.get_num_threads() // scores_per_head)
    chunks = zip(
        *(states.flatten(0, 1).split(chunk_size) for states in (query, key, value)), strict=True
    )

    # [heads in the chunk, n, head_dim] each
    outputs = [torch.bmm(torch.bmm(q, k.mT).softmax(dim=-1), v) for q, k, v in chunks]
    return torch.cat(outputs).unflatten(0, query.shape[:2]).transpose(1, 2)

"""Faster modules for CPUs. The outputs agree with plain PyTorch up to rounding errors.

    KERNEL_CLASSES               classes that replace plain ones (lean_layers.py installs them)
    use_plain_modules(model)     restores the plain classes, also of lean layers
    VITCLS_CPU_KERNELS=0         environment variable that prevents installation
    torch.backends.mkldnn.flags(enabled=False)    plain PyTorch while the context is active

    nn.Linear           -> CPULinear            oneDNN: float32 with AVX-512 but not AMX, bfloat16
                                                in inference
    ViTCLSMLP           -> CPUMLP               GELU fused with a linear layer or in place;
                                                recomputed in backward
    nn.Conv2d           -> CPUConv2d            float32 on CPUs without half-precision instructions
    attention classes   -> CPUAttention, ...    bfloat16: a few heads at a time, and one cast of
                                                the input

On CPUs without bfloat16 or float16 instructions, half-precision products, also in attention,
are computed in float32 and then rounded. Parameters, state dicts, `isinstance` checks, copying and
pickling work as in plain modules. Plain PyTorch is used in exported and traced programs, for
modules with hooks, for quantized, sharded or parametrized weights, and if a private PyTorch API is
missing; CPU kernels are not used under torch.func. Under autocast, oneDNN is used only for weights
in bfloat16. docs/speed.md lists the speedups.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.output_capturing import capture_outputs

from ..model.attention_masks_vitcls import get_matmul_dtype
from ..model.blocks_vitcls import ViTCLSAttention, ViTCLSMLP, list_hooks
from ..model.variants_vitcls import ViTCLSDifferentialAttention


# Private PyTorch APIs, used only in this file. If an API is missing, no kernel is installed.
try:
    from torch._C import _functorch
    from torch._C import _len_torch_dispatch_stack as count_dispatch_modes
    from torch.autograd import forward_ad
    from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

    peek_functorch_stack = _functorch.peek_interpreter_stack
    # None in builds without oneDNN
    onednn_pointwise: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    HALF_PRECISION_CHECKS: dict[torch.dtype, Callable[[], bool] | None] = {
        torch.bfloat16: getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None),
        torch.float16: getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None),
    }
    # In float32, MKL is as fast as oneDNN or faster on CPUs with AMX.
    HAS_AMX = torch.cpu._is_amx_tile_supported()
    HAS_AVX512_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()

    def is_functorch_active() -> bool:
        """Check whether torch.func or forward-mode AD is active; oneDNN supports neither."""
        return peek_functorch_stack() is not None or forward_ad._current_level >= 0

    def is_exporting() -> bool:
        """Check whether the model is being exported, perhaps for another machine."""
        # Before torch 2.14, torch.compiler.is_exporting() is also true during compilation.
        return torch.compiler._is_exporting_flag or torch.jit.is_tracing()

    is_functorch_active(), is_exporting()
    HAS_PRIVATE_NAMES = True
except (ImportError, AttributeError):
    HAS_PRIVATE_NAMES = False


Model = TypeVar("Model", bound=nn.Module)


# Installing ---------------------------------------------------------------------------------------
def can_use_cpu_kernels() -> bool:
    """Check that VITCLS_CPU_KERNELS is not 0 and that PyTorch has all required private APIs."""
    return os.environ.get("VITCLS_CPU_KERNELS") != "0" and HAS_PRIVATE_NAMES


def use_plain_modules(model: Model) -> Model:
    """Undo `use_fast_modules` in place, and return the model.

    Examples:
        >>> from modeling_vitcls import ViTCLSModel, use_plain_modules
        >>> model = use_plain_modules(ViTCLSModel.from_pretrained("runs/photos"))
    """
    for module in model.modules():
        if isinstance(module, FastModule):
            module.__class__ = type(module).__bases__[-1]
            vars(module).pop("usual", None)  # The attribute of a lean layer
    return model


class FastModule(nn.Module):
    """The first base class of a faster module. The last base class is the plain one."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or pickled module, as a plain one where kernels cannot be used."""
        super().__setstate__(state)
        if not can_use_cpu_kernels():
            use_plain_modules(self)


# Modules ------------------------------------------------------------------------------------------
class CPULinear(FastModule, nn.Linear):
    """A linear layer that maps [..., in] to [..., out]."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return `inputs @ weight.T + bias`."""
        if can_use_onednn(self, inputs):
            # A lookup in the dict is ten times as fast as the attributes, which nn.Module searches
            # in Python.
            parameters = self._parameters
            linear: Callable[..., Tensor] = (
                onednn_linear_autograd if torch.is_grad_enabled() else onednn_linear
            )
            return linear(inputs, parameters["weight"], parameters["bias"])
        if is_emulated(inputs) and has_plain_parameters(self):
            return linear_in_float32(inputs, self.weight, self.bias)
        return super().forward(inputs)


class CPUConv2d(FastModule, nn.Conv2d):
    """A convolution, [B, C, H, W] -> [B, out, rows, columns], such as the projection of patches."""

    def forward(self, images: Tensor) -> Tensor:
        """Convolve the images."""
        if is_emulated(images) and has_plain_parameters(self):
            return compute_in_float32(self._conv_forward, images, self.weight, self.bias)
        return super().forward(images)


class CPUMLP(FastModule, ViTCLSMLP):
    """ViTCLSMLP with GELU fused with a linear layer, or in place if autograd does not need it."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the MLP, [B, N, D] -> [B, N, D]."""
        if not hidden_states.is_cpu or must_be_plain() or not can_fuse_gelu(self):
            return super().forward(hidden_states)

        hidden_states = cast_for_autocast(hidden_states)
        if not torch.is_grad_enabled():
            if can_use_onednn(self.fc1, hidden_states):
                return self.fc2(
                    onednn_linear(hidden_states, self.fc1.weight, self.fc1.bias, "gelu")
                )
            # GELU works in place, because allocating its output takes longer.
            return self.fc2(torch.ops.aten.gelu_.default(self.fc1(hidden_states)))

        preactivations = self.fc1(hidden_states)  # [B, N, intermediate]
        if can_use_onednn(self.fc2, preactivations):
            return OneDNNGELULinear.apply(preactivations, self.fc2.weight, self.fc2.bias)
        return self.fc2(self.activation_fn(preactivations))


class CPUAttention(FastModule, ViTCLSAttention):
    """Kernel of `ViTCLSAttention`, and base class of the other attention kernels."""

    def project_qkv(
        self, hidden_states: Tensor, num_queries: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, from one cast of the input under autocast."""
        return super().project_qkv(cast_for_autocast(hidden_states), num_queries)

    def get_attention_function(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """Return `sdpa_attention` in place of transformers' function, and any other as it is.

        A person may have registered another function for "sdpa".
        """
        function = super().get_attention_function()
        return sdpa_attention if function is sdpa_attention_forward else function


class CPUDifferentialAttention(CPUAttention, ViTCLSDifferentialAttention):
    """CPU kernel of `ViTCLSDifferentialAttention`."""


KERNEL_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: CPULinear,
    nn.Conv2d: CPUConv2d,
    ViTCLSMLP: CPUMLP,
    ViTCLSAttention: CPUAttention,
    ViTCLSDifferentialAttention: CPUDifferentialAttention,
}


# Classes of the modules of an MLP whose GELU can be fused, in the order of the forward pass.
FUSED_CLASSES = [CPULinear, GELUActivation, nn.Identity, CPULinear]


# Conditions ---------------------------------------------------------------------------------------
def can_use_onednn(linear: nn.Linear | nn.Conv2d, inputs: Tensor) -> bool:
    """Check that oneDNN is faster and can be used: not under torch.func or a dispatch mode."""
    if not inputs.is_cpu or must_be_plain() or not has_plain_parameters(linear):
        return False
    weight: Tensor = linear._parameters["weight"]  # type: ignore[assignment]
    min_multiplications = MIN_MULTIPLICATIONS.get((inputs.dtype, torch.is_grad_enabled()))
    return (
        min_multiplications is not None
        and inputs.numel() * weight.shape[0] >= min_multiplications
        and weight.dtype == inputs.dtype
        and inputs.dtype == get_matmul_dtype(inputs)  # False if autocast would change the dtype
        and not count_dispatch_modes()
    )


def can_fuse_gelu(mlp: ViTCLSMLP) -> bool:
    """Check that an MLP has only the exact GELU between `CPULinear` layers, and no hooks."""
    modules = (mlp.fc1, mlp.activation_fn, mlp.norm, mlp.fc2)
    has_classes = [type(module) for module in modules] == FUSED_CLASSES
    has_forwards = any("forward" in vars(module) for module in modules)
    return has_classes and not (has_forwards or has_hooks(modules))


def has_plain_parameters(linear: nn.Linear | nn.Conv2d) -> bool:
    """Check that weight and bias are plain: not quantized, sharded or parametrized."""
    parameters = linear._parameters
    # The bias may be None, but not missing.
    return type(parameters.get("weight")) is nn.Parameter and "bias" in parameters


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Check for hooks, which are not run if the modules are not called."""
    # transformers leaves hooks that record attention weights, which SDPA does not have
    return has_global_hooks() or any(
        getattr(hook, "__module__", None) != capture_outputs.__module__
        for hook in chain.from_iterable(map(list_hooks, modules))
    )


def must_be_plain() -> bool:
    """Check for what only plain PyTorch does: compilation, tracing, torch.func; or the switch."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or not torch.backends.mkldnn.enabled
        or is_functorch_active()
    )


# oneDNN -------------------------------------------------------------------------------------------
def onednn_linear(
    inputs: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str = "none"
) -> Tensor:
    """Return `activation(inputs @ weight.T + bias)`, [..., in] and [out, in] -> [..., out].

    "gelu" is the exact GELU.
    """
    return onednn_pointwise.default(inputs, weight, bias, activation, [], "none")


def onednn_linear_autograd(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `inputs @ weight.T + bias` with gradients; under torch.func, PyTorch computes it."""
    if is_functorch_active():
        return nn.functional.linear(inputs, weight, bias)
    # `LinearFunction.forward` calls this function again, with gradients disabled.
    if torch.is_grad_enabled():
        return LinearFunction.apply(onednn_linear_autograd, inputs, weight, bias)
    return onednn_linear(inputs, weight, bias)


def compute_linear_gradients(
    linear: Callable[..., Tensor],
    needs_grad: Sequence[bool],
    grad: Tensor,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of a linear layer: inputs [..., in], weight [out, in], bias [out].

    Args:
        linear: function that computes a linear layer, `linear(inputs, weight, bias)`.
        needs_grad: which of the three gradients to compute; the other gradients are None.
        grad: gradient of the output, [..., out].
    """
    grad_rows = grad.reshape(-1, grad.shape[-1])  # [n, out]
    input_rows = inputs.reshape(-1, inputs.shape[-1])  # [n, in]
    input_grad = linear(grad, weight.t(), None) if needs_grad[0] else None

    weight_grad = None
    if needs_grad[1] and len(weight) <= weight.shape[1]:
        # oneDNN is faster if the second argument has more rows.
        weight_grad = linear(grad_rows.t(), input_rows.t(), None)
    elif needs_grad[1]:
        weight_grad = linear(input_rows.t(), grad_rows.t(), None).t()

    bias_grad = grad_rows.sum(0) if bias is not None and needs_grad[2] else None
    return input_grad, weight_grad, bias_grad


class LinearFunction(torch.autograd.Function):
    """Autograd around `linear`, which computes the products of all passes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        linear: Callable[..., Tensor], inputs: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        return linear(inputs, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.linear, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_grad = ctx.needs_input_grad[1:]
        return None, *compute_linear_gradients(ctx.linear, needs_grad, grad, *ctx.saved_tensors)


class OneDNNGELULinear(torch.autograd.Function):
    """GELU and a linear layer, computed by oneDNN; the backward pass recomputes the GELU."""

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return onednn_linear(nn.functional.gelu(inputs), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, bias = ctx.saved_tensors
        activations = nn.functional.gelu(inputs)
        input_grad, *parameter_grads = compute_linear_gradients(
            linear=onednn_linear_autograd,
            needs_grad=ctx.needs_input_grad,
            grad=grad,
            inputs=activations,
            weight=weight,
            bias=bias,
        )
        if input_grad is not None:
            input_grad = torch.ops.aten.gelu_backward(input_grad, inputs)
        return input_grad, *parameter_grads


def is_onednn_correct() -> bool:
    """Try oneDNN's operator on this CPU, and compare it with PyTorch."""
    # Fake tensors, as in torch.compile, have no values to compare.
    if count_dispatch_modes():
        return True
    inputs, weight = (
        torch.linspace(-1, 1, rows * 16, dtype=torch.float32, device="cpu").view(rows, 16)
        for rows in (4, 8)
    )
    try:
        with torch.no_grad():
            return torch.allclose(onednn_linear(inputs, weight, None), inputs @ weight.T, atol=1e-5)
    except Exception:  # Operators may raise any exception on untested processors
        return False


# Minimum number of multiplications for which oneDNN is faster, by (dtype, whether gradients are
# enabled).
MIN_MULTIPLICATIONS: dict[tuple[torch.dtype, bool], int] = {}
HAS_ONEDNN = (
    HAS_PRIVATE_NAMES and torch.backends.mkldnn.is_available() and onednn_pointwise is not None
)
if (
    HAS_ONEDNN
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    and is_onednn_correct()
):
    if HAS_AMX or HAS_AVX512_BFLOAT16:
        MIN_MULTIPLICATIONS[torch.bfloat16, False] = 0
    if not HAS_AMX:
        MIN_MULTIPLICATIONS |= {(torch.float32, False): 1_500_000, (torch.float32, True): 8_000_000}


# Half precision on CPUs without half-precision instructions ---------------------------------------
# On these CPUs, PyTorch multiplies half-precision numbers one by one, and products take 8 times as
# long as in float32. Like PyTorch, these functions accumulate in float32. Tensors saved for the
# backward pass stay in half precision.
EMULATED_DTYPES: set[torch.dtype] = set()
# This was measured on x86 only.
if HAS_PRIVATE_NAMES and torch.backends.cpu.get_cpu_capability().startswith("AVX"):
    EMULATED_DTYPES = {
        dtype for dtype, check in HALF_PRECISION_CHECKS.items() if check is not None and not check()
    }


def is_emulated(inputs: Tensor) -> bool:
    """Check whether PyTorch would multiply `inputs` without instructions for their dtype."""
    return (
        bool(EMULATED_DTYPES)
        and inputs.is_cpu
        and get_matmul_dtype(inputs) in EMULATED_DTYPES
        and not is_exporting()
        and bool(torch.backends.mkldnn.enabled)
    )


def cast_for_autocast(inputs: Tensor) -> Tensor:
    """Cast float32 inputs to the autocast dtype once, for several products."""
    if inputs.dtype != torch.float32 or not inputs.is_cpu or must_be_plain():
        return inputs
    return inputs.to(get_matmul_dtype(inputs))


def compute_in_float32(
    function: Callable[..., Tensor], inputs: Tensor, *other_inputs: Tensor | None
) -> Tensor:
    """Compute `function(inputs, *other_inputs)` in float32, and round it to half precision."""
    dtype = get_matmul_dtype(inputs)
    with torch.autocast("cpu", enabled=False):
        # Floats are rounded to `dtype` first; boolean masks and None stay.
        tensors = [
            each.to(dtype).float() if each is not None and each.is_floating_point() else each
            for each in (inputs, *other_inputs)
        ]
        return function(*tensors).to(dtype)


def linear_in_float32(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `inputs @ weight.T + bias` in the dtype of nn.Linear, [..., in] -> [..., out]."""
    dtype = get_matmul_dtype(inputs)
    tensors = (inputs.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return LinearFunction.apply(partial(compute_in_float32, nn.functional.linear), *tensors)


# Attention ----------------------------------------------------------------------------------------
# Chunked attention stores its weights for the backward pass, which takes memory
MAX_CHUNKED_KEYS = 1200
# Number of attention scores per chunk and thread: 1 MiB in bfloat16, about one L2 cache
SCORES_PER_THREAD = 2**19


def sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention [B, n, heads, head_dim] in chunks where that is faster, else with SDPA."""
    is_plain = attention_mask is None and dropout == 0 and not kwargs.get("is_causal")
    if is_plain and can_chunk_attention(query, key):
        return attend_in_chunks(query, key, value, scaling), None

    # The type is quoted, because torch.compile before 2.11 cannot trace `Tensor | None`
    def call_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: "Tensor | None") -> Tensor:
        output, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout, scaling, **kwargs
        )
        return output

    attend = partial(compute_in_float32, call_sdpa) if is_emulated(query) else call_sdpa
    return attend(query, key, value, attention_mask), None


def can_chunk_attention(query: Tensor, key: Tensor) -> bool:
    """Check that `attend_in_chunks` is faster than SDPA. With AMX, it has not been measured."""
    return (
        HAS_AVX512_BFLOAT16
        and not HAS_AMX
        and query.dtype == torch.bfloat16
        and query.is_cpu
        and key.shape[2] <= MAX_CHUNKED_KEYS
        and not must_be_plain()
    )


def attend_in_chunks(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Compute softmax(query @ key.T * scaling) @ value, a few heads at a time.

    The scores of a few heads stay in the cache. They are rounded to the dtype of the inputs before
    the softmax, as in transformers' eager attention. Subtracting the mean of the keys makes scores
    smaller, so that less is lost by rounding, and does not change the softmax.

    Args:
        query: [B, heads, n, head_dim].
        key, value: [B, heads, N, head_dim].

    Returns:
        [B, n, heads, head_dim].
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

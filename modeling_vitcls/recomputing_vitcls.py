"""What an MLP computes a second time, in the backward pass, because that is cheaper than to keep it.

    kept               what goes into the activation, [B, N, intermediate]
    computed again     what comes out of it, of the same size

Values and gradients are the same to the bit. Two others do so by themselves: an MLP that oneDNN multiplies
(onednn_vitcls.py), and attention (attention_steps_vitcls.py), which comes here where it is in float32 for half
precision. Gradient checkpointing, in contrast, computes whole layers again.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .linear_vitcls import has_hooks


def recomputed(
    module: nn.Module, function: Callable[..., torch.Tensor], first: torch.Tensor, *others: torch.Tensor | None
) -> torch.Tensor:
    """`function(first, *others)`, of a module; where it pays, only the inputs are kept for the backward pass.

    Of the function's last operation only its inputs are computed again.
    """
    if not pays_to_recompute(first) or any(map(has_hooks, module.modules())):  # which would see it twice
        return function(first, *others)
    return checkpoint(function, first, *others, use_reentrant=False)


def pays_to_recompute(inputs: torch.Tensor) -> bool:
    """Whether there will be a backward pass, on a CPU: elsewhere it was not measured.

    Compilers decide for themselves, and torch.func has no way to keep less.
    """
    return (
        inputs.requires_grad
        and inputs.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    )

"""The backward pass of a linear layer, by whatever multiplies fastest: oneDNN, or float32 for half precision."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


class LinearFunction(torch.autograd.Function):
    """A function of inputs [..., in], weight [out, in] and bias [out], which are kept for the backward pass."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Keep what came in."""
        ctx.save_for_backward(*inputs)


def gradients(
    multiply: Callable[..., torch.Tensor],
    needed: Sequence[bool],
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grad: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    """Of a linear layer's inputs [..., in], weight [out, in] and bias [out], from that of its output [..., out].

    `multiply(inputs, weight, bias)` is a linear layer itself; `needed` says which of the three gradients are wanted.
    """
    grads, rows = grad.reshape(-1, grad.shape[-1]), inputs.reshape(-1, inputs.shape[-1])  # [rows, out], [rows, in]
    of_inputs = multiply(grad, weight.t(), None) if needed[0] else None
    of_weight = None
    if needed[1] and len(weight) <= weight.shape[1]:  # the longer side as oneDNN's weight is faster
        of_weight = multiply(grads.t(), rows.t(), None)
    elif needed[1]:
        of_weight = multiply(rows.t(), grads.t(), None).t()
    return of_inputs, of_weight, grads.sum(0) if bias is not None and needed[2] else None

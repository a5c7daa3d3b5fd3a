"""Attention step by step, for CPUs: scores, softmax, mix. A few images at a time, so that scores stay in the cache.

    forward     part of the batch -> scores -> weights -> mixed values     nothing in between is kept
    backward    the same part -> its weights once more -> gradients

The numbers are those of PyTorch's attention within rounding. What goes this way is decided in
attention_core_vitcls.py.
"""

from collections.abc import Iterator
from typing import Any

import torch


# Scores that each thread computes at a time: 1 MiB in bfloat16, about what the cache of a core holds.
SCORES_PER_THREAD = 2**19


def attend_in_steps(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Queries [B, maps, n, d], keys and values [B, maps, N, d] -> mixed values [B, n, maps, d].

    The mask, [B or 1, maps or 1, n or 1, N] or None, is boolean (what is seen) or added to the scores. The softmax is
    in the dtype of the scores.
    """
    if torch.compiler.is_compiling():  # compilers cut it into parts as they like
        return mixed(query * scaling, key, value, mask).contiguous()
    if not torch.is_grad_enabled():
        return mixed_in_parts(query, key, value, mask, scaling)
    return AttentionInParts.apply(query, key, value, mask, scaling)


class AttentionInParts(torch.autograd.Function):
    """`attend_in_steps` that keeps nothing but its inputs; its gradients have gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
    ) -> torch.Tensor:
        """Part after part of the batch."""
        return mixed_in_parts(query, key, value, mask, scaling)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Keep what came in."""
        *tensors, ctx.scaling = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of queries, keys, values, and of a mask that is added and learned."""
        query, key, value, mask = ctx.saved_tensors
        learns_mask = ctx.needs_input_grad[3]
        grad = grad.transpose(1, 2).contiguous()  # [B, maps, n, d]
        parts = in_parts(query.contiguous() * ctx.scaling, key.contiguous(), value.contiguous(), mask, grad)
        found = [part_gradients(learns_mask, *part) for part in parts]
        of_query, of_key, of_value = (torch.cat(each).transpose(1, 2) for each in list(zip(*found, strict=True))[:3])
        of_mask = mask_gradient(mask, [part[3] for part in found]) if learns_mask else None
        return of_query * ctx.scaling, of_key, of_value, of_mask, None


def mixed_in_parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """`attend_in_steps`, part after part of the batch."""
    parts = in_parts(query.contiguous() * scaling, key.contiguous(), value.contiguous(), mask)
    first, *others = [mixed(*part) for part in parts]
    return torch.cat([first, *others]) if others else first


def part_size(query: torch.Tensor, key: torch.Tensor) -> int:
    """How many images' scores are computed at a time."""
    scores_of_one = query.shape[1] * query.shape[2] * key.shape[2]
    return max(1, SCORES_PER_THREAD * torch.get_num_threads() // scores_of_one)


def in_parts(query: torch.Tensor, key: torch.Tensor, *others: torch.Tensor | None) -> Iterator[tuple[Any, ...]]:
    """These tensors for a few images after the others; what all images share, again each time."""
    size, num_images = part_size(query, key), len(query)
    if size >= num_images:
        yield query, key, *others
        return
    for first in range(0, num_images, size):
        part = slice(first, first + size)
        yield tuple(each if each is None or len(each) < num_images else each[part] for each in (query, key, *others))


def weights_of(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What each query, already scaled, takes of each key, [B, maps, n, N]."""
    scores = torch.matmul(query, key.transpose(2, 3))
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    return scores.softmax(dim=-1)


def mixed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Values mixed by the weights, [B, n, maps, d]."""
    return torch.matmul(weights_of(query, key, mask), value).transpose(1, 2)


def part_gradients(
    learns_mask: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    grad: torch.Tensor,
) -> tuple[Any, ...]:
    """Of scaled queries, of keys and values, [B, n or N, maps, d] as projections give them; of the mask if it learns.

    With weights W = softmax(S) and their gradient G, that of the scores S is W * (G - sum(W * G)).
    """
    weights = weights_of(query, key, mask)  # [B, maps, n, N]
    of_weights = torch.matmul(grad, value.transpose(2, 3))
    of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
    return (
        torch.matmul(of_scores, key).transpose(1, 2),
        torch.matmul(of_scores.transpose(2, 3), query).transpose(1, 2),
        torch.matmul(weights.transpose(2, 3), grad).transpose(1, 2),
        of_scores.sum_to_size(mask.shape).to(mask.dtype) if learns_mask and mask is not None else None,
    )


def mask_gradient(mask: torch.Tensor, of_parts: list[torch.Tensor]) -> torch.Tensor:
    """That of the whole batch's mask, [B or 1, maps or 1, n or 1, N], from those of its parts."""
    is_shared = len(mask) == 1
    return torch.stack(of_parts).sum(0) if is_shared else torch.cat(of_parts)

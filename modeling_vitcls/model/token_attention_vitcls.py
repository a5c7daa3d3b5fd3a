# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""Attention of the special tokens: their rows of the attention maps.

    rows = model.token_attention(pixel_values)      # [batch, layer, head, special token, key]

Fused attention does not return attention maps, and full maps have N x N values. Therefore, a
`recorder` in the attention module (blocks_vitcls.py) receives queries and keys, and only the rows
of the special tokens are computed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from .attention_masks_vitcls import apply_mask
from .token_layout_vitcls import COUNT_FIELDS


LayerIndices = Sequence[int] | Literal["all"]


def compute_token_attention(
    model: Any,
    pixel_values: Tensor,
    attention_mask: Tensor | None,
    tokens: Sequence[str],
    layers: LayerIndices,
) -> Tensor:
    """Compute the attention weights of special tokens (see `token_attention` of the models)."""
    encoder = model.base_model
    layout = encoder.config.token_layout
    indices = range(layout.num_prefix_tokens)
    layer_numbers = range(1, 1 + len(encoder.layers))
    if layers == "all":
        layers = layer_numbers

    indices_by_group = {name: indices[getattr(layout, name)] for name in COUNT_FIELDS}
    token_indices = sorted(index for group in set(tokens) for index in indices_by_group[group])
    chosen = encoder.config.resolve_layers(layers, len(layer_numbers))
    if not set(chosen) <= set(layer_numbers):
        last = len(layer_numbers)
        raise ValueError(
            f"layers={list(layers)}: layers count from 1; layers=[1] is the first, [{last}] or [-1] the last"
        )
    layer_indices = [layer - 1 for layer in chosen]
    rows: dict[int, Tensor] = {}  # Layer -> [B, heads, special tokens, N]

    def record(layer: int, query: Tensor, key: Tensor, mask: Any, scaling: float) -> None:
        # Special tokens come first. Complete maps of all layers may not fit into memory.
        query = query[:, :, : layout.num_prefix_tokens]
        rows[layer] = compute_attention_rows(query, key, mask, scaling)

    with record_attention(model, layer_indices, record):
        # FSDP2 may require calling the whole model
        model(pixel_values, attention_mask=attention_mask)
    return torch.stack([rows[layer][:, :, token_indices] for layer in layer_indices], dim=1)


@contextmanager
def record_attention(
    model: Any, layers: Iterable[int], record: Callable[..., None]
) -> Iterator[None]:
    """Call `record` in the attention of each of `layers` within the context.

    The arguments are (layer, query, key, mask, scaling).

    The model that is passed runs eagerly within the context, also if `model.compile()` was called;
    compiled models of other threads stay compiled. The previous recorders are restored at the end.
    While one thread records, no other may use this model.
    """
    encoder = model.base_model
    attention_modules = {index: encoder.layers[index].attention for index in layers}
    previous_recorders = {each: each.recorder for each in attention_modules.values()}

    # Not `torch.compiler.set_stance`, which holds for all threads
    compiled_calls = {module: module._compiled_call_impl for module in model.modules()}

    try:
        for index, attention in attention_modules.items():
            attention.recorder = partial(record, index)
        for module in compiled_calls:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in compiled_calls.items():
            module._compiled_call_impl = call
        for attention, recorder in previous_recorders.items():
            attention.recorder = recorder


def compute_attention_rows(query: Tensor, key: Tensor, mask: Any, scaling: float) -> Tensor:
    """Compute the attention weights [B, heads, n, N] of the first n queries and N keys."""
    scores = apply_mask(
        torch.matmul(query, key.transpose(2, 3)) * scaling, select_mask_rows(mask, query, key)
    )
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)


def select_mask_rows(mask: Any, query: Tensor, key: Tensor) -> Tensor | None:
    """Select the rows of a mask for the first n queries, for any attention implementation.

    Masks are None, [B, N] (flash), [B or 1, heads or 1, N or 1, N] (SDPA, eager) or a `BlockMask`
    (flex attention).
    """
    if mask is None or query.shape[2] == 0:
        return None
    if not isinstance(mask, Tensor):
        from torch.nn.attention.flex_attention import create_mask

        batch, _, num_rows, _ = query.shape
        return create_mask(mask.mask_mod, batch, 1, num_rows, key.shape[2], device=query.device)
    if mask.ndim == 2:
        return mask.bool()[:, None, None, :]
    return mask[:, :, : query.shape[2]]

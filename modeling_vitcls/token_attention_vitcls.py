"""What the special tokens attend to: their rows of the attention maps, layer by layer.

    rows = model.token_attention(pixel_values)      # [batch, layer, head, special token, key]

Fused attention gives no maps, and whole ones would take N x N numbers. So hooks on each layer's `AttentionCore` take
its queries and keys, in a forward pass like any other, and compute the few rows again.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import nn

from .configuration_vitcls import TOKEN_COUNTS, TokenLayout


SPECIAL_TOKENS = tuple(TOKEN_COUNTS)  # names of the groups, in the order of the sequence

Layers = Sequence[int] | Literal["all"]


def read_token_attention(
    model: Any, pixel_values: torch.Tensor, attention_mask: torch.Tensor | None, tokens: Sequence[str], layers: Layers
) -> torch.Tensor:
    """See `ViTCLSPreTrainedModel.token_attention`."""
    encoder = model.base_model
    rows_wanted = places_of(tokens, encoder.config.token_layout)
    wanted = indices_of(layers, len(encoder.layers))
    rows: dict[int, torch.Tensor] = {}
    with ExitStack() as hooks:
        hooks.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code has no hooks
        hooks.enter_context(encoder.register_forward_pre_hook(ask_for_special_tokens, with_kwargs=True))
        for index in set(wanted):
            core = encoder.layers[index].attention.core
            note = noting(rows, index, encoder.config.token_layout.num_prefix_tokens)
            hooks.enter_context(core.register_forward_pre_hook(note, with_kwargs=True))
        model(pixel_values, attention_mask=attention_mask)
    return torch.stack([rows[index][:, :, rows_wanted] for index in wanted], dim=1)


def places_of(tokens: Sequence[str], layout: TokenLayout) -> list[int]:
    """Places in the sequence of the special tokens of these groups, in its order.

    Raises:
        ValueError: for a group that does not exist.
    """
    for name in tokens:
        if name not in SPECIAL_TOKENS:
            raise ValueError(f"tokens: there is no group {name!r}: name some of {', '.join(SPECIAL_TOKENS)}")
    special = range(layout.num_prefix_tokens)
    return [place for name, group in layout.items() if name in tokens for place in special[group]]


def indices_of(layers: Layers, num_layers: int) -> list[int]:
    """The layers' indices, from 0.

    Raises:
        ValueError: for none, or one that does not exist.
    """
    if layers == "all":
        return list(range(num_layers))
    if isinstance(layers, str) or not layers:
        raise ValueError(f'layers is {layers!r}: give "all" or a list of one or more indices')
    for index in layers:
        if not -num_layers <= index < num_layers:
            raise ValueError(f"layers: there is no layer {index}: the model has {num_layers}, from 0")
    return [index % num_layers for index in layers]


def ask_for_special_tokens(encoder: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A hook that asks for all special tokens of the last layer, where a head asks for some of them."""
    if kwargs.get("num_tokens_read") is not None:
        kwargs = kwargs | {"num_tokens_read": encoder.config.token_layout.num_prefix_tokens}
    return args, kwargs


def noting(rows: dict[int, torch.Tensor], index: int, num_special: int) -> Callable[..., None]:
    """A hook that puts the special tokens' rows [B, maps, special tokens, N] of a layer into `rows`."""

    def note(core: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        _, query, key, _, mask = args
        query = query[:, :, :num_special]
        rows[index] = attention_rows(query, key, first_rows_of(mask, query, key), kwargs["scaling"])

    return note


def attention_rows(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
    """As the weights of eager attention, but for dropout: [B, maps, n, d], [B, maps, N, d] -> [B, maps, n, N]."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)


def first_rows_of(mask: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """The first rows of a mask, as many as there are queries, in any of the forms that implementations take.

    These are none, [B, N] over keys (flash), [B or 1, maps or 1, N or 1, N] boolean or added to scores (SDPA, eager),
    and flex attention's, which is a function of the places.
    """
    if mask is None or query.shape[2] == 0:
        return None
    if not isinstance(mask, torch.Tensor):
        from torch.nn.attention.flex_attention import create_mask

        (batch, _, num_rows, _), num_keys = query.shape, key.shape[-2]
        return create_mask(mask.mask_mod, batch, 1, num_rows, num_keys, device=query.device)
    if mask.ndim == 2:
        return mask.bool()[:, None, None, :]
    return mask[:, :, : query.shape[2]]

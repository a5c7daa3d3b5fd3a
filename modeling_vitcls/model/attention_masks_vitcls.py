# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""Attention masks, attention biases, and maps of the special tokens. A default model uses no mask.

    attention_mask (argument)   mask of tokens (padding) [B, N], or complete 4-dimensional mask
    build_cls_attention_mask    hides patches from individual CLS tokens (`cls_scopes`)
    RelativePositionBias        learned bias per relative patch position (`relative_position_bias`)
    TokenFadeIn                 added tokens, until training has faded them in (`fading_tokens`)
    compute_token_attention     rows of the attention maps of the special tokens (`token_attention`)

`build_attention_mask` combines the masks in the format that the attention implementation expects.
`config.cls_scopes` hides patches from CLS tokens only. All tokens can attend to special tokens.

Fused attention returns no attention maps, and full maps have N x N values. A `recorder` in the
attention module (blocks_vitcls.py) therefore receives queries and keys, and only the rows of the special
tokens are computed.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import logging

from .configuration_vitcls import ViTCLSConfig
from .field_checks_vitcls import Size
from .positions_vitcls import needs_resampling
from .token_layout_vitcls import COUNT_FIELDS


logger = logging.get_logger(__name__)


def build_attention_mask(
    config: ViTCLSConfig,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    grid_size: Size,
    relative_position_bias: "RelativePositionBias | None",
    fade_in: "TokenFadeIn | None",
) -> Any:
    """Combine the masks and biases in the format that the attention implementation expects.

    Args:
        hidden_states: [B, N, D], after the embeddings.
        attention_mask: [B, N], 1 for each token that may be attended to; or a complete
            4-dimensional mask.
        grid_size: number of patch rows and columns.

    Returns:
        One mask for all layers, a list with one mask per layer, or None if no mask is required.

    Raises:
        ValueError: if `attention_mask` has an invalid shape, or the attention implementation does
            not support a mask.
    """
    if (
        attention_mask is not None
        and attention_mask.ndim != 4
        and attention_mask.shape != hidden_states.shape[:2]
    ):
        raise ValueError(
            f"attention_mask must have shape [batch, tokens] = {list(hidden_states.shape[:2])}, "
            f"special tokens included, but it has shape {list(attention_mask.shape)}"
        )

    mask = None
    if config.cls_scopes is not None:
        mask = build_cls_attention_mask(config, hidden_states, attention_mask, grid_size)
    elif attention_mask is not None:
        # With None, transformers would build an all-true mask during tracing.
        mask = create_bidirectional_mask(
            config=config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )

    if relative_position_bias is not None:
        mask = relative_position_bias(hidden_states, mask, grid_size)
    if fade_in is not None:
        mask = fade_in(hidden_states, mask)
    return mask


def detach_in_export(values: Tensor) -> Tensor:
    """Detach the values of a bias while torch.onnx traces: with gradients, SDPA has another kernel."""
    return values.detach() if torch.onnx.is_in_onnx_export() else values


def require_mask(config: ViTCLSConfig, feature: str, *others: str) -> None:
    """Raise ValueError unless the attention is SDPA, eager, or one of the `others` that read a mask."""
    supported = ("sdpa", "eager", *others)
    if config._attn_implementation not in supported:
        raise ValueError(
            f"{feature} requires an attention mask, which {config._attn_implementation} may ignore: "
            f"set attn_implementation to {' or '.join(supported)}"
        )


def apply_mask(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Apply a boolean or additive mask to an attention bias or to attention scores."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        # The smallest number instead of -inf, with which a row of hidden keys alone would become
        # NaN.
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask


# CLS scopes ---------------------------------------------------------------------------------------
def build_cls_attention_mask(
    config: ViTCLSConfig,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    grid_size: Size,
) -> Any:
    """Build the mask that hides from each CLS token the patches outside its scope."""
    require_mask(config, "cls_scopes", "flex_attention")
    if attention_mask is not None and attention_mask.ndim == 4:
        raise ValueError(
            "cls_scopes does not support a 4-dimensional attention_mask: pass a mask [batch, "
            "tokens]"
        )
    visibility = build_cls_visibility(config, grid_size, hidden_states.device)  # [N, N]

    def is_visible(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return visibility[q_idx, kv_idx]

    return create_bidirectional_mask(
        config=config,
        inputs_embeds=hidden_states,
        attention_mask=attention_mask,
        and_mask_function=is_visible,
    )


def build_cls_visibility(config: ViTCLSConfig, grid_size: Size, device: torch.device) -> Tensor:
    """Build a boolean matrix [N, N]; [q, k] is true if token q may attend to token k."""
    layout = config.token_layout
    num_tokens = layout.get_num_tokens(*grid_size)
    visibility = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device)
    for index, scope in enumerate(config.cls_scopes or ()):
        if not isinstance(scope, str):  # The scope "image" hides no patches
            visibility[index, layout.patches] = build_cell_mask(scope, grid_size, device)
    return visibility


def build_cell_mask(scope: list[int], grid_size: Size, device: torch.device) -> Tensor:
    """Mark the patches in the cell `[rows, columns, row, column]`: a boolean vector [patches]."""
    grid_rows, grid_columns = grid_size
    rows, columns, row, column = scope
    if grid_rows < rows or grid_columns < columns:
        raise ValueError(
            f"cls_scopes: a grid of {rows} x {columns} cells requires at least {rows} x {columns} "
            f"patches, but the image has {grid_rows} x {grid_columns} patches: use larger images"
        )

    y = torch.arange(grid_rows, device=device)
    x = torch.arange(grid_columns, device=device)
    # [grid_rows], [grid_columns]
    is_cell_row = (y >= row * grid_rows // rows) & (y < (row + 1) * grid_rows // rows)
    is_cell_column = (x >= column * grid_columns // columns) & (
        x < (column + 1) * grid_columns // columns
    )
    return (is_cell_row[:, None] & is_cell_column).flatten()


# Relative position bias ---------------------------------------------------------------------------
class RelativePositionBias(nn.Module):
    """Learned bias per relative position of two patches (BEiT, arXiv 2106.08254; Swin).

    `tables` [tables, distances + 3, heads] has one row per signed (row, column) distance, and three
    rows for pairs with special tokens: special to patch, patch to special, special to special. For
    other grids, tables are resampled.
    """

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.config = config
        rows, columns = config.grid_size
        num_tables = 1 if config.relative_position_bias == "shared" else config.num_hidden_layers
        num_table_rows = (2 * rows - 1) * (2 * columns - 1) + 3
        self.tables = nn.Parameter(
            torch.empty(num_tables, num_table_rows, config.num_attention_heads)
        )

    def forward(self, hidden_states: Tensor, mask: Any, grid_size: Size) -> Any:
        """Add the mask to the bias [B or 1, heads, N, N], or to a list with one bias per layer."""
        require_mask(self.config, "relative_position_bias")
        index = self.get_relative_position_index(grid_size, hidden_states.device)  # [N, N]
        # [tables, distances + 3, heads]
        tables = detach_in_export(self.tables)
        tables = resample_bias_tables(tables, self.config.grid_size, grid_size)
        tables = tables.to(hidden_states.dtype)
        # table[index]: [N, N, heads]
        biases = [apply_mask(table[index].permute(2, 0, 1).unsqueeze(0), mask) for table in tables]
        return biases if len(biases) > 1 else biases[0]

    def get_relative_position_index(self, grid_size: Size, device: torch.device) -> Tensor:
        """Find the row of the table for each pair of tokens, [N, N]."""
        layout = self.config.token_layout
        rows, columns = grid_size
        # [patches] each, patches = rows * columns
        y, x = torch.cartesian_prod(
            torch.arange(rows, device=device), torch.arange(columns, device=device)
        ).unbind(dim=1)
        row_offset = y[:, None] - y[None, :] + rows - 1  # [patches, patches], 0 or more
        column_offset = x[:, None] - x[None, :] + columns - 1

        num_distances = (2 * rows - 1) * (2 * columns - 1)
        num_tokens = layout.get_num_tokens(rows, columns)
        index = torch.full(
            (num_tokens, num_tokens), num_distances + 2, dtype=torch.long, device=device
        )

        index[: layout.num_prefix_tokens, layout.patches] = num_distances
        index[layout.patches, : layout.num_prefix_tokens] = num_distances + 1
        index[layout.patches, layout.patches] = row_offset * (2 * columns - 1) + column_offset
        return index


def resample_bias_tables(tables: Tensor, grid_size: Size, new_grid_size: Size) -> Tensor:
    """Resample bias tables [tables, distances + 3, heads] to another grid.

    The rows of special tokens do not change.
    """
    if not needs_resampling(grid_size, new_grid_size):
        return tables
    table_size = [2 * size - 1 for size in grid_size]
    new_table_size = [2 * size - 1 for size in new_grid_size]

    # [tables, heads, y, x]
    maps = tables[:, :-3].float().unflatten(1, table_size).permute(0, 3, 1, 2)
    maps = nn.functional.interpolate(
        maps, size=new_table_size, mode="bilinear", align_corners=False
    )
    # [tables, new distances, heads]
    distance_rows = maps.permute(0, 2, 3, 1).flatten(1, 2).to(tables.dtype)
    return torch.cat([distance_rows, tables[:, -3:]], dim=1)


# Fading in ----------------------------------------------------------------------------------------
class TokenFadeIn(nn.Module):
    """Fades added tokens in: the attention to each is multiplied by g, which training raises to 1.

    Attention weights become w_j = g_j exp(s_j) / sum_i g_i exp(s_i): log(g_j) is added to the scores
    of key j. An added token starts at g = 0, where no other token attends to it. Each training pass
    adds 1 / `config.token_fade_in_steps`, so after that many passes it is an ordinary token, with
    any optimizer. At g = 1, attention needs no bias any more, and `save_pretrained` leaves nothing
    of this module in the folder.

    A training pass is a forward pass in training mode with gradients: each pass of accumulated
    gradients counts, evaluation does not. g = 0 hides a token from other tokens, not from a head
    that reads it.

    Attributes:
        progress: [n], g of each token in units of `FULL`. An integer, so that half precision neither
            rounds nor stops it, and a buffer, so that checkpoints continue.
        is_open: whether all tokens had g = 1 when it was last looked at: in eager training passes, and
            in `train` and `eval`.
    """

    FULL = 10**9
    progress: Tensor

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.config = config
        layout = config.token_layout
        self.token_indices = [
            getattr(layout, group).start + index
            for group, index in list_last_tokens(config, config.fading_tokens)
        ]
        self.register_buffer(
            "progress", torch.zeros(len(self.token_indices), dtype=torch.long), persistent=True
        )
        self.is_open = False

    def forward(self, hidden_states: Tensor, mask: Any) -> Any:
        """Add log(g) to the mask, or to the list of masks. In training, count the pass first."""
        require_mask(self.config, "fading tokens in (unless token_fade_in_steps=0 is set)")
        if self.training and torch.is_grad_enabled():
            self.progress += math.ceil(self.FULL / self.config.token_fade_in_steps)
            # A compiled model would stop here in each pass; `train` and `eval` look for it.
            if not torch.compiler.is_compiling():
                self.find_open_tokens()
        elif hidden_states.requires_grad and not torch.compiler.is_compiling():
            hidden_states.register_hook(warn_about_evaluation_mode)

        bias = hidden_states.new_zeros(1, 1, 1, hidden_states.shape[1])  # [1, 1, 1, N]
        bias[..., self.token_indices] = self.get_values().log().to(bias.dtype)
        if isinstance(mask, list):
            return [apply_mask(bias, layer_mask) for layer_mask in mask]
        return apply_mask(bias, mask)

    def get_values(self) -> Tensor:
        """Compute g of each token, [n], in float32: from 0, hidden, to 1, an ordinary token."""
        return (self.progress / self.FULL).clamp(max=1.0)

    def find_open_tokens(self) -> None:
        """Set `is_open`."""
        self.is_open = not self.progress.is_meta and bool((self.progress >= self.FULL).all())

    def train(self, mode: bool = True) -> Self:
        """Set the training mode, as in PyTorch, and look whether all tokens have g = 1."""
        if not self.is_open:
            self.find_open_tokens()
        return super().train(mode)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load as in PyTorch; weights that were saved without fading have ordinary tokens."""
        ordinary = torch.full_like(self.progress, self.FULL)
        state_dict.setdefault(f"{prefix}progress", ordinary)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.find_open_tokens()


def warn_about_evaluation_mode(_gradient: Tensor) -> None:
    """Say that tokens stay hidden. `from_pretrained` returns a model in evaluation mode."""
    logger.warning_once(
        "The model is trained in evaluation mode, in which new tokens are not faded in. Call model.train()"
    )


class LearnedGates(nn.Module):
    """The gates of folders that were saved before tokens were faded in: g is 50 |parameter|, at most 1.

    `from_pretrained` replaces this module with a `TokenFadeIn` of the same values.
    """

    SCALE = 50.0

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        num_gates = len(list_last_tokens(config, config.gated_tokens))
        self.gates = nn.Parameter(torch.zeros(num_gates))

    def get_values(self) -> Tensor:
        """Compute g of each token, [n]."""
        return (self.gates.float().abs() * self.SCALE).clamp(max=1.0).double()


def list_last_tokens(
    config: ViTCLSConfig, counts: Mapping[Any, int] | None
) -> list[tuple[str, int]]:
    """List (group, index within the group) of the last `counts[group]` tokens, in sequence order."""
    tokens: list[tuple[str, int]] = []
    for group, field in COUNT_FIELDS.items():
        num_tokens = getattr(config, field)
        first = num_tokens - (counts or {}).get(group, 0)
        tokens += [(group, index) for index in range(first, num_tokens)]
    return tokens


# Attention maps of the special tokens -------------------------------------------------------------
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

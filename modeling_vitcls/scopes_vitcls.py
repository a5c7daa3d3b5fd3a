"""Which token may attend to which, and how much: what is added to attention's scores before the softmax.

    FullView        every token sees every token, but for a padding mask of the caller
    ScopedView      CLS tokens that see a part of the image (`config.cls_scopes`)
    DistanceView    a learned bias by the distance between patches (`config.relative_position_bias`)
    TokenGates      added tokens that start without influence (`config.gated_tokens`), on top of a view

Special tokens are visible to every token. A scope hides patches from one CLS token only, so that it summarises its
own region; patches and registers keep seeing the whole image. Each view gives one mask per layer.
"""

from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask

from .configuration_vitcls import ViTCLSConfig
from .resampling_vitcls import needs_no_resampling


class FullView(nn.Module):
    """Every token sees every token, but for a mask that the caller gives."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, grid: tuple[int, int]
    ) -> list[Any]:
        """Per layer, the mask in the form that the attention implementation wants; None where nothing is hidden.

        `attention_mask` is [B, N] over all tokens, 1 where a token may be seen, or a ready 4D mask.
        """
        if attention_mask is None:  # while a graph is traced, transformers would make up a mask that hides nothing
            return [None] * self.config.num_hidden_layers
        check_mask(attention_mask, hidden_states)
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        return [mask] * self.config.num_hidden_layers


class ScopedView(nn.Module):
    """Each CLS token sees the patches within its own scope (`config.cls_scopes`)."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, grid: tuple[int, int]
    ) -> list[Any]:
        """As `FullView.forward`, with the scopes applied.

        Raises:
            ValueError: if the attention implementation takes no mask, or a scope covers no patch of so small an image.
        """
        if "flash" in self.config._attn_implementation:
            raise ValueError(
                f"cls_scopes need an attention mask and {self.config._attn_implementation} takes none: "
                'set attn_implementation to "sdpa", "flex_attention" or "eager"'
            )
        if attention_mask is not None and attention_mask.ndim == 4:
            raise ValueError(
                "cls_scopes cannot be combined with an attention_mask of 4 dimensions: give [batch, tokens]"
            )
        check_mask(attention_mask, hidden_states)
        visible = self.visible_keys(grid, hidden_states.device)  # [N, N]

        def in_scope(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return visible[query, key]

        mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            and_mask_function=in_scope,
        )
        return [mask] * self.config.num_hidden_layers

    def visible_keys(self, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
        """Boolean [N, N]: row q, column k is true where token q may attend to token k."""
        layout = self.config.token_layout
        rows, columns = grid
        sequence_length = layout.num_prefix_tokens + rows * columns
        visible = torch.ones(sequence_length, sequence_length, dtype=torch.bool, device=device)
        for index, scope in enumerate(self.config.cls_scopes or ()):
            if not isinstance(scope, str):  # "image" hides nothing
                visible[index, layout.patches] = cell_mask(scope, grid, device)
        return visible


def check_mask(attention_mask: torch.Tensor | None, hidden_states: torch.Tensor) -> None:
    """Raise ValueError unless a mask is [B, N], or a ready one of four dimensions."""
    if attention_mask is None or attention_mask.ndim == 4 or attention_mask.shape == hidden_states.shape[:2]:
        return
    raise ValueError(
        f"attention_mask has shape {list(attention_mask.shape)} and there are {list(hidden_states.shape[:2])} "
        "[batch, tokens], special tokens among them: make them equal"
    )


def cell_mask(scope: list[int], grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Boolean [rows * columns], true for the patches within the cell `[rows, columns, row, column]` of the image."""
    (grid_rows, grid_columns), (rows, columns, row, column) = grid, scope
    if grid_rows < rows or grid_columns < columns:
        raise ValueError(
            f"cls_scopes: the image has {grid_rows} x {grid_columns} patches, too few for a {rows} x {columns} grid: "
            "use larger images"
        )
    y, x = torch.arange(grid_rows, device=device), torch.arange(grid_columns, device=device)
    in_rows = (y >= row * grid_rows // rows) & (y < (row + 1) * grid_rows // rows)
    in_columns = (x >= column * grid_columns // columns) & (x < (column + 1) * grid_columns // columns)
    return (in_rows[:, None] & in_columns).flatten()


class DistanceView(nn.Module):
    """A learned bias for each distance between patches, per layer or shared (BEiT, arXiv 2106.08254; Swin).

    `tables` has one row of heads per (row, column) distance, then three for pairs with special tokens: special to
    patch, patch to special, special to special. For other grids the distances are resampled.
    """

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.config = config
        rows, columns = config.grid_size
        num_tables = 1 if config.relative_position_bias == "shared" else config.num_hidden_layers
        num_rows = (2 * rows - 1) * (2 * columns - 1) + 3
        self.tables = nn.Parameter(torch.empty(num_tables, num_rows, config.num_attention_heads))

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, grid: tuple[int, int]
    ) -> list[torch.Tensor]:
        """Per layer, a bias [B or 1, heads, N, N] with the caller's mask applied.

        Raises:
            ValueError: if the attention implementation takes no additive mask.
        """
        require_additive_mask(self.config, "relative_position_bias is")
        check_mask(attention_mask, hidden_states)
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        index = self.table_index(grid, hidden_states.device)  # [N, N]
        tables = resample_distances(self.tables, self.config.grid_size, grid).to(hidden_states.dtype)
        biases = [combine(table[index].permute(2, 0, 1).unsqueeze(0), mask) for table in tables]
        return biases * (self.config.num_hidden_layers // len(biases))

    def table_index(self, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
        """Row of the table for each pair of tokens, [N, N]."""
        layout = self.config.token_layout
        rows, columns = grid
        y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
        y, x = y.flatten(), x.flatten()  # [rows * columns] each
        down = y[:, None] - y[None, :] + rows - 1
        right = x[:, None] - x[None, :] + columns - 1
        num_distances = (2 * rows - 1) * (2 * columns - 1)
        shape = [layout.num_prefix_tokens + rows * columns] * 2
        index = torch.full(shape, num_distances + 2, dtype=torch.long, device=device)  # special to special
        index[: layout.num_prefix_tokens, layout.patches] = num_distances
        index[layout.patches, : layout.num_prefix_tokens] = num_distances + 1
        index[layout.patches, layout.patches] = down * (2 * columns - 1) + right
        return index


def resample_distances(tables: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Biases by distance [tables, distances + 3, heads] for another grid; those of special tokens stay."""
    if needs_no_resampling(grid, new_grid):
        return tables
    distances, new_distances = ([2 * size - 1 for size in sizes] for sizes in (grid, new_grid))
    maps = tables[:, :-3].float().unflatten(1, distances).permute(0, 3, 1, 2)  # [tables, heads, y, x]
    maps = nn.functional.interpolate(maps, size=new_distances, mode="bilinear", align_corners=False)
    return torch.cat([maps.permute(0, 2, 3, 1).flatten(1, 2).to(tables.dtype), tables[:, -3:]], dim=1)


class TokenGates(nn.Module):
    """Scales how much some tokens are attended to, by a learned gate each, between nearly shut and any openness.

    Attention weights become w_j = g_j exp(s_j) / sum_i g_i exp(s_i): log(g) is added to the scores of token j. With
    g = 1e-6 at the start the other tokens do not notice it. The parameter `gates` is made for optimisers such as Adam,
    whose steps are as long as the learning rate whatever the gradient:

    - It is linear in g. The gradient with respect to log(g) would be a millionth of that of an open token.
    - g is 50 times its magnitude: a gate has to come from 0 to 1, where other weights are about 0.02.
    - Its sign does not count: a gate that is cut off below zero would be lost after a first step downwards. Nor is one
      lost at zero, where half precision may put it.
    """

    SCALE = 50.0
    OPEN = 1.0 / SCALE  # the parameter's value for g = 1, and at the start
    SHUT = 1e-6 / SCALE
    SMALLEST = 2.0**-24  # of g; keeps the logarithm finite, and is lost to rounding in g = 1

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.config = config
        self.places = gated_places(config)
        self.gates = nn.Parameter(torch.empty(len(self.places)))

    def forward(self, masks: list[Any], hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """Add the gates to each layer's mask.

        Raises:
            ValueError: if the attention implementation takes no additive mask.
        """
        require_additive_mask(self.config, "gated_tokens are")
        bias = hidden_states.new_zeros(1, 1, 1, hidden_states.shape[1])
        bias[..., self.places] = self.openness().log().to(bias.dtype)
        return [combine(bias, mask) for mask in masks]

    def openness(self) -> torch.Tensor:
        """g of each gated token, [n]; 1 is as open as a token without a gate."""
        magnitude = torch.where(self.gates < 0, -self.gates, self.gates)  # unlike abs, with a gradient at 0
        return magnitude * self.SCALE + self.SMALLEST


class NoGates(nn.Module):
    """Stands where `TokenGates` would, for models whose tokens are all open."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()

    def forward(self, masks: list[Any], hidden_states: torch.Tensor) -> list[Any]:
        """Return the masks as they are."""
        return masks


def gated_places(config: ViTCLSConfig) -> list[int]:
    """Places in the sequence of the gated tokens: the last ones of their groups."""
    places: list[int] = []
    for name, group in config.token_layout.items():
        count = (config.gated_tokens or {}).get(name, 0)
        places += range(group.stop - count, group.stop) if count else ()
    return places


def require_additive_mask(config: ViTCLSConfig, what: str) -> None:
    """Raise ValueError for attention implementations whose scores nothing can be added to."""
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"{what} added to attention's scores and {config._attn_implementation} takes no such bias: "
            'set attn_implementation to "sdpa" or "eager"'
        )


def combine(bias: torch.Tensor, mask: Any) -> torch.Tensor:
    """Apply a boolean or additive mask to a bias of attention's scores."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask


def first_rows(mask: Any, number: int | None) -> Any:
    """What the first tokens may see, of a mask [B or 1, heads or 1, N or 1, N]; the mask itself for no number."""
    return mask if mask is None or number is None else mask[:, :, :number]


def build_view(config: ViTCLSConfig) -> nn.Module:
    """The view that a configuration asks for."""
    if config.relative_position_bias != "none":
        return DistanceView(config)
    return FullView(config) if config.cls_scopes is None else ScopedView(config)

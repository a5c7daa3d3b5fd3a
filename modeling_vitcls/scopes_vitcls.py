"""Which token may attend to which: padding masks of the caller, and CLS tokens that see a part of the image.

Special tokens are visible to every token. A scope hides patches from one CLS token only, so that it summarises its
own region; patches and registers keep seeing the whole image.
"""

from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask

from .configuration_vitcls import ViTCLSConfig


class FullView(nn.Module):
    """Every token sees every token, but for a mask that the caller gives."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, grid: tuple[int, int]) -> Any:
        """The mask in the form that the attention implementation wants; None where nothing is hidden.

        `attention_mask` is [B, N] over all tokens, 1 where a token may be seen, or a ready 4D mask.
        """
        check_mask(attention_mask, hidden_states)
        return create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )


class ScopedView(nn.Module):
    """Each CLS token sees the patches within its own scope (`config.cls_scopes`)."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, grid: tuple[int, int]) -> Any:
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

        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            and_mask_function=in_scope,
        )

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
    mask = torch.zeros(grid, dtype=torch.bool, device=device)
    mask[
        row * grid_rows // rows : (row + 1) * grid_rows // rows,
        column * grid_columns // columns : (column + 1) * grid_columns // columns,
    ] = True
    return mask.flatten()

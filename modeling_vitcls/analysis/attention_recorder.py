"""Record the attention of every layer in a forward pass, for any attention implementation.

    layers = []
    with process_attention_layers(model, layers.append):
        model(pixel_values)
    layers[0].compute_weights()    # [B, maps, N, N]; only the maps of this layer are in memory

The `recorder` of each layer's attention receives queries, keys and values instead of attention maps, so memory grows
with N, not N².
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..token_attention_vitcls import compute_attention_rows, record_attention, select_mask_rows
from .model_utils import unwrap_model


@dataclass(frozen=True)
class RecordedLayer:
    """Inputs and output of one layer's attention. Each head has one map, or two maps with differential attention."""

    query: torch.Tensor  # [B, maps, N, d]
    key: torch.Tensor  # [B, maps, N, d]
    value: torch.Tensor  # [B, maps, N, head_dim]
    mask: Any
    scaling: float
    attention_output: torch.Tensor  # [B, N, maps, head_dim]

    def compute_weights(self, num_rows: int | None = None) -> torch.Tensor:
        """Return the maps [B, maps, N, N] of eager attention, or only the rows of the first `num_rows` tokens. Maps
        are computed in float32, so that rows sum to 1 for half-precision models too."""
        query, key = self.query[:, :, :num_rows].float(), self.key.float()
        return compute_attention_rows(query, key, select_mask_rows(self.mask, query, key), self.scaling)


@contextmanager
def process_attention_layers(model: Any, process_layer: Callable[[RecordedLayer], None]) -> Iterator[None]:
    """Call `process_layer` with the attention of each layer, including all tokens of the last layer, during forward
    passes inside the block."""
    encoder = unwrap_model(model).base_model
    record = lambda index, *fields: process_layer(RecordedLayer(*fields))  # noqa: E731
    with record_attention(encoder, range(len(encoder.layers)), record):
        yield

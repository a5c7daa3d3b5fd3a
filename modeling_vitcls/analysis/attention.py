"""The attention of every layer of a forward pass.

    trace = trace_attention(model, pixel_values)
    trace.compute_attention()      # [B, L, maps, S, N], of the special tokens

    with process_attention_layers(model, layers.append):
        model(pixel_values)
    layers[0].compute_weights()    # [B, maps, N, N]; only the maps of this layer are in memory

The `recorder` of each layer's attention receives queries, keys and values instead of attention
maps, so memory grows with N, not N².

Keys are in the order of `config.token_layout`; `extract_patch_maps` (maps.py) selects the patches.
Every attention implementation is supported.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..model.configuration_vitcls import ViTCLSConfig
from ..model.token_attention_vitcls import compute_attention_rows, record_attention


@dataclass(frozen=True)
class RecordedLayer:
    """Inputs of one layer's attention.

    Each head has one map, or two maps with differential attention.
    """

    query: torch.Tensor  # [B, maps, N, d]
    key: torch.Tensor  # [B, maps, N, d]
    value: torch.Tensor  # [B, maps, N, head_dim]
    mask: Any
    scaling: float
    attention_output: torch.Tensor  # [B, N, maps, head_dim]

    def compute_weights(self, num_rows: int | None = None) -> torch.Tensor:
        """Compute the maps [B, maps, N, N], or only the rows of the first `num_rows` tokens.

        They are the maps of eager attention, computed in float32: rows sum to 1 even for
        half-precision models.
        """
        query = self.query[:, :, :num_rows].float()
        return compute_attention_rows(query, self.key.float(), self.mask, self.scaling)


@contextmanager
def process_attention_layers(
    model: Any, process_layer: Callable[[RecordedLayer], None]
) -> Iterator[None]:
    """Call `process_layer` with the attention of each layer during forward passes inside the block.

    The attention includes all tokens of the last layer.
    """

    def record(_: int, *fields: Any) -> None:
        process_layer(RecordedLayer(*fields))

    with record_attention(model, range(len(model.base_model.layers)), record):
        yield


@dataclass(frozen=True)
class AttentionTrace:
    """Outputs and recorded attention of a forward pass."""

    config: ViTCLSConfig
    outputs: Any  # Outputs of the model, with hidden states
    layers: list[RecordedLayer]

    @torch.no_grad()
    def compute_attention(self) -> torch.Tensor:
        """Compute the attention of each special token to all tokens [B, L, maps, S, N].

        It is what `model.token_attention` returns. In a model without CLS tokens, the mean over the
        patches comes first.
        """
        layout = self.config.token_layout
        has_cls = bool(self.config.num_cls_tokens)
        layers = []
        # The layers take turns, because the full maps of all layers may not fit into memory.
        for layer in self.layers:
            if has_cls:
                layers.append(layer.compute_weights(layout.num_prefix_tokens))
                continue
            weights = layer.compute_weights()
            patches = weights[:, :, layout.patches].mean(dim=2, keepdim=True)
            special_tokens = weights[:, :, : layout.num_prefix_tokens]
            layers.append(torch.cat([patches, special_tokens], dim=2))
        return torch.stack(layers, dim=1)


@torch.no_grad()
def trace_attention(model: Any, pixel_values: torch.Tensor) -> AttentionTrace:
    """Run a model on images, and record the attention of all layers.

    Args:
        model: any ViTCLS model without wrappers, in evaluation mode.
        pixel_values: [B, C, H, W].
    """
    layers: list[RecordedLayer] = []
    with process_attention_layers(model, layers.append):
        outputs = model(pixel_values, output_hidden_states=True)
    return AttentionTrace(model.config, outputs, layers)

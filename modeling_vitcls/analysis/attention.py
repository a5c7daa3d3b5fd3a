"""The attention of the special tokens in every layer, with the outputs of the same forward pass.

Keys are in the order of `config.token_layout`; `extract_patch_maps` (maps.py) selects the patches.
Every attention implementation is supported.
"""

from typing import Any

import torch

from ..model.token_attention_vitcls import compute_attention_rows, record_attention


@torch.no_grad()
def trace_attention(model: Any, pixel_values: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Run a model on images, and compute the attention of each special token to all tokens.

    Args:
        model: any ViTCLS model without wrappers, in evaluation mode.
        pixel_values: [B, C, H, W].

    Returns:
        The outputs of the model, with hidden states, and the attention [B, L, maps, S, N], computed in
        float32. Each head has one map, or two with differential attention. In a model without CLS
        tokens, the mean over the patches comes first.
    """
    layout = model.config.token_layout
    num_rows = layout.num_prefix_tokens if model.config.num_cls_tokens else None
    layers: list[torch.Tensor] = []

    # Only one layer has full maps at a time: all of them may not fit into memory.
    def record(_: int, query: torch.Tensor, key: torch.Tensor, mask: Any, scaling: float) -> None:
        query = query[:, :, :num_rows].float()
        weights = compute_attention_rows(query, key.float(), mask, scaling)
        if num_rows is None:
            patches = weights[:, :, layout.patches].mean(dim=2, keepdim=True)
            weights = torch.cat([patches, weights[:, :, : layout.num_prefix_tokens]], dim=2)
        layers.append(weights)

    with record_attention(model, range(len(model.base_model.layers)), record):
        outputs = model(pixel_values, output_hidden_states=True)
    return outputs, torch.stack(layers, dim=1)

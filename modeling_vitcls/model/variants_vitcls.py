# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""Variants of the encoder that a configuration can select. The default model uses no variant.

    layer_type="post", "parallel"     ViTCLSPostNormLayer, ViTCLSParallelLayer
    attention_type="differential"     ViTCLSDifferentialAttention
    register_neurons={4: [17]}        RegisterNeurons

These classes extend the classes of blocks_vitcls.py, which does not import this file.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .blocks_vitcls import ViTCLSAttention, ViTCLSLayer
from .configuration_vitcls import ViTCLSConfig


# Layers -------------------------------------------------------------------------------------------
class ViTCLSPostNormLayer(ViTCLSLayer):
    """Layer with norms on the outputs of attention and MLP (EVA02-CLIP-E)."""

    def forward(self, hidden_states: Tensor, *inputs: Any, **kwargs: Any) -> Tensor:
        attn_output, _ = self.attention(hidden_states, *inputs, **kwargs)
        attn_output = self.layernorm_before(self.dropout(attn_output))
        branch = self.drop_path(self.layer_scale1(attn_output))
        hidden_states = hidden_states[:, : branch.shape[1]] + branch

        mlp_output = self.layernorm_after(self.dropout(self.mlp(hidden_states)))
        branch = self.drop_path(self.layer_scale2(mlp_output))
        return hidden_states + branch


class ViTCLSParallelLayer(ViTCLSLayer):
    """Layer with parallel attention and MLP after one norm (ViT-22B, arXiv 2302.05442)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Both branches share one norm and one layer scale.
        del self.layernorm_after, self.layer_scale2

    def forward(self, hidden_states: Tensor, *inputs: Any, **kwargs: Any) -> Tensor:
        normalized_states = self.layernorm_before(hidden_states)
        attn_output, _ = self.attention(normalized_states, *inputs, **kwargs)
        num_tokens = attn_output.shape[1]
        mlp_output = self.mlp(normalized_states[:, :num_tokens])
        branch = self.dropout(attn_output) + self.dropout(mlp_output)
        return hidden_states[:, :num_tokens] + self.drop_path(self.layer_scale1(branch))


LAYER_CLASSES: dict[str, type[ViTCLSLayer]] = {
    "standard": ViTCLSLayer,
    "post": ViTCLSPostNormLayer,
    "parallel": ViTCLSParallelLayer,
}


# Differential attention ---------------------------------------------------------------------------
class ViTCLSDifferentialAttention(ViTCLSAttention):
    """Attention whose heads subtract a second map (Ye et al. 2024, arXiv 2410.05258).

    The query and key of a head are each split into two halves, one per map. Each layer learns the
    weight of the second map. Unlike in the paper, this weight is a parameter, and the norm's
    weights include the output scale.
    """

    MAPS_PER_HEAD = 2
    # Initial weight of the second map (the paper's limit in deep layers); norm weights start at 0.2
    LAMBDA_INIT = 0.8

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__(config)
        self.lambda_full = nn.Parameter(torch.empty(1))
        self.head_norm = nn.RMSNorm(self.head_dim, eps=1e-5)

    def project_qkv(
        self, hidden_states: Tensor, num_queries: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the queries, keys and values of both maps of each head.

        Queries and keys are [B, 2 * heads, n or N, head_dim / 2]; values are
        [B, 2 * heads, N, head_dim].
        """
        query, key, value = super().project_qkv(hidden_states, num_queries)
        # Both maps of a head use the same values.
        return query, key, value.repeat_interleave(2, dim=1)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the normalized difference [B, n, heads, head_dim] of both maps' outputs."""
        # [B, n, 2 * heads, head_dim]
        outputs, weights = super().attend(query, key, value, attention_mask, **kwargs)
        # [B, n, heads, head_dim] each
        first_output, second_output = outputs.unflatten(2, (-1, 2)).unbind(3)
        return self.head_norm(first_output - self.lambda_full * second_output), weights


ATTENTION_CLASSES: dict[str, type[ViTCLSAttention]] = {
    "softmax": ViTCLSAttention,
    "differential": ViTCLSDifferentialAttention,
}


# Test-time registers ------------------------------------------------------------------------------
class RegisterNeurons(nn.Module):
    """Move activations of an MLP from the patches to the last register, without training.

    A few neurons write the outliers of a ViT without registers. The last register gets the largest
    activation of each over the patches, which then have 0; other special tokens keep theirs (Jiang et al.
    2025, arXiv 2506.08010, section 4). An activation is an input of the last linear layer of the MLP: of
    a gated one, the product of the gate and the value.
    """

    def __init__(self, config: ViTCLSConfig, neurons: list[int]) -> None:
        super().__init__()
        self.neurons = neurons
        self.layout = config.token_layout

    def forward(self, activations: Tensor) -> Tensor:
        """Move the activations of `neurons`, in a copy of [B, N, intermediate]."""
        if activations.shape[1] <= self.layout.num_prefix_tokens:  # A last layer of special tokens
            return activations
        moved = activations.clone()
        moved[:, self.layout.patches, self.neurons] = 0
        largest = activations[:, self.layout.patches, self.neurons].amax(dim=1)
        moved[:, self.layout.registers.stop - 1, self.neurons] = largest
        return moved

# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""The Vision Transformer (Dosovitskiy et al. 2020, arXiv 2010.11929) in plain PyTorch.

    pixel_values [B, C, H, W]
      -> ViTCLSEmbeddings     patches, special tokens, learned or sin-cos position embeddings
         tokens [B, N, D]     [ CLS | distillation | registers | patches ]
      -> ViTCLSLayer x L      x = x + attention(norm(x));  x = x + mlp(norm(x))
         tokens [B, N, D]

B images, N tokens, D channels. Every layer updates special tokens in the same way as patches.
`ViTCLSModel` (modeling_vitcls.py) calls the layers. Module names follow the ViT of transformers.
Variants that a configuration selects come last: post-norm and parallel layers, differential attention,
test-time registers. The default model uses none.

This file contains no performance optimizations, and is what runs. The installed package builds a faster
object for reading: `pack(model)`.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_vitcls import ViTCLSConfig
from .field_checks_vitcls import Size
from .positions_vitcls import (
    can_trace_resampling,
    needs_resampling,
    resample_positions,
    rotate_patches,
)
from .token_layout_vitcls import COUNT_FIELDS, GROUPS_WITH_POSITIONS, TOKEN_KINDS


NORMS: dict[str, type[nn.Module]] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


def build_norm(config: ViTCLSConfig, width: int | None = None) -> nn.Module:
    """Build a norm of type `config.norm_type` over `width` channels (default: `hidden_size`)."""
    return NORMS[config.norm_type](width or config.hidden_size, eps=config.layer_norm_eps)


# Embeddings ---------------------------------------------------------------------------------------
class ViTCLSPatchEmbeddings(nn.Module):
    """Project each patch, [B, C, H, W] -> [B, rows * columns, D].

    Pixels beyond the last whole patch are ignored.
    """

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_height_width
        self.projection = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=self.patch_size,
            stride=self.patch_size,
            bias=config.patch_bias,
        )
        self.norm = build_norm(config) if config.patch_norm else nn.Identity()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Project the patches of images [B, C, H, W].

        The caller must check the shape with `get_grid_size`.
        """
        patches: Tensor = self.projection(pixel_values)  # [B, D, rows, columns]
        patches = patches.flatten(2).transpose(1, 2)  # [B, rows * columns, D]
        return self.norm(patches)

    def get_grid_size(self, pixel_values: Tensor) -> Size:
        """Return the number of patch rows and columns.

        Raise ValueError if the shape of the images is unsupported.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[0] == 0:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}: pass one or more "
                "images, [batch, channels, height, width]"
            )
        _, channels, height, width = pixel_values.shape
        if channels != self.num_channels:
            raise ValueError(
                f"the model requires {self.num_channels} channel(s), but pixel_values has "
                f"{channels}: convert the images, or build the model with num_channels={channels}"
            )
        patch_height, patch_width = self.patch_size
        if height < patch_height or width < patch_width:
            raise ValueError(
                f"images of {height} x {width} pixels are smaller than one patch of {patch_height} "
                f"x {patch_width}: enlarge the images"
            )
        return height // patch_height, width // patch_width


class ViTCLSEmbeddings(nn.Module):
    """Build the token sequence [B, N, D] of images [B, C, H, W]: special tokens, then patches."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.patch_embeddings = ViTCLSPatchEmbeddings(config)
        self.position_embeddings = build_position_embeddings(config)
        for kind in TOKEN_KINDS:  # self.cls_token and so on
            num_tokens = getattr(config, kind.count_field)
            self.register_parameter(kind.parameter, build_tokens(num_tokens, config.hidden_size))
        self.mask_token = build_tokens(int(config.use_mask_token), config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm = build_norm(config) if config.pre_norm else nn.Identity()

    def forward(
        self,
        pixel_values: Tensor,
        grid_size: Size,
        bool_masked_pos: Tensor | None = None,
    ) -> Tensor:
        """Embed images, and replace masked patches with the mask token.

        Args:
            grid_size: number of patch rows and columns, from `get_grid_size`.
            bool_masked_pos: [B, rows * columns]; True for masked patches.

        Raises:
            ValueError: if `bool_masked_pos` does not have one value per patch.
        """
        # [B, rows * columns, D]
        patches = self.mask_patches(self.patch_embeddings(pixel_values), bool_masked_pos)
        special_tokens = self.get_special_tokens()  # Group -> [1, n, D]
        if self.position_embeddings is not None:
            special_tokens, patches = self.position_embeddings(special_tokens, patches, grid_size)
        special_states = [
            tokens.expand(pixel_values.shape[0], -1, -1) for tokens in special_tokens.values()
        ]
        tokens: Tensor = self.dropout(torch.cat([*special_states, patches], dim=1))  # [B, N, D]
        return self.norm(tokens)

    def get_special_tokens(self) -> dict[str, Tensor]:
        """Collect the learned tokens [1, n, D] of each group, in sequence order.

        Empty groups are omitted.
        """
        # Everything that looks for tokens in the sequence relies on this order (TokenLayout).
        groups = {kind.group: getattr(self, kind.parameter) for kind in TOKEN_KINDS}
        return {group: tokens for group, tokens in groups.items() if tokens is not None}

    def mask_patches(self, patches: Tensor, bool_masked_pos: Tensor | None) -> Tensor:
        """Replace masked patches with the mask token."""
        if bool_masked_pos is None:
            if self.mask_token is None or not self.training:
                return patches
            # Use an all-false mask, because distributed training requires a gradient for every
            # parameter.
            bool_masked_pos = patches.new_zeros(patches.shape[:2], dtype=torch.bool)
        if self.mask_token is None:
            raise ValueError("bool_masked_pos requires a mask token: set use_mask_token=True")
        if bool_masked_pos.shape != patches.shape[:2]:
            raise ValueError(
                f"bool_masked_pos has shape {list(bool_masked_pos.shape)}, not {list(patches.shape[:2])}"
            )
        return torch.where(
            bool_masked_pos.bool().unsqueeze(-1), self.mask_token.to(patches.dtype), patches
        )


class LearnedPositionEmbeddings(nn.Module):
    """Learned position embeddings, resampled to the patch grid of the images.

    `config.position_embedding_tokens` selects the special tokens that have positions, too.
    """

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.config = config
        self.grid_size = config.grid_size
        groups = GROUPS_WITH_POSITIONS[config.position_embedding_tokens]
        for group, field in COUNT_FIELDS.items():
            num_tokens = getattr(config, field) if group in groups else 0
            # [1, n, D] or None
            self.register_parameter(group, build_tokens(num_tokens, config.hidden_size))
        self.patches = nn.Parameter(torch.empty(1, math.prod(self.grid_size), config.hidden_size))

    def forward(
        self, special_tokens: dict[str, Tensor], patches: Tensor, grid_size: Size
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Add positions to patches [B, rows * columns, D], and to special tokens that have any."""
        positions: Tensor = self.patches  # [1, rows * columns, D]
        if needs_resampling(self.grid_size, grid_size, can_trace_resampling(self.config)):
            positions = resample_positions(positions, self.grid_size, grid_size, self.config)
        for group, tokens in special_tokens.items():
            if getattr(self, group) is not None:
                special_tokens[group] = tokens + getattr(self, group)  # [1, n, D]
        return special_tokens, patches + positions


class SinCosPositionEmbeddings(nn.Module):
    """Fixed sine-cosine position embeddings of patches (MoCo v3, arXiv 2104.02057).

    The channels are [sin x, cos x, sin y, cos y].
    """

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size

    def forward(
        self, special_tokens: dict[str, Tensor], patches: Tensor, grid_size: Size
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Add position embeddings to the patches [B, rows * columns, D].

        Special tokens do not change.
        """
        # Computed for each grid instead of stored, so that images of any size have exact positions.
        axes = (
            torch.arange(length, dtype=torch.float32, device=patches.device) for length in grid_size
        )
        y, x = torch.cartesian_prod(*axes).unbind(dim=1)  # [rows * columns] each
        exponents = (
            torch.arange(0, self.hidden_size, 4, dtype=torch.float32, device=patches.device)
            / self.hidden_size
        )
        frequencies = 10000.0**-exponents  # [D / 4]
        x_angles = x[:, None] * frequencies  # [rows * columns, D / 4]
        y_angles = y[:, None] * frequencies
        positions = torch.cat(
            [x_angles.sin(), x_angles.cos(), y_angles.sin(), y_angles.cos()], dim=-1
        )
        return special_tokens, patches + positions.to(patches.dtype)


def build_position_embeddings(
    config: ViTCLSConfig,
) -> LearnedPositionEmbeddings | SinCosPositionEmbeddings | None:
    """Build learned or sin-cos position embeddings; return None if the model has neither."""
    if config.position_embedding_type.startswith("learned"):
        return LearnedPositionEmbeddings(config)
    if config.position_embedding_type == "sincos_2d":
        return SinCosPositionEmbeddings(config)
    return None


def build_tokens(num_tokens: int, width: int) -> nn.Parameter | None:
    """Return a parameter [1, num_tokens, width], which `_init_weights` fills; None for 0 tokens."""
    return nn.Parameter(torch.empty(1, num_tokens, width)) if num_tokens else None


# Attention ----------------------------------------------------------------------------------------
def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[Tensor, Tensor]:
    """Compute attention [B, n, heads, head_dim] in plain PyTorch, and its weights [B, heads, n, N].

    Queries are [B, heads, n, head_dim]; keys and values are [B, heads, N, head_dim]. The softmax
    runs in float32.
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class ViTCLSAttention(nn.Module):
    """Multi-head self-attention.

    Attributes:
        recorder: function that every forward pass calls with query, key, mask and scaling. Default:
            None.
    """

    # Number of attention maps that each head computes; 2 in differential attention
    MAPS_PER_HEAD = 1

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.qk_head_dim = self.head_dim // self.MAPS_PER_HEAD
        self.scaling = self.qk_head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.recorder: Callable[[Tensor, Tensor, Any, float], None] | None = None
        width = config.hidden_size
        inner_dim = config.num_attention_heads * config.head_dim
        query_bias, key_bias, value_bias = (
            config.qkv_bias if bias is None else bias
            for bias in (config.query_bias, config.key_bias, config.value_bias)
        )
        self.q_proj = nn.Linear(width, inner_dim, bias=query_bias)
        self.k_proj = nn.Linear(width, inner_dim, bias=key_bias)
        self.v_proj = nn.Linear(width, inner_dim, bias=value_bias)
        self.o_proj = nn.Linear(inner_dim, width, bias=config.projection_bias)
        self.q_norm = build_norm(config, self.qk_head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config, self.qk_head_dim) if config.qk_norm else nn.Identity()
        self.norm = build_norm(config, inner_dim) if config.attention_norm else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: Tensor | None = None,
        num_queries: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, [B, N, D] -> [B, n, D], and return the outputs and the weights [B, heads, n, N].

        Fused attention returns no weights.

        Args:
            hidden_states: [B, N, D].
            attention_mask: mask in the format that the attention implementation expects
                (attention_masks_vitcls.py).
            position_embeddings: cos and sin of rotary position embeddings, [2, patches, head_dim] or
                [2, heads, patches, head_dim].
            num_queries: number n of leading tokens to update, which must be special tokens.
                Default: all N tokens.
        """
        query, key, value = self.project_qkv(hidden_states, num_queries)
        if position_embeddings is not None:
            query, key = rotate_patches(query, key, position_embeddings)
        elif self.config.has_rotary_positions:
            raise ValueError(
                "a layer with rotary positions requires them: pass `position_embeddings`"
            )
        if attention_mask is not None and num_queries is not None:
            attention_mask = attention_mask[:, :, :num_queries]
        # [B, n, heads, head_dim]
        attn_output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        attn_output = attn_output.flatten(2)  # [B, n, heads * head_dim]
        return self.o_proj(self.norm(attn_output)), weights

    def project_qkv(
        self, hidden_states: Tensor, num_queries: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries [B, heads, n, head_dim], keys and values [B, heads, N, head_dim].

        Rotary position embeddings are not yet applied.
        """
        queries = hidden_states
        if num_queries is not None:
            # torch.cat copies the tokens: with a view, torch.onnx would fix the batch size if the
            # example has one image.
            queries = torch.cat([hidden_states[:, :num_queries]], dim=1)
        # [B, n or N, heads, head_dim]
        query = self.q_norm(split_heads(self.q_proj(queries), self.qk_head_dim))
        key = self.k_norm(split_heads(self.k_proj(hidden_states), self.qk_head_dim))
        value = split_heads(self.v_proj(hidden_states), self.head_dim)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the attention output [B, n, heads, head_dim] and the weights.

        Fused attention returns no weights.
        """
        attention_function = self.get_attention_function()
        kwargs |= {
            "dropout": self.attention_dropout if self.training else 0.0,
            "scaling": self.scaling,
        }
        attn_output, weights = attention_function(self, query, key, value, attention_mask, **kwargs)
        # Queries and keys are read here, after norms and rotation, as attention sees them.
        if self.recorder is not None:
            self.recorder(query, key, attention_mask, self.scaling)
        return attn_output, weights

    def get_attention_function(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """Return the function of transformers for `config._attn_implementation`."""
        return ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )


def split_heads(states: Tensor, head_dim: int) -> Tensor:
    """Split [B, N, heads * head_dim] into heads; `unflatten` would fix the batch size of a traced model."""
    return states.view(*states.shape[:-1], -1, head_dim)


# MLP ----------------------------------------------------------------------------------------------
class ViTCLSMLP(nn.Module):
    """Linear layer, activation, linear layer: [B, N, D] -> [B, N, intermediate] -> [B, N, D]."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        width, inner_dim = config.hidden_size, config.intermediate_size
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(width, inner_dim, bias=config.mlp_bias)
        self.norm = build_norm(config, inner_dim) if config.mlp_norm else nn.Identity()
        self.fc2 = nn.Linear(inner_dim, width, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        activations = self.activation_fn(self.fc1(hidden_states))  # [B, N, intermediate]
        return self.fc2(self.norm(activations))


class ViTCLSGLU(nn.Module):
    """Gated MLP, `down(act(gate(x)) * up(x))` (Shazeer 2020, arXiv 2002.05202); see `ViTCLSMLP`."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        width, inner_dim = config.hidden_size, config.intermediate_size
        self.activation_fn = ACT2FN["silu" if config.mlp_type == "swiglu" else config.hidden_act]
        self.gate_proj = nn.Linear(width, inner_dim, bias=config.mlp_bias)
        self.up_proj = nn.Linear(width, inner_dim, bias=config.mlp_bias)
        self.norm = build_norm(config, inner_dim) if config.mlp_norm else nn.Identity()
        self.down_proj = nn.Linear(inner_dim, width, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gates = self.activation_fn(self.gate_proj(hidden_states))  # [B, N, intermediate]
        activations = gates * self.up_proj(hidden_states)
        return self.down_proj(self.norm(activations))


# Layer --------------------------------------------------------------------------------------------
class LayerScale(nn.Module):
    """Multiply each channel by a learned factor (CaiT, arXiv 2103.17239)."""

    def __init__(self, hidden_size: int, init_value: float) -> None:
        super().__init__()
        self.init_value = float(init_value)
        self.lambda1 = nn.Parameter(torch.empty(hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.lambda1


class DropPath(nn.Module):
    """Drop a residual branch for random images (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        # A Python float: a tensor would lose its value when a model is built on the meta device
        self.rate = rate

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Zero the branch [B, N, D] of random images; divide others by the keep probability."""
        if not self.training:
            return hidden_states
        keep_prob = 1 - self.rate
        mask = hidden_states.new_empty(hidden_states.shape[0], 1, 1).bernoulli_(keep_prob)
        # Divide by the keep rate: the expected output is then the one of evaluation.
        return hidden_states * mask / keep_prob


class ViTCLSLayer(GradientCheckpointingLayer):
    """A pre-norm Transformer layer, [B, N, D] -> [B, N, D], and base class of the other layers.

    transformers records the output of each layer as a hidden state. The model passes the mask of
    `cls_scopes`, biases and fading, and rotary positions: a layer that is called alone has none of them.
    """

    def __init__(
        self,
        config: ViTCLSConfig,
        drop_path_rate: float = 0.0,
        attention_class: type[ViTCLSAttention] = ViTCLSAttention,
    ) -> None:
        super().__init__()
        self.layernorm_before = build_norm(config)
        self.attention = attention_class(config)
        self.layer_scale1 = build_layer_scale(config)
        self.layernorm_after = build_norm(config)
        self.mlp = ViTCLSMLP(config) if config.mlp_type == "mlp" else ViTCLSGLU(config)
        self.layer_scale2 = build_layer_scale(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: Tensor | None = None,
        num_tokens: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """Apply attention, then the MLP, and return all tokens or only the first `num_tokens`."""
        attn_output, _ = self.attention(
            self.layernorm_before(hidden_states),
            attention_mask,
            position_embeddings,
            num_tokens,
            **kwargs,
        )
        branch = self.drop_path(self.layer_scale1(self.dropout(attn_output)))
        hidden_states = hidden_states[:, :num_tokens] + branch

        mlp_output = self.mlp(self.layernorm_after(hidden_states))
        branch = self.drop_path(self.layer_scale2(self.dropout(mlp_output)))
        return hidden_states + branch


class ViTCLSLayers(nn.ModuleList):
    """The layers of a model, one after another."""

    def forward(
        self,
        hidden_states: Tensor,
        inputs: Sequence[Any],
        read_layers: Collection[int],
        **kwargs: Any,
    ) -> dict[int, Tensor]:
        """Collect the outputs [B, N, D] of the layers in `read_layers`, from 1; 0 is the input.

        Args:
            hidden_states: [B, N, D].
            inputs: of each layer: the attention mask, rotary positions and, perhaps, the number of tokens.
        """
        states = {0: hidden_states}
        for index, layer in enumerate(self):
            hidden_states = layer(hidden_states, *inputs[index], **kwargs)
            if index + 1 in read_layers:
                states[index + 1] = hidden_states
        return states


def build_layer_scale(config: ViTCLSConfig) -> nn.Module:
    """Build the `LayerScale` of a residual branch; the identity without an initial value."""
    if config.layer_scale_init_value is None:
        return nn.Identity()
    return LayerScale(config.hidden_size, config.layer_scale_init_value)


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

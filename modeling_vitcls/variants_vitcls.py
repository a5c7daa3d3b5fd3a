# SPDX-License-Identifier: Apache-2.0
"""Variants of the encoder that a configuration can select. The default model uses no variant.

    layer_type="post", "parallel"     ViTCLSPostNormLayer, ViTCLSParallelLayer
    attention_type="differential"     ViTCLSDifferentialAttention
    register_neurons                  RegisterNeurons
    patch_drop_rate                   PatchDropout
    merged_patches_per_layer          MergingLayer and MergingAttention, called by `run_merging_layers`

These classes extend the classes of blocks_vitcls.py, which does not import this file.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_masks_vitcls import require_additive_mask
from .blocks_vitcls import ViTCLSAttention, ViTCLSLayer, build_norm
from .configuration_vitcls import ViTCLSConfig
from .positions_vitcls import PositionEmbeddings


# Layers --------------------------------------------------------------------------------------------------------------
class ViTCLSPostNormLayer(ViTCLSLayer):
    """Layer with norms on the outputs of attention and MLP, before each residual connection (EVA02-CLIP-E)."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: PositionEmbeddings | None = None,
        num_tokens: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        attn_output, _ = self.attention(hidden_states, attention_mask, position_embeddings, num_tokens, **kwargs)
        attn_output = self.layernorm_before(self.dropout(attn_output))
        hidden_states = self.add_branch(hidden_states[:, :num_tokens], attn_output, self.layer_scale1)
        mlp_output = self.layernorm_after(self.dropout(self.mlp(hidden_states)))
        return self.add_branch(hidden_states, mlp_output, self.layer_scale2)


class ViTCLSParallelLayer(ViTCLSLayer):
    """Layer with parallel attention and MLP after one norm, [B, N, D] -> [B, N, D] (ViT-22B, arXiv 2302.05442)."""

    def __init__(
        self,
        config: ViTCLSConfig,
        drop_path_rate: float = 0.0,
        attention_class: type[ViTCLSAttention] = ViTCLSAttention,
    ) -> None:
        super().__init__(config, drop_path_rate, attention_class)
        del self.layernorm_after, self.layer_scale2  # both branches share one norm and one layer scale

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: PositionEmbeddings | None = None,
        num_tokens: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        normalized_states = self.layernorm_before(hidden_states)
        attn_output, _ = self.attention(normalized_states, attention_mask, position_embeddings, num_tokens, **kwargs)
        branch = self.dropout(attn_output) + self.dropout(self.mlp(normalized_states[:, :num_tokens]))
        return self.add_branch(hidden_states[:, :num_tokens], branch, self.layer_scale1)


LAYER_CLASSES: dict[str, type[ViTCLSLayer]] = {
    "standard": ViTCLSLayer,
    "post": ViTCLSPostNormLayer,
    "parallel": ViTCLSParallelLayer,
}


# Differential attention ----------------------------------------------------------------------------------------------
class ViTCLSDifferentialAttention(ViTCLSAttention):
    """Attention whose heads compute the difference between two attention maps (Ye et al. 2024, arXiv 2410.05258).

    The query and key of a head are each split into two halves, one per map. Each layer learns the weight of the second
    map. Unlike in the paper, this weight is a parameter, and the norm's weights include the output scale.
    """

    LAMBDA_INIT = 0.8  # initial weight of the second map (the paper's limit in deep layers); norm weights start at 0.2

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__(config)
        self.qk_head_dim = self.head_dim // 2
        self.scaling = self.qk_head_dim**-0.5
        if config.qk_norm:
            self.q_norm = build_norm(config, self.qk_head_dim)
            self.k_norm = build_norm(config, self.qk_head_dim)
        self.second_share = nn.Parameter(torch.empty(1))
        self.head_norm = nn.RMSNorm(self.head_dim, eps=1e-5)

    def project_qkv(self, hidden_states: Tensor, num_queries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys [B, 2 * heads, n or N, head_dim / 2], and values [B, 2 * heads, N, head_dim]."""
        query, key, value = super().project_qkv(hidden_states, num_queries)
        return query, key, value.repeat_interleave(2, dim=1)  # both maps of a head use the same values

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the normalized difference [B, n, heads, head_dim] of the maps' outputs, and the attention weights."""
        outputs, weights = super().attend(query, key, value, attention_mask, **kwargs)  # [B, n, 2 * heads, head_dim]
        first_output, second_output = outputs.unflatten(2, (-1, 2)).unbind(3)
        return self.head_norm(first_output - self.second_share * second_output), weights


ATTENTION_CLASSES: dict[str, type[ViTCLSAttention]] = {
    "softmax": ViTCLSAttention,
    "differential": ViTCLSDifferentialAttention,
}


def get_layer_classes(config: ViTCLSConfig) -> tuple[type[ViTCLSLayer], type[ViTCLSAttention]]:
    """Return the layer class and the attention class for a configuration."""
    if config.merged_patches_per_layer:
        return MergingLayer, MergingAttention
    return LAYER_CLASSES[config.layer_type], ATTENTION_CLASSES[config.attention_type]


# Register neurons ----------------------------------------------------------------------------------------------------
class RegisterNeurons(nn.Module):
    """Move the activations of selected MLP neurons from the patches to the last register, without training.

    For each neuron, the register receives the largest patch activation in magnitude, and all patch activations are set
    to 0. Other special tokens are unchanged, as in the authors' code (Jiang et al. 2025, arXiv 2506.08010, section 4).
    """

    def __init__(self, config: ViTCLSConfig, neurons: list[int]) -> None:
        super().__init__()
        self.neurons = neurons
        self.patches = config.token_layout.patches
        self.last_register = config.token_layout.registers.stop - 1

    def forward(self, activations: Tensor) -> Tensor:
        """Return a copy of the activations [B, N, intermediate] in which the activations of `neurons` are moved."""
        patch_activations = activations[:, self.patches, self.neurons]  # [B, patches, neurons]
        largest_index = patch_activations.abs().argmax(dim=1, keepdim=True)  # [B, 1, neurons]
        edited_activations = activations.clone()
        edited_activations[:, self.patches, self.neurons] = 0
        edited_activations[:, self.last_register, self.neurons] = patch_activations.gather(1, largest_index).squeeze(1)
        return edited_activations

    def extra_repr(self) -> str:
        return f"neurons={self.neurons}"


def add_register_neurons(layers: Iterable[Any], config: ViTCLSConfig) -> None:
    """Add `RegisterNeurons` to the MLPs of the layers in `config.register_neurons`."""
    for index, layer in enumerate(layers):
        if neurons := [neuron for layer_index, neuron in config.register_neurons or () if layer_index == index]:
            layer.mlp.register_neurons = RegisterNeurons(config, neurons)


# Patch dropout -------------------------------------------------------------------------------------------------------
class PatchDropout(nn.Module):
    """Keep a random subset of each image's patches in training (PatchDropout, arXiv 2208.07220; FLIP, 2212.00794).

    Kept patches retain their positions: learned embeddings are already added, and rotary embeddings are selected
    with the patches. Special tokens are always kept. In eval mode, all patches are kept.
    """

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.rate = config.patch_drop_rate
        self.num_prefix_tokens = config.token_layout.num_prefix_tokens

    def forward(self, hidden_states: Tensor, mask: Any, position_embeddings: Any) -> tuple[Tensor, Any, Any]:
        """Drop the same patches from hidden states [B, N, D], masks and position embeddings.

        Masks and position embeddings are each a single value for all layers, a list with one value per layer, or None.
        """
        if not self.training:
            return hidden_states, mask, position_embeddings
        kept_indices = self.choose_patches(hidden_states)  # [B, num_kept]
        prefix_indices = torch.arange(self.num_prefix_tokens, device=hidden_states.device)
        prefix_indices = prefix_indices.expand(hidden_states.shape[0], -1)
        indices = torch.cat([prefix_indices, kept_indices + self.num_prefix_tokens], dim=1)  # [B, n]
        return (
            select_tokens(hidden_states, indices),
            map_layers(mask, lambda layer_mask: select_mask(layer_mask, indices)),
            map_layers(position_embeddings, lambda cos_sin: select_position_embeddings(cos_sin, kept_indices)),
        )

    def choose_patches(self, hidden_states: Tensor) -> Tensor:
        """Return the indices [B, num_kept] of the patches to keep, in ascending order."""
        num_images, num_patches = hidden_states.shape[0], hidden_states.shape[1] - self.num_prefix_tokens
        num_kept = get_num_kept_patches(self.rate, num_patches)
        random_order = torch.rand(num_images, num_patches, device=hidden_states.device).argsort(dim=1)
        return random_order[:, :num_kept].sort(dim=1).values

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def get_num_kept_patches(drop_rate: float, num_patches: int) -> int:
    """Return the number of patches kept per image in training, rounded to the nearest integer and at least 1."""
    return max(1, round(num_patches * (1 - drop_rate)))


def require_all_patches(model: nn.Module, config: ViTCLSConfig) -> None:
    """Raise ValueError if a model that requires every patch is in training mode with patch dropout."""
    if model.training and config.patch_drop_rate > 0:
        raise ValueError(
            f"{type(model).__name__} requires every patch, but patch_drop_rate is {config.patch_drop_rate}. "
            "Set patch_drop_rate=0 to train the model."
        )


def map_layers(values: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the value of each layer, or to a single value for all layers."""
    if values is None:
        return None
    return [function(value) for value in values] if isinstance(values, list) else function(values)


def select_tokens(hidden_states: Tensor, indices: Tensor) -> Tensor:
    """Return the tokens [B, n, D] at `indices` [B, n] of hidden states [B, N, D]."""
    return hidden_states.gather(1, indices.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))


def select_mask(mask: Any, indices: Tensor) -> Any:
    """Select the tokens at `indices` [B, n] in a mask, for any attention implementation.

    Masks are [B, N] (flash), [B or 1, heads or 1, N or 1, N] (SDPA, eager) or a `BlockMask` (flex attention).
    """
    if not isinstance(mask, Tensor):
        return select_block_mask(mask, indices)
    if mask.ndim == 2:
        return torch.take_along_dim(mask, indices, dim=1)
    if mask.shape[2] > 1:
        mask = torch.take_along_dim(mask, indices[:, None, :, None], dim=2)
    return torch.take_along_dim(mask, indices[:, None, None, :], dim=3)


def select_block_mask(mask: Any, indices: Tensor) -> Any:
    """Select the tokens at `indices` [B, n] in a flex attention mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    def is_visible(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask.mask_mod(batch_idx, head_idx, indices[batch_idx, q_idx], indices[batch_idx, kv_idx])

    num_images, num_tokens = indices.shape
    return create_block_mask(is_visible, num_images, None, num_tokens, num_tokens, device=indices.device)


def select_position_embeddings(position_embeddings: PositionEmbeddings, indices: Tensor) -> PositionEmbeddings:
    """Return cos and sin [B, heads or 1, n, head_dim] of the patches at `indices` [B, n]."""
    index = indices[:, None, :, None]
    cos, sin = (embedding.reshape(1, -1, *embedding.shape[-2:]) for embedding in position_embeddings)
    return torch.take_along_dim(cos, index, dim=2), torch.take_along_dim(sin, index, dim=2)


# Token merging -------------------------------------------------------------------------------------------------------
#
# Each layer merges similar patches between attention and MLP, so that later layers have fewer tokens (ToMe, arXiv
# 2210.09461). Between layers, each patch has a copy of its group's hidden state, so hidden states keep their shape.
# Attention is weighted by group size: log(size) is added to the scores. Merging changes outputs but needs no training.


@dataclass(frozen=True)
class MergedGroups:
    """Partition of the N tokens of the sequence into T groups. Each special token is a group of its own.

    Attributes:
        sizes: [B, T], number of tokens in each group.
        member_index: [B, T], sequence index of one token in each group.
        group_index: [B, N], group index of each token.
    """

    sizes: Tensor
    member_index: Tensor
    group_index: Tensor

    @classmethod
    def from_tokens(cls, hidden_states: Tensor) -> Self:
        """Build groups of size one for hidden states [B, N, D]."""
        indices = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        indices = indices.expand(hidden_states.shape[0], -1)  # [B, N]
        return cls(torch.ones_like(indices, dtype=torch.float32), indices, indices)

    def collect(self, hidden_states: Tensor) -> Tensor:
        """Return one token per group, [B, T, D]. Hidden states [B, N, D] must be equal within each group."""
        return select_tokens(hidden_states, self.member_index)

    def expand(self, tokens: Tensor) -> Tensor:
        """Copy the token of each group, [B, T, D], to all members of the group. Return [B, N, D]."""
        return select_tokens(tokens, self.group_index)

    def get_attention_bias(self, dtype: torch.dtype) -> Tensor:
        """Return the attention bias log(group size) of each key, [B, 1, 1, T]."""
        return self.sizes.log().to(dtype)[:, None, None, :]

    def merge(self, tokens: Tensor, source_indices: Tensor, target_indices: Tensor) -> tuple[Tensor, "MergedGroups"]:
        """Merge tokens at distinct `source_indices` [B, r] into non-source tokens at `target_indices` [B, r].

        Returns:
            The averages [B, T - r, D] over the members of the new groups, and the new groups.
        """
        num_remaining = tokens.shape[1] - source_indices.shape[1]
        is_kept = torch.ones_like(self.member_index, dtype=torch.bool).scatter(1, source_indices, False)  # [B, T]
        new_index = is_kept.cumsum(dim=1) - 1  # [B, T], valid only for kept tokens
        new_index = new_index.scatter(1, source_indices, new_index.gather(1, target_indices))  # sources join targets
        order = torch.arange(tokens.shape[1], device=tokens.device).where(is_kept, tokens.shape[1])  # sources last
        kept_indices = order.topk(num_remaining, dim=1, largest=False).values  # [B, T - r], ascending
        sizes = self.sizes.new_zeros(tokens.shape[0], num_remaining).scatter_add(1, new_index, self.sizes)
        weights = (self.sizes / sizes.gather(1, new_index)).to(tokens.dtype).unsqueeze(-1)  # [B, T, 1]
        merged_tokens = tokens.new_zeros(tokens.shape[0], num_remaining, tokens.shape[2])
        merged_tokens = merged_tokens.scatter_add(1, new_index.unsqueeze(-1).expand_as(tokens), tokens * weights)
        return merged_tokens, MergedGroups(
            sizes, self.member_index.gather(1, kept_indices), new_index.gather(1, self.group_index)
        )


def match_similar_patches(keys: Tensor, num_pairs: int) -> tuple[Tensor, Tensor]:
    """Match patches with similar keys [B, n, d] (bipartite soft matching; ToMe, section 3).

    Pair each even-indexed patch with the odd-indexed patch with the highest cosine similarity; return the best pairs.

    Returns:
        Indices of the even patches and indices of the paired odd patches, [B, num_pairs] each.
    """
    keys = nn.functional.normalize(keys, dim=-1)
    similarity = keys[:, 0::2] @ keys[:, 1::2].transpose(1, 2)  # [B, n - n // 2, n // 2]
    best_similarity, partners = similarity.max(dim=-1)
    even_indices = best_similarity.topk(num_pairs, dim=-1).indices
    return 2 * even_indices, 2 * partners.gather(1, even_indices) + 1


class MergingAttention(ViTCLSAttention):
    """Attention that returns the head-averaged key of each token, [B, T, d], instead of attention weights."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output of `ViTCLSAttention.attend`, and the mean keys [B, T, d].

        Raises:
            ValueError: if attention is recorded, or if tensor parallelism splits the heads.
        """
        if kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)) or self.recorder:
            raise ValueError(
                "Attention between merged patches cannot be recorded. Load the model with merged_patches_per_layer=0."
            )
        if key.shape[1] != self.config.num_attention_heads:
            raise ValueError(
                "merged_patches_per_layer does not support tensor parallelism. Set merged_patches_per_layer=0."
            )
        attn_output, _ = super().attend(query, key, value, attention_mask, **kwargs)
        return attn_output, key.mean(dim=1)


class MergingLayer(ViTCLSLayer):
    """Standard layer that merges patches between attention and MLP."""

    def __init__(
        self,
        config: ViTCLSConfig,
        drop_path_rate: float = 0.0,
        attention_class: type[ViTCLSAttention] = MergingAttention,
    ) -> None:
        super().__init__(config, drop_path_rate, attention_class)
        self.config = config
        self.num_prefix_tokens = config.token_layout.num_prefix_tokens
        self.num_pairs = config.merged_patches_per_layer

    def forward(  # type: ignore[override]  # also accepts and returns the groups
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: PositionEmbeddings | None = None,
        num_tokens: int | None = None,
        *,
        groups: MergedGroups,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, MergedGroups]:
        """Return outputs [B, N or num_tokens, D] and groups. Hidden states [B, N, D] must be equal within each group.

        Raises:
            ValueError: if a mask is passed, or if the attention implementation does not support an additive bias.
        """
        require_additive_mask(self.config, "merged_patches_per_layer")
        if attention_mask is not None:
            raise ValueError("attention_mask is not supported with merged patches. Set merged_patches_per_layer=0.")
        tokens, bias = groups.collect(hidden_states), groups.get_attention_bias(hidden_states.dtype)
        if num_tokens is not None:  # only special tokens are computed, so no patches are merged
            return super().forward(tokens, bias, position_embeddings, num_tokens, **kwargs), groups
        attn_output, keys = self.attention(self.layernorm_before(tokens), bias, position_embeddings, **kwargs)
        tokens = self.add_branch(tokens, self.dropout(attn_output), self.layer_scale1)
        tokens, groups = self.merge(tokens, keys, groups)  # [B, T - r, D]
        mlp_output = self.mlp(self.layernorm_after(tokens))
        tokens = self.add_branch(tokens, self.dropout(mlp_output), self.layer_scale2)
        return groups.expand(tokens), groups

    def merge(self, tokens: Tensor, keys: Tensor, groups: MergedGroups) -> tuple[Tensor, MergedGroups]:
        """Merge up to half of the patches in tokens [B, T, D] into patches with similar keys [B, T, d]."""
        num_pairs = min(self.num_pairs, (tokens.shape[1] - self.num_prefix_tokens) // 2)
        if num_pairs == 0:
            return tokens, groups
        source_indices, target_indices = match_similar_patches(keys[:, self.num_prefix_tokens :].detach(), num_pairs)
        return groups.merge(tokens, source_indices + self.num_prefix_tokens, target_indices + self.num_prefix_tokens)


def run_merging_layers(
    layers: Iterable[nn.Module], hidden_states: Tensor, mask: Any, num_output_tokens: int | None, **kwargs: Any
) -> Tensor:
    """Run the layers, each of which updates the groups. Return hidden states [B, N or num_output_tokens, D]."""
    groups = MergedGroups.from_tokens(hidden_states)
    *earlier_layers, last_layer = layers
    for layer in earlier_layers:
        hidden_states, groups = layer(hidden_states, mask, groups=groups, **kwargs)
    hidden_states, _ = last_layer(hidden_states, mask, num_tokens=num_output_tokens, groups=groups, **kwargs)
    return hidden_states

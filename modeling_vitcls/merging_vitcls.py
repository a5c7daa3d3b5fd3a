"""Token merging: each layer joins the most similar patches, so that later layers have fewer (ToMe, arXiv 2210.09461).

    all tokens -> one for each group -> attention -> similar patches become one group -> MLP -> all tokens

Between layers every patch has a place, with the state of its group: hidden states, poolers and maps of features are as
ever, and a mean over patches counts a group as often as it has patches. Attention counts it so too: the logarithm of
its size is added to the scores of its key. Special tokens are never merged. It is inexact, and needs no training.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_core_vitcls import AttentionCore
from .configuration_vitcls import ViTCLSConfig
from .layers_vitcls import ViTCLSLayer
from .patch_dropout_vitcls import tokens_at
from .rotary_vitcls import Rotation
from .scopes_vitcls import require_additive_mask


@dataclass(frozen=True)
class Groups:
    """Which places of the sequence share one token. Special tokens have one each, and tokens keep the order of places.

    Attributes:
        sizes: [B, T], places of each token.
        place_of: [B, T], one place of each token.
        token_of: [B, N], the token of each place.
    """

    sizes: torch.Tensor
    place_of: torch.Tensor
    token_of: torch.Tensor

    @classmethod
    def of_one(cls, hidden_states: torch.Tensor) -> Self:
        """A token for every place of [B, N, D]."""
        places = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        places = places.expand(hidden_states.shape[0], -1)  # [B, N]
        return cls(torch.ones_like(places, dtype=torch.float32), places, places)

    def collect(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, N, D], equal within groups -> [B, T, D]."""
        return tokens_at(self.place_of, hidden_states)

    def spread(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, N, D]."""
        return tokens_at(self.token_of, tokens)

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        """What to add to the scores of each key, [B, 1, 1, T]: as if it stood there once for each of its places."""
        return self.sizes.log().to(dtype)[:, None, None, :]

    def merge(
        self, tokens: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, "Groups"]:
        """Join each of the tokens `sources` [B, r], all different, with one of `targets` [B, r], which are no sources.

        Returns:
            The tokens [B, T - r, D], averages over the places of the groups, and these groups.
        """
        num_left = tokens.shape[1] - sources.shape[1]
        stays = torch.ones_like(self.place_of, dtype=torch.bool).scatter(1, sources, False)
        new_token = stays.cumsum(dim=1) - 1  # [B, T], right for those that stay
        new_token = new_token.scatter(1, sources, new_token.gather(1, targets))
        places = torch.arange(tokens.shape[1], device=tokens.device).where(stays, tokens.shape[1])  # sources last
        staying = places.topk(num_left, dim=1, largest=False).values  # [B, T - r], in order
        sizes = self.sizes.new_zeros(tokens.shape[0], num_left).scatter_add(1, new_token, self.sizes)
        shares = (self.sizes / sizes.gather(1, new_token)).to(tokens.dtype).unsqueeze(-1)  # [B, T, 1]
        merged = tokens.new_zeros(tokens.shape[0], num_left, tokens.shape[2])
        merged = merged.scatter_add(1, new_token.unsqueeze(-1).expand_as(tokens), tokens * shares)
        groups = Groups(sizes, self.place_of.gather(1, staying), new_token.gather(1, self.token_of))
        return merged, groups


def most_similar(keys: torch.Tensor, num_pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bipartite soft matching of patches by their keys [B, n, d] (section 3 of the paper).

    Every second patch proposes the most similar of the others, by cosine, and the best proposals are accepted.

    Returns:
        Indices of the patches that propose, and of those proposed, [B, num_pairs] each.
    """
    keys = nn.functional.normalize(keys, dim=-1)
    similarity = keys[:, 0::2] @ keys[:, 1::2].transpose(1, 2)  # [B, n - n // 2, n // 2]
    best, proposed = similarity.max(dim=-1)
    proposing = best.topk(num_pairs, dim=-1).indices
    return 2 * proposing, 2 * proposed.gather(1, proposing) + 1


class MergingCore(AttentionCore):
    """Attention that gives the mean key of each token in place of its weights."""

    def forward(
        self,
        attention: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `AttentionCore.forward` -> ([B, n, heads, d], keys [B, T, d]).

        Raises:
            ValueError: where somebody wants to see attention, or where some heads are on another device.
        """
        wants_weights = kwargs.get("output_attentions", getattr(self.config, "output_attentions", False))
        if wants_weights or self._forward_hooks or self._forward_pre_hooks:
            raise ValueError(
                "attention cannot be read between merged patches: load the model with merged_patches_per_layer=0"
            )
        if key.shape[1] != self.config.num_attention_heads:
            raise ValueError(
                "merged_patches_per_layer needs all heads on one device: leave tensor parallelism out, or set it to 0"
            )
        attended, _ = super().forward(attention, query, key, value, attention_mask, **kwargs)
        return attended, key.mean(dim=1)


class MergingLayer(ViTCLSLayer):
    """A standard layer that merges patches between attention and MLP."""

    def __init__(self, config: ViTCLSConfig, layer_index: int, drop_path_rate: float) -> None:
        super().__init__(config, layer_index, drop_path_rate)
        self.config = config
        self.attention.core = MergingCore(config)
        self.num_special = config.token_layout.num_prefix_tokens
        self.num_pairs = config.merged_patches_per_layer

    def forward(  # type: ignore[override]  # it hands the groups on
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotation: Rotation = None,
        num_tokens: int | None = None,
        *,
        groups: Groups,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, Groups]:
        """[B, N, D], equal within `groups` -> ([B, N or num_tokens, D], groups for the next layer).

        Raises:
            ValueError: for a mask, or an attention implementation to whose scores nothing can be added.
        """
        require_additive_mask(self.config, "sizes of merged patches are")
        if attention_mask is not None:
            raise ValueError("attention_mask hides patches that may be merged: set merged_patches_per_layer=0")
        tokens, bias = groups.collect(hidden_states), groups.bias(hidden_states.dtype)
        if num_tokens is not None:  # special ones alone: nothing to merge
            return super().forward(tokens, bias, rotation, num_tokens, **kwargs), groups
        attended, keys = self.attention(self.layernorm_before(tokens), bias, rotation, **kwargs)
        tokens = tokens + self.drop_path(self.layer_scale1(self.dropout(attended)))
        tokens, groups = self.merge(tokens, keys, groups)  # [B, T - r, D]
        transformed = self.mlp(self.layernorm_after(tokens))
        tokens = tokens + self.drop_path(self.layer_scale2(self.dropout(transformed)))
        return groups.spread(tokens), groups

    def merge(self, tokens: torch.Tensor, keys: torch.Tensor, groups: Groups) -> tuple[torch.Tensor, Groups]:
        """Join the most similar patches of [B, T, D] by their keys [B, T, d]; half of them at most."""
        num_pairs = min(self.num_pairs, (tokens.shape[1] - self.num_special) // 2)
        if num_pairs == 0:
            return tokens, groups
        sources, targets = most_similar(keys[:, self.num_special :].detach(), num_pairs)
        return groups.merge(tokens, sources + self.num_special, targets + self.num_special)


def run_merging_layers(
    layers: Iterable[nn.Module],
    hidden_states: torch.Tensor,
    masks: Sequence[Any],
    rotations: Sequence[Rotation],
    num_tokens: Sequence[int | None],
    **kwargs: Any,
) -> torch.Tensor:
    """Through all layers, [B, N, D] -> [B, N, D]; `num_tokens` as in `ViTCLSLayer.forward`."""
    groups = Groups.of_one(hidden_states)
    for layer, mask, rotation, number in zip(layers, masks, rotations, num_tokens, strict=True):
        hidden_states, groups = layer(hidden_states, mask, rotation, number, groups=groups, **kwargs)
    return hidden_states

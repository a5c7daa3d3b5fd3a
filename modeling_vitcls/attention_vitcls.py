"""Multi-head self-attention: projections to queries, keys and values, and back.

    softmax        each head mixes values by one attention map
    differential   each head mixes values by the difference of two (arXiv 2410.05258)

The special tokens are ordinary rows here. Rotary positions come from rotary_vitcls.py, masks from scopes_vitcls.py,
implementations (eager, SDPA, flash, flex) from attention_core_vitcls.py.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_core_vitcls import AttentionCore
from .configuration_vitcls import ViTCLSConfig
from .linear_vitcls import Linear, as_autocast_will
from .norms_vitcls import build_norm
from .rotary_vitcls import Rotation, leave_unrotated, rotate_patches
from .scopes_vitcls import first_rows


class ViTCLSAttention(nn.Module):
    """Attention with one map per head."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.map_dim = self.head_dim  # channels of a query or key that make one attention map
        self.scaling = self.map_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        width, inner_width = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj = Linear(width, inner_width, bias=_first_set(config.query_bias, config.qkv_bias))
        self.k_proj = Linear(width, inner_width, bias=_first_set(config.key_bias, config.qkv_bias))
        self.v_proj = Linear(width, inner_width, bias=_first_set(config.value_bias, config.qkv_bias))
        self.o_proj = Linear(inner_width, width, bias=config.projection_bias)
        self.q_norm = build_norm(config, self.map_dim) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config, self.map_dim) if config.qk_norm else nn.Identity()
        self.norm = build_norm(config, inner_width) if config.attention_norm else nn.Identity()
        self.rotate: Callable = rotate_patches if config.has_rotary_positions else leave_unrotated
        self.core = AttentionCore(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotation: Rotation = None,
        num_queries: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, N, D] -> ([B, n, D], weights [B, maps, n, N] where the implementation returns them).

        n is `num_queries`: so many tokens, all of them special, attend, from the first on. Default: all N.
        """
        hidden_states = as_autocast_will(hidden_states)
        # -1 heads: under tensor parallelism each process holds some of them
        query = self.q_proj(hidden_states[:, :num_queries]).unflatten(-1, (-1, self.map_dim))  # [B, n, maps, map_dim]
        key = self.k_proj(hidden_states).unflatten(-1, (-1, self.map_dim))
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))  # [B, N, heads, head_dim]
        query, key = self.q_norm(query).transpose(1, 2), self.k_norm(key).transpose(1, 2)  # [B, maps, n or N, map_dim]
        query, key = self.rotate(query, key, rotation)

        attended, weights = self.core(
            self,
            query,
            key,
            self.value_per_map(value).transpose(1, 2),
            first_rows(attention_mask, num_queries),
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )  # [B, n, maps, head_dim]
        attended = self.norm(self.combine_maps(attended).flatten(2))
        return self.o_proj(attended), weights

    def value_per_map(self, value: torch.Tensor) -> torch.Tensor:
        """[B, N, heads, head_dim] -> [B, N, maps, head_dim]; a head has one map."""
        return value

    def combine_maps(self, attended: torch.Tensor) -> torch.Tensor:
        """[B, N, maps, head_dim] -> [B, N, heads, head_dim]."""
        return attended


class ViTCLSDifferentialAttention(ViTCLSAttention):
    """Attention in which each head subtracts a second map from its first (Ye et al. 2024, arXiv 2410.05258).

    A head's query and key are two of half its width. The share of the second map is one learned number per layer;
    the paper learns the same number as a difference of exponentials, and scales the norm by a constant.
    """

    INITIAL_SHARE = 0.8  # as in the paper, which also scales the norm's output by 1 - 0.8

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__(config)
        self.map_dim = self.head_dim // 2
        self.scaling = self.map_dim**-0.5
        self.q_norm = build_norm(config, self.map_dim) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config, self.map_dim) if config.qk_norm else nn.Identity()
        self.second_share = nn.Parameter(torch.empty(1))
        self.head_norm = nn.RMSNorm(self.head_dim, eps=1e-5)

    def value_per_map(self, value: torch.Tensor) -> torch.Tensor:
        """[B, N, heads, head_dim] -> [B, N, maps, head_dim]; both maps of a head mix the same values."""
        return value.repeat_interleave(2, dim=2)

    def combine_maps(self, attended: torch.Tensor) -> torch.Tensor:
        """[B, N, maps, head_dim] -> [B, N, heads, head_dim]."""
        first, second = attended.unflatten(2, (-1, 2)).unbind(3)
        return self.head_norm(first - self.second_share * second)


ATTENTIONS: dict[str, type[ViTCLSAttention]] = {
    "softmax": ViTCLSAttention,
    "differential": ViTCLSDifferentialAttention,
}


def _first_set(value: bool | None, default: bool) -> bool:
    return default if value is None else value

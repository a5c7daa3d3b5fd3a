"""What mixes values by queries and keys: the implementations of attention, and the module through which all go.

    queries, keys, values, mask -> AttentionCore -> mixed values       by `config._attn_implementation`

Those of transformers (flash, flex and whatever else is registered with it) are used as they are. Ours are "eager",
which returns the weights, and "sdpa", which on the CPU is computed step by step where that is faster.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_steps_vitcls import attend_in_steps
from .configuration_vitcls import ViTCLSConfig
from .half_precision_vitcls import in_float32, is_emulated, is_exporting
from .recomputing_vitcls import recomputed


class AttentionCore(nn.Module):
    """Attention without weights of its own, after the projections: where hooks see queries, keys and mask."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        attention: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries [B, maps, n, d], keys and values [B, maps, N, d] -> ([B, n, maps, d], weights or None).

        `attention` is the module that holds the projections, which implementations ask for its dtype and mode.
        """
        implementation: Callable = ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return implementation(attention, query, key, value, attention_mask, **kwargs)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention on [B, heads, N, head_dim], with its weights [B, heads, N, N]; softmax in float32."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def sdpa_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, None]:
    """PyTorch's fused attention, or the same step by step where `prefers_steps`; never with weights."""
    if dropout == 0 and prefers_steps(query, key):
        return attend_in_steps(query, key, value, attention_mask, scaling), None

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)[0]

    if is_emulated(query):  # what float32 needs for the backward pass is twice what came in
        return recomputed(module, partial(in_float32, attend), query, key, value, attention_mask), None
    return attend(query, key, value, attention_mask), None


LONGEST_IN_STEPS = 1200  # keys up to which the steps were faster
FEWEST_IN_STEPS = 20_000  # scores of all images and heads from which on they were
# Whether the processor multiplies bfloat16 in its own instructions.
MULTIPLIES_BFLOAT16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def prefers_steps(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether attention_steps_vitcls.py beats PyTorch's fused kernel: on some CPUs, in bfloat16, for short sequences.

    Measured on an AMD EPYC with AVX-512 and torch 2.15, ViT-S, batch 16, 197 tokens: in bfloat16 2.1 times as fast
    forward, 2.3 times forward and backward; in float32 0.8 and 0.9 times; a fourth as fast for one image of 17 tokens.
    The fused kernel stays in programs that are exported or traced, since they run elsewhere, and in compiled training,
    which would keep all weights.
    """
    if not query.is_cpu or query.dtype != torch.bfloat16 or not MULTIPLIES_BFLOAT16 or is_exporting():
        return False
    if key.shape[2] > LONGEST_IN_STEPS:
        return False
    if torch.compiler.is_compiling():
        return not query.requires_grad
    return query.shape[:3].numel() * key.shape[2] >= FEWEST_IN_STEPS


# transformers' own table, but for "sdpa".
ATTENTION_FUNCTIONS = AttentionInterface()
ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention

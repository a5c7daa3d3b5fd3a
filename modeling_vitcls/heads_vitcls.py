"""From the encoded sequence to answers: pooling, classifiers, and the pixel decoder of masked image modelling.

    sequence [B, N, D] -> pooler -> [B, P] -> classifier -> logits [B, labels]

Only pooled tokens reach a head: layers that see all tokens are those of linear_vitcls.py. Losses are in
losses_vitcls.py.
"""

from collections import OrderedDict

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_vitcls import ViTCLSConfig
from .linear_vitcls import Linear
from .norms_vitcls import build_norm


class CLSPooler(nn.Module):
    """The CLS token; several become one vector by `config.cls_pooling`. [B, N, D] -> [B, P]."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.tokens = config.token_layout.cls if config.pooled_cls_tokens is None else config.pooled_cls_tokens
        self.reduce = CLS_REDUCTIONS[config.cls_pooling]

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        """Read the CLS tokens."""
        return self.reduce(sequence[:, self.tokens])


def first_token(tokens: torch.Tensor) -> torch.Tensor:
    """[B, k, D] -> [B, D]."""
    return tokens[:, 0]


def mean_token(tokens: torch.Tensor) -> torch.Tensor:
    """[B, k, D] -> [B, D]."""
    return tokens.mean(dim=1)


def concatenated_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """[B, k, D] -> [B, k * D]."""
    return tokens.flatten(1)


CLS_REDUCTIONS = {"first": first_token, "mean": mean_token, "concat": concatenated_tokens}


class PatchMeanPooler(nn.Module):
    """Mean of the patches, without special tokens. [B, N, D] -> [B, D]."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.patches = config.token_layout.patches

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        """Average the patches."""
        return sequence[:, self.patches].mean(dim=1)


class CLSMeanPooler(nn.Module):
    """CLS and mean of the patches, concatenated. [B, N, D] -> [B, P + D]."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.cls = CLSPooler(config)
        self.mean = PatchMeanPooler(config)

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        """Read CLS tokens and patches."""
        return torch.cat([self.cls(sequence), self.mean(sequence)], dim=-1)


class PatchMaxPooler(nn.Module):
    """Largest value of each channel over the patches. [B, N, D] -> [B, D]."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.patches = config.token_layout.patches

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        """Take the maxima."""
        return sequence[:, self.patches].amax(dim=1)


class AttentionPooler(nn.Module):
    """A learned query attends to the patches, then an MLP (MAP head; Zhai et al. 2022, arXiv 2106.04560).

    Shapes: [B, N, D] -> [B, D].
    """

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.tokens = slice(None) if config.attention_pool_tokens == "all" else config.token_layout.patches
        self.head_dim = width // (config.attention_pool_heads or config.num_attention_heads)
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.q_proj = nn.Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.transform = PooledMLP(config) if config.attention_pool_mlp else nn.Identity()

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        """Attend from the probe."""
        tokens = sequence[:, self.tokens]
        query = self._per_head(self.q_proj(self.probe))  # [1, heads, 1, head_dim]
        query = query.expand(sequence.shape[0], -1, -1, -1)
        key, value = self._per_head(self.k_proj(tokens)), self._per_head(self.v_proj(tokens))
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.transform(self.o_proj(attended.transpose(1, 2).flatten(1)))

    def _per_head(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class PooledMLP(nn.Module):
    """Norm and MLP around a residual, on one pooled vector. [B, D] -> [B, D]."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        hidden_size = config.attention_pool_intermediate_size or config.intermediate_size
        self.layernorm = build_norm(config)
        self.fc1 = nn.Linear(config.hidden_size, hidden_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(hidden_size, config.hidden_size)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Transform the pooled vector."""
        return pooled + self.fc2(self.activation_fn(self.fc1(self.layernorm(pooled))))


POOLERS = {
    "cls": CLSPooler,
    "mean": PatchMeanPooler,
    "cls_mean": CLSMeanPooler,
    "max": PatchMaxPooler,
    "attention": AttentionPooler,
}


def build_pooler(config: ViTCLSConfig) -> nn.Module:
    """Pooling by `config.pooling`, and the norm and activated linear layer that may follow. [B, N, D] -> [B, P]."""
    pooler = POOLERS[config.pooling](config)
    if not config.pooled_norm and config.pooled_activation is None:
        return pooler
    norm = build_norm(config, config.pooled_size) if config.pooled_norm else nn.Identity()
    return nn.Sequential(OrderedDict(pooler=pooler, layernorm=norm, **_pooled_dense(config)))


def _pooled_dense(config: ViTCLSConfig) -> dict[str, nn.Module]:
    if config.pooled_activation is None:
        return {}
    return {
        "dense": nn.Linear(config.pooled_size, config.pooled_size),
        "activation": ACT2FN[config.pooled_activation],
    }


def build_head(config: ViTCLSConfig, in_features: int, num_labels: int | None) -> nn.Module:
    """The classifier that `config.head_type` names, [B, in_features] -> [B, num_labels]; identity for no labels."""
    if not num_labels:
        return nn.Identity()
    if config.head_type == "linear":
        return nn.Linear(in_features, num_labels)
    hidden_size = config.head_hidden_size or config.hidden_size
    return nn.Sequential(nn.Linear(in_features, hidden_size), nn.GELU(), nn.Linear(hidden_size, num_labels))


def mean_logits(cls_logits: torch.Tensor, distillation_logits: torch.Tensor) -> torch.Tensor:
    """Average of both heads."""
    return (cls_logits + distillation_logits) / 2


def only_cls_logits(cls_logits: torch.Tensor, distillation_logits: torch.Tensor) -> torch.Tensor:
    """The class head alone."""
    return cls_logits


def only_distillation_logits(cls_logits: torch.Tensor, distillation_logits: torch.Tensor) -> torch.Tensor:
    """The distillation head alone."""
    return distillation_logits


LOGIT_CHOICES = {"mean": mean_logits, "cls": only_cls_logits, "distillation": only_distillation_logits}


class PixelDecoder(nn.Module):
    """One linear layer from each encoded patch to its pixels (SimMIM, arXiv 2111.09886, section 3.4)."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_height_width
        patch_height, patch_width = self.patch_size
        self.projection = Linear(config.hidden_size, config.num_channels * patch_height * patch_width)

    def forward(self, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[B, rows * columns, D] -> pixels [B, C, rows * patch height, columns * patch width]."""
        (rows, columns), (patch_height, patch_width) = grid, self.patch_size
        pixels = self.projection(patches)  # [B, rows * columns, C * patch height * patch width]
        pixels = pixels.view(-1, rows, columns, self.num_channels, patch_height, patch_width)
        return pixels.permute(0, 3, 1, 4, 2, 5).reshape(
            -1, self.num_channels, rows * patch_height, columns * patch_width
        )

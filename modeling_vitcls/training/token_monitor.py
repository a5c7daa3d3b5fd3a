"""Whether the special tokens learn. A CLS token without gradient, or that does not move, is the classic mistake.

norm              of the token
gradient_norm     of its gradient, after clipping (under DeepSpeed, before it)
update_ratio      norm of the last update / norm of the token
entropy           of what CLS attends to, in nats, per layer; ln(tokens) where it attends to all alike
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..blocks_vitcls import ViTCLSEmbeddings
from .distributed_state import as_whole, whole_gradient
from .trainable import set_training


Tokens = dict[str, torch.Tensor]  # "cls[0]" -> [D]

ATTENTION_IMAGES = 8  # over which the entropy is averaged


@dataclass(frozen=True)
class TokenHealth:
    """The figures of each token, by name."""

    norm: dict[str, float]
    gradient_norm: dict[str, float]
    update_ratio: dict[str, float]

    def record(self) -> dict[str, dict[str, float | None]]:
        """For metrics.jsonl; None where gradients overflowed, as they may under fp16."""
        figures = {"norm": self.norm, "gradient_norm": self.gradient_norm, "update_ratio": self.update_ratio}
        return {
            f"token_{name}": {
                token: float(f"{value:.6g}") if math.isfinite(value) else None for token, value in values.items()
            }
            for name, values in figures.items()
        }


class TokenMonitor:
    """Reads the special tokens of a model while it is trained, and remembers how they started.

    A model that starts behind the embeddings, such as the head of a linear probe, has none.
    """

    def __init__(self, model: nn.Module) -> None:
        embeddings = [module for module in model.modules() if isinstance(module, ViTCLSEmbeddings)]
        self.parameters = embeddings[0].get_special_tokens() if embeddings else {}
        self.at_start = self.tokens()
        self.named: set[str] = set()  # tokens that were found without gradient

    def tokens(self) -> Tokens:
        """A copy of each token, on the CPU."""
        return {
            f"{group}[{index}]": token
            for group, parameter in self.parameters.items()
            for index, token in enumerate(as_whole(parameter).detach().float().cpu().squeeze(0).clone())
        }

    def gradients(self) -> Tokens:
        """The gradient of each token that has one."""
        return {
            f"{group}[{index}]": gradient
            for group, parameter in self.parameters.items()
            if (whole := whole_gradient(parameter)) is not None
            for index, gradient in enumerate(whole.float().cpu().squeeze(0).clone())
        }

    def health(self, before: Tokens, gradients: Tokens) -> TokenHealth:
        """After a step: the figures, from the tokens before it and the gradients that moved them."""
        after = self.tokens()
        gradient_norms = {name: norm(gradients[name]) if name in gradients else 0.0 for name in after}
        return TokenHealth(
            norm={name: norm(token) for name, token in after.items()},
            gradient_norm=gradient_norms,
            update_ratio={
                name: norm(token - before[name]) / max(norm(before[name]), 1e-12) for name, token in after.items()
            },
        )

    def newly_without_gradient(self, health: TokenHealth) -> list[str]:
        """Names of the tokens that got no gradient in this step, each once."""
        found = [name for name, value in health.gradient_norm.items() if value == 0 and name not in self.named]
        self.named.update(found)
        return found

    def unmoved(self) -> list[str]:
        """Names of the tokens that are exactly as they started, such as `registers[1]`."""
        return [name for name, token in self.tokens().items() if torch.equal(token, self.at_start[name])]

    def movement(self) -> dict[str, float]:
        """Euclidean norm of the change of each token since the start."""
        return {name: norm(token - self.at_start[name]) for name, token in self.tokens().items()}


def build_attention_measure(
    model: Any, normalise: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """`AttentionEntropy` of a model whose CLS attention can be read: not without CLS tokens, nor between merged
    patches."""
    can_be_read = model.config.num_cls_tokens and not model.config.merged_patches_per_layer
    return AttentionEntropy(model, normalise) if can_be_read else nothing


def nothing(batch: dict[str, Any]) -> dict[str, Any]:
    """There is no CLS attention that could be measured."""
    return {}


class AttentionEntropy:
    """Measures, now and then, how much of the image the CLS tokens attend to."""

    def __init__(self, model: Any, normalise: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.model = model
        self.normalise = normalise

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, list[float]]:
        """Entropy in nats per layer: the mean over the batch's first images, heads and CLS tokens."""
        pixel_values = self.normalise(batch["pixels"][:ATTENTION_IMAGES])  # [B, C, H, W]
        self.model.eval()
        weights = self.model.token_attention(pixel_values, tokens=("cls",))  # [B, layers, heads, CLS, N]
        set_training(self.model)
        entropy = torch.special.entr(weights.float()).sum(-1)  # [B, layers, heads, CLS]
        return {"cls_attention_entropy": [round(value, 4) for value in entropy.mean(dim=(0, 2, 3)).tolist()]}


def norm(vector: torch.Tensor) -> float:
    """Its Euclidean length."""
    return vector.norm().item()

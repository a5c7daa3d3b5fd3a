"""Metrics of the special tokens, to detect tokens that are not trained.

norm              norm of the token
gradient_norm     norm of the token's gradient after clipping
movement          norm of the token's change since the start of training
entropy           entropy of the CLS attention in nats, per layer; ln(number of tokens) for uniform attention
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..model.blocks_vitcls import ViTCLSEmbeddings
from .distributed_state import gather_tensor
from .model import set_train_mode


Tokens = dict[str, torch.Tensor]  # token name (for example "cls[0]") -> token [D]

MAX_ATTENTION_IMAGES = 8  # maximum number of images for the attention entropy


class TokenMonitor:
    """Monitor of a model's special tokens during training.

    The monitor stores the initial values of the tokens. A model without embeddings, such as the
    heads in linear probing, has no special tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        embeddings = [module for module in model.modules() if isinstance(module, ViTCLSEmbeddings)]
        self.parameters = embeddings[0].get_special_tokens() if embeddings else {}
        self.initial_tokens = self.copy_tokens()

    def copy_tokens(self, gradients: bool = False) -> Tokens:
        """Return a copy of each token, or of its gradient if it has one, on the CPU."""
        copies: Tokens = {}
        for group, parameter in self.parameters.items():
            tensor = parameter.grad if gradients else parameter.detach()
            if tensor is not None:
                tokens = gather_tensor(tensor).float().cpu().squeeze(0).clone()  # [n, D]
                copies |= {f"{group}[{index}]": token for index, token in enumerate(tokens)}
        return copies

    def compute_norms(self, gradients: Tokens) -> dict[str, dict[str, float | None]]:
        """Return the norms of each token and of its gradient, 0 without gradient."""
        norms = {name: token.norm().item() for name, token in self.copy_tokens().items()}
        gradient_norms = {
            name: gradients[name].norm().item() if name in gradients else 0.0 for name in norms
        }
        metrics = {"token_norm": norms, "token_gradient_norm": gradient_norms}
        return {
            key: {name: round_finite(value) for name, value in values.items()}
            for key, values in metrics.items()
        }

    def compute_token_movement(self) -> dict[str, float]:
        """Return the Euclidean norm of each token's change since the start of training."""
        return {
            name: (token - self.initial_tokens[name]).norm().item()
            for name, token in self.copy_tokens().items()
        }


@torch.no_grad()
def measure_attention_entropy(
    model: Any, normalize: Callable[[torch.Tensor], torch.Tensor], batch: dict[str, Any]
) -> dict[str, Any]:
    """Return the entropy of the CLS attention in nats for each layer.

    It is averaged over the CLS tokens, the heads, and the first images of the batch.
    """
    pixel_values = normalize(batch["pixels"][:MAX_ATTENTION_IMAGES])  # [B, C, H, W]
    model.eval()
    # [B, layers, heads, CLS, N]
    attention_weights = model.token_attention(pixel_values, tokens=("cls",))
    set_train_mode(model)
    entropy = torch.special.entr(attention_weights.float()).sum(-1)  # [B, layers, heads, CLS]
    return {
        "cls_attention_entropy": [round(value, 4) for value in entropy.mean(dim=(0, 2, 3)).tolist()]
    }


def round_finite(value: float) -> float | None:
    """Round a number to six significant digits.

    Return None if the number is not finite, which may happen in fp16.
    """
    return float(f"{value:.6g}") if math.isfinite(value) else None

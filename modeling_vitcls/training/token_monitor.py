"""Metrics of the special tokens, to detect tokens that are not trained.

norm        norm of the token
movement    norm of the token's change since the start of training
entropy     entropy of the CLS attention in nats, per layer; ln(number of tokens) for uniform attention
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..blocks_vitcls import ViTCLSEmbeddings
from .distributed_state import gather_tensor
from .model import set_train_mode


MAX_ATTENTION_IMAGES = 8  # maximum number of images for the attention entropy


class TokenMonitor:
    """Monitor of a model's special tokens during training. The monitor stores the initial values of the tokens. A
    model without embeddings, such as the heads in linear probing, has no special tokens."""

    def __init__(self, model: nn.Module) -> None:
        embeddings = [module for module in model.modules() if isinstance(module, ViTCLSEmbeddings)]
        self.parameters = embeddings[0].get_special_tokens() if embeddings else {}
        self.initial_tokens = self.copy_tokens()

    def copy_tokens(self) -> dict[str, torch.Tensor]:
        """Return a copy [D] of each token on the CPU, by name, such as "cls[0]"."""
        return {
            f"{group}[{index}]": token
            for group, tensor in self.parameters.items()
            for index, token in enumerate(gather_tensor(tensor.detach()).float().cpu().squeeze(0).clone())
        }

    def compute_norms(self) -> dict[str, float]:
        """Return the norm of each token."""
        return {name: round(token.norm().item(), 6) for name, token in self.copy_tokens().items()}

    def compute_token_movement(self) -> dict[str, float]:
        """Return the Euclidean norm of each token's change since the start of training."""
        return {name: (token - self.initial_tokens[name]).norm().item() for name, token in self.copy_tokens().items()}


@torch.no_grad()
def measure_attention_entropy(
    model: Any, normalize: Callable[[torch.Tensor], torch.Tensor], batch: dict[str, Any]
) -> dict[str, Any]:
    """Return the entropy of the CLS attention in nats for each layer, averaged over the CLS tokens, the heads, and the
    first images of the batch."""
    pixel_values = normalize(batch["pixels"][:MAX_ATTENTION_IMAGES])  # [B, C, H, W]
    model.eval()
    attention_weights = model.token_attention(pixel_values, tokens=("cls",))  # [B, layers, heads, CLS, N]
    set_train_mode(model)
    entropy = torch.special.entr(attention_weights.float()).sum(-1)  # [B, layers, heads, CLS]
    return {"cls_attention_entropy": [round(value, 4) for value in entropy.mean(dim=(0, 2, 3)).tolist()]}

"""Metrics of the special tokens, to detect tokens that are not trained.

norm              norm of the token
gradient_norm     norm of the token's gradient after clipping
update_ratio      norm of the last update / norm of the token
entropy           entropy of the CLS attention in nats, per layer; ln(number of tokens) for uniform attention
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..blocks_vitcls import ViTCLSEmbeddings
from .distributed_state import gather_tensor
from .model import set_train_mode


Tokens = dict[str, torch.Tensor]  # token name (for example "cls[0]") -> token [D]

MAX_ATTENTION_IMAGES = 8  # maximum number of images for the attention entropy


class TokenMonitor:
    """Monitor of a model's special tokens during training. The monitor stores the initial values of the tokens. A
    model without embeddings, such as the heads in linear probing, has no special tokens."""

    def __init__(self, model: nn.Module) -> None:
        embeddings = [module for module in model.modules() if isinstance(module, ViTCLSEmbeddings)]
        self.parameters = embeddings[0].get_special_tokens() if embeddings else {}
        self.initial_tokens = self.copy_tokens()
        self.reported_names: set[str] = set()  # names that `find_new_tokens_without_gradient` has returned

    def copy_tokens(self, gradients: bool = False) -> Tokens:
        """Return a copy of each token, or of the gradient of each token that has one, on the CPU."""
        tensors = {group: each.grad if gradients else each.detach() for group, each in self.parameters.items()}
        return {
            f"{group}[{index}]": token
            for group, tensor in tensors.items()
            if tensor is not None
            for index, token in enumerate(gather_tensor(tensor).float().cpu().squeeze(0).clone())
        }

    def compute_token_metrics(self, old_tokens: Tokens, gradients: Tokens) -> dict[str, dict[str, float | None]]:
        """Return the metrics of each token for metrics.jsonl. `old_tokens` are the tokens before the update."""
        new_tokens = self.copy_tokens()
        norms = {name: token.norm().item() for name, token in new_tokens.items()}
        gradient_norms = {name: gradients[name].norm().item() if name in gradients else 0.0 for name in new_tokens}
        update_ratios = {
            name: (token - old_tokens[name]).norm().item() / max(old_tokens[name].norm().item(), 1e-12)
            for name, token in new_tokens.items()
        }
        metrics = {"token_norm": norms, "token_gradient_norm": gradient_norms, "token_update_ratio": update_ratios}
        return {key: {name: round_finite(value) for name, value in values.items()} for key, values in metrics.items()}

    def find_new_tokens_without_gradient(self, token_metrics: dict[str, dict[str, float | None]]) -> list[str]:
        """Return the names of the tokens whose gradient is missing or zero in this step. Each name is returned at most
        once per run."""
        norms = token_metrics["token_gradient_norm"]
        names = [name for name, norm in norms.items() if norm == 0 and name not in self.reported_names]
        self.reported_names.update(names)
        return names

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


def round_finite(value: float) -> float | None:
    """Round a number to six significant digits. Return None if the number is not finite, which may happen in fp16."""
    return float(f"{value:.6g}") if math.isfinite(value) else None

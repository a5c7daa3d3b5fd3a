"""Metrics of the special tokens, to detect tokens that are not trained.

norm              norm of the token
gradient_norm     norm of the token's gradient after clipping
movement          norm of the token's change since the start of training
"""

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..model.blocks_vitcls import ViTCLSEmbeddings


Tokens = dict[str, torch.Tensor]  # token name (for example "cls[0]") -> token [D]


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
        """Copy each token, or its gradient if it has one, to the CPU."""
        copies: Tokens = {}
        for group, parameter in self.parameters.items():
            tensor = parameter.grad if gradients else parameter.detach()
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()  # all processes call this
            if tensor is not None:
                # `clone`, because on a CPU the other methods return views of the parameter, which
                # training changes.
                tokens = tensor.float().cpu().squeeze(0).clone()  # [n, D]
                copies |= {f"{group}[{index}]": token for index, token in enumerate(tokens)}
        return copies

    def compute_norms(self, gradients: Tokens) -> dict[str, dict[str, float | None]]:
        """Compute the norms of each token and of its gradient, 0 without gradient."""
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
        """Measure how far each token has moved since the start of training (Euclidean norm)."""
        return {
            name: (token - self.initial_tokens[name]).norm().item()
            for name, token in self.copy_tokens().items()
        }


def round_finite(value: float) -> float | None:
    """Round a number to six significant digits.

    Return None if the number is not finite, which may happen in fp16.
    """
    return float(f"{value:.6g}") if math.isfinite(value) else None

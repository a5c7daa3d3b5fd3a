"""How far the special tokens moved in training. One that did not move learned nothing: the classic silent mistake."""

import torch
from torch import nn

from ..embeddings_vitcls import ViTCLSEmbeddings


Tokens = dict[str, torch.Tensor]  # group -> [n, D]


def special_tokens(model: nn.Module) -> Tokens:
    """A copy of each group of special tokens, on the CPU."""
    embeddings = next(module for module in model.modules() if isinstance(module, ViTCLSEmbeddings))
    return {
        name: token.detach().float().cpu().clone().squeeze(0) for name, token in embeddings.special_tokens().items()
    }


def movement(before: Tokens, after: Tokens) -> dict[str, float]:
    """Euclidean norm of the change of each group."""
    return {name: (after[name] - before[name]).norm().item() for name in before}


def unmoved(before: Tokens, after: Tokens) -> list[str]:
    """Names of the tokens that are exactly as they were, such as `registers[1]`."""
    return [
        f"{name}[{index}]"
        for name in before
        for index, (old, new) in enumerate(zip(before[name], after[name], strict=True))
        if torch.equal(old, new)
    ]

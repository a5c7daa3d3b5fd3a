"""Two faults of special tokens, and the share of patches with outlier norms.

    list_faults(use, states, movement)
        find_identical_tokens(...)            tokens that do the work of another token
        find_unmoved_tokens(...)              tokens that training did not reach
    is_outlier(norms)                         patches that store something global (Darcet et al. 2023)

A token's output in a layer counts only if an output of the model depends on it (`TokenUse`).
"""

from collections.abc import Mapping, Sequence

import torch

from .token_use import TokenUse


# Maximum distance between identical tokens, relative to their variation over images
MAX_IDENTICAL_DISTANCE = 0.01
ROUNDING_ERROR = 1e-6  # The error of a state, as a fraction of its norm
# Minimum norm of an outlier patch, as a multiple of the median patch norm of the image. Darcet et
# al. choose an absolute norm for each model.
OUTLIER_RATIO = 3.0


def list_faults(
    use: TokenUse, states: Mapping[int, torch.Tensor], movement: Mapping[str, float]
) -> list[str]:
    """Write one sentence per identical token, and per token that training did not move.

    `states` has the form of `MeasuredStates.by_layer`.
    """
    *used_layers, _ = use.num_layers
    # CLS tokens of tasks start as twins, and each has a classifier of its own.
    identical = {} if use.config.tasks else find_identical_tokens(states, used_layers)
    faults = [
        f"{use.names[index]}: identical to {use.names[other]} after layer {layer}"
        for index, (other, layer) in identical.items()
    ]
    return faults + [
        f"{use.names[index]}: not moved by training, which moved others"
        for index in find_unmoved_tokens(use.groups, movement)
    ]


def find_identical_tokens(
    states: Mapping[int, torch.Tensor], used_layers: Sequence[int]
) -> dict[int, tuple[int, int]]:
    """Find tokens with the same state as another token: token -> nearest such token, and layer.

    Two tokens are compared after the last layer in which both are used, because a head may ignore
    a difference that arises later.

    Args:
        states: states [images, S, D] of the special tokens after the layers `used_layers`.
        used_layers: [S], last layer in which each token is used.
    """
    identical = {}
    for index, own_layer in enumerate(used_layers):
        candidates = []
        for other, other_layer in enumerate(used_layers):
            # After its last layer, a token's state has no effect.
            layer = min(own_layer, other_layer)
            # In float32, the variation of a token with a large norm would be lost to rounding.
            pair = states[layer][:, [index, other]].double()  # [images, 2, D]
            mean = pair.mean(dim=0)
            variation = (pair - mean).square().sum(dim=-1).mean(dim=0).sqrt()  # [2]
            distance = (pair[:, 0] - pair[:, 1]).square().sum(dim=-1).mean().sqrt()
            limit = MAX_IDENTICAL_DISTANCE * variation.min() + ROUNDING_ERROR * mean[0].norm()
            if other != index and distance <= limit:
                candidates.append((distance.item(), other, layer))
        if candidates:
            identical[index] = min(candidates)[1:]
    return identical


def find_unmoved_tokens(
    groups: Mapping[str, Sequence[int]], movement: Mapping[str, float]
) -> list[int]:
    """Find the tokens that training did not move although it moved others.

    Args:
        groups: sequence indices of the tokens of each group (`TokenUse.groups`).
        movement: distance by which training moved each token (`token_movement` in results.json),
            by keys such as `cls[0]`.
    """
    if not any(movement.values()):
        return []  # The run trained no token at all, but perhaps a head
    unmoved = []
    for group, indices in groups.items():
        unmoved += [
            index for number, index in enumerate(indices) if movement.get(f"{group}[{number}]") == 0
        ]
    return unmoved


def is_outlier(norms: torch.Tensor) -> torch.Tensor:
    """Mark the norms [B, P] of patches that exceed OUTLIER_RATIO times the median of their image."""
    return norms > OUTLIER_RATIO * norms.median(dim=1, keepdim=True).values

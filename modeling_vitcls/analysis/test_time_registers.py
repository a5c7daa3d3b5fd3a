"""Registers at test time: artifacts of a trained model move out of the image, without training.

    neurons = find_register_neurons(model, pixel_values)
    better = with_test_time_register(model, neurons)
    patch_norm_outliers(model, pixel_values), patch_norm_outliers(better, pixel_values)    # 0.02, 0.0

ViTs trained without registers write global information into a few patches, whose norms grow far beyond the others'
(Darcet et al. 2023, arXiv 2309.16588). A handful of MLP neurons do this; their activations can be moved to one added
token at inference (Jiang et al. 2025, arXiv 2506.08010). The choice is part of the configuration, so the model saves
and loads as any other. Adding, dropping and resizing tokens in general is `model.adapted` (adaptation_vitcls.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..modeling_vitcls import ViTCLSPreTrainedModel


# A patch counts as an outlier beyond this multiple of the image's median norm. (The paper sets a norm for each model.)
OUTLIER_RATIO = 3.0


def patch_norm_outliers(
    model: ViTCLSPreTrainedModel, pixel_values: torch.Tensor, ratio: float = OUTLIER_RATIO
) -> float:
    """Share of patches whose norm after the last layer, before the final norm, exceeds `ratio` x their image's median.

    Args:
        pixel_values: [B, C, H, W].
    """
    with encoded(model, pixel_values) as (hidden_states, _):
        return is_outlier(hidden_states[-1], ratio).float().mean().item()


def find_register_neurons(
    model: ViTCLSPreTrainedModel,
    pixel_values: torch.Tensor,
    num_neurons: int = 10,
    ratio: float = OUTLIER_RATIO,
    last_layer: int | None = None,
) -> list[list[int]]:
    """The MLP neurons that are most active at outlier patches (algorithm 1 of the paper), strongest first.

    Outliers are found after the last layer. The activations' magnitudes are averaged over the outliers of each image,
    then over images, in all layers up to the one where outliers arise.

    Args:
        pixel_values: [B, C, H, W]; a few dozen images of the kind that the model will see.
        num_neurons: How many to choose. Larger models need more: raise it until `patch_norm_outliers` of the model
            with the register no longer falls.
        last_layer: Index of the last layer to search. Default: the first one after which at least half of the
            outliers stand out already.

    Returns:
        `[[layer, neuron], ...]`, for `with_test_time_register`.

    Raises:
        ValueError: if no patch is an outlier, or there are fewer neurons than asked for.
    """
    with encoded(model, pixel_values) as (hidden_states, activations):
        outliers = is_outlier(hidden_states[-1], ratio)  # [B, patches]
        if not outliers.any():
            raise ValueError(f"no patch has a norm beyond {ratio} times the median: lower ratio, or give more images")
        if last_layer is None:
            last_layer = layer_of_origin(hidden_states[1:], outliers, ratio)
        searched = activations[: last_layer + 1]
        scores = torch.stack([mean_at(outliers, states) for states in searched])  # [layers, neurons]
    if not 0 < num_neurons <= scores.numel():
        raise ValueError(f"num_neurons is {num_neurons} and the layers up to {last_layer} have {scores.numel()}")
    strongest = scores.flatten().topk(num_neurons).indices.tolist()
    return [list(divmod(index, scores.shape[1])) for index in strongest]


@torch.no_grad()
def with_test_time_register(model: ViTCLSPreTrainedModel, neurons: list[list[int]]) -> ViTCLSPreTrainedModel:
    """A copy of the model with one more register, at zero, that receives the activations of these neurons.

    Args:
        neurons: `[[layer, neuron], ...]`, from `find_register_neurons`.

    Raises:
        ValueError: if a neuron does not exist, or the model has such a register already.
    """
    if model.config.register_neurons:
        raise ValueError("this model has a test-time register already: choose all its neurons at once")
    better = model.adapt(num_register_tokens=model.config.num_register_tokens + 1, register_neurons=neurons)
    base: Any = better.base_model
    base.embeddings.register_tokens[:, -1] = 0
    if "registers" in (better.config.gated_tokens or {}):
        base.gates.gates[-1] = base.gates.OPEN  # the last gate is the last register's
    return better


@contextmanager
def encoded(
    model: ViTCLSPreTrainedModel, pixel_values: torch.Tensor
) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """The patches after the embeddings and after each layer, [B, patches, D], and in each MLP, [B, patches, neurons].

    In eval mode and without gradients, on the model's device; then everything is as it was.
    """
    base: Any = model.base_model
    patches = base.config.token_layout.patches
    activations: list[torch.Tensor] = []

    def read_activations(mlp: Any, inputs: tuple[torch.Tensor]) -> None:
        activations.append(mlp.get_activations(inputs[0])[:, patches])

    hooks = [layer.mlp.register_forward_pre_hook(read_activations) for layer in base.layers]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            outputs = base(pixel_values.to(model.device), output_hidden_states=True)
        yield [states[:, patches] for states in outputs.hidden_states], activations
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()


def is_outlier(patches: torch.Tensor, ratio: float) -> torch.Tensor:
    """[B, patches, D] -> boolean [B, patches]: the norm exceeds `ratio` x the median of the image."""
    norms = patches.float().norm(dim=-1)
    return norms > ratio * norms.median(dim=1, keepdim=True).values


def layer_of_origin(after_layers: list[torch.Tensor], outliers: torch.Tensor, ratio: float) -> int:
    """The first layer after which at least half of the final `outliers` [B, patches] are outliers."""
    for index, patches in enumerate(after_layers):
        if is_outlier(patches, ratio)[outliers].float().mean() >= 0.5:
            return index
    return len(after_layers) - 1


def mean_at(outliers: torch.Tensor, activations: torch.Tensor) -> torch.Tensor:
    """Mean magnitude [neurons] of [B, patches, neurons] over the outliers of each image, then over images with any."""
    counts = outliers.sum(dim=1)  # [B]
    sums = (activations.float().abs() * outliers.unsqueeze(-1)).sum(dim=1)  # [B, neurons]
    has_outliers = counts > 0
    return (sums[has_outliers] / counts[has_outliers].unsqueeze(-1)).mean(dim=0)

"""Registers for a model that was trained without: the MLP neurons that write its outliers.

    neurons = find_register_neurons(model, pixel_values)                  {4: [1021, 387], 6: [92]}
    model = model.adapt(num_register_tokens=1, register_neurons=neurons)  outliers move into the register

The method is of Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers" (arXiv
2506.08010). In large ViTs, a few patches have norms far above the others (Darcet et al. 2023, arXiv
2309.16588), and a few neurons write them.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from .photo import OUTLIER_RATIO


logger = logging.getLogger(__name__)


@torch.no_grad()
def find_register_neurons(
    model: Any,
    images: Tensor | Iterable[Tensor],
    num_neurons: int = 10,
    outlier_layer: int = -1,
    threshold: float | None = None,
    last_layer: int | None = None,
) -> dict[int, list[int]]:
    """Find the neurons that are most active where a model has outliers.

    The score of a neuron is its mean magnitude at the outliers of an image, averaged over the images
    that have some (arXiv 2506.08010, algorithm 1).

    Args:
        model: any ViTCLS model, in evaluation mode.
        images: `pixel_values` [B, C, H, W], or batches of them. The authors use 500 images.
        num_neurons: how many neurons to return. The authors use 10 to 50.
        outlier_layer: layer after which norms are compared, from 1; negative ones count from the last.
        threshold: the norm of an outlier. The authors set one for each model, such as 150 for DINOv2-L.
            Default: three times the median of the patches of the image.
        last_layer: last layer whose neurons are candidates, from 1. Default: the first one after which
            there are as many outliers as half of those after `outlier_layer`.

    Returns:
        Layer, from 1 -> neurons, as `config.register_neurons`; empty if no patch is an outlier, which a line
        says.

    Raises:
        ValueError: if a layer does not exist.

    Examples:
        >>> from modeling_vitcls import ViTCLSModel, find_register_neurons
        >>> model = ViTCLSModel.from_pretrained("dino").eval()
        >>> find_register_neurons(model, torch.randn(2, 3, 56, 56))
        {}
    """
    encoder = model.base_model
    num_layers = len(encoder.layers)
    patches = encoder.config.token_layout.patches
    (outlier_layer,) = encoder.config.resolve_layers([outlier_layer], num_layers)
    counts = torch.zeros(num_layers)  # Outliers after each layer
    scores: list[Tensor] = []  # [layers, neurons] of each image that has outliers
    num_images = 0
    for batch in [images] if isinstance(images, Tensor) else images:
        with record_activations(encoder) as activations:
            states = encoder(batch.to(model.device), output_hidden_states=True).hidden_states
        norms = [
            state[:, patches].float().norm(dim=-1) for state in states[1:]
        ]  # [B, patches] each
        are_outliers = [find_outliers(each, threshold) for each in norms]
        counts += torch.tensor([each.sum().item() for each in are_outliers])
        num_images += len(batch)
        for image, is_outlier in enumerate(are_outliers[outlier_layer - 1]):
            if is_outlier.any():
                rows = [each[image, patches][is_outlier].abs().mean(dim=0) for each in activations]
                scores.append(torch.stack(rows).float().cpu())

    if not scores:
        logger.warning(
            f"no patch of {num_images:,} images is an outlier after layer {outlier_layer}: there is nothing to "
            "move into a register"
        )
        return {}
    if last_layer is None:
        is_enough = counts >= counts[outlier_layer - 1] / 2
        last_layer = int(is_enough.float().argmax()) + 1
    (last_layer,) = encoder.config.resolve_layers([last_layer], num_layers)
    mean = torch.stack(scores).mean(dim=0)[:last_layer]
    found: dict[int, list[int]] = {}
    for place in mean.flatten().argsort(descending=True)[:num_neurons].tolist():
        layer, neuron = divmod(place, mean.shape[1])
        found.setdefault(layer + 1, []).append(neuron)
    return dict(sorted(found.items()))


def find_outliers(norms: Tensor, threshold: float | None) -> Tensor:
    """Find the patches with outlier norms, [B, patches]."""
    if threshold is not None:
        return norms > threshold
    return norms > OUTLIER_RATIO * norms.median(dim=1, keepdim=True).values


@contextmanager
def record_activations(encoder: Any) -> Iterator[list[Tensor]]:
    """Collect the inputs [B, N, intermediate] of the last linear layer of each MLP, in order."""
    activations: list[Tensor] = []
    with ExitStack() as hooks:
        for layer in encoder.layers:
            linear = layer.mlp.fc2 if hasattr(layer.mlp, "fc2") else layer.mlp.down_proj
            hooks.enter_context(
                linear.register_forward_pre_hook(lambda _, inputs: activations.append(inputs[0]))
            )
        yield activations

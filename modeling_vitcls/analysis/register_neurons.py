"""Test-time registers: move artifacts from patches to a register, without training.

    neurons = find_register_neurons(model, pixel_values)
    adapted = add_test_time_register(model, neurons)
    compute_outlier_fraction(model, pixel_values), compute_outlier_fraction(adapted, pixel_values)    # 0.02, 0.0

ViTs trained without registers write global information into a few patches, whose norms become much
larger than the norms of other patches (Darcet et al. 2023, arXiv 2309.16588). A few MLP neurons
cause these norms, and their activations can be moved to one added token at inference (Jiang et al.
2025, arXiv 2506.08010). The neurons are stored in the configuration, so the model is saved and
loaded like any other model. To add or remove other tokens, use `model.adapt`
(adaptation_vitcls.py).
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..model.modeling_vitcls import ViTCLSPreTrainedModel
from .model_utils import evaluation_mode


# Minimum norm of an outlier patch, as a multiple of the median patch norm of the image (Jiang et
# al. choose an absolute norm for each model).
OUTLIER_RATIO = 3.0


def compute_outlier_fraction(
    model: ViTCLSPreTrainedModel, pixel_values: torch.Tensor, ratio: float = OUTLIER_RATIO
) -> float:
    """Return the fraction of patches with an outlier norm in images [B, C, H, W].

    The norm of an outlier exceeds `ratio` times the median patch norm of the image. Norms are
    computed after the last layer, before the final normalization.
    """
    hidden_states, _ = encode_patches(model, pixel_values)
    return is_outlier(hidden_states[-1], ratio).float().mean().item()


def find_register_neurons(
    model: ViTCLSPreTrainedModel,
    pixel_values: torch.Tensor,
    num_neurons: int = 10,
    ratio: float = OUTLIER_RATIO,
) -> list[list[int]]:
    """Return the MLP neurons with the largest activations at outlier patches, in descending order.

    Source: algorithm 1 of Jiang et al.

    Outliers are detected after the last layer. Layers are searched up to the first layer whose
    output contains at least half of these outliers. The magnitudes of activations are averaged over
    the outliers of each image, and then over the images.

    Args:
        pixel_values: [B, C, H, W], a few dozen images similar to the images used at inference.
        num_neurons: number of neurons to return. Larger models require more neurons. Increase the
            number until the outlier fraction of the model with the register
            (`compute_outlier_fraction`) no longer decreases.

    Returns:
        `[[layer, neuron], ...]`, the `neurons` argument of `add_test_time_register`.

    Raises:
        ValueError: if no patch is an outlier.
    """
    hidden_states, activations = encode_patches(model, pixel_values)
    outliers = is_outlier(hidden_states[-1], ratio)  # [B, patches]
    if not outliers.any():
        raise ValueError(
            f"Register neurons require outlier patches, but no patch has a norm above {ratio} "
            "times the median norm of the image. Decrease ratio or pass more images."
        )

    outlier_fractions = [
        is_outlier(patches, ratio)[outliers].float().mean() for patches in hidden_states[1:]
    ]
    last_layer = next(index for index, fraction in enumerate(outlier_fractions) if fraction >= 0.5)

    # [searched layers, neurons]
    scores = torch.stack(
        [average_outlier_activations(outliers, states) for states in activations[: last_layer + 1]]
    )
    top_indices = scores.flatten().topk(num_neurons).indices.tolist()
    return [list(divmod(index, scores.shape[1])) for index in top_indices]


@torch.no_grad()
def add_test_time_register(
    model: ViTCLSPreTrainedModel, neurons: list[list[int]]
) -> ViTCLSPreTrainedModel:
    """Return a copy of the model with a register that receives the activations of `neurons`.

    The register is initialized with zeros.

    Args:
        neurons: MLP neurons `[[layer, neuron], ...]`, as returned by `find_register_neurons`.

    Raises:
        ValueError: if a neuron does not exist, or the model already has a test-time register.
    """
    if model.config.register_neurons:
        raise ValueError(
            "The model already has a test-time register. Pass all neurons in a single call."
        )
    num_registers = model.config.num_register_tokens + 1
    adapted_model = model.adapt(
        num_register_tokens=num_registers, register_neurons=neurons, gate_new_tokens=False
    )

    encoder: Any = adapted_model.base_model
    encoder.embeddings.register_tokens[:, -1] = 0
    if "registers" in (adapted_model.config.gated_tokens or {}):
        encoder.gates.gates[-1] = encoder.gates.OPEN  # the last gate belongs to the last register
    return adapted_model


def encode_patches(
    model: ViTCLSPreTrainedModel, pixel_values: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the states and the MLP activations of the patches.

    The states [B, patches, D] are those after the embeddings and after each layer, and the
    activations [B, patches, neurons] are those in each layer.
    """
    encoder: Any = model.base_model
    patches = encoder.config.token_layout.patches
    activations: list[torch.Tensor] = []

    def read_activations(module: Any, inputs: tuple[torch.Tensor]) -> None:
        activations.append(inputs[0][:, patches])

    with ExitStack() as hooks, evaluation_mode(model), torch.no_grad():
        for layer in encoder.layers:
            down_projection = layer.mlp.fc2 if hasattr(layer.mlp, "fc2") else layer.mlp.down_proj
            has_norm = not isinstance(layer.mlp.norm, nn.Identity)
            reader = layer.mlp.norm if has_norm else down_projection
            hooks.enter_context(reader.register_forward_pre_hook(read_activations))
        outputs = encoder(pixel_values.to(model.device), output_hidden_states=True)
    return [states[:, patches] for states in outputs.hidden_states], activations


def is_outlier(patches: torch.Tensor, ratio: float) -> torch.Tensor:
    """Return a mask [B, patches] of the patches [B, patches, D] with outlier norms.

    Their norms exceed `ratio` times the median patch norm of the image.
    """
    norms = patches.float().norm(dim=-1)
    return norms > ratio * norms.median(dim=1, keepdim=True).values


def average_outlier_activations(outliers: torch.Tensor, activations: torch.Tensor) -> torch.Tensor:
    """Return the mean magnitude [neurons] of activations [B, patches, neurons] at outlier patches.

    It is averaged over the outlier patches of each image, and then over the images with outliers.
    """
    # [B, neurons]
    activation_sums = (activations.float().abs() * outliers.unsqueeze(-1)).sum(dim=1)
    num_outliers = outliers.sum(dim=1, keepdim=True)  # [B, 1]
    return (activation_sums / num_outliers)[num_outliers[:, 0] > 0].mean(dim=0)

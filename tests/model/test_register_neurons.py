"""Neurons of a configuration that write to the last register instead of the patches."""

import torch
from helpers.tiny_models import build_tiny_config, randomize

from modeling_vitcls import ViTCLSModel


def test_only_the_neurons_of_patches_and_of_the_last_register_change() -> None:
    neurons = [5, 17]
    fields = {"num_register_tokens": 2, "register_neurons": [[1, neuron] for neuron in neurons]}
    model = randomize(ViTCLSModel(build_tiny_config(**fields)))
    layout = model.config.token_layout
    register = layout.registers.stop - 1
    activations = torch.randn(2, layout.num_prefix_tokens + 16, 24)
    moved = model.layers[1].mlp.register_neurons(activations)

    changed = (moved != activations).any(dim=0)  # [N, neurons]
    expected = torch.zeros_like(changed)
    expected[register:, neurons] = True
    assert torch.equal(changed, expected)

    of_patches = activations[:, layout.patches][..., neurons]
    # activations may be negative
    strongest = of_patches.gather(1, of_patches.abs().argmax(dim=1, keepdim=True))
    assert torch.equal(moved[:, [register]][..., neurons], strongest)

"""Registers at test time, on models with planted artifacts.

The artifacts are neurons that are active at few patches and write a large norm. They are planted in
layer 1 of 3. The outliers start there and remain until the last layer.
"""

from typing import Any

import pytest
import torch
from helpers.tiny_models import build_images, build_tiny_config, raises_one_line, randomize

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel
from modeling_vitcls.analysis.register_neurons import (
    add_test_time_register,
    compute_outlier_fraction,
    find_register_neurons,
)


LAYER = 1
PLANTED = (5, 17)  # neurons of layer 1
PATCHES = (3, 9)  # patch at which each neuron is active, in every image
SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "intermediate_size": 32,
    "position_embedding_tokens": "all",
}
MLPS = {
    "mlp": {"mlp_type": "mlp"},
    "swiglu": {"mlp_type": "swiglu"},
    "parallel": {"layer_type": "parallel"},
}

all_mlps = pytest.mark.parametrize("fields", MLPS.values(), ids=MLPS)


@torch.no_grad()
def build_planted_model(model_class: type = ViTCLSModel, **fields: Any) -> Any:
    """Return a model in which each planted neuron is active at one patch.

    The patch is identified by a channel of its position, which is zero at all other tokens up to
    layer 1. The neuron writes a large value to channel 2.
    """
    model = randomize(model_class(build_tiny_config(**SIZES, **fields)))
    base = model.base_model
    base.embeddings.patch_embeddings.projection.weight.mul_(0.1)
    layer = base.layers[LAYER]
    norm = getattr(layer, "layernorm_after", layer.layernorm_before)
    norm.weight.fill_(1)
    norm.bias.zero_()
    writers = [
        part
        for block in base.layers[: LAYER + 1]
        for part in (block.attention.o_proj, _outer(block.mlp))
    ]
    for channel, (neuron, patch) in enumerate(zip(PLANTED, PATCHES, strict=True)):
        for part in (base.embeddings.patch_embeddings.projection, *writers):
            part.weight[channel] = 0
            part.bias[channel] = 0
        base.embeddings.cls_token[..., channel] = 0
        for positions in base.embeddings.position_embeddings.parameters():
            positions[..., channel] = 0
        base.embeddings.position_embeddings.patches[:, patch, channel] = 5
        plant_neuron(layer.mlp, neuron, channel)
    return model


def plant_neuron(mlp: Any, neuron: int, channel: int) -> None:
    """After the norm, the channel is above 2 at one patch and near 0 elsewhere."""
    inner = mlp.fc1 if hasattr(mlp, "fc1") else mlp.gate_proj
    inner.weight[neuron] = 0
    inner.weight[neuron, channel] = 20
    inner.bias[neuron] = -20
    if hasattr(mlp, "up_proj"):
        mlp.up_proj.weight[neuron] = 0
        mlp.up_proj.bias[neuron] = 1
    _outer(mlp).weight[:, neuron] = 0
    _outer(mlp).weight[2, neuron] = 8


def _outer(mlp: Any) -> torch.nn.Linear:
    return mlp.fc2 if hasattr(mlp, "fc2") else mlp.down_proj


@all_mlps
def test_outliers_move_to_the_register(fields: dict[str, Any]) -> None:
    model = build_planted_model(**fields)
    assert compute_outlier_fraction(model, build_images()) == 2 / 16
    neurons = find_register_neurons(model, build_images(), num_neurons=2)
    assert sorted(neurons) == [[LAYER, neuron] for neuron in PLANTED]

    more = find_register_neurons(model, build_images(), num_neurons=10)
    assert more[:2] == neurons
    assert len(more) == 10
    assert max(more)[0] <= LAYER  # not after the layer with outliers

    better = add_test_time_register(model, neurons)
    assert compute_outlier_fraction(better, build_images()) == 0.0
    assert better.config.num_register_tokens == 1
    assert better.config.register_neurons == neurons

    with torch.no_grad():
        # [B, N]
        norms = better(build_images(), output_hidden_states=True).hidden_states[-1].norm(dim=-1)

    register = better.config.token_layout.registers
    assert (
        norms[:, register] > 3 * norms.median()
    ).all()  # position of the artifacts after the change
    # the original model is not changed
    assert compute_outlier_fraction(model, build_images()) == 2 / 16


@all_mlps
def test_only_planted_activations_of_patches_and_the_register_change(
    fields: dict[str, Any],
) -> None:
    model = build_planted_model(**fields, num_register_tokens=2)
    better = add_test_time_register(model, [[LAYER, neuron] for neuron in PLANTED])
    register_neurons = better.layers[LAYER].mlp.register_neurons
    layout = better.config.token_layout
    activations = torch.randn(2, layout.num_prefix_tokens + 16, 32)
    moved = register_neurons(activations)
    others = [neuron for neuron in range(32) if neuron not in PLANTED]

    assert torch.equal(moved[..., others], activations[..., others])
    before = slice(layout.registers.stop - 1)  # CLS and the other registers
    assert torch.equal(moved[:, before], activations[:, before])
    assert not moved[:, layout.patches][..., PLANTED].any()

    of_patches = activations[:, layout.patches][..., PLANTED]
    # activations may be negative
    strongest = of_patches.gather(1, of_patches.abs().argmax(dim=1, keepdim=True))
    assert torch.equal(moved[:, [layout.registers.stop - 1]][..., PLANTED], strongest)


def test_the_register_starts_at_zero_and_other_weights_are_not_changed() -> None:
    model = build_planted_model(ViTCLSForImageClassification, num_register_tokens=2)
    better = add_test_time_register(model, [[LAYER, 5]])
    assert torch.equal(
        better.vitcls.embeddings.register_tokens[:, :2], model.vitcls.embeddings.register_tokens
    )
    assert not better.vitcls.embeddings.register_tokens[:, 2].any()
    assert not better.vitcls.embeddings.position_embeddings.registers[:, 2].any()

    old = model.state_dict()
    new = better.state_dict()
    changed = {
        name
        for name in new
        if new[name].shape != old[name].shape or not torch.equal(new[name], old[name])
    }
    assert changed == {
        f"vitcls.embeddings.{part}" for part in ("register_tokens", "position_embeddings.registers")
    }


def test_the_register_of_a_gated_group_is_open() -> None:
    model = build_planted_model().adapt(num_register_tokens=2, gate_new_tokens=True)
    better = add_test_time_register(model, [[LAYER, neuron] for neuron in PLANTED])
    assert better.gates.get_gate_values().tolist() == pytest.approx([1e-6, 1e-6, 1.0], abs=2e-7)
    assert compute_outlier_fraction(better, build_images()) == 0.0


def test_unsupported_models_are_errors() -> None:
    healthy = randomize(ViTCLSModel(build_tiny_config()))
    with raises_one_line("ratio"):
        find_register_neurons(healthy, build_images())
    with raises_one_line("[1, 99]"):
        add_test_time_register(healthy, [[1, 99]])
    better = add_test_time_register(build_planted_model(), [[LAYER, 5]])
    with raises_one_line("test-time register"):
        add_test_time_register(better, [[LAYER, 17]])

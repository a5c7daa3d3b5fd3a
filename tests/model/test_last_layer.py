"""A model computes all tokens of its last layer; models with fewer layers."""

import pickle
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    IMAGES,
    TOKENS,
    assert_same_outputs,
    build_random,
    build_tiny_config,
    raises_one_line,
    record_outputs,
)
from torch import nn

from modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSForImageClassification,
    ViTCLSModel,
)
from modeling_vitcls.conversion.weight_rules import Fields
from modeling_vitcls.speed.packed import can_trim_last_layer


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_other_attention_implementations_require_all_tokens(implementation: str) -> None:
    config = build_tiny_config(**TOKENS)
    config._attn_implementation = implementation
    assert not can_trim_last_layer(config)


# Hooks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mlp_type": "swiglu", "mlp_norm": True, "attention_norm": True},
        {"layer_type": "parallel"},
    ],
    ids=str,
)
@torch.enable_grad()
def test_hooks_receive_all_tokens(fields: Fields) -> None:
    """Forward and backward hooks on the last layer and each of its modules."""
    model = build_random(ViTCLSForImageClassification, **TOKENS, **fields)
    counts: list[int] = []

    def see(module: Any, inputs: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        counts.extend(
            tensor.shape[1]
            for tensor in tensors
            if isinstance(tensor, torch.Tensor) and tensor.ndim >= 3
        )

    modules = [model.vitcls, model.vitcls.layernorm, *model.vitcls.layers[-1].modules()]
    for module in modules:
        module.register_forward_hook(see)
        module.register_full_backward_hook(see)
    model(IMAGES).logits.sum().backward()
    assert set(counts) == {22}
    assert len(counts) >= len(modules)


class Logged(nn.Module):
    """A wrapper around a layer, which reads its output."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.num_tokens = 0

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = self.layer(*args, **kwargs)
        self.num_tokens = output.shape[1]
        return output


def test_a_global_hook_a_patched_forward_and_a_wrapped_layer_see_all_tokens() -> None:
    model = build_random(ViTCLSForImageClassification, **TOKENS)
    expected = model(IMAGES).logits
    last_layer = model.vitcls.layers[-1]
    seen: list[int] = []

    def see(module: Any, inputs: Any, output: Any) -> None:
        if module is last_layer:
            seen.append(output.shape[1])

    handle = nn.modules.module.register_module_forward_hook(see)
    model(IMAGES)
    handle.remove()

    outputs = record_outputs(last_layer)
    model(IMAGES)
    del last_layer.forward
    assert seen == [outputs[0].shape[1]] == [22]

    logged = Logged(last_layer)
    model.vitcls.layers[-1] = logged
    assert_same_outputs(model(IMAGES).logits, expected, 1e-5)
    assert logged.num_tokens == 22


@pytest.mark.parametrize("pooled_layers", [None, [-2, -1]])
def test_a_model_with_fewer_layers_reads_the_last_ones(pooled_layers: list[int] | None) -> None:
    fields = TOKENS | {"num_hidden_layers": 3, "pooled_layers": pooled_layers}
    model = build_random(ViTCLSForImageClassification, **fields)
    short = build_random(ViTCLSForImageClassification, **fields | {"num_hidden_layers": 2})
    short.load_state_dict(model.state_dict(), strict=False)
    model.vitcls.layers = model.vitcls.layers[:2]
    assert torch.equal(model(IMAGES).logits, short(IMAGES).logits)


def test_a_head_of_a_layer_that_was_removed_is_an_error() -> None:
    model = ViTCLSForImageClassification(build_tiny_config(num_hidden_layers=3, pooled_layers=[3]))
    model.vitcls.layers = model.vitcls.layers[:2]
    with pytest.raises(ValueError, match="the heads read layer 3, but the model has 2 layers"):
        model(IMAGES)


def test_a_backbone_with_fewer_layers_has_the_maps_of_these_layers() -> None:
    backbone = build_random(ViTCLSBackbone, num_hidden_layers=3, out_features=["stage1"])
    (expected,) = backbone(IMAGES).feature_maps
    backbone.layers = backbone.layers[:2]
    assert torch.equal(backbone(IMAGES).feature_maps[0], expected)
    backbone.out_features = ["stage1", "stage3"]
    with raises_one_line("stage3", "2 layers"):
        backbone(IMAGES)


def test_an_output_with_all_tokens_of_the_last_layer_can_be_pickled() -> None:
    model = build_random(ViTCLSModel)
    expected = model(IMAGES, num_output_tokens=1, output_layers=[-1])
    assert expected.last_hidden_state.shape[1] == 1
    loaded = pickle.loads(pickle.dumps(expected))
    assert torch.equal(loaded.layer_tokens[-1], model(IMAGES).last_hidden_state)

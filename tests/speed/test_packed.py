"""A packed model has the outputs of its model, which stays plain and is not watched."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from helpers.compare import assert_equal_in_float32, build_models, reorder_weights
from helpers.tiny_models import (
    IMAGES,
    MASK,
    TASKS,
    TOKENS,
    assert_same_bits,
    build_random,
    randomize,
)
from peft import LoraConfig, get_peft_model
from pytest import MonkeyPatch
from torch import nn
from torch.testing import assert_close

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
    pack,
)
from modeling_vitcls.conversion.weight_rules import Fields
from modeling_vitcls.model.blocks_vitcls import ViTCLSLayers
from modeling_vitcls.speed.packed import PackedLayers, count_output_tokens
from scripts.benchmark import build_timm_vit, count_kernels


pytestmark = pytest.mark.usefixtures("no_grad")

VARIANTS = {
    "default": {},
    "all_tokens": {"compute_all_tokens": True},
    "no_biases": {"qkv_bias": False, "projection_bias": False, "mlp_bias": False},
    "no_key_bias": {"key_bias": False},
    "scales": {"layer_scale_init_value": 0.1, "num_register_tokens": 2},
    "norms": {"qk_norm": True, "attention_norm": True, "mlp_norm": True, "norm_type": "rmsnorm"},
    "rotary": {"position_embedding_type": "rope_2d", "hidden_act": "gelu_pytorch_tanh"},
    "mixed": {"position_embedding_type": "rope_mixed", "num_register_tokens": 1},
    "swiglu": {"mlp_type": "swiglu", "drop_path_rate": 0.5},
    "masks": {"cls_scopes": [[2, 2, 0, 1]], "num_register_tokens": 1},
    "bias": {"relative_position_bias": "layer"},
    "differential": {"attention_type": "differential"},
    "parallel": {"layer_type": "parallel"},
    "layers": {"pooled_layers": [-2, -1]},
    "mean": {"pooling": "mean"},
    "attention": {"pooling": "attention"},
    "dropout": {"attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.1},
    "tokens": TOKENS,
}


@pytest.fixture(params=["joined", "reordered"])
def order(request: pytest.FixtureRequest, monkeypatch: MonkeyPatch) -> str:
    """Run a test with joined weights, and with weights in the order of oneDNN."""
    if request.param == "reordered":
        reorder_weights(monkeypatch, torch.float32)
    return request.param


def list_classes(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_outputs_equal_those_of_the_model(fields: Fields) -> None:
    packed, plain = build_models(**fields)
    masks = (None, MASK) if fields is TOKENS else (None,)
    for mask in masks:
        for _ in range(2):  # The second pass takes the weights of the first one
            outputs = [each(IMAGES, attention_mask=mask) for each in (packed, plain)]
            found, expected = ({"logits": each.logits} for each in outputs)
            assert_equal_in_float32(found, expected)


@pytest.mark.parametrize("name", ["default", "differential", "parallel", "attention", "norms"])
def test_usual_layers_are_packed(name: str) -> None:
    packed, _ = build_models(**VARIANTS[name])
    is_usual = name not in ("differential", "parallel")
    assert isinstance(packed.vitcls.layers, PackedLayers) == is_usual


def test_tokens_hidden_states_and_tasks_equal_those_of_the_model() -> None:
    encoder = build_random(ViTCLSModel, num_register_tokens=2)
    found, expected = (each(IMAGES, output_hidden_states=True) for each in (pack(encoder), encoder))
    assert_close(found.tokens, expected.tokens, rtol=1e-4, atol=1e-5)
    assert_close(found.hidden_states, expected.hidden_states, rtol=1e-4, atol=1e-5)
    model = build_random(ViTCLSForMultiTaskClassification, num_cls_tokens=2, tasks=TASKS)
    assert_close(pack(model)(IMAGES).logits, model(IMAGES).logits, rtol=1e-4, atol=1e-5)


def test_the_model_stays_plain_and_both_share_their_memory() -> None:
    model = build_random(ViTCLSForImageClassification, num_register_tokens=2)
    classes, state = list_classes(model), copy.deepcopy(model.state_dict())
    packed = pack(model)
    packed(IMAGES)
    assert list_classes(model) == classes
    assert type(model.vitcls.layers) is ViTCLSLayers
    assert model.num_output_tokens is None
    assert_same_bits(model.state_dict(), state)
    assert list(packed.state_dict()) == list(state)
    for one, other in zip(packed.parameters(), model.parameters(), strict=True):
        assert one is other
    assert pack(packed) is packed
    assert not any("is_packed" in vars(module) for module in model.modules())


@torch.enable_grad()
def test_a_packed_model_can_be_trained_and_packed_again() -> None:
    model = build_random(ViTCLSForImageClassification)
    with torch.no_grad():
        pack(model)(IMAGES)
    model.train()(IMAGES).logits.sum().backward()
    assert model.vitcls.layers[0].mlp.fc1.weight.grad is not None
    with torch.no_grad():
        for layer in model.vitcls.layers:
            layer.mlp.fc1.weight.add_(1)
        assert_close(pack(model)(IMAGES).logits, model.eval()(IMAGES).logits, rtol=1e-4, atol=1e-5)


def test_weights_are_prepared_once_for_each_precision() -> None:
    packed, _ = build_models()
    packed(IMAGES)
    products = packed.vitcls.layers.products
    first = products[torch.float32]
    packed(IMAGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed(IMAGES)
    assert products[torch.float32] is first
    assert {weight.dtype for weight, _ in products[torch.bfloat16][0]} == {torch.bfloat16}
    assert len(products) == 2


def test_the_environment_keeps_layers_plain(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("VITCLS_CPU_KERNELS", "0")
    packed, plain = build_models()
    assert type(packed.vitcls.layers) is ViTCLSLayers
    assert torch.equal(packed(IMAGES).logits, plain(IMAGES).logits)


@torch.enable_grad()
def test_gradients_of_the_pixels_are_those_of_the_model() -> None:
    gradients = []
    for model in build_models():
        pixels = IMAGES.clone().requires_grad_()
        model(pixels).logits.sum().backward()
        gradients.append(pixels.grad)
    assert_close(*gradients)


# What is unusual ----------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A part of a layer that a person wrote."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.gate = randomize(nn.Linear(16, 16))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.mlp(states) * self.gate(states)


def wrap_mlp(model: Any) -> None:
    model.vitcls.layers[0].mlp = Wrapped(model.vitcls.layers[0].mlp)


def replace_list(model: Any) -> None:
    model.vitcls.layers = nn.ModuleList(model.vitcls.layers[:1])


def replace_forward(model: Any) -> None:
    layer = model.vitcls.layers[0]
    layer.forward = lambda states, *args, **kwargs: 2 * type(layer).forward(layer, states, *args)


def add_hook(model: Any) -> None:
    model.vitcls.layers[0].register_forward_hook(lambda layer, args, output: 2 * output)


def use_eager_attention(model: Any) -> None:
    model.set_attn_implementation("eager")


def add_adapter(model: Any) -> None:
    config = LoraConfig(target_modules=["q_proj", "fc1"], init_lora_weights=False)
    get_peft_model(model, config)


@pytest.mark.parametrize(
    "change",
    [wrap_mlp, replace_list, replace_forward, add_hook, use_eager_attention, add_adapter],
)
def test_a_changed_model_is_computed_as_it_is(change: Any) -> None:
    model = build_random(ViTCLSForImageClassification)
    expected = model(IMAGES).logits
    change(model)
    packed = pack(model.eval())
    assert_close(packed(IMAGES).logits, model(IMAGES).logits, rtol=1e-4, atol=1e-5)
    if change is not use_eager_attention:
        assert not torch.allclose(packed(IMAGES).logits, expected, atol=1e-3)


def test_attention_of_the_special_tokens_and_hooks_see_all_tokens() -> None:
    packed, plain = build_models(**TOKENS)
    assert_close(packed.token_attention(IMAGES), plain.token_attention(IMAGES))
    seen: list[int] = []
    packed.vitcls.layers[-1].register_forward_hook(
        lambda layer, args, output: seen.append(output.shape[1])
    )
    packed(IMAGES)
    assert seen == [22]


# The last layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "num_read"),
    [
        ({"num_register_tokens": 3}, 1),
        (TOKENS, 3),
        (TOKENS | {"distillation_head": False, "cls_pooling": "concat"}, 2),
        (TOKENS | {"layer_type": "post"}, 3),
        (TOKENS | {"pooling": "cls_mean"}, None),
        (TOKENS | {"compute_all_tokens": True}, None),
    ],
    ids=str,
)
def test_the_last_layer_computes_what_the_heads_read(fields: Fields, num_read: int | None) -> None:
    packed, plain = build_models(**fields)
    assert count_output_tokens(plain.vitcls) == packed.num_output_tokens == num_read
    tokens = packed.vitcls(IMAGES, num_output_tokens=packed.num_output_tokens).last_hidden_state
    num_tokens = plain.config.token_layout.get_num_tokens(4, 4)
    assert tokens.shape[1] == (num_read or num_tokens)
    assert plain.vitcls(IMAGES).last_hidden_state.shape[1] == num_tokens


def test_a_pass_starts_two_kernels_per_layer_more_than_timms_model() -> None:
    packed, _ = build_models(num_hidden_layers=12)
    packed(IMAGES)
    timm_model = build_timm_vit(packed.config).eval()
    ours, theirs = (count_kernels(partial(each, IMAGES)) for each in (packed, timm_model))
    assert ours <= theirs + 2 * 12

"""Models are plain when they are built, and `use_fast_modules` changes only layers of this package."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.compare import assert_equal_in_float32, run_step
from helpers.tiny_models import IMAGES, assert_same_bits, build_random
from pytest import MonkeyPatch
from torch import nn
from torch.testing import assert_close
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_vitcls import ViTCLSForImageClassification, use_fast_modules, use_plain_modules
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.speed.lean_layers import LeanLayers


def build_model(**fields: Any) -> Any:
    return build_random(ViTCLSForImageClassification, **fields)


def list_classes(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


def has_fast_modules(model: nn.Module) -> bool:
    return any(isinstance(module, LeanLayers) for module in model.modules())


@torch.no_grad()
def build_packed_model() -> Any:
    """Build a model whose weights a pass has packed."""
    model = use_fast_modules(build_model(), packed=True)
    model(IMAGES)
    assert model.vitcls.layers.packed_weights
    return model


def test_models_are_plain_when_built_and_loaded_and_those_of_the_commands_are_fast(
    tmp_path: Path,
) -> None:
    model = build_packed_model()
    weights = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = ViTCLSForImageClassification.from_pretrained(tmp_path)
    assert not has_fast_modules(build_model())
    assert not has_fast_modules(loaded)
    assert has_fast_modules(ModelFolder(tmp_path).load(ViTCLSForImageClassification))
    assert list(loaded.state_dict()) == list(weights) == list(build_model().state_dict())
    assert_same_bits(loaded.state_dict(), weights)


def test_plain_modules_come_back() -> None:
    model = build_model(mlp_type="swiglu")
    classes = list_classes(model)
    attributes = list(vars(model.vitcls.layers))
    assert use_fast_modules(model, packed=True) is model
    assert list_classes(model) != classes
    assert use_plain_modules(model) is model
    assert list_classes(model) == classes
    assert list(vars(model.vitcls.layers)) == attributes


def test_training_ends_packed_weights_and_a_cast_forgets_them() -> None:
    model = build_packed_model().double()
    assert model.vitcls.layers.packed_weights == {}
    assert model.train().vitcls.layers.packed_weights is None
    assert build_packed_model().eval().vitcls.layers.packed_weights
    assert not has_fast_modules(build_packed_model().adapt(num_register_tokens=1))


def test_packed_weights_are_made_once_for_each_precision() -> None:
    model = build_packed_model()
    packed = model.vitcls.layers.packed_weights
    first = packed[torch.float32]
    with torch.no_grad():
        model(IMAGES)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(IMAGES)
    assert packed[torch.float32] is first
    assert {weight.dtype for weight, _ in packed[torch.bfloat16][-1]} == {torch.bfloat16}
    assert len(packed) == 2


def test_the_environment_keeps_models_plain(monkeypatch: MonkeyPatch) -> None:
    model = build_packed_model()
    monkeypatch.setenv("VITCLS_CPU_KERNELS", "0")
    assert not has_fast_modules(use_fast_modules(build_model(), packed=True))
    assert not has_fast_modules(copy.deepcopy(model))
    assert not has_fast_modules(pickle.loads(pickle.dumps(model)))
    monkeypatch.setenv("VITCLS_CPU_KERNELS", "1")
    assert has_fast_modules(copy.deepcopy(model))


class Wrapped(nn.Module):
    """A part of a layer that a person wrote."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.gate = nn.Linear(16, 16)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.mlp(states) * self.gate(states)


@pytest.mark.parametrize("replaces_list", [False, True])
def test_layers_of_a_person_are_computed_as_they_are(replaces_list: bool) -> None:
    plain = build_model()
    layers = plain.vitcls.layers
    layers[0].mlp = Wrapped(layers[0].mlp)
    if replaces_list:
        plain.vitcls.layers = nn.ModuleList(layers[:1])
    fast = use_fast_modules(copy.deepcopy(plain), packed=True)
    assert list_classes(fast.vitcls.layers[0]) == list_classes(layers[0])
    assert_equal_in_float32(run_step(fast, IMAGES), run_step(plain, IMAGES))


@torch.no_grad()
def test_another_function_for_sdpa_is_called(monkeypatch: MonkeyPatch) -> None:
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    seen: list[Any] = []

    def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(module)
        return original(module, *args, **kwargs)

    model = build_packed_model()
    expected = model(IMAGES).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attend)
    assert_close(model(IMAGES).logits, expected)
    assert len(seen) == model.config.num_hidden_layers


@torch.no_grad()
def test_eager_attention_and_recorders_are_used() -> None:
    model = build_packed_model()
    expected = model.token_attention(IMAGES)
    model.set_attn_implementation("eager")
    maps = model(IMAGES, output_attentions=True).attentions
    assert len(maps) == model.config.num_hidden_layers
    assert_close(torch.stack(maps, dim=1)[..., :1, :], expected)


@pytest.mark.parametrize("is_fast", [False, True])
def test_quantizers_find_the_linear_layers(is_fast: bool) -> None:
    model = build_packed_model() if is_fast else build_model()
    num_linear = sum(type(module) is nn.Linear for module in model.modules())
    assert num_linear == 6 * model.config.num_hidden_layers + 1
    torch.fx.symbolic_trace(model.vitcls.layers[0].mlp)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    names = [type(module).__module__ for module in quantized.modules()]
    assert sum("quantized" in name for name in names) >= num_linear

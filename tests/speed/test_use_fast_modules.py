"""Models are plain when they are built, and `use_fast_modules` changes only modules of this package."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.compare import assert_equal_in_float32, run_step
from helpers.tiny_models import build_images, build_tiny_config, randomize
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSPreTrainedModel,
    use_fast_modules,
    use_plain_modules,
)
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.speed import lean_layers
from modeling_vitcls.speed.cpu_kernels import FastModule


def build_model(**fields: Any) -> Any:
    return randomize(ViTCLSForImageClassification(build_tiny_config(**fields)))


def list_classes(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


def has_fast_modules(model: nn.Module) -> bool:
    return any(isinstance(module, FastModule) for module in model.modules())


def test_models_are_plain_when_built_and_loaded_and_those_of_the_commands_are_fast(
    tmp_path: Path,
) -> None:
    model = build_model()
    assert not has_fast_modules(model)
    use_fast_modules(model).save_pretrained(tmp_path)
    assert not has_fast_modules(ViTCLSForImageClassification.from_pretrained(tmp_path))
    assert has_fast_modules(ModelFolder(tmp_path).load(ViTCLSForImageClassification))


def test_plain_modules_come_back() -> None:
    model = build_model(mlp_type="swiglu")
    classes = list_classes(model)
    assert use_fast_modules(model) is model
    assert list_classes(model) != classes
    assert use_plain_modules(model) is model
    assert list_classes(model) == classes


class Wrapped(nn.Module):
    """A part of a layer that a person wrote."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.gate = nn.Linear(16, 16)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.mlp(states) * self.gate(states)


class Ranker(ViTCLSPreTrainedModel):
    """A model of a person with a ViT of this package."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.classifier = ViTCLSForImageClassification(config)
        self.score = nn.Linear(3, 1)
        self.post_init()


def test_linear_layers_of_a_person_keep_their_class() -> None:
    ranker: Any = Ranker(build_tiny_config())
    layer = ranker.classifier.vitcls.layers[0]
    layer.mlp = Wrapped(layer.mlp)
    use_fast_modules(ranker)
    assert has_fast_modules(layer.mlp.mlp)
    assert type(layer.mlp.gate) is nn.Linear
    assert type(ranker.score) is nn.Linear


@pytest.mark.parametrize("min_size", [0, 10**9], ids=["cpu_kernels", "lean_layers"])
@torch.no_grad()
def test_another_function_for_sdpa_is_called(
    min_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lean_layers, "MIN_MULTIPLICATIONS_OF_KERNELS", min_size)
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    seen: list[Any] = []

    def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(module)
        return original(module, *args, **kwargs)

    model = use_fast_modules(build_model())
    expected = model(build_images()).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attend)
    torch.testing.assert_close(model(build_images()).logits, expected)
    assert len(seen) == model.config.num_hidden_layers


@pytest.mark.parametrize("min_size", [0, 10**9], ids=["cpu_kernels", "lean_layers"])
def test_fast_weights_are_used(min_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in code of MAML, tensors take the place of parameters."""
    monkeypatch.setattr(lean_layers, "MIN_MULTIPLICATIONS_OF_KERNELS", min_size)
    models = build_model(), use_fast_modules(build_model())
    for model in models:
        model(build_images())
        layer = model.vitcls.layers[0]
        for module in (layer.attention.q_proj, layer.mlp.fc1, layer.layernorm_before):
            for name in ("weight", "bias"):
                value = 2 * module._parameters.pop(name).detach()
                setattr(module, name, value)
    plain, fast = (run_step(model, build_images()) for model in models)
    assert_equal_in_float32(fast, plain)


def test_quantizers_find_the_linear_layers_of_a_model_as_it_is_built() -> None:
    model = build_model()
    num_linear = sum(type(module) is nn.Linear for module in model.modules())
    assert num_linear == 6 * model.config.num_hidden_layers + 1
    torch.fx.symbolic_trace(model.vitcls.layers[0].mlp)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    names = [type(module).__module__ for module in quantized.modules()]
    assert sum("quantized" in name for name in names) >= num_linear

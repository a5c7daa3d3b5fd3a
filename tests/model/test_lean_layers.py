"""Lean layers have the outputs, gradients and hooks of plain layers, whatever changes later."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.tiny_models import build_images, build_tiny_config, randomize
from peft import LoraConfig, get_peft_model
from torch import nn

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.model import cpu_kernels_vitcls
from modeling_vitcls.model.cpu_kernels_vitcls import is_usual_layer, uninstall_cpu_kernels
from scripts.host_time import count_kernels

from .compare import assert_equal_in_float32, run_step


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "all_tokens": {"compute_all_tokens": True},
    "no_biases": {"qkv_bias": False, "projection_bias": False, "mlp_bias": False},
    "scales": {"layer_scale_init_value": 0.1, "num_register_tokens": 2},
    "norms": {"qk_norm": True, "attention_norm": True, "mlp_norm": True, "norm_type": "rmsnorm"},
    "rotary": {"position_embedding_type": "rope_2d", "hidden_act": "gelu_pytorch_tanh"},
    "swiglu": {"mlp_type": "swiglu", "drop_path_rate": 0.5},
    "masks": {"cls_scopes": [[2, 2, 0, 1]], "num_register_tokens": 1, "register_neurons": [[0, 3]]},
    "dropout": {"attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.0},
}


@pytest.fixture(params=[True, False], ids=["cpu_kernels", "as_on_a_gpu"], autouse=True)
def has_cpu_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run each test with the CPU kernels, and with the operations that a GPU would run."""
    if not request.param:
        monkeypatch.setattr(cpu_kernels_vitcls, "has_cpu_kernels", lambda inputs: False)
    return request.param


def build_models(**fields: Any) -> tuple[Any, Any]:
    """Build two classifiers with equal weights, with lean and with plain layers."""
    lean, plain = (
        randomize(ViTCLSForImageClassification(build_tiny_config(**fields))) for _ in range(2)
    )
    uninstall_cpu_kernels(plain)
    return lean, plain


def is_lean(model: Any) -> bool:
    """Check that the layers of a model are computed as lean layers."""
    found = {is_usual_layer(layer, {}) for layer in model.vitcls.layers}
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_outputs_and_gradients_equal_those_of_plain_layers(fields: dict[str, Any]) -> None:
    results = []
    models = build_models(**fields)
    assert is_lean(models[0])
    for model in models:
        with torch.no_grad():
            evaluated = {"evaluated": model(build_images()).logits}
        torch.manual_seed(0)  # drop path and dropout
        results.append(evaluated | run_step(model.train(), build_images()))
    assert_equal_in_float32(*results)


def test_changed_weights_are_used_at_once() -> None:
    lean, plain = build_models()
    lean(build_images())
    for model in (lean, plain):
        model.vitcls.layers[0].attention.k_proj.weight.data.mul_(-3)
        model.vitcls.layers[1].attention.v_proj = nn.Linear(16, 16).requires_grad_(False)
        nn.init.constant_(model.vitcls.layers[1].attention.v_proj.weight, 0.1)
        nn.init.constant_(model.vitcls.layers[1].attention.v_proj.bias, 0.2)
    assert_equal_in_float32(*(run_step(model, build_images()) for model in (lean, plain)))


@pytest.mark.parametrize(
    "name",
    [
        "layernorm_before",
        "drop_path",
        "attention",
        "attention.q_proj",
        "attention.norm",
        "mlp",
        "mlp.fc1",
        "mlp.activation_fn",
        "dropout",
    ],
)
def test_hooks_and_replaced_forwards_inside_a_layer_are_called(name: str) -> None:
    model, plain = build_models()
    model(build_images())  # as usual
    module = model.vitcls.layers[0].get_submodule(name)
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda *values: seen.append(values))
    found = run_step(model.train(), build_images())
    assert seen
    assert_equal_in_float32(found, run_step(plain.train(), build_images()))
    handle.remove()
    assert is_lean(model.eval())

    forward = module.forward
    module.forward = lambda *args, **kwargs: seen.append(args) or forward(*args, **kwargs)
    seen.clear()
    model(build_images())
    assert seen


@torch.no_grad()
def test_layers_stay_lean_after_hidden_states_were_requested() -> None:
    model, plain = build_models()
    states, expected = (
        each(build_images(), output_hidden_states=True).hidden_states for each in (model, plain)
    )
    assert is_lean(model)
    torch.testing.assert_close(states, expected)


def test_hooks_of_all_modules_are_called() -> None:
    model, plain = build_models()
    counts = []
    for each in (model, plain):
        seen: list[Any] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda *values, seen=seen: seen.append(values)
        )
        each(build_images())
        handle.remove()
        counts.append(len(seen))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("change", [copy.deepcopy, lambda model: model.double().float()])
def test_copied_and_moved_models_stay_lean(change: Callable[[Any], Any]) -> None:
    model, plain = build_models()
    model(build_images())
    changed = change(model)
    assert_equal_in_float32(run_step(changed, build_images()), run_step(plain, build_images()))
    assert is_lean(changed)


@pytest.mark.parametrize("target", ["q_proj", "o_proj", "fc1"])
def test_lora_of_any_linear_layer_equals_plain_pytorch(target: str) -> None:
    results = []
    for model in build_models():
        adapter = get_peft_model(model, LoraConfig(r=2, target_modules=[target]))
        for name, weight in adapter.named_parameters():
            if "lora_" in name:
                nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(1))
        results.append(run_step(adapter, build_images()))
    assert_equal_in_float32(*results)


def test_gradient_checkpointing_has_the_same_gradients() -> None:
    model, plain = build_models()
    model.gradient_checkpointing_enable()
    assert_equal_in_float32(
        run_step(model.train(), build_images()), run_step(plain.train(), build_images())
    )


def test_a_training_step_starts_fewer_kernels_than_with_plain_layers(has_cpu_kernels: bool) -> None:
    lean, plain = (
        count_kernels(lambda model=model: run_step(model.train(), build_images()))
        for model in build_models(num_hidden_layers=12)
    )
    assert plain - lean == (0 if has_cpu_kernels else 64)


def test_layers_are_found_by_name() -> None:
    """FSDP and device maps look for the names in `_no_split_modules`."""
    lean, _ = build_models()
    assert type(lean.vitcls.layers[0]).__name__ in lean._no_split_modules

"""Lean layers have the outputs, gradients and hooks of plain layers, whatever changes later."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.compare import assert_equal_in_float32, run_step
from helpers.tiny_models import build_images, build_tiny_config, randomize
from torch import nn

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.speed import lean_layers
from modeling_vitcls.speed.lean_layers import is_usual_layer, use_fast_modules
from scripts.benchmark import build_timm_vit, count_kernels


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "all_tokens": {"compute_all_tokens": True},
    "no_biases": {"qkv_bias": False, "projection_bias": False, "mlp_bias": False},
    "scales": {"layer_scale_init_value": 0.1, "num_register_tokens": 2},
    "norms": {"qk_norm": True, "attention_norm": True, "mlp_norm": True, "norm_type": "rmsnorm"},
    "rotary": {"position_embedding_type": "rope_2d", "hidden_act": "gelu_pytorch_tanh"},
    "swiglu": {"mlp_type": "swiglu", "drop_path_rate": 0.5},
    "masks": {"cls_scopes": [[2, 2, 0, 1]], "num_register_tokens": 1},
    "dropout": {"attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.0},
}


@pytest.fixture(params=[True, False], ids=["cpu_kernels", "as_on_a_gpu"], autouse=True)
def has_cpu_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run each test as with large images on a CPU, and with the operations that a GPU would run."""
    monkeypatch.setattr(lean_layers, "has_cpu_kernels", lambda inputs: request.param)
    return request.param


def build_models(**fields: Any) -> tuple[Any, Any]:
    """Build two classifiers with equal weights, with lean and with plain layers."""
    lean, plain = (
        randomize(ViTCLSForImageClassification(build_tiny_config(**fields))) for _ in range(2)
    )
    return use_fast_modules(lean), plain


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


def replace_module(layer: Any) -> None:
    layer.attention.v_proj = nn.Linear(16, 16)
    nn.init.constant_(layer.attention.v_proj.weight, 0.1)
    nn.init.constant_(layer.attention.v_proj.bias, 0.2)


def transpose(layer: Any) -> None:
    """Transpose weights as those of Flax; the views have the addresses of the weights."""
    layer.attention.q_proj.weight.data = layer.attention.q_proj.weight.data.t()
    layer.attention.k_proj.weight = nn.Parameter(layer.attention.k_proj.weight.detach().T)


def share_queries_and_keys(layer: Any) -> None:
    layer.attention.k_proj = layer.attention.q_proj
    layer.attention.double().float()


def keep_one_head(layer: Any) -> None:
    """Keep one head of keys and values, which all heads of queries read."""
    for linear in (layer.attention.k_proj, layer.attention.v_proj):
        linear.weight = nn.Parameter(linear.weight[: layer.attention.head_dim].detach())
        linear.bias = nn.Parameter(linear.bias[: layer.attention.head_dim].detach())


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.attention.k_proj.weight.data.mul_(-3),
        lambda layer: layer.attention.double().float().v_proj.weight.data.add_(1),
        lambda layer: setattr(layer.attention.q_proj.bias, "data", layer.attention.q_proj.bias + 1),
        lambda layer: setattr(layer.attention.v_proj, "bias", None),
        lambda layer: setattr(layer, "dropout", nn.GELU()),
        replace_module,
        transpose,
        share_queries_and_keys,
        keep_one_head,
    ],
)
def test_changed_parts_are_used_at_once_and_trained(change: Callable[[Any], Any]) -> None:
    models = build_models()
    logits: list[list[Any]] = [[], [], []]
    for model in models:
        logits[0].append(model(build_images()).logits)
        change(model.vitcls.layers[0])
        with torch.no_grad():
            logits[1].append(model(build_images()).logits)

    steps = [run_step(model, build_images()) for model in models]
    assert_equal_in_float32(*steps)
    for model in models:
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        with torch.no_grad():
            logits[2].append(model(build_images()).logits)

    for found, expected in logits:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(logits[0][0], logits[1][0], atol=1e-3)
    assert not torch.allclose(logits[1][0], logits[2][0], atol=1e-3)


def test_replicas_of_data_parallel_are_plain() -> None:
    """A replica has no parameters, but tensors of the same names."""
    model, plain = build_models()
    layer = model.vitcls.layers[0]
    replica = layer._replicate_for_data_parallel()
    replica.attention = layer.attention._replicate_for_data_parallel()
    replica.attention.q_proj = layer.attention.q_proj._replicate_for_data_parallel()
    for name, weight in layer.attention.q_proj.named_parameters():
        setattr(replica.attention.q_proj, name, weight.detach())
    states = torch.randn(2, 5, 16)
    torch.testing.assert_close(replica(states), plain.vitcls.layers[0](states))


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


@torch.no_grad()
def call_with_other_weights(model: Any) -> Any:
    torch.func.functional_call(model, model.state_dict(), (build_images(),))
    return model


def assign_weights(model: Any) -> Any:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return model


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda model: model.double().float(),
        call_with_other_weights,
        assign_weights,
    ],
)
def test_copied_and_changed_models_stay_lean(change: Callable[[Any], Any]) -> None:
    model, plain = build_models()
    num_kernels = count_kernels(partial(torch.no_grad()(model), build_images()))
    changed = change(model)
    assert_equal_in_float32(run_step(changed, build_images()), run_step(plain, build_images()))
    assert is_lean(changed)
    assert count_kernels(partial(torch.no_grad()(changed), build_images())) == num_kernels


def test_a_training_step_starts_fewer_kernels_than_with_plain_layers(has_cpu_kernels: bool) -> None:
    lean, plain = (
        count_kernels(lambda model=model: run_step(model.train(), build_images()))
        for model in build_models(num_hidden_layers=12)
    )
    assert plain - lean == (0 if has_cpu_kernels else 73)


@torch.no_grad()
def test_a_forward_pass_starts_two_kernels_per_layer_more_than_in_timm(
    has_cpu_kernels: bool,
) -> None:
    """They join the weights and biases of queries, keys and values.

    The positions of special tokens are parameters of their own, hence one addition more.
    """
    model, _ = build_models(num_hidden_layers=12)
    timm_model = build_timm_vit(model.config).eval()
    ours, theirs = (count_kernels(partial(each, build_images())) for each in (model, timm_model))
    assert ours - theirs == (26 if has_cpu_kernels else 25)


def test_layers_are_found_by_name() -> None:
    """FSDP and device maps look for the names in `_no_split_modules`."""
    lean, _ = build_models()
    assert type(lean.vitcls.layers[0]).__name__ in lean._no_split_modules

"""Lean layers have the outputs, gradients and hooks of plain layers, whatever changes later."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import compare
from helpers.compare import (
    NUM_MODELS,
    Tensors,
    assert_equal_in_float32,
    reorder_weights,
    run_step,
    stack_models,
)
from helpers.tiny_models import IMAGES, randomize, record_outputs
from peft import LoraConfig, get_peft_model
from pytest import MonkeyPatch
from torch import nn
from torch.testing import assert_close

from modeling_vitcls.conversion.weight_rules import Fields
from modeling_vitcls.model.blocks_vitcls import (
    ViTCLSAttention,
    ViTCLSLayer,
    ViTCLSLayers,
    ViTCLSMLP,
)
from modeling_vitcls.speed.lean_layers import find_plan
from scripts.benchmark import build_timm_vit, count_kernels


VARIANTS = {
    "default": {},
    "all_tokens": {"compute_all_tokens": True},
    "no_biases": {"qkv_bias": False, "projection_bias": False, "mlp_bias": False},
    "no_key_bias": {"key_bias": False},
    "scales": {"layer_scale_init_value": 0.1, "num_register_tokens": 2},
    "norms": {"qk_norm": True, "attention_norm": True, "mlp_norm": True, "norm_type": "rmsnorm"},
    "rotary": {"position_embedding_type": "rope_2d", "hidden_act": "gelu_pytorch_tanh"},
    "swiglu": {"mlp_type": "swiglu", "drop_path_rate": 0.5},
    "masks": {"cls_scopes": [[2, 2, 0, 1]], "num_register_tokens": 1},
    "bias": {"relative_position_bias": "layer"},
    "differential": {"attention_type": "differential"},
    "parallel": {"layer_type": "parallel"},
    "hidden_dropout": {"hidden_dropout_prob": 0.1},
    "dropout": {"attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.0},
}


@pytest.fixture(params=["lean", "packed", "reordered"], autouse=True)
def mode(request: pytest.FixtureRequest, monkeypatch: MonkeyPatch) -> str:
    """Run each test with lean layers, with packed weights, and in the order of oneDNN."""
    if request.param == "reordered":
        reorder_weights(monkeypatch, torch.float32)
    return request.param


only_packed = pytest.mark.parametrize("mode", ["packed"], indirect=True)


@pytest.fixture
def build_models(mode: str) -> Callable[..., tuple[Any, Any]]:
    """Return a function that builds two classifiers with equal weights, a lean and a plain one."""
    return partial(compare.build_models, packed=mode != "lean")


def is_lean(model: Any) -> bool:
    """Check that the layers of a model are computed as lean layers."""
    return find_plan(model.vitcls.layers, {}) is not None


@torch.no_grad()
def infer(*models: Any) -> list[Tensors]:
    """Compute the logits of models, which uses packed weights."""
    return [{"logits": model(IMAGES).logits} for model in models]


def has_changed(before: list[Tensors], after: list[Tensors]) -> bool:
    return not torch.allclose(before[0]["logits"], after[0]["logits"], atol=1e-3)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_outputs_and_gradients_equal_those_of_plain_layers(
    build_models: Any, fields: Fields
) -> None:
    results = []
    models = build_models(**fields)
    for model, evaluated in zip(models, infer(*models), strict=True):
        torch.manual_seed(0)  # drop path and dropout
        results.append(run_step(model.train(), IMAGES))
        results[-1]["evaluated"] = evaluated["logits"]
    assert_equal_in_float32(*results)


@pytest.mark.parametrize("name", ["default", "differential", "parallel", "hidden_dropout"])
def test_usual_layers_are_lean(build_models: Any, name: str) -> None:
    model, _ = build_models(**VARIANTS[name])
    assert is_lean(model.train()) == (name == "default")


# Changes ------------------------------------------------------------------------------------------


def replace_module(layer: Any) -> None:
    layer.attention.v_proj = randomize(nn.Linear(16, 16))


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


def prune_mlp(layer: Any) -> None:
    """Keep half of the channels, as views of the weights."""
    mlp = layer.mlp
    mlp.fc1.weight.data, mlp.fc1.bias.data = mlp.fc1.weight.data[:12], mlp.fc1.bias.data[:12]
    mlp.fc2.weight.data = mlp.fc2.weight.data[:, :12]


def replace_memory_twice(layer: Any) -> None:
    """The second tensor may get the address of the first one."""
    for _ in range(2):
        layer.mlp.fc2.weight.data = layer.mlp.fc2.weight.data * 1.5


def use_fast_weights(layer: Any) -> None:
    """As in code of MAML, tensors take the place of parameters."""
    for module in (layer.attention.q_proj, layer.mlp.fc1, layer.layernorm_before):
        for name in ("weight", "bias"):
            setattr(module, name, 2 * module._parameters.pop(name).detach())


@torch.no_grad()
def edit_in_place(layer: Any) -> None:
    layer.attention.k_proj.weight.mul_(-3)
    layer.mlp.fc2.bias.add_(1)


@pytest.mark.parametrize(
    "change",
    [
        edit_in_place,
        lambda layer: layer.attention.double().float().v_proj.weight.data.add_(1),
        lambda layer: setattr(layer.attention.q_proj.bias, "data", layer.attention.q_proj.bias + 1),
        lambda layer: setattr(layer.attention.v_proj, "bias", None),
        lambda layer: setattr(layer, "dropout", nn.GELU()),
        lambda layer: setattr(layer.attention, "scaling", 2.0),
        lambda layer: setattr(layer.layernorm_after, "eps", 1.0),
        lambda layer: setattr(layer.mlp.activation_fn, "act", torch.relu),
        lambda layer: layer.load_state_dict({k: -v for k, v in layer.state_dict().items()}),
        replace_module,
        transpose,
        share_queries_and_keys,
        keep_one_head,
        prune_mlp,
        replace_memory_twice,
        use_fast_weights,
    ],
)
def test_changed_parts_are_used_at_once_and_trained(
    build_models: Any, change: Callable[[Any], Any]
) -> None:
    models = build_models()
    before = infer(*models)
    for model in models:
        change(model.vitcls.layers[0])
    changed = infer(*models)

    assert_equal_in_float32(*(run_step(model, IMAGES) for model in models))
    for model in models:
        # It does not count its edits of the weights
        torch.optim.SGD(model.parameters(), lr=0.1, fused=True).step()
    trained = infer(*models)

    for each in (before, changed, trained):
        assert_equal_in_float32(*each)
    assert has_changed(before, changed)
    assert has_changed(changed, trained)


@torch.inference_mode()
def test_weights_that_are_edited_in_inference_mode_are_used(build_models: Any) -> None:
    """Tensors of inference mode do not count their edits."""
    models = build_models()
    before = infer(*models)
    for model in models:
        model.vitcls.layers[0].mlp.fc1.weight.mul_(2)
    changed = infer(*models)
    assert_equal_in_float32(*changed)
    assert has_changed(before, changed)


def test_dropout_that_is_trained_alone_is_applied(build_models: Any) -> None:
    """Monte Carlo dropout samples the answers of a model in evaluation mode."""
    models = build_models(**VARIANTS["hidden_dropout"])
    before = infer(*models)
    sampled = []
    for model in models:
        model.vitcls.layers[0].dropout.train()
        torch.manual_seed(0)
        sampled += infer(model)
    assert_equal_in_float32(*sampled)
    assert has_changed(before, sampled)


@torch.no_grad()
def test_replicas_of_data_parallel_have_their_own_weights(build_models: Any) -> None:
    model, _ = build_models()
    infer(model)
    replica = model.vitcls.layers._replicate_for_data_parallel()
    replica[0] = randomize(ViTCLSLayer(model.config), seed=1).eval()
    inputs = (torch.randn(2, 5, 16), [(None, None, None)] * 2, {2})
    assert_close(replica(*inputs), ViTCLSLayers.forward(replica, *inputs))


def assign_weights(model: Any) -> Any:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return model


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.double().float(),
        assign_weights,
    ],
)
def test_copied_and_changed_models_stay_lean(
    build_models: Any, mode: str, change: Callable[[Any], Any]
) -> None:
    model, plain = build_models()
    infer(model)
    changed = change(model)
    assert_equal_in_float32(*infer(changed, plain))
    assert bool(changed.vitcls.layers.packed_weights) == (mode != "lean")
    assert_equal_in_float32(run_step(changed, IMAGES), run_step(plain, IMAGES))
    assert is_lean(changed)


# Hooks and replaced functions ---------------------------------------------------------------------


@only_packed
@pytest.mark.parametrize(
    "name",
    [
        "",
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
def test_hooks_and_replaced_forwards_inside_a_layer_are_called(
    build_models: Any, name: str
) -> None:
    model, plain = build_models()
    infer(model)  # as usual
    seen: list[list[Any]] = [[], []]
    handles = [
        each.vitcls.layers[0]
        .get_submodule(name)
        .register_forward_hook(lambda *values, calls=calls: calls.append(values))
        for each, calls in zip((model, plain), seen, strict=True)
    ]
    assert_equal_in_float32(*infer(model, plain))
    steps = [run_step(each.train(), IMAGES) for each in (model, plain)]
    assert_equal_in_float32(*steps)
    assert len(seen[0]) == len(seen[1]) > 1
    handles[0].remove()
    infer(model.eval())
    assert is_lean(model)
    assert len(seen[0]) == len(seen[1])

    calls = record_outputs(model.vitcls.layers[0].get_submodule(name))
    infer(model)
    assert calls


def test_hooks_of_the_backward_pass_are_called(build_models: Any) -> None:
    model, _ = build_models()
    seen: list[Any] = []
    model.vitcls.layers[0].mlp.fc2.register_full_backward_hook(lambda *each: seen.append(each))
    run_step(model, IMAGES)
    assert len(seen) == 1


def test_hooks_of_all_modules_are_called(build_models: Any) -> None:
    counts = []
    for model in build_models():
        infer(model)
        seen: list[Any] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda *values, seen=seen: seen.append(values)
        )
        infer(model)
        handle.remove()
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0


@only_packed
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (ViTCLSLayers, "forward"),
        (ViTCLSLayer, "forward"),
        (ViTCLSAttention, "forward"),
        (ViTCLSAttention, "attend"),
        (ViTCLSAttention, "project_qkv"),
        (ViTCLSMLP, "forward"),
        (nn.Linear, "forward"),
        (nn.LayerNorm, "forward"),
    ],
)
@pytest.mark.parametrize("is_class", [True, False], ids=["class", "instance"])
def test_functions_that_a_person_replaces_are_called(
    build_models: Any,
    owner: type[nn.Module],
    name: str,
    is_class: bool,
    monkeypatch: MonkeyPatch,
) -> None:
    """Libraries for token merging and profiling replace them in the class."""
    model, _ = build_models()
    infer(model)
    seen: list[Any] = []
    original = getattr(owner, name)
    modules = [module for module in model.vitcls.layers.modules() if isinstance(module, owner)]
    assert modules, "otherwise, no call is expected"

    def call(*args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        return original(*args, **kwargs)

    if is_class:
        monkeypatch.setattr(owner, name, call)
    else:
        setattr(modules[0], name, partial(call, modules[0]))
    infer(model)
    assert len(seen) >= (len(modules) if is_class else 1)


@torch.no_grad()
def test_hidden_states_of_all_layers_are_recorded(build_models: Any) -> None:
    model, plain = build_models()
    states, expected = (
        each(IMAGES, output_hidden_states=True).hidden_states for each in (model, plain)
    )
    assert is_lean(model)
    assert len(states) == len(expected) == 3
    assert_close(states, expected)


# Other libraries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["lean", "packed"], indirect=True)
def test_gradients_of_lora_equal_plain_pytorch(build_models: Any) -> None:
    """In one model, the terms of a rank-2 gradient may cancel; hence several models."""
    steps: list[list[Tensors]] = [[], []]
    for seed in range(NUM_MODELS):
        for results, model in zip(steps, build_models(seed), strict=True):
            infer(model)
            adapter = get_peft_model(
                model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj", "fc1"])
            )
            generator = torch.Generator().manual_seed(1)
            for name, weight in adapter.named_parameters():
                if "lora_" in name:
                    nn.init.normal_(weight, std=0.3, generator=generator)
            results.append(run_step(adapter, IMAGES))

    assert all("lora_" in name for name in steps[0][0] if name != "logits")
    assert len(steps[0][0]) > 1
    assert_equal_in_float32(*map(stack_models, steps))


@only_packed
def test_gradients_per_image_with_torch_func_equal_plain_pytorch(build_models: Any) -> None:
    def compute_gradients(model: Any) -> Tensors:
        weights = {name: weight.detach() for name, weight in model.named_parameters()}

        def compute_loss(weights: Tensors, image: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, weights, (image[None],)).logits.square().sum()

        return torch.func.vmap(torch.func.grad(compute_loss), in_dims=(None, 0))(weights, IMAGES)

    assert_equal_in_float32(*map(compute_gradients, build_models()))


@pytest.mark.slow
@only_packed
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_models_equal_plain_pytorch(build_models: Any, backend: str) -> None:
    lean, plain = build_models(num_register_tokens=2)
    compiled = torch.compile(lean, backend=backend, fullgraph=True)
    assert_equal_in_float32(run_step(lean, IMAGES, forward=compiled), run_step(plain, IMAGES))
    assert_equal_in_float32(*infer(compiled, plain))


# Number of operators ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["lean"], indirect=True)
@torch.no_grad()
def test_a_forward_pass_starts_two_kernels_per_layer_more_than_in_timm(build_models: Any) -> None:
    """They join the weights and biases of queries, keys and values.

    The positions of special tokens are parameters of their own, hence one addition more.
    """
    model, _ = build_models(num_hidden_layers=12)
    timm_model = build_timm_vit(model.config).eval()
    ours, theirs = (count_kernels(partial(each, IMAGES)) for each in (model, timm_model))
    assert ours - theirs == 25

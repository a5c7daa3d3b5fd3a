"""Lean layers have the outputs, gradients and hooks of plain layers, whatever changes later."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.utils.other import clean_state_dict_for_safetensors
from helpers.tiny_models import build_images, build_tiny_config, randomize, save_and_load
from peft import LoraConfig, get_peft_model
from torch import nn

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.model.cpu_kernels_vitcls import is_usual_layer, uninstall_cpu_kernels
from scripts.benchmark import build_timm_vit
from scripts.host_time import count_kernels

from .compare import assert_equal_in_float32, run_step, stack_models


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


def build_models(seed: int = 0, **fields: Any) -> tuple[Any, Any]:
    """Build two classifiers with equal weights, with lean and with plain layers."""
    lean, plain = (
        randomize(ViTCLSForImageClassification(build_tiny_config(**fields)), seed) for _ in range(2)
    )
    uninstall_cpu_kernels(plain)
    return lean, plain


def is_lean(model: Any) -> bool:
    """Check that the layers of a model are computed as lean layers."""
    tokens = torch.zeros(2, 17, model.config.hidden_size)
    found = {is_usual_layer(layer, tokens) for layer in model.vitcls.layers}
    assert len(found) == 1
    return found.pop()


def compute_plainly(model: Any) -> torch.Tensor:
    """Compute the logits of a plain model with the same weights."""
    plain = ViTCLSForImageClassification(copy.deepcopy(model.config)).to(model.dtype).eval()
    uninstall_cpu_kernels(plain)
    plain.load_state_dict(copy.deepcopy(model.state_dict()))
    return plain(build_images().to(model.dtype)).logits


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_outputs_and_gradients_equal_those_of_plain_layers(fields: dict[str, Any]) -> None:
    steps: list[list[Any]] = [[], []]
    for seed in range(4):
        models = build_models(seed, **fields)
        assert is_lean(models[0])
        with torch.no_grad():
            logits = [{"logits": model(build_images()).logits} for model in models]
        assert_equal_in_float32(*logits)
        for results, model in zip(steps, models, strict=True):
            torch.manual_seed(seed)  # drop path and dropout
            results.append(run_step(model.train(), build_images()))
    assert_equal_in_float32(*map(stack_models, steps))


@pytest.mark.parametrize("compute_all_tokens", [False, True])
@torch.no_grad()
def test_outputs_of_the_default_model_have_the_bits_of_plain_layers(
    compute_all_tokens: bool,
) -> None:
    lean, plain = build_models(compute_all_tokens=compute_all_tokens)
    assert torch.equal(lean(build_images()).logits, plain(build_images()).logits)


# Changes of the weights ---------------------------------------------------------------------------


def take_step(model: Any) -> None:
    model.zero_grad()
    model(build_images(), labels=torch.tensor([0, 2])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()


def edit_values(model: Any) -> None:
    model.vitcls.layers[0].attention.k_proj.weight.data.mul_(-3)


def edit_array(model: Any) -> None:
    model.vitcls.layers[0].attention.v_proj.weight.detach().numpy()[:] *= -3


def transpose_data(model: Any) -> None:
    weight = model.vitcls.layers[0].attention.q_proj.weight
    weight.data = weight.data.t()


def replace_parameter(model: Any) -> None:
    attention = model.vitcls.layers[0].attention
    attention.v_proj.bias = nn.Parameter(attention.v_proj.bias.detach() + 1)


def load_other_weights(model: Any, assign: bool = False) -> None:
    model.load_state_dict(build_models(seed=5)[0].state_dict(), assign=assign)


def parametrize(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.vitcls.layers[0].attention.q_proj)
    nn.utils.parametrize.remove_parametrizations(model.vitcls.layers[0].attention.q_proj, "weight")


CHANGES: list[Callable[[Any], object]] = [
    take_step,
    edit_values,
    edit_array,
    transpose_data,
    replace_parameter,
    load_other_weights,
    lambda model: load_other_weights(model, assign=True),
    lambda model: nn.utils.vector_to_parameters(
        torch.randn(model.num_parameters()), model.parameters()
    ),
    lambda model: model.double().float(),
    lambda model: model.double(),
    parametrize,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_used_at_once(change: Callable[[Any], object]) -> None:
    model, _ = build_models()
    with torch.no_grad():
        before = model(build_images()).logits
    change(model)
    with torch.no_grad():
        after = model(build_images().to(model.dtype)).logits
        expected = compute_plainly(model)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    if model.dtype == before.dtype and change is not CHANGES[8] and change is not parametrize:
        assert not torch.allclose(after, before)


def test_a_moved_model_stays_lean_and_a_shared_one_stays_where_it_is() -> None:
    model, _ = build_models()
    assert is_lean(model.double().float())
    model.share_memory()
    with torch.no_grad():
        model(build_images())
    assert all(weight.is_shared() for weight in model.parameters())
    assert not is_lean(model)


# Copies and files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copy_model", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
@torch.no_grad()
def test_copies_are_lean_and_have_weights_of_their_own(copy_model: Callable[[Any], Any]) -> None:
    model, _ = build_models()
    copied = copy_model(model)
    before = model(build_images()).logits
    edit_values(copied)
    assert is_lean(copied)
    assert torch.equal(model(build_images()).logits, before)
    torch.testing.assert_close(copied(build_images()).logits, compute_plainly(copied))


def test_files_contain_each_weight_once(tmp_path: Any) -> None:
    model, plain = build_models()
    sizes = []
    for each in (model, plain):
        file = io.BytesIO()
        torch.save(each.state_dict(), file)
        sizes.append(file.tell())
    assert sizes[0] == sizes[1]
    assert len(pickle.dumps(model)) < 1.05 * len(pickle.dumps(plain)) + 5000
    names = model.state_dict().keys()
    assert clean_state_dict_for_safetensors(dict(model.state_dict())).keys() == names
    loaded = save_and_load(model, tmp_path)
    assert is_lean(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(build_images()).logits, model(build_images()).logits)


# Where plain layers compute -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "layernorm_before",
        "drop_path",
        "attention",
        "attention.q_proj",
        "attention.o_proj",
        "attention.norm",
        "mlp",
        "mlp.fc1",
        "mlp.activation_fn",
        "mlp.register_neurons",
        "dropout",
    ],
)
def test_hooks_and_replaced_forwards_inside_a_layer_are_called(name: str) -> None:
    model, plain = build_models()
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


@pytest.mark.parametrize("target", ["q_proj", "o_proj", "fc1", "fc2"])
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


def test_gradients_of_weights_changed_before_the_backward_pass_are_an_error() -> None:
    model, _ = build_models()
    loss = model(build_images(), labels=torch.tensor([0, 2])).loss
    with torch.no_grad():
        model.vitcls.layers[1].attention.o_proj.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@torch.no_grad()
def test_a_forward_pass_starts_three_kernels_more_than_that_of_timm() -> None:
    """The CLS token has a position of its own, and in the last layer a copy and a query."""
    config = build_tiny_config(num_hidden_layers=12)
    counts = [
        count_kernels(lambda model=model: model(build_images()))
        for model in (ViTCLSForImageClassification(config).eval(), build_timm_vit(config).eval())
    ]
    assert counts[0] == counts[1] + 3

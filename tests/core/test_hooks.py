"""Hooks receive all tokens; without hooks, the last layer computes only the tokens that the classifiers read."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from captum.attr import LayerIntegratedGradients
from helpers.tiny_models import TASKS, build_images, build_tiny_config, get_largest_difference, randomize
from torch import nn

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSForMultiTaskClassification
from modeling_vitcls.blocks_vitcls import ViTCLSLayer
from modeling_vitcls.variants_vitcls import ViTCLSParallelLayer, ViTCLSPostNormLayer


pytestmark = pytest.mark.usefixtures("low_thresholds")  # the kernels are also used for these small models

FIELDS: dict[str, Any] = {"num_register_tokens": 3, "num_distillation_tokens": 1}
NUM_TOKENS, NUM_READ = 1 + 1 + 3 + 16, 2

VARIANTS: dict[str, dict[str, Any]] = {
    "layer_scale": {"layer_scale_init_value": 0.5, "drop_path_rate": 0.1},
    "swiglu": {"mlp_type": "swiglu", "mlp_norm": True},
    "norms": {"qk_norm": True, "attention_norm": True},
    "parallel": {"layer_type": "parallel"},
    "post": {"layer_type": "post"},
    "differential": {"attention_type": "differential"},
}
each_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)


def build_model(**fields: Any) -> Any:
    """Return a classifier with random weights."""
    return randomize(ViTCLSForImageClassification(build_tiny_config(**FIELDS, **fields)))


def list_hooked_modules(model: Any) -> list[str]:
    """Return the names of the encoder, its final norm, its last layer and each module in that layer."""
    names = [name for name, _ in model.named_modules() if name.startswith("vitcls.layers.1")]
    return ["vitcls", "vitcls.layernorm", *names]


# Kind of hook -> function that installs a hook which calls `see(tensors)`.
HOOKS: dict[str, Callable[[nn.Module, Callable[[Any], None]], Any]] = {
    "forward": lambda module, see: module.register_forward_hook(lambda _, args, output: see(output)),
    "forward_with_arguments": lambda module, see: module.register_forward_hook(
        lambda _, args, kwargs, output: see(output), with_kwargs=True
    ),
    "forward_pre": lambda module, see: module.register_forward_pre_hook(lambda _, args: see(args)),
    "backward": lambda module, see: module.register_full_backward_hook(lambda _, grad_in, grad_out: see(grad_out)),
    "backward_pre": lambda module, see: module.register_full_backward_pre_hook(lambda _, grad_out: see(grad_out)),
}


@pytest.fixture
def token_counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which each call of a layer adds the number of tokens that it computed."""
    numbers: list[int] = []

    def count(layer_class: type[nn.Module]) -> None:
        forward = layer_class.forward

        def counting_forward(self: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
            output = forward(self, *args, **kwargs)
            numbers.append(output.shape[1])
            return output

        monkeypatch.setattr(layer_class, "forward", counting_forward)

    for layer_class in (ViTCLSLayer, ViTCLSParallelLayer, ViTCLSPostNormLayer):
        count(layer_class)
    return numbers


def list_token_counts(seen: Any) -> Iterator[int]:
    """Yield the number of tokens of each [B, N, ...] tensor, and of each [B, N, heads, head_dim]."""
    if isinstance(seen, torch.Tensor) and seen.ndim in (3, 4) and seen.shape[1] != 3:  # not the images
        yield seen.shape[1]
    elif isinstance(seen, dict):
        yield from list_token_counts(tuple(seen.values()))
    elif isinstance(seen, tuple):
        for each in seen:
            yield from list_token_counts(each)


def run_step(model: Any) -> torch.Tensor:
    """Return the logits, after a backward pass."""
    logits = model(build_images().requires_grad_()).logits
    logits.square().sum().backward()
    return logits.detach()


def check_hook(model: Any, name: str, kind: str, token_counts: list[int]) -> None:
    """Check that a hook on a module receives all tokens, and that the logits stay the same."""
    token_counts.clear()
    logits = run_step(model)
    counts: list[int] = []
    handle = HOOKS[kind](model.get_submodule(name), lambda seen: counts.extend(list_token_counts(seen)))
    assert get_largest_difference(run_step(model), logits) <= 1e-5 * logits.abs().max().item()
    if (name, kind) != ("vitcls", "forward_pre"):  # its input are images
        assert counts and set(counts) == {NUM_TOKENS}
    handle.remove()
    assert torch.equal(run_step(model), logits)
    assert token_counts == [NUM_TOKENS, NUM_READ, NUM_TOKENS, NUM_TOKENS, NUM_TOKENS, NUM_READ]


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", list_hooked_modules(build_model()))
def test_hooks_receive_all_tokens(name: str, kind: str, token_counts: list[int]) -> None:
    if name == "vitcls" and kind.startswith("backward"):
        pytest.skip("PyTorch calls backward hooks only if a module returns a tensor or a tuple of tensors")
    check_hook(build_model(), name, kind, token_counts)


@each_variant
def test_hooks_on_variants_receive_all_tokens(fields: dict[str, Any], token_counts: list[int]) -> None:
    model = build_model(**fields)
    for name in list_hooked_modules(model):
        check_hook(model, name, "forward", token_counts)


@torch.no_grad()
def test_hooks_on_earlier_layers_change_nothing(token_counts: list[int]) -> None:
    """Earlier layers always compute all tokens."""
    model, counts = build_model(), []
    for module in (model.vitcls.layers[0], model.vitcls.embeddings, model.classifier, model):
        module.register_forward_hook(lambda _, args, output: counts.extend(list_token_counts(output)))
    model(build_images())
    assert token_counts == [NUM_TOKENS, NUM_READ]
    assert counts == [NUM_TOKENS, NUM_TOKENS]


@torch.no_grad()
def test_several_tasks(token_counts: list[int]) -> None:
    model = randomize(ViTCLSForMultiTaskClassification(build_tiny_config(num_cls_tokens=2, tasks=TASKS)))
    logits = model(build_images()).logits
    model.vitcls.layernorm.register_forward_hook(lambda _, args, output: None)
    hooked = model(build_images()).logits
    assert token_counts == [18, 2, 18, 18]
    for task, expected in logits.items():
        assert get_largest_difference(hooked[task], expected) <= 1e-5 * expected.abs().max().item()


@torch.no_grad()
@pytest.mark.parametrize("requested", ["output_hidden_states", "output_attentions"])
def test_recorded_outputs_are_requested_once(requested: str, token_counts: list[int]) -> None:
    """transformers' own hooks stay installed; afterwards, the last layer is reduced again."""
    model = build_model()
    model.set_attn_implementation("eager")
    logits = model(build_images()).logits
    recorded = model(build_images(), **{requested: True})[requested.removeprefix("output_")]
    assert {each.shape[-2] for each in recorded} == {NUM_TOKENS}
    assert model.vitcls.layers[-1]._forward_hooks or model.vitcls.layers[-1].attention._forward_hooks
    assert torch.equal(model(build_images()).logits, logits)
    assert token_counts == [NUM_TOKENS, NUM_READ, NUM_TOKENS, NUM_TOKENS, NUM_TOKENS, NUM_READ]


# Explanations --------------------------------------------------------------------------------------------------------


def compute_gradient(model: Any, class_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output [B, N, D] of the last layer's first norm, and the gradient of the summed logit of a class."""
    layer, encoder = model.vitcls.layers[-1], model.vitcls
    with torch.no_grad():
        inputs = model(build_images(), output_hidden_states=True).hidden_states[-2]
        normalized = layer.layernorm_before(inputs)
    normalized.requires_grad_()
    attended, _ = layer.attention(normalized)
    hidden_states = inputs + attended
    hidden_states = encoder.layernorm(hidden_states + layer.mlp(layer.layernorm_after(hidden_states)))
    logits = (model.classifier(hidden_states[:, 0]) + model.distillation_classifier(hidden_states[:, 1])) / 2
    (gradient,) = torch.autograd.grad(logits[:, class_index].sum(), normalized)
    return normalized.detach(), gradient


def test_grad_cam() -> None:
    """Compare with Selvaraju et al. (2017, arXiv 1610.02391), with the patches as the feature map."""
    model = build_model()
    target = model.vitcls.layers[-1].layernorm_before
    seen: dict[str, torch.Tensor] = {}
    target.register_forward_hook(lambda _, args, output: seen.update(activations=output.detach()))
    target.register_full_backward_hook(lambda _, grad_in, grad_out: seen.update(gradients=grad_out[0]))
    model(build_images()).logits[:, 1].sum().backward()

    patches, grid = model.config.token_layout.patches, model.config.grid_size

    def compute_map(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        feature_map, gradient_map = (
            each[:, patches].transpose(1, 2).unflatten(2, grid) for each in (activations, gradients)
        )  # [B, D, rows, columns]
        weights = gradient_map.mean(dim=(2, 3), keepdim=True)
        return (weights * feature_map).sum(1).relu()  # [B, rows, columns]

    found = compute_map(seen["activations"], seen["gradients"])
    expected = compute_map(*compute_gradient(model, 1))
    assert found.shape == (2, 4, 4) and (found > 0).any()
    assert get_largest_difference(found, expected) <= 1e-5 * expected.max().item()


def test_captum_integrated_gradients() -> None:
    """The attributions of the last layer's tokens sum to the change of the logit (Sundararajan et al. 2017)."""
    model = build_model()
    attribution = LayerIntegratedGradients(lambda pixel_values: model(pixel_values).logits, model.vitcls.layers[-1])
    found, error = attribution.attribute(
        build_images(), torch.zeros(2, 3, 32, 32), target=1, n_steps=200, return_convergence_delta=True
    )
    assert found.shape == (2, NUM_TOKENS, 16)
    with torch.no_grad():
        change = (model(build_images()).logits - model(torch.zeros(2, 3, 32, 32)).logits)[:, 1]
    assert error.abs().max() <= 0.01 * change.abs().max()
    assert get_largest_difference(found.sum(dim=(1, 2)).float(), change) <= 0.01 * change.abs().max().item()
    assert (found[:, NUM_READ:] == 0).all()  # the classifiers read only the CLS and the distillation token

"""What the backward pass computes again instead of keeping it: the same gradients, and less that is kept."""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import BLOCKS, filled, images, tiny_config
from torch import nn

from modeling_vitcls import ViTCLSForImageClassification, cpu_kernels_vitcls
from modeling_vitcls.benchmarking.memory import peak_in_a_process
from modeling_vitcls.cpu_kernels_vitcls import recomputed


MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "drop_path_rate": 0.3},
    "gated MLP": {"mlp_type": "swiglu", "mlp_norm": True},
    "register neurons": {"num_register_tokens": 1, "register_neurons": [[0, 3], [1, 5]]},
    "learned bias": {"relative_position_bias": "layer"},
    "scopes": BLOCKS["scopes"],
    "differential": {"attention_type": "differential"},
}


class Watched:
    """Two operations, of which the second keeps the result of the first."""

    def __init__(self) -> None:
        self.between: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        between = inputs.exp() * 2
        self.between.append(weakref.ref(between))
        return between.sin()


def test_what_is_between_is_not_kept() -> None:
    inputs, plain, cheap = torch.randn(5, requires_grad=True), Watched(), Watched()
    wanted, found = plain(inputs), recomputed(nn.Identity(), cheap, inputs)
    assert plain.between[0]() is not None
    assert cheap.between[0]() is None
    assert torch.equal(*(torch.autograd.grad(outputs.sum(), inputs)[0] for outputs in (wanted, found)))
    assert len(plain.between) == 1 and len(cheap.between) == 2


@pytest.mark.parametrize("why", ["no gradients", "nothing to train", "another device", "torch.func", "compiled"])
def test_where_nothing_is_computed_again(why: str) -> None:
    watched = Watched()
    inputs = torch.randn(5, requires_grad=why != "nothing to train", device="meta" if "device" in why else "cpu")
    if why == "torch.func":
        torch.func.grad(lambda each: recomputed(nn.Identity(), watched, each).sum())(inputs.detach())
    elif why == "compiled":
        torch.compile(lambda each: recomputed(nn.Identity(), watched, each), backend="eager", fullgraph=True)(
            inputs
        ).sum().backward()
    else:
        with torch.set_grad_enabled(why != "no gradients"):
            outputs = recomputed(nn.Identity(), watched, inputs)
        if outputs.requires_grad:
            outputs.sum().backward()
    assert len(watched.between) == 1


@pytest.fixture(params=[False, True], ids=["plain", "autocast"])
def autocast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attention in steps on every processor, where autocast is on."""
    monkeypatch.setattr(cpu_kernels_vitcls, "HAS_BFLOAT16_PRODUCTS", True)
    monkeypatch.setattr(cpu_kernels_vitcls, "MIN_CHUNKED_SCORES", 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=request.param):
        yield


@pytest.mark.usefixtures("autocast")
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_gradients_are_the_same_to_the_bit(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled(ViTCLSForImageClassification(tiny_config(**fields))).train()

    def gradients() -> list[torch.Tensor | None]:
        torch.manual_seed(0)
        model.zero_grad()
        model(images(), labels=torch.tensor([0, 2])).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    found = gradients()
    monkeypatch.setattr(cpu_kernels_vitcls, "can_recompute", lambda inputs: False)
    for one, other in zip(found, gradients(), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("mlp_type", ["mlp", "swiglu"])
def test_a_model_keeps_no_activations(mlp_type: str) -> None:
    """Nor several copies of what projections read."""
    model = filled(ViTCLSForImageClassification(tiny_config(mlp_type=mlp_type))).train()
    activations, projected = [], []
    for layer in model.vitcls.layers:
        layer.mlp.activation_fn = Noting(layer.mlp.activation_fn, activations)
        for projection in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj):
            projection.register_forward_hook(
                lambda module, inputs, outputs: projected.append((inputs[0].dtype, inputs[0].data_ptr()))
            )
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(), labels=torch.tensor([0, 2])).loss
    assert len(activations) == model.config.num_hidden_layers
    assert all(each() is None for each in activations)
    assert len(projected) == 3 * model.config.num_hidden_layers
    assert {dtype for dtype, _ in projected} == {torch.bfloat16}
    assert all(len(set(projected[index : index + 3])) == 1 for index in range(0, len(projected), 3))
    loss.backward()
    assert len(activations) == 2 * model.config.num_hidden_layers


class Noting(nn.Module):
    """An activation whose results are noted, weakly."""

    def __init__(self, activation: nn.Module, seen: list[weakref.ref[torch.Tensor]]) -> None:
        super().__init__()
        self.activation, self.seen = activation, seen

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = self.activation(inputs)
        self.seen.append(weakref.ref(outputs))
        return outputs


@pytest.mark.parametrize("part", ["activation_fn", "fc2"])
def test_hooks_see_everything_once(part: str) -> None:
    model = filled(ViTCLSForImageClassification(tiny_config())).train()
    seen: list[int] = []
    model.vitcls.layers[0].mlp.get_submodule(part).register_forward_pre_hook(lambda *_: seen.append(1))
    model(images(), labels=torch.tensor([0, 2])).loss.backward()
    assert len(seen) == 1
    with torch.inference_mode():
        model(images())
    assert len(seen) == 2


def test_shapes_without_numbers() -> None:
    """Models run on the meta device."""
    with torch.device("meta"):
        model = ViTCLSForImageClassification(tiny_config(mlp_type="swiglu"))
    assert model(torch.empty(2, 3, 32, 32, device="meta")).logits.shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("row", ["bf16 autocast, batch 16", "fp32, batch 16"])
def test_a_step_takes_less_memory_than_with_others(row: str) -> None:
    module = "modeling_vitcls.benchmarking.training_steps"
    ours = peak_in_a_process(module, row, "timm")
    theirs = min(peak_in_a_process(module, row, peer, "--theirs") for peer in ("timm", "transformers"))
    assert ours <= 0.95 * theirs

"""Linear layers answer the same whichever library computes them, and step aside where they should."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

from modeling_vitcls import ViTCLSConfig, cpu_kernels_vitcls
from modeling_vitcls.blocks_vitcls import ViTCLSMLP
from modeling_vitcls.cpu_kernels_vitcls import Linear, PatchProjection, activated


needs_onednn = pytest.mark.skipif(not cpu_kernels_vitcls.HAS_ONEDNN, reason="this processor or PyTorch has no oneDNN")
ONEDNN = "mkldnn::_linear_pointwise"


@pytest.fixture(autouse=True)
def float32_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on processors, and for sizes, where it is right but not the fastest."""
    if cpu_kernels_vitcls.HAS_ONEDNN:
        monkeypatch.setitem(cpu_kernels_vitcls.MIN_WORK, (torch.float32, False), 0)
        monkeypatch.setitem(cpu_kernels_vitcls.MIN_WORK, (torch.float32, True), 0)


@pytest.fixture
def linear() -> Iterator[Linear]:
    """A layer with random weights, and inference around it."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield Linear(48, 80)


def computed_by(call: object, *inputs: object) -> tuple[torch.Tensor, set[str]]:
    """The result, and the operators that were called for it."""
    with profile() as profiled:
        result = call(*inputs)  # type: ignore[operator]
    return result, {event.key for event in profiled.key_averages()}


@needs_onednn
@pytest.mark.parametrize("shape", [(2, 7, 48), (3, 48), (48,), (0, 5, 48)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_float32_inference_is_onednns_and_the_same(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, inputs = Linear(48, 80, bias=bias), torch.randn(shape)
    with torch.no_grad():
        found, operators = computed_by(layer, inputs)
    assert ONEDNN in operators
    torch.testing.assert_close(found, nn.functional.linear(inputs, layer.weight, layer.bias), atol=1e-6, rtol=1e-6)


def test_a_weight_and_a_bias_that_are_computed_from_others(linear: Linear) -> None:
    """They are no longer the layer's own."""

    class Doubled(nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return 2 * values

    inputs = torch.randn(2, 7, 48)
    before = linear(inputs)
    for name in ("weight", "bias"):
        nn.utils.parametrize.register_parametrization(linear, name, Doubled())
        nn.utils.parametrize.remove_parametrizations(linear, name) if name == "weight" else None
    torch.testing.assert_close(linear(inputs), 2 * before)


@needs_onednn
def test_a_view_that_is_not_contiguous(linear: Linear) -> None:
    inputs = torch.randn(4, 48, 9).transpose(1, 2)[:, ::2]  # [4, 5, 48]
    found, operators = computed_by(linear, inputs)
    assert ONEDNN in operators
    torch.testing.assert_close(found, nn.functional.linear(inputs, linear.weight, linear.bias), atol=1e-6, rtol=1e-6)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_is_computed_with_the_product(linear: Linear, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not cpu_kernels_vitcls.HAS_BFLOAT16:
        pytest.skip("this processor has no bfloat16")
    layer, inputs = linear.to(dtype), torch.randn(2, 7, 48, dtype=dtype)
    found, operators = computed_by(activated, layer, ACT2FN["gelu"], inputs)
    assert ONEDNN in operators and "aten::gelu" not in operators
    exact = nn.functional.gelu(nn.functional.linear(inputs.double(), layer.weight.double(), layer.bias.double()))
    limit = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), exact, atol=limit, rtol=limit)


def test_without_onednn_gelu_is_computed_in_place(linear: Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels_vitcls, "MIN_WORK", {})
    inputs = torch.randn(2, 7, 48)
    found, operators = computed_by(activated, linear, ACT2FN["gelu"], inputs)
    assert "aten::gelu_" in operators and "aten::gelu" not in operators
    assert torch.equal(found, nn.functional.gelu(nn.functional.linear(inputs, linear.weight, linear.bias)))
    seen = []
    linear.register_forward_hook(lambda module, args, output: seen.append(output))  # it may keep what it sees
    assert torch.equal(activated(linear, ACT2FN["gelu"], inputs), found)
    assert torch.equal(seen[0], nn.functional.linear(inputs, linear.weight, linear.bias))


@pytest.mark.parametrize("name", ["gelu_pytorch_tanh", "quick_gelu", "relu", "silu"])
def test_other_activations_stay_what_they_are(linear: Linear, name: str) -> None:
    inputs = torch.randn(2, 7, 48)
    wanted = ACT2FN[name](nn.functional.linear(inputs, linear.weight, linear.bias))
    torch.testing.assert_close(activated(linear, ACT2FN[name], inputs), wanted, atol=1e-6, rtol=1e-6)


def test_it_steps_aside(linear: Linear) -> None:
    """For hooks, other dtypes, autocast, a replaced forward, and those who record, count or transform operators."""
    inputs = torch.randn(2, 7, 48)

    def is_plain(layer: nn.Module, given: torch.Tensor = inputs) -> bool:
        _, operators = computed_by(activated, layer, ACT2FN["gelu"], given)
        return ONEDNN not in operators

    def is_alone(layer: nn.Module) -> bool:
        """Whether the activation is not part of it."""
        _, operators = computed_by(activated, layer, ACT2FN["gelu"], inputs)
        return "aten::gelu" in operators

    with torch.enable_grad():
        assert is_alone(linear)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_plain(linear)
    assert is_plain(linear.double(), inputs.double())
    linear.float()
    seen = []
    hook = linear.register_forward_hook(lambda module, args, output: seen.append(output))
    assert is_alone(linear)
    torch.testing.assert_close(seen[0], nn.functional.linear(inputs, linear.weight, linear.bias))
    hook.remove()
    linear.forward = linear.forward  # type: ignore[method-assign]  # as Accelerate does to load weights when needed
    assert is_alone(linear)
    del linear.forward
    with FlopCounterMode(display=False) as counter:
        linear(inputs)
    assert counter.get_total_flops() == 2 * 2 * 7 * 48 * 80  # it does not know oneDNN's operator
    traced = torch.jit.trace(linear, inputs)
    assert "mkldnn" not in str(traced.inlined_graph)


@needs_onednn
def test_small_products_are_not_onednns(linear: Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes as long to start as they take."""
    monkeypatch.setattr(cpu_kernels_vitcls, "MIN_WORK", {(torch.float32, False): 10 * 48 * 80})
    assert ONEDNN not in computed_by(linear, torch.randn(9, 48))[1]
    assert ONEDNN in computed_by(linear, torch.randn(2, 5, 48))[1]


# With gradients ------------------------------------------------------------------------------------------------------


def gradients_of(call: Any, inputs: torch.Tensor, module: nn.Module) -> list[torch.Tensor]:
    """The first and second derivatives by inputs and parameters, of something that depends on all of them."""
    inputs = inputs.detach().requires_grad_()
    wanted = [inputs, *module.parameters()]
    first = torch.autograd.grad(call(inputs).square().sum(), wanted, create_graph=True)
    return [*first, *torch.autograd.grad(sum(each.square().sum() for each in first), wanted)]


@needs_onednn
@pytest.mark.parametrize("shape", [(2, 7, 48), (3, 48), (48,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out", [80, 16])
def test_gradients_are_onednns_and_the_same(shape: tuple[int, ...], bias: bool, out: int) -> None:
    torch.manual_seed(0)
    layer, inputs = Linear(48, out, bias=bias), torch.randn(shape)
    found, operators = computed_by(gradients_of, layer, inputs, layer)
    assert ONEDNN in operators and not operators & {"aten::linear", "aten::addmm", "aten::mm"}
    layer, inputs = layer.double(), inputs.double()
    for one, exact in zip(found, gradients_of(layer, inputs, layer), strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


@needs_onednn
def test_what_is_not_needed_is_not_computed() -> None:
    layer = Linear(48, 80).requires_grad_(False)
    assert layer(torch.randn(3, 48)).grad_fn is None
    layer.bias.requires_grad_()
    result, inputs = layer(torch.randn(3, 48)), torch.randn(3, 48, requires_grad=True)
    assert ONEDNN not in computed_by(result.sum().backward)[1]
    assert torch.equal(layer.bias.grad, torch.full((80,), 3.0)) and layer.weight.grad is None
    layer(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, layer.weight.sum(0).expand(3, 48))


@needs_onednn
@pytest.mark.parametrize("shape", [(2, 7, 48), (3, 48)], ids=str)
def test_gradients_of_images_one_by_one(shape: tuple[int, ...]) -> None:
    """torch.func, which oneDNN's operators do not know, and forward-mode differentiation."""
    torch.manual_seed(0)
    layer, inputs = Linear(48, 80), torch.randn(shape)
    weights = dict(layer.named_parameters())

    def loss(weights: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, weights, image).sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, inputs)["weight"]
    exact = inputs.flatten(1, -2).sum(1) if inputs.ndim == 3 else inputs
    torch.testing.assert_close(found, exact[:, None].expand(-1, 80, -1))
    with forward_ad.dual_level():
        dual = layer(forward_ad.make_dual(inputs, torch.ones_like(inputs)))
        tangents = [forward_ad.unpack_dual(dual).tangent]
    with torch.no_grad():
        tangents.append(torch.func.jvp(layer, (inputs,), (torch.ones_like(inputs),))[1])
    for tangent in tangents:
        torch.testing.assert_close(tangent, layer.weight.sum(1).expand_as(tangent))


@needs_onednn
def test_several_gradients_at_once() -> None:
    """As torch.autograd.functional.jacobian(vectorize=True) asks for them."""
    layer, inputs = mlp(), torch.randn(3, 48, requires_grad=True)
    wanted = torch.randn(5, 3, 48)
    (found,) = torch.autograd.grad(layer(inputs), [inputs], wanted, is_grads_batched=True)
    for one, by_itself in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(layer(inputs), [inputs], by_itself)[0])


def mlp(**changes: object) -> ViTCLSMLP:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 80}
    return ViTCLSMLP(ViTCLSConfig(**sizes, **changes), layer_index=0)


@needs_onednn
def test_an_mlp_learns_by_onednn_and_keeps_what_goes_into_gelu() -> None:
    layer, inputs = mlp(), torch.randn(2, 7, 48)
    found, operators = computed_by(gradients_of, layer, inputs, layer)
    assert not operators & {"aten::linear", "aten::addmm", "aten::mm"}
    kept: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(inputs)
    own = [inputs, *layer.parameters()]
    activations = [tensor for tensor in kept if not any(tensor.data_ptr() == one.data_ptr() for one in own)]
    assert [tuple(tensor.shape) for tensor in activations] == [(2, 7, 80)]
    layer, inputs = layer.double(), inputs.double()
    for one, exact in zip(found, gradients_of(layer, inputs, layer), strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


@needs_onednn
@pytest.mark.parametrize("name", ["norm", "move_neurons", "fc2", "activation_fn"])
def test_whoever_listens_inside_an_mlp_hears_it(name: str) -> None:
    layer, inputs, heard = mlp(), torch.randn(2, 7, 48), []
    wanted = layer(inputs)
    getattr(layer, name).register_forward_hook(lambda module, args, output: heard.append(output))
    torch.testing.assert_close(layer(inputs), wanted, rtol=1e-5, atol=1e-6)
    assert len(heard) == 1


@needs_onednn
def test_an_mlp_with_a_norm_learns_the_same() -> None:
    layer, inputs = mlp(mlp_norm=True), torch.randn(2, 7, 48)
    found = gradients_of(layer, inputs, layer)
    layer, inputs = layer.double(), inputs.double()
    for one, exact in zip(found, gradients_of(layer, inputs, layer), strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


# Patches -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not cpu_kernels_vitcls.HAS_BFLOAT16, reason="this processor multiplies no bfloat16")
@pytest.mark.parametrize("bias", [True, False])
def test_patches_are_projected_by_one_product(bias: bool) -> None:
    """Patches need not be square, nor the image a whole number of them."""
    torch.manual_seed(0)
    layer, images = PatchProjection(3, 24, kernel_size=(4, 6), stride=(4, 6), bias=bias), torch.randn(2, 3, 18, 29)
    with torch.no_grad():
        exact = layer(images)
        assert torch.equal(exact, nn.Conv2d.forward(layer, images))
        found, operators = computed_by(layer.bfloat16(), images.bfloat16())
    assert ONEDNN in operators and "aten::conv2d" not in operators
    assert found.shape == (2, 24, 4, 4)
    torch.testing.assert_close(found.float(), exact, atol=2e-2, rtol=2e-2)
    _, operators = computed_by(layer, images.bfloat16())  # it learns
    assert "aten::conv2d" in operators


def test_changed_weights_count_at_once(linear: Linear) -> None:
    """Nothing is packed beforehand."""
    inputs = torch.randn(2, 7, 48)
    linear(inputs)
    linear.weight.zero_()
    assert torch.equal(linear(inputs), linear.bias.expand(2, 7, 80))

"""CPU kernels have the outputs and gradients of plain PyTorch, and are replaced by plain PyTorch where unsupported.

linear layers, MLPs and the patch projection with oneDNN
- half precision in float32, on CPUs without its instructions
- activation recomputation
- chunked attention
"""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.tiny_models import BLOCKS, build_images, build_tiny_config, get_largest_difference, randomize
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

from modeling_vitcls import ViTCLSConfig, ViTCLSForImageClassification, ViTCLSModel, cpu_kernels_vitcls
from modeling_vitcls.blocks_vitcls import ViTCLSMLP
from modeling_vitcls.cpu_kernels_vitcls import (
    CPUMLP,
    MAX_CHUNKED_KEYS,
    CPULinear,
    CPUPatchProjection,
    chunked_attention,
    install_cpu_kernels,
    is_emulated,
    linear_gelu,
    recompute_in_backward,
    sdpa_attention,
    sdpa_attention_forward,
    should_use_chunked_attention,
)
from modeling_vitcls.variants_vitcls import RegisterNeurons


ONEDNN = "mkldnn::_linear_pointwise"
HAS_ONEDNN_BFLOAT16 = (torch.bfloat16, False) in cpu_kernels_vitcls.MIN_MULTIPLICATIONS


@pytest.fixture
def float32_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use oneDNN for all processors and sizes on which it is correct, even if it is not the fastest."""
    if cpu_kernels_vitcls.HAS_ONEDNN:
        monkeypatch.setitem(cpu_kernels_vitcls.MIN_MULTIPLICATIONS, (torch.float32, False), 0)
        monkeypatch.setitem(cpu_kernels_vitcls.MIN_MULTIPLICATIONS, (torch.float32, True), 0)


def requires_onednn(test: Any) -> Any:
    """Mark a test of oneDNN's operators in float32."""
    test = pytest.mark.skipif(not cpu_kernels_vitcls.HAS_ONEDNN, reason="this processor or PyTorch has no oneDNN")(
        test
    )
    return pytest.mark.usefixtures("float32_by_onednn")(test)


@pytest.fixture
def linear(float32_by_onednn: None) -> Iterator[CPULinear]:
    """Return a layer with random weights, with gradients disabled."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield CPULinear(48, 80)


def profile_operators(call: object, *inputs: object) -> tuple[torch.Tensor, set[str]]:
    """Return the result of a call, and the names of the operators that computed it."""
    with profile() as profiled:
        result = call(*inputs)  # type: ignore[operator]
    return result, {event.key for event in profiled.key_averages()}


@requires_onednn
@pytest.mark.parametrize("shape", [(2, 7, 48), (3, 48), (48,), (0, 5, 48)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_float32_inference_uses_onednn_and_agrees(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, inputs = CPULinear(48, 80, bias=bias), torch.randn(shape)
    with torch.no_grad():
        found, operators = profile_operators(layer, inputs)
    assert ONEDNN in operators
    torch.testing.assert_close(found, nn.functional.linear(inputs, layer.weight, layer.bias), atol=1e-6, rtol=1e-6)


def test_parametrized_weights_are_used(linear: CPULinear) -> None:
    """A parametrized weight is not in `_parameters`."""

    class Doubled(nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return 2 * values

    inputs = torch.randn(2, 7, 48)
    before = linear(inputs)
    for name in ("weight", "bias"):
        nn.utils.parametrize.register_parametrization(linear, name, Doubled())
        nn.utils.parametrize.remove_parametrizations(linear, name) if name == "weight" else None
    torch.testing.assert_close(linear(inputs), 2 * before)


@requires_onednn
def test_non_contiguous_inputs(linear: CPULinear) -> None:
    inputs = torch.randn(4, 48, 9).transpose(1, 2)[:, ::2]  # [4, 5, 48]
    found, operators = profile_operators(linear, inputs)
    assert ONEDNN in operators
    torch.testing.assert_close(found, nn.functional.linear(inputs, linear.weight, linear.bias), atol=1e-6, rtol=1e-6)


@requires_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_is_fused_in_inference(linear: CPULinear, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not HAS_ONEDNN_BFLOAT16:
        pytest.skip("this processor has no bfloat16")
    layer, inputs = linear.to(dtype), torch.randn(2, 7, 48, dtype=dtype)
    found, operators = profile_operators(linear_gelu, layer, ACT2FN["gelu"], inputs)
    assert ONEDNN in operators and "aten::gelu" not in operators
    exact = nn.functional.gelu(nn.functional.linear(inputs.double(), layer.weight.double(), layer.bias.double()))
    limit = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), exact, atol=limit, rtol=limit)


def test_gelu_is_in_place_without_onednn(linear: CPULinear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels_vitcls, "MIN_MULTIPLICATIONS", {})
    inputs = torch.randn(2, 7, 48)
    found, operators = profile_operators(linear_gelu, linear, ACT2FN["gelu"], inputs)
    assert "aten::gelu_" in operators and "aten::gelu" not in operators
    assert torch.equal(found, nn.functional.gelu(nn.functional.linear(inputs, linear.weight, linear.bias)))
    seen = []
    linear.register_forward_hook(lambda module, args, output: seen.append(output))  # a hook may keep the output
    assert torch.equal(linear_gelu(linear, ACT2FN["gelu"], inputs), found)
    assert torch.equal(seen[0], nn.functional.linear(inputs, linear.weight, linear.bias))


@torch.no_grad()
def test_traced_graphs_have_a_plain_gelu(linear: CPULinear) -> None:
    linear.requires_grad_(False)
    inputs = torch.randn(2, 7, 48)
    traced = torch.jit.trace(lambda values: linear_gelu(linear, ACT2FN["gelu"], values), inputs)
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert "aten::gelu" in kinds and "aten::gelu_" not in kinds
    expected = nn.functional.gelu(nn.functional.linear(inputs, linear.weight, linear.bias))
    torch.testing.assert_close(traced(inputs), expected)


@pytest.mark.parametrize("name", ["gelu_pytorch_tanh", "quick_gelu", "relu", "silu"])
def test_other_activations_are_not_replaced(linear: CPULinear, name: str) -> None:
    inputs = torch.randn(2, 7, 48)
    wanted = ACT2FN[name](nn.functional.linear(inputs, linear.weight, linear.bias))
    torch.testing.assert_close(linear_gelu(linear, ACT2FN[name], inputs), wanted, atol=1e-6, rtol=1e-6)


class Doubled(CPULinear):
    """A subclass with its own forward pass."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(inputs)


def test_plain_pytorch_where_onednn_does_not_apply(linear: CPULinear) -> None:
    """Check hooks, other dtypes, autocast, a replaced forward, and modes that record, count or transform operators."""
    inputs = torch.randn(2, 7, 48)

    def is_plain(layer: nn.Module, given: torch.Tensor = inputs) -> bool:
        _, operators = profile_operators(linear_gelu, layer, ACT2FN["gelu"], given)
        return ONEDNN not in operators

    def is_separate(layer: nn.Module) -> bool:
        """Return whether the activation is a separate operator."""
        _, operators = profile_operators(linear_gelu, layer, ACT2FN["gelu"], inputs)
        return "aten::gelu" in operators

    with torch.enable_grad():
        assert is_separate(linear)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_plain(linear)
    assert is_plain(linear.double(), inputs.double())
    assert is_plain(CPULinear(48, 80, device="meta"), inputs.to("meta"))
    linear.float()
    with torch.backends.mkldnn.flags(enabled=False):
        assert is_plain(linear) and is_separate(linear)
    seen = []
    hook = linear.register_forward_hook(lambda module, args, output: seen.append(output))
    assert is_separate(linear)
    torch.testing.assert_close(seen[0], nn.functional.linear(inputs, linear.weight, linear.bias))
    hook.remove()
    linear.forward = linear.forward  # type: ignore[method-assign]  # as Accelerate does to load weights on demand
    assert is_separate(linear)
    del linear.forward
    doubled = Doubled(48, 80)
    doubled.load_state_dict(linear.state_dict())
    torch.testing.assert_close(linear_gelu(doubled, ACT2FN["gelu"], inputs), nn.functional.gelu(2 * linear(inputs)))
    with FlopCounterMode(display=False) as counter:
        linear(inputs)
    assert counter.get_total_flops() == 2 * 2 * 7 * 48 * 80  # oneDNN's operator does not support this activation
    traced = torch.jit.trace(linear, inputs)
    assert "mkldnn" not in str(traced.inlined_graph)


@requires_onednn
def test_small_products_do_not_use_onednn(linear: CPULinear, monkeypatch: pytest.MonkeyPatch) -> None:
    """The overhead of oneDNN takes as long as a small product."""
    monkeypatch.setattr(cpu_kernels_vitcls, "MIN_MULTIPLICATIONS", {(torch.float32, False): 10 * 48 * 80})
    assert ONEDNN not in profile_operators(linear, torch.randn(9, 48))[1]
    assert ONEDNN in profile_operators(linear, torch.randn(2, 5, 48))[1]


# With gradients ------------------------------------------------------------------------------------------------------


def compute_gradients(call: Any, inputs: torch.Tensor, module: nn.Module) -> list[torch.Tensor]:
    """Return first and second derivatives of the output with respect to inputs and parameters."""
    inputs = inputs.detach().requires_grad_()
    wanted = [inputs, *module.parameters()]
    first = torch.autograd.grad(call(inputs).square().sum(), wanted, create_graph=True)
    return [*first, *torch.autograd.grad(sum(each.square().sum() for each in first), wanted)]


@requires_onednn
@pytest.mark.parametrize("shape", [(2, 7, 48), (3, 48), (48,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out", [80, 16])
def test_gradients_use_onednn_and_agree(shape: tuple[int, ...], bias: bool, out: int) -> None:
    torch.manual_seed(0)
    layer, inputs = CPULinear(48, out, bias=bias), torch.randn(shape)
    found, operators = profile_operators(compute_gradients, layer, inputs, layer)
    assert ONEDNN in operators and not operators & {"aten::linear", "aten::addmm", "aten::mm"}
    layer, inputs = layer.double(), inputs.double()
    for one, exact in zip(found, compute_gradients(layer, inputs, layer), strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


@requires_onednn
def test_only_the_gradients_that_are_needed_are_computed() -> None:
    layer = CPULinear(48, 80).requires_grad_(False)
    assert layer(torch.randn(3, 48)).grad_fn is None
    layer.bias.requires_grad_()
    result, inputs = layer(torch.randn(3, 48)), torch.randn(3, 48, requires_grad=True)
    assert ONEDNN not in profile_operators(result.sum().backward)[1]
    assert torch.equal(layer.bias.grad, torch.full((80,), 3.0)) and layer.weight.grad is None
    layer(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, layer.weight.sum(0).expand(3, 48))


@requires_onednn
@pytest.mark.parametrize("shape", [(2, 7, 48), (3, 48)], ids=str)
def test_torch_func_and_forward_mode(shape: tuple[int, ...]) -> None:
    """oneDNN's operators support neither of them."""
    torch.manual_seed(0)
    layer, inputs = CPULinear(48, 80), torch.randn(shape)
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


@requires_onednn
def test_batched_gradients() -> None:
    """Compute them as torch.autograd.functional.jacobian(vectorize=True) does."""
    layer, inputs = build_mlp(), torch.randn(3, 48, requires_grad=True)
    wanted = torch.randn(5, 3, 48)
    (found,) = torch.autograd.grad(layer(inputs), [inputs], wanted, is_grads_batched=True)
    for one, by_itself in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(layer(inputs), [inputs], by_itself)[0])


def build_mlp(**fields: Any) -> ViTCLSMLP:
    """Return an MLP with the kernels installed: with `register_neurons`, the MLP of the first layer."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 80}
    config = ViTCLSConfig(**sizes, **fields)
    mlp = ViTCLSMLP(config)
    if config.register_neurons:
        mlp.register_neurons = RegisterNeurons(config, [neuron for _, neuron in config.register_neurons])
    install_cpu_kernels(mlp)
    assert type(mlp) is CPUMLP and type(mlp.fc1) is CPULinear
    return mlp


@requires_onednn
def test_an_mlp_trains_with_onednn_and_keeps_the_inputs_of_gelu() -> None:
    layer, inputs = build_mlp(), torch.randn(2, 7, 48)
    found, operators = profile_operators(compute_gradients, layer, inputs, layer)
    assert not operators & {"aten::linear", "aten::addmm", "aten::mm"}
    kept: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(inputs)
    own = [inputs, *layer.parameters()]
    activations = [tensor for tensor in kept if not any(tensor.data_ptr() == one.data_ptr() for one in own)]
    assert [tuple(tensor.shape) for tensor in activations] == [(2, 7, 80)]
    layer, inputs = layer.double(), inputs.double()
    for one, exact in zip(found, compute_gradients(layer, inputs, layer), strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


@requires_onednn
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("norm", {"mlp_norm": True}),
        ("register_neurons", {"num_register_tokens": 1, "register_neurons": [[0, 3]]}),
        ("fc2", {}),
        ("activation_fn", {}),
    ],
)
def test_hooks_inside_an_mlp_are_called_once(name: str, fields: dict[str, Any]) -> None:
    layer, inputs, seen = build_mlp(**fields), torch.randn(2, 7, 48), []
    wanted = layer(inputs)
    getattr(layer, name).register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(layer(inputs), wanted, rtol=1e-5, atol=1e-6)
    assert len(seen) == 1


@requires_onednn
def test_gradients_of_the_last_layer_of_a_frozen_mlp() -> None:
    layer, inputs = build_mlp(), torch.randn(2, 7, 48)
    layer.fc1.requires_grad_(False)
    layer(inputs).square().sum().backward()
    found = [layer.fc2.weight.grad, layer.fc2.bias.grad]
    layer.zero_grad()
    layer.double()(inputs.double()).square().sum().backward()
    for one, exact in zip(found, (layer.fc2.weight.grad, layer.fc2.bias.grad), strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


# Patches -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_ONEDNN_BFLOAT16, reason="this processor has no bfloat16")
@pytest.mark.parametrize("bias", [True, False])
def test_patches_are_projected_by_one_product(bias: bool) -> None:
    """Check patches that are not square, and image sizes that are not multiples of the patch size."""
    torch.manual_seed(0)
    layer, images = CPUPatchProjection(3, 24, kernel_size=(4, 6), stride=(4, 6), bias=bias), torch.randn(2, 3, 18, 29)
    with torch.no_grad():
        exact = layer(images)
        assert torch.equal(exact, nn.Conv2d.forward(layer, images))
        found, operators = profile_operators(layer.bfloat16(), images.bfloat16())
    assert ONEDNN in operators and "aten::conv2d" not in operators
    assert found.shape == (2, 24, 4, 4)
    torch.testing.assert_close(found.float(), exact, atol=2e-2, rtol=2e-2)
    _, operators = profile_operators(layer, images.bfloat16())  # with gradients
    assert "aten::conv2d" in operators


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"stride": 2}, CPUPatchProjection),
        ({"stride": 1}, nn.Conv2d),
        ({"stride": 2, "padding": 1}, nn.Conv2d),
        ({"stride": 2, "dilation": 2}, nn.Conv2d),
        ({"stride": 2, "groups": 3}, nn.Conv2d),
        ({"stride": 1, "padding": "same"}, nn.Conv2d),
    ],
)
@torch.no_grad()
def test_other_convolutions_are_not_replaced(settings: dict[str, Any], expected: type) -> None:
    """A subclass of a model may contain any convolution."""
    model = nn.Sequential(nn.Conv2d(3, 6, 2, **settings)).bfloat16()
    images = torch.randn(2, 3, 8, 10).bfloat16()
    plain = model(images)
    install_cpu_kernels(model)
    assert type(model[0]) is expected
    torch.testing.assert_close(model(images), plain, atol=2e-2, rtol=2e-2)


def test_changed_weights_take_effect(linear: CPULinear) -> None:
    """No packed copy of the weights is kept."""
    inputs = torch.randn(2, 7, 48)
    linear(inputs)
    linear.weight.zero_()
    assert torch.equal(linear(inputs), linear.bias.expand(2, 7, 80))


# Half precision on CPUs without its instructions ---------------------------------------------------------------------


DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Return a dtype for which this CPU is declared to have no instructions."""
    monkeypatch.setattr(cpu_kernels_vitcls, "EMULATED_DTYPES", {request.param})
    return request.param


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Return a second monkeypatch, to compare with PyTorch."""
    with monkeypatch.context() as context:
        yield context


@pytest.mark.parametrize("bias", [True, False])
def test_products_are_rounded_once(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    layer, inputs = CPULinear(48, 80, bias=bias).to(dtype), torch.randn(2, 7, 48).to(dtype)
    exact = nn.functional.linear(inputs.float(), layer.weight.float(), layer.bias.float() if bias else None)
    assert torch.equal(layer(inputs), exact.to(dtype))


@pytest.mark.parametrize("bias", [True, False])
def test_autocast_multiplies_values_in_half_precision(dtype: torch.dtype, bias: bool) -> None:
    """Weights and inputs in float32 are rounded before an emulated product, not only the result."""
    torch.manual_seed(0)
    layer, inputs = CPULinear(48, 80, bias=bias), torch.randn(2, 7, 48)
    with torch.autocast("cpu", dtype=dtype):
        found = layer(inputs)
    rounded = [None if each is None else each.to(dtype).float() for each in (inputs, layer.weight, layer.bias)]
    assert torch.equal(found, nn.functional.linear(*rounded).to(dtype))
    assert not torch.equal(found, layer.double()(inputs.double()).to(dtype))


class ProductDtypes(TorchDispatchMode):
    """Record the dtypes of the factors of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and record the dtypes of its arguments."""
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.dtypes |= {factor.dtype for factor in args[-2:]}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
def test_emulated_products_are_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    layer, inputs = CPULinear(48, 80).to(torch.float32 if autocast else dtype), torch.randn(2, 7, 48)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast), ProductDtypes() as products:
        result = layer(inputs if autocast else inputs.to(dtype))
        assert result.dtype == dtype
        result.sum().backward()
    assert products.dtypes == {torch.float32}


def test_parametrized_and_quantized_weights_are_not_emulated(dtype: torch.dtype) -> None:
    linear, projection = CPULinear(48, 80).to(dtype), CPUPatchProjection(3, 24, kernel_size=4, stride=4).to(dtype)
    for layer, shape in ((linear, (2, 48)), (projection, (2, 3, 8, 8))):
        inputs, weight = torch.randn(shape, dtype=dtype), layer.weight
        assert "LinearFunction" in profile_operators(layer, inputs)[1]
        layer.weight = nn.Parameter(weight.detach().as_subclass(type("Quantized", (torch.Tensor,), {})))
        assert "LinearFunction" not in profile_operators(layer, inputs)[1]
        layer.weight = weight
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
        assert "LinearFunction" not in profile_operators(layer, inputs)[1]


def test_first_and_second_gradients_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, inputs = CPULinear(6, 4).to(dtype), torch.randn(3, 5, 6).to(dtype).requires_grad_()
    wide = nn.Linear(6, 4)
    wide.load_state_dict(layer.state_dict())
    wide_inputs = inputs.detach().float().requires_grad_()
    found, exact = [
        torch.autograd.grad(
            torch.autograd.grad(each(given).square().sum(), given, create_graph=True)[0].square().sum(),
            [given, *each.parameters()],
        )
        for each, given in ((layer, inputs), (wide, wide_inputs))
    ]
    for of_half, of_float in zip(found, exact, strict=True):
        assert of_half.dtype == dtype
        torch.testing.assert_close(of_half.float(), of_float, rtol=5e-2, atol=5e-2 * of_float.abs().max().item())


def test_the_backward_pass_keeps_half_precision(dtype: torch.dtype) -> None:
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.dtype)
        return tensor

    layer, inputs = CPULinear(48, 80), torch.randn(2, 7, 48)
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", dtype=dtype):
        result = layer(inputs)
    assert result.dtype == dtype and set(kept) == {dtype}
    result.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.weight.grad, inputs.sum((0, 1)).expand(80, 48), rtol=2e-2, atol=2e-2)


def test_patch_projection_in_half_precision(dtype: torch.dtype, without_kernels: pytest.MonkeyPatch) -> None:
    """Check patches that are not square and image sizes that are not multiples of the patch size, with gradients."""
    torch.manual_seed(0)
    layer, pixels = CPUPatchProjection(3, 24, kernel_size=(4, 6), stride=(4, 6)).to(dtype), torch.randn(2, 3, 18, 29)
    found = layer(pixels.to(dtype))
    found.float().square().sum().backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    without_kernels.setattr(cpu_kernels_vitcls, "EMULATED_DTYPES", set())
    exact = layer.float()(pixels.to(dtype).float())
    exact.square().sum().backward()
    torch.testing.assert_close(found.float(), exact, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(gradient.float(), layer.weight.grad, rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_in_half_precision_agrees(
    dtype: torch.dtype, masked: bool, autocast: bool, without_kernels: pytest.MonkeyPatch
) -> None:
    fields = {"cls_scopes": [[2, 2, 0, 1]]} if masked else {}
    tokens = {"num_register_tokens": 2, "num_distillation_tokens": 1}
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**tokens, **fields)))
    pixel_values = build_images(3)
    exact = model(pixel_values).logits
    if not autocast:
        model, pixel_values = model.to(dtype), pixel_values.to(dtype)

    def logits_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            logits = model(pixel_values).logits
        logits.float().square().sum().backward()
        return logits.float(), model.vitcls.embeddings.cls_token.grad.float()

    found = logits_and_gradient()
    without_kernels.setattr(cpu_kernels_vitcls, "EMULATED_DTYPES", set())
    peers = logits_and_gradient()
    # as close to float32 as PyTorch's half precision, or closer
    error, limit = (found[0] - exact).abs().max(), (peers[0] - exact).abs().max()
    assert error <= 2 * limit
    torch.testing.assert_close(found[1], peers[1], rtol=0.1, atol=0.1 * peers[1].abs().max().item())


def test_gradients_per_image_in_half_precision(dtype: torch.dtype) -> None:
    """Compute them with torch.func."""
    layer, inputs = CPULinear(6, 4).to(dtype), torch.randn(3, 5, 6).to(dtype)
    weights = dict(layer.named_parameters())

    def loss(weights: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, weights, image).float().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, inputs)["weight"].float()
    exact = inputs.float().sum(1)[:, None].expand(3, 4, 6)
    torch.testing.assert_close(found, exact, rtol=2e-2, atol=2e-2)


def test_exported_programs_do_not_depend_on_this_cpu(dtype: torch.dtype) -> None:
    layer, inputs = CPULinear(6, 4).to(dtype), torch.randn(3, 6).to(dtype)
    program = torch.export.export(layer, (inputs,))
    assert not [node for node in program.graph.nodes if "to" in str(node.target).split(".")]
    assert "float32" not in str(program.graph)
    traced = torch.jit.trace(layer, inputs)
    assert not [node for node in traced.inlined_graph.nodes() if node.kind() == "aten::to"]


@pytest.mark.slow
def test_compiled_half_precision_agrees(dtype: torch.dtype) -> None:
    layer, inputs = CPULinear(48, 80).to(dtype).requires_grad_(False), torch.randn(2, 7, 48).to(dtype)
    torch.testing.assert_close(torch.compile(layer)(inputs), layer(inputs), rtol=1e-2, atol=1e-2)


def test_other_dtypes_and_devices_are_not_emulated(dtype: torch.dtype) -> None:
    assert is_emulated(torch.zeros(1, dtype=dtype))
    assert not is_emulated(torch.zeros(1))
    assert not is_emulated(torch.zeros(1, dtype=dtype, device="meta"))
    with torch.autocast("cpu", dtype=dtype):
        assert is_emulated(torch.zeros(1))
        assert not is_emulated(torch.zeros(1, dtype=torch.float64))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not is_emulated(torch.zeros(1, dtype=dtype))


# Activation recomputation --------------------------------------------------------------------------------------------


MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "drop_path_rate": 0.3},
    "gated MLP": {"mlp_type": "swiglu", "mlp_norm": True},
    "register neurons": {"num_register_tokens": 1, "register_neurons": [[0, 3], [1, 5]]},
    "learned bias": {"relative_position_bias": "layer"},
    "scopes": BLOCKS["scopes"],
    "differential": {"attention_type": "differential"},
}


class TwoOperations:
    """Two operations. The second saves the output of the first for its backward pass."""

    def __init__(self) -> None:
        self.between: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        between = inputs.exp() * 2
        self.between.append(weakref.ref(between))
        return between.sin()


def test_intermediate_results_are_not_kept() -> None:
    inputs, plain, cheap = torch.randn(5, requires_grad=True), TwoOperations(), TwoOperations()
    wanted, found = plain(inputs), recompute_in_backward(nn.Identity(), cheap, inputs)
    assert plain.between[0]() is not None
    assert cheap.between[0]() is None
    assert torch.equal(*(torch.autograd.grad(outputs.sum(), inputs)[0] for outputs in (wanted, found)))
    assert len(plain.between) == 1 and len(cheap.between) == 2


@pytest.mark.parametrize(
    "why",
    ["no gradients", "nothing to train", "another device", "torch.func", "compiled", "kernels off", "hooks off"],
)
def test_where_nothing_is_recomputed(why: str) -> None:
    watched = TwoOperations()
    inputs = torch.randn(5, requires_grad=why != "nothing to train", device="meta" if "device" in why else "cpu")

    def run(each: torch.Tensor) -> torch.Tensor:
        return recompute_in_backward(nn.Identity(), watched, each)

    if why == "torch.func":
        torch.func.grad(lambda each: run(each).sum())(inputs.detach())
    elif why == "compiled":
        torch.compile(run, backend="eager", fullgraph=True)(inputs).sum().backward()
    elif why == "hooks off":
        with torch.autograd.graph.disable_saved_tensors_hooks("saved tensors cannot be replaced"):
            run(inputs).sum().backward()
    elif why == "kernels off":
        with torch.backends.mkldnn.flags(enabled=False):
            run(inputs).sum().backward()
    else:
        with torch.set_grad_enabled(why != "no gradients"):
            outputs = run(inputs)
        if outputs.requires_grad:
            outputs.sum().backward()
    assert len(watched.between) == 1


@pytest.fixture(params=[False, True], ids=["plain", "autocast"])
def autocast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use chunked attention on every processor if autocast is enabled."""
    monkeypatch.setattr(cpu_kernels_vitcls, "HAS_AVX512_BFLOAT16", True)
    monkeypatch.setattr(cpu_kernels_vitcls, "MIN_CHUNKED_SCORES", 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=request.param):
        yield


@pytest.mark.usefixtures("autocast")
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_recomputed_gradients_are_the_same_to_the_bit(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**fields))).train()

    def compute_all_gradients() -> list[torch.Tensor | None]:
        torch.manual_seed(0)
        model.zero_grad()
        model(build_images(), labels=torch.tensor([0, 2])).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    found = compute_all_gradients()
    monkeypatch.setattr(cpu_kernels_vitcls, "can_recompute", lambda inputs: False)
    for one, other in zip(found, compute_all_gradients(), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("mlp_type", ["mlp", "swiglu"])
def test_a_model_keeps_no_activations(mlp_type: str) -> None:
    """Check also that the inputs of the three projections are not copied."""
    model = randomize(ViTCLSForImageClassification(build_tiny_config(mlp_type=mlp_type))).train()
    activations, projected = [], []
    for layer in model.vitcls.layers:
        layer.mlp.activation_fn = RecordingActivation(layer.mlp.activation_fn, activations)
        for projection in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj):
            projection.register_forward_hook(
                lambda module, inputs, outputs: projected.append((inputs[0].dtype, inputs[0].data_ptr()))
            )
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(build_images(), labels=torch.tensor([0, 2])).loss
    assert len(activations) == model.config.num_hidden_layers
    assert all(each() is None for each in activations)
    assert len(projected) == 3 * model.config.num_hidden_layers
    assert {dtype for dtype, _ in projected} == {torch.bfloat16}
    assert all(len(set(projected[index : index + 3])) == 1 for index in range(0, len(projected), 3))
    loss.backward()
    assert len(activations) == 2 * model.config.num_hidden_layers


class RecordingActivation(nn.Module):
    """An activation that records weak references to its outputs."""

    def __init__(self, activation: nn.Module, seen: list[weakref.ref[torch.Tensor]]) -> None:
        super().__init__()
        self.activation, self.seen = activation, seen

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = self.activation(inputs)
        self.seen.append(weakref.ref(outputs))
        return outputs


@pytest.mark.parametrize("part", ["activation_fn", "fc2"])
def test_hooks_are_called_once(part: str) -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config())).train()
    seen: list[int] = []
    model.vitcls.layers[0].mlp.get_submodule(part).register_forward_pre_hook(lambda *_: seen.append(1))
    model(build_images(), labels=torch.tensor([0, 2])).loss.backward()
    assert len(seen) == 1
    with torch.inference_mode():
        model(build_images())
    assert len(seen) == 2


def test_the_meta_device() -> None:
    """Check shapes without values."""
    with torch.device("meta"):
        model = ViTCLSForImageClassification(build_tiny_config(mlp_type="swiglu"))
    assert model(torch.empty(2, 3, 32, 32, device="meta")).logits.shape == (2, 3)


# Chunked attention ---------------------------------------------------------------------------------------------------


NUM_IMAGES = 3
NUM_TOKENS = 21
KEYS = torch.arange(NUM_TOKENS)
MASKS: dict[str, torch.Tensor | None] = {
    "none": None,
    "boolean": (KEYS % 3 > 0).expand(NUM_IMAGES, 1, NUM_TOKENS, NUM_TOKENS),
    "boolean, one row": (KEYS % 3 > 0).expand(NUM_IMAGES, 1, 1, NUM_TOKENS),
    "added": torch.randn(NUM_IMAGES, 4, NUM_TOKENS, NUM_TOKENS, generator=torch.Generator().manual_seed(1)),
    "added, for all": torch.randn(1, 1, 1, NUM_TOKENS, generator=torch.Generator().manual_seed(1)),
}


class Attention(torch.nn.Module):
    """Contains the attribute of the calling module that attention functions read."""

    is_causal = False


def build_states(num_queries: int = NUM_TOKENS, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return random queries, keys and values as projections return them: [3, 4, n or N, 8], not contiguous."""
    generator = torch.Generator().manual_seed(0)
    lengths = (num_queries, NUM_TOKENS, NUM_TOKENS)
    made = [
        torch.randn(NUM_IMAGES, length, 4, 8, generator=generator, dtype=torch.float64).to(dtype) for length in lengths
    ]
    return [each.requires_grad_().transpose(1, 2) for each in made]


def compute_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float
) -> torch.Tensor:
    """Return the output of PyTorch's attention."""
    mixed, _ = sdpa_attention_forward(Attention(), query, key, value, mask, 0.0, scaling)
    return mixed


def compute_results(attend: Any, given: list[torch.Tensor], mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Return attended values, and gradients with respect to queries, keys, values and an additive mask."""
    differentiable = [*given, *([mask] if mask is not None and mask.requires_grad else [])]
    mixed = attend(*given, mask, 0.4)
    factor = torch.linspace(-1, 1, mixed.numel(), dtype=mixed.dtype).view_as(mixed)
    return [mixed, *torch.autograd.grad((mixed * factor).sum(), differentiable)]


@pytest.fixture(params=[1, 2, 10], ids="{} per chunk".format)
def chunk_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the number of images per chunk."""
    monkeypatch.setattr(cpu_kernels_vitcls, "get_chunk_size", lambda query, key: request.param)


@pytest.mark.usefixtures("chunk_size")
@pytest.mark.parametrize("num_queries", [NUM_TOKENS, 1, 3])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_chunked_attention_equals_pytorch(mask: torch.Tensor | None, num_queries: int) -> None:
    if mask is not None:
        mask = mask[:, :, :num_queries]
        if mask.is_floating_point():
            mask = mask.clone().requires_grad_()
    found = compute_results(chunked_attention, build_states(num_queries), mask)
    wanted = compute_results(compute_attention, build_states(num_queries), mask)
    assert found[0].shape == (NUM_IMAGES, num_queries, 4, 8)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and get_largest_difference(one, other) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunked_attention_in_half_precision_is_as_exact_as_pytorch(dtype: torch.dtype) -> None:
    exact = compute_results(compute_attention, build_states(), None)
    errors = []
    for attend in (chunked_attention, compute_attention):
        found = compute_results(attend, build_states(dtype=dtype), None)
        assert all(each.dtype == dtype for each in found)
        errors.append([get_largest_difference(one.float(), other) for one, other in zip(found, exact, strict=True)])
    for chunked_error, fused_error in zip(*errors, strict=True):
        assert chunked_error <= 2 * fused_error + torch.finfo(dtype).eps


@pytest.mark.parametrize("length, size", [(20, 436), (197, 4), (2000, 1)])
def test_chunks_fit_the_cache(length: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expect a million scores for two threads, and at least one image."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    query = torch.empty(1, 6, length, 8)
    assert cpu_kernels_vitcls.get_chunk_size(query, query) == size


@torch.no_grad()
def test_chunked_attention_without_images_or_visible_keys() -> None:
    query, key, value = build_states()
    assert chunked_attention(query[:0], key[:0], value[:0], None, 0.4).shape == (0, NUM_TOKENS, 4, 8)
    found = chunked_attention(query, key, value, torch.zeros(1, 1, 1, NUM_TOKENS, dtype=torch.bool), 0.4)
    assert get_largest_difference(found, value.mean(dim=2).unsqueeze(1).expand_as(found)) <= 1e-6


@torch.no_grad()
def test_compiled_chunked_attention() -> None:
    torch.compiler.reset()
    compiled, states = torch.compile(chunked_attention, backend="eager", fullgraph=True), build_states()
    for mask in (None, MASKS["boolean"]):
        found = compiled(*states, mask, 0.4)
        assert found.is_contiguous()
        assert get_largest_difference(found, compute_attention(*states, mask, 0.4)) <= 1e-5


def test_chunked_attention_gradients_by_finite_differences() -> None:
    """Check first and second order."""
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 4, 4)
    given = [torch.randn(3, 2, length, 2, dtype=torch.float64, generator=generator) for length in lengths]
    given = [each.requires_grad_() for each in [*given, torch.randn(1, 2, 3, 4, dtype=torch.float64)]]
    assert torch.autograd.gradcheck(lambda *each: chunked_attention(*each, 0.7), given)
    assert torch.autograd.gradgradcheck(lambda *each: chunked_attention(*each, 0.7), given)


def test_chunked_attention_gradients_per_image() -> None:
    """Compute them with torch.func."""
    given = [each.detach() for each in build_states()]

    def attend_to_one(*one: torch.Tensor) -> torch.Tensor:
        return chunked_attention(*(each.unsqueeze(0) for each in one), None, 0.4).square().sum()

    found = torch.func.vmap(torch.func.grad(attend_to_one))(*given)
    wanted = torch.autograd.grad(
        compute_attention(*(each.requires_grad_() for each in given), None, 0.4).square().sum(), given[0]
    )
    assert get_largest_difference(found, wanted[0]) <= 1e-5


def test_attention_dropout_equals_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels_vitcls, "HAS_AVX512_BFLOAT16", True)
    monkeypatch.setattr(cpu_kernels_vitcls, "MIN_CHUNKED_SCORES", 0)
    given = build_states(dtype=torch.bfloat16)
    found = [sdpa_attention(Attention(), *given, None, scaling=0.4, dropout=rate)[0] for rate in (0.0, 0.5)]
    assert torch.equal(found[0], chunked_attention(*given, None, 0.4))
    torch.manual_seed(0)
    found[1] = sdpa_attention(Attention(), *given, None, scaling=0.4, dropout=0.5)[0]
    torch.manual_seed(0)
    assert torch.equal(found[1], sdpa_attention_forward(Attention(), *given, None, 0.5, 0.4)[0])
    assert get_largest_difference(*found) > 0.1


def test_where_chunked_attention_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels_vitcls, "HAS_AVX512_BFLOAT16", True)

    def is_used(dtype: torch.dtype, length: int, device: str = "cpu", num_images: int = 100) -> bool:
        made = torch.empty(num_images, 1, length, 8, dtype=dtype, device=device)
        return should_use_chunked_attention(made, made)

    assert is_used(torch.bfloat16, 17) and is_used(torch.bfloat16, MAX_CHUNKED_KEYS, num_images=1)
    assert not is_used(torch.bfloat16, 17, num_images=10)
    assert not is_used(torch.bfloat16, MAX_CHUNKED_KEYS + 1)
    query, key = (torch.empty(100, 1, length, 8, dtype=torch.bfloat16) for length in (3, MAX_CHUNKED_KEYS + 1))
    assert not should_use_chunked_attention(query, key)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not is_used(torch.bfloat16, 17)
    assert not is_used(torch.float32, 197) and not is_used(torch.float16, 197)
    assert not is_used(torch.bfloat16, 197, "meta")
    monkeypatch.setattr(cpu_kernels_vitcls, "HAS_AVX512_BFLOAT16", False)
    assert not is_used(torch.bfloat16, 17)


def test_chunked_attention_requires_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled inference uses it; export and compiled training do not."""
    calls: list[int] = []

    def count_calls(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return chunked_attention(*args, **kwargs)

    monkeypatch.setattr(cpu_kernels_vitcls, "chunked_attention", count_calls)
    monkeypatch.setattr(cpu_kernels_vitcls, "HAS_AVX512_BFLOAT16", True)
    monkeypatch.setattr(cpu_kernels_vitcls, "MIN_CHUNKED_SCORES", 0)
    model = randomize(ViTCLSModel(build_tiny_config())).bfloat16()
    torch.compiler.reset()  # the compiler stops recompiling functions that other tests have compiled often
    with torch.no_grad():
        expected = model(build_images()).last_hidden_state
        assert len(calls) == model.config.num_hidden_layers
        compiled = torch.compile(model, backend="eager")(build_images()).last_hidden_state
        assert torch.nn.functional.cosine_similarity(compiled, expected, dim=-1).min() > 0.99
        assert len(calls) == 2 * model.config.num_hidden_layers
        with torch.enable_grad():
            torch.compile(model, backend="eager")(build_images())
        torch.export.export(model, (build_images().bfloat16(),))
        model.set_attn_implementation("eager")
        model(build_images())
    assert len(calls) == 2 * model.config.num_hidden_layers
    for implementation in ("flex_attention", "sdpa"):
        model.set_attn_implementation(implementation)
        functions = [layer.attention.get_attention_function() for layer in model.layers]
        assert [function is sdpa_attention for function in functions] == [implementation == "sdpa"] * 2


def test_training_in_bfloat16_is_close_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use learned masks, and biases per head."""
    monkeypatch.setattr(cpu_kernels_vitcls, "MIN_CHUNKED_SCORES", 0)
    fields = {"relative_position_bias": "layer", "gated_tokens": {"registers": 2}, "num_register_tokens": 2}
    gradients = []
    for half in (False, True):
        model = randomize(ViTCLSForImageClassification(build_tiny_config(**fields)))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            model(build_images(), labels=torch.tensor([0, 2])).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99

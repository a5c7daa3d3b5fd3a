"""Linear layers answer the same whichever library computes them, and step aside where they should."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

from modeling_vitcls import linear_vitcls
from modeling_vitcls.linear_vitcls import Linear, PatchProjection, activated


needs_onednn = pytest.mark.skipif(not linear_vitcls.HAS_ONEDNN, reason="this processor or PyTorch has no oneDNN")
ONEDNN = "mkldnn::_linear_pointwise"


@pytest.fixture(autouse=True)
def float32_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on processors where it is right but not the fastest."""
    monkeypatch.setitem(linear_vitcls.DTYPES, torch.float32, linear_vitcls.HAS_ONEDNN)


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
    if dtype == torch.bfloat16 and not linear_vitcls.HAS_BFLOAT16:
        pytest.skip("this processor has no bfloat16")
    layer, inputs = linear.to(dtype), torch.randn(2, 7, 48, dtype=dtype)
    found, operators = computed_by(activated, layer, ACT2FN["gelu"], inputs)
    assert ONEDNN in operators and "aten::gelu" not in operators
    exact = nn.functional.gelu(nn.functional.linear(inputs.double(), layer.weight.double(), layer.bias.double()))
    limit = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), exact, atol=limit, rtol=limit)


def test_without_onednn_gelu_is_computed_in_place(linear: Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear_vitcls.DTYPES, torch.float32, False)
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
    """For gradients, hooks, other dtypes, autocast, a replaced forward, and those who record or count operators."""
    inputs = torch.randn(2, 7, 48)

    def is_plain(layer: nn.Module, given: torch.Tensor = inputs) -> bool:
        _, operators = computed_by(activated, layer, ACT2FN["gelu"], given)
        return ONEDNN not in operators

    def is_alone(layer: nn.Module) -> bool:
        """Whether the activation is not part of it."""
        _, operators = computed_by(activated, layer, ACT2FN["gelu"], inputs)
        return "aten::gelu" in operators

    with torch.enable_grad():
        assert is_plain(linear)
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


@pytest.mark.skipif(not linear_vitcls.HAS_BFLOAT16, reason="this processor multiplies no bfloat16")
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

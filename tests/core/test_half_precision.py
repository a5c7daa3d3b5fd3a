"""Half precision on CPUs that cannot multiply it: float32 computes it, and the numbers stay what they are."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from modeling_vitcls import ViTCLSConfig, ViTCLSForImageClassification, cpu_kernels_vitcls
from modeling_vitcls.cpu_kernels_vitcls import Linear, PatchProjection, is_emulated


DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """One that this CPU is said not to have."""
    monkeypatch.setattr(cpu_kernels_vitcls, "EMULATED", {request.param})
    return request.param


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """To compare with what PyTorch does."""
    with monkeypatch.context() as context:
        yield context


def random_model(**changes: object) -> ViTCLSForImageClassification:
    torch.manual_seed(0)
    tokens = {"num_register_tokens": 2, "num_distillation_tokens": 1, "num_labels": 5}
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTCLSConfig(image_size=32, patch_size=8, **size, **tokens, **changes)
    model = ViTCLSForImageClassification(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_float32s_rounded_once(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    layer, inputs = Linear(48, 80, bias=bias).to(dtype), torch.randn(2, 7, 48).to(dtype)
    exact = nn.functional.linear(inputs.float(), layer.weight.float(), layer.bias.float() if bias else None)
    assert torch.equal(layer(inputs), exact.to(dtype))


def test_gradients_and_theirs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, inputs = Linear(6, 4).to(dtype), torch.randn(3, 5, 6).to(dtype).requires_grad_()
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


def test_half_precision_is_kept_for_the_backward_pass(dtype: torch.dtype) -> None:
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.dtype)
        return tensor

    layer, inputs = Linear(48, 80), torch.randn(2, 7, 48)
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", dtype=dtype):
        result = layer(inputs)
    assert result.dtype == dtype and set(kept) == {dtype}
    result.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.weight.grad, inputs.sum((0, 1)).expand(80, 48), rtol=2e-2, atol=2e-2)


def test_patches(dtype: torch.dtype, without: pytest.MonkeyPatch) -> None:
    """Not square, and not a whole number of them; with gradients."""
    torch.manual_seed(0)
    layer, images = PatchProjection(3, 24, kernel_size=(4, 6), stride=(4, 6)).to(dtype), torch.randn(2, 3, 18, 29)
    found = layer(images.to(dtype))
    found.float().square().sum().backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    without.setattr(cpu_kernels_vitcls, "EMULATED", set())
    exact = layer.float()(images.to(dtype).float())
    exact.square().sum().backward()
    torch.testing.assert_close(found.float(), exact, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(gradient.float(), layer.weight.grad, rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_answers_the_same(
    dtype: torch.dtype, masked: bool, autocast: bool, without: pytest.MonkeyPatch
) -> None:
    model = random_model(**({"cls_scopes": [[2, 2, 0, 1]]} if masked else {}))
    pixel_values = torch.randn(3, 3, 32, 32)
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
    without.setattr(cpu_kernels_vitcls, "EMULATED", set())
    peers = logits_and_gradient()
    # As near to float32 as PyTorch's own half precision is, or nearer
    error, limit = (found[0] - exact).abs().max(), (peers[0] - exact).abs().max()
    assert error <= 2 * limit
    torch.testing.assert_close(found[1], peers[1], rtol=0.1, atol=0.1 * peers[1].abs().max().item())


def test_torch_func_goes_through(dtype: torch.dtype) -> None:
    """Gradients of single images."""
    layer, inputs = Linear(6, 4).to(dtype), torch.randn(3, 5, 6).to(dtype)
    weights = dict(layer.named_parameters())

    def loss(weights: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, weights, image).float().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, inputs)["weight"].float()
    exact = inputs.float().sum(1)[:, None].expand(3, 4, 6)
    torch.testing.assert_close(found, exact, rtol=2e-2, atol=2e-2)


def test_exported_programs_do_not_know_this_cpu(dtype: torch.dtype) -> None:
    program = torch.export.export(Linear(6, 4).to(dtype), (torch.randn(3, 6).to(dtype),))
    assert not [node for node in program.graph.nodes if "to" in str(node.target).split(".")]
    assert "float32" not in str(program.graph)


def test_compiled_code_agrees(dtype: torch.dtype) -> None:
    layer, inputs = Linear(48, 80).to(dtype).requires_grad_(False), torch.randn(2, 7, 48).to(dtype)
    torch.testing.assert_close(torch.compile(layer)(inputs), layer(inputs), rtol=1e-2, atol=1e-2)


def test_float32_and_what_is_not_on_the_cpu_are_left_alone(dtype: torch.dtype) -> None:
    assert is_emulated(torch.zeros(1, dtype=dtype))
    assert not is_emulated(torch.zeros(1))
    assert not is_emulated(torch.zeros(1, dtype=dtype, device="meta"))
    with torch.autocast("cpu", dtype=dtype):
        assert is_emulated(torch.zeros(1))
        assert not is_emulated(torch.zeros(1, dtype=torch.float64))

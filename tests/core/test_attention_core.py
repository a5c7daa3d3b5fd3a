"""Attention in steps on the CPU: where it is chosen, and that it is PyTorch's attention."""

from typing import Any

import pytest
import torch
from tiny_models import filled, images, largest_difference, tiny_config

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel, cpu_kernels_vitcls
from modeling_vitcls.cpu_kernels_vitcls import (
    MAX_CHUNKED_KEYS,
    chunked_attention,
    prefers_chunks,
    sdpa_attention,
    sdpa_attention_forward,
)


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
    """What implementations ask about the module that calls them."""

    is_causal = False


def states(num_queries: int = NUM_TOKENS, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Random queries, keys and values as the projections give them: [3, 4, n or N, 8], not contiguous."""
    generator = torch.Generator().manual_seed(0)
    lengths = (num_queries, NUM_TOKENS, NUM_TOKENS)
    made = [
        torch.randn(NUM_IMAGES, length, 4, 8, generator=generator, dtype=torch.float64).to(dtype) for length in lengths
    ]
    return [each.requires_grad_().transpose(1, 2) for each in made]


def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float) -> torch.Tensor:
    """PyTorch's attention."""
    mixed, _ = sdpa_attention_forward(Attention(), query, key, value, mask, 0.0, scaling)
    return mixed


def results(attend: Any, given: list[torch.Tensor], mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Mixed values, and gradients with respect to queries, keys, values and an added mask."""
    differentiable = [*given, *([mask] if mask is not None and mask.requires_grad else [])]
    mixed = attend(*given, mask, 0.4)
    factor = torch.linspace(-1, 1, mixed.numel(), dtype=mixed.dtype).view_as(mixed)
    return [mixed, *torch.autograd.grad((mixed * factor).sum(), differentiable)]


@pytest.fixture(params=[1, 2, 10], ids="{} at a time".format)
def images_at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many images' scores are computed at a time."""
    monkeypatch.setattr(cpu_kernels_vitcls, "part_size", lambda query, key: request.param)


@pytest.mark.usefixtures("images_at_a_time")
@pytest.mark.parametrize("num_queries", [NUM_TOKENS, 1, 3])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_steps_are_pytorch_s_attention(mask: torch.Tensor | None, num_queries: int) -> None:
    if mask is not None:
        mask = mask[:, :, :num_queries]
        if mask.is_floating_point():
            mask = mask.clone().requires_grad_()
    found = results(chunked_attention, states(num_queries), mask)
    wanted = results(fused, states(num_queries), mask)
    assert found[0].shape == (NUM_IMAGES, num_queries, 4, 8)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and largest_difference(one, other) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_pytorch_s(dtype: torch.dtype) -> None:
    exact = results(fused, states(), None)
    errors = []
    for attend in (chunked_attention, fused):
        found = results(attend, states(dtype=dtype), None)
        assert all(each.dtype == dtype for each in found)
        errors.append([largest_difference(one.float(), other) for one, other in zip(found, exact, strict=True)])
    for in_steps, in_one in zip(*errors, strict=True):
        assert in_steps <= 2 * in_one + torch.finfo(dtype).eps


@pytest.mark.parametrize("length, size", [(20, 436), (197, 4), (2000, 1)])
def test_parts_fit_the_cache(length: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a million scores on two threads, and one image at least."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    query = torch.empty(1, 6, length, 8)
    assert cpu_kernels_vitcls.part_size(query, query) == size


def test_no_images() -> None:
    query, key, value = (each[:0].detach() for each in states())
    assert chunked_attention(query, key, value, None, 0.4).shape == (0, NUM_TOKENS, 4, 8)


def test_gradients_of_gradients() -> None:
    """Of the first and second order, by finite differences."""
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 4, 4)
    given = [torch.randn(3, 2, length, 2, dtype=torch.float64, generator=generator) for length in lengths]
    given = [each.requires_grad_() for each in [*given, torch.randn(1, 2, 3, 4, dtype=torch.float64)]]
    assert torch.autograd.gradcheck(lambda *each: chunked_attention(*each, 0.7), given)
    assert torch.autograd.gradgradcheck(lambda *each: chunked_attention(*each, 0.7), given)


def test_gradients_of_each_image() -> None:
    """With torch.func."""
    given = [each.detach() for each in states()]

    def of_one(*one: torch.Tensor) -> torch.Tensor:
        return chunked_attention(*(each.unsqueeze(0) for each in one), None, 0.4).square().sum()

    found = torch.func.vmap(torch.func.grad(of_one))(*given)
    wanted = torch.autograd.grad(fused(*(each.requires_grad_() for each in given), None, 0.4).square().sum(), given[0])
    assert largest_difference(found, wanted[0]) <= 1e-5


def test_dropout_is_pytorch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels_vitcls, "HAS_BFLOAT16_PRODUCTS", True)
    monkeypatch.setattr(cpu_kernels_vitcls, "MIN_CHUNKED_SCORES", 0)
    given = states(dtype=torch.bfloat16)
    found = [sdpa_attention(Attention(), *given, None, scaling=0.4, dropout=rate)[0] for rate in (0.0, 0.5)]
    assert torch.equal(found[0], chunked_attention(*given, None, 0.4))
    torch.manual_seed(0)
    found[1] = sdpa_attention(Attention(), *given, None, scaling=0.4, dropout=0.5)[0]
    torch.manual_seed(0)
    assert torch.equal(found[1], sdpa_attention_forward(Attention(), *given, None, 0.5, 0.4)[0])
    assert largest_difference(*found) > 0.1


def test_where_steps_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels_vitcls, "HAS_BFLOAT16_PRODUCTS", True)

    def chosen(dtype: torch.dtype, length: int, device: str = "cpu", num_images: int = 100) -> bool:
        made = torch.empty(num_images, 1, length, 8, dtype=dtype, device=device)
        return prefers_chunks(made, made)

    assert chosen(torch.bfloat16, 17) and chosen(torch.bfloat16, MAX_CHUNKED_KEYS, num_images=1)
    assert not chosen(torch.bfloat16, 17, num_images=10)
    assert not chosen(torch.bfloat16, MAX_CHUNKED_KEYS + 1)
    assert not chosen(torch.float32, 197) and not chosen(torch.float16, 197)
    assert not chosen(torch.bfloat16, 197, "meta")
    monkeypatch.setattr(cpu_kernels_vitcls, "HAS_BFLOAT16_PRODUCTS", False)
    assert not chosen(torch.bfloat16, 17)


def test_only_sdpa_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled too, but not while exporting, nor in compiled training."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return chunked_attention(*args, **kwargs)

    monkeypatch.setattr(cpu_kernels_vitcls, "chunked_attention", counted)
    monkeypatch.setattr(cpu_kernels_vitcls, "HAS_BFLOAT16_PRODUCTS", True)
    monkeypatch.setattr(cpu_kernels_vitcls, "MIN_CHUNKED_SCORES", 0)
    model = filled(ViTCLSModel(tiny_config())).bfloat16()
    torch.compiler.reset()  # it gives up on what tests before this one compiled often
    with torch.no_grad():
        model(images())
        assert len(calls) == model.config.num_hidden_layers
        torch.compile(model, backend="eager")(images())
        assert len(calls) == 2 * model.config.num_hidden_layers
        with torch.enable_grad():
            torch.compile(model, backend="eager")(images())
        torch.export.export(model, (images().bfloat16(),))
        model.set_attn_implementation("eager")
        model(images())
    assert len(calls) == 2 * model.config.num_hidden_layers
    assert cpu_kernels_vitcls.ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention


def test_training_in_bfloat16_follows_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that are learned and biases of every head among it."""
    monkeypatch.setattr(cpu_kernels_vitcls, "MIN_CHUNKED_SCORES", 0)
    fields = {"relative_position_bias": "layer", "gated_tokens": {"registers": 2}, "num_register_tokens": 2}
    gradients = []
    for half in (False, True):
        model = filled(ViTCLSForImageClassification(tiny_config(**fields)))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            model(images(), labels=torch.tensor([0, 2])).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99

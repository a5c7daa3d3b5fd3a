"""Attention in steps on the CPU: where it is chosen, and that it is PyTorch's attention."""

from typing import Any

import pytest
import torch
from tiny import filled, images, largest_difference, tiny_config

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel, attention_core_vitcls
from modeling_vitcls.attention_core_vitcls import (
    LONGEST_IN_STEPS,
    attend_in_steps,
    prefers_steps,
    sdpa_attention,
    sdpa_attention_forward,
)


NUM_TOKENS = 21
KEYS = torch.arange(NUM_TOKENS)
MASKS: dict[str, torch.Tensor | None] = {
    "none": None,
    "boolean": (KEYS % 3 > 0).expand(2, 1, NUM_TOKENS, NUM_TOKENS),
    "boolean, one row": (KEYS % 3 > 0).expand(2, 1, 1, NUM_TOKENS),
    "added": torch.randn(2, 4, NUM_TOKENS, NUM_TOKENS, generator=torch.Generator().manual_seed(1)),
    "added, for all heads": torch.randn(1, 1, 1, NUM_TOKENS, generator=torch.Generator().manual_seed(1)),
}


class Attention(torch.nn.Module):
    """What implementations ask about the module that calls them."""

    is_causal = False


def states(num_queries: int = NUM_TOKENS, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Random queries, keys and values as the projections give them: [2, 4, n or N, 8], not contiguous."""
    generator = torch.Generator().manual_seed(0)
    lengths = (num_queries, NUM_TOKENS, NUM_TOKENS)
    made = [torch.randn(2, length, 4, 8, generator=generator, dtype=torch.float64).to(dtype) for length in lengths]
    return [each.requires_grad_().transpose(1, 2) for each in made]


def results(attend: Any, given: list[torch.Tensor], mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Mixed values, and gradients with respect to queries, keys, values and an added mask."""
    differentiable = [*given, *([mask] if mask is not None and mask.requires_grad else [])]
    mixed, weights = attend(Attention(), *given, mask, scaling=0.4, dropout=0.0)
    assert weights is None
    factor = torch.linspace(-1, 1, mixed.numel(), dtype=mixed.dtype).view_as(mixed)
    return [mixed, *torch.autograd.grad((mixed * factor).sum(), differentiable)]


@pytest.mark.parametrize("num_queries", [NUM_TOKENS, 1, 3])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_steps_are_pytorch_s_attention(mask: torch.Tensor | None, num_queries: int) -> None:
    if mask is not None:
        mask = mask[:, :, :num_queries]
        if mask.is_floating_point():
            mask = mask.clone().requires_grad_()
    found = results(attend_in_steps, states(num_queries), mask)
    wanted = results(sdpa_attention_forward, states(num_queries), mask)
    assert found[0].shape == (2, num_queries, 4, 8)
    for one, other in zip(found, wanted, strict=True):
        assert largest_difference(one, other) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_pytorch_s(dtype: torch.dtype) -> None:
    exact = results(sdpa_attention_forward, states(), None)
    errors = []
    for attend in (attend_in_steps, sdpa_attention_forward):
        found = results(attend, states(dtype=dtype), None)
        assert all(each.dtype == dtype for each in found)
        errors.append([largest_difference(one.float(), other) for one, other in zip(found, exact, strict=True)])
    for in_steps, fused in zip(*errors, strict=True):
        assert in_steps <= 2 * fused + torch.finfo(dtype).eps


def test_dropout() -> None:
    """Nothing is dropped but in training, and what is kept is scaled up."""
    given = [each.detach() for each in states()]
    given[2] = torch.ones_like(given[2])
    module = Attention()
    torch.manual_seed(0)
    kept, _ = attend_in_steps(module.train(), *given, None, scaling=0.4, dropout=0.5)
    assert kept.std() > 0.1 and abs(kept.mean() - 1) < 0.1
    kept, _ = attend_in_steps(module.eval(), *given, None, scaling=0.4, dropout=0.5)
    assert largest_difference(kept, torch.ones_like(kept)) <= 1e-5


def test_where_steps_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_core_vitcls, "MULTIPLIES_BFLOAT16", True)

    def chosen(dtype: torch.dtype, length: int, device: str = "cpu") -> bool:
        made = torch.empty(1, 1, length, 8, dtype=dtype, device=device)
        return prefers_steps(made, made)

    assert chosen(torch.bfloat16, 17) and chosen(torch.bfloat16, LONGEST_IN_STEPS)
    assert not chosen(torch.bfloat16, LONGEST_IN_STEPS + 1)
    assert not chosen(torch.float32, 197) and not chosen(torch.float16, 197)
    assert not chosen(torch.bfloat16, 197, "meta")
    monkeypatch.setattr(attention_core_vitcls, "MULTIPLIES_BFLOAT16", False)
    assert not chosen(torch.bfloat16, 17)


def test_only_sdpa_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not while compiling or exporting."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return attend_in_steps(*args, **kwargs)

    monkeypatch.setattr(attention_core_vitcls, "attend_in_steps", counted)
    monkeypatch.setattr(attention_core_vitcls, "MULTIPLIES_BFLOAT16", True)
    model = filled(ViTCLSModel(tiny_config())).bfloat16()
    with torch.no_grad():
        model(images())
        assert len(calls) == model.config.num_hidden_layers
        torch.compile(model, backend="eager")(images())
        torch.export.export(model, (images().bfloat16(),))
        model.set_attn_implementation("eager")
        model(images())
    assert len(calls) == model.config.num_hidden_layers
    assert attention_core_vitcls.ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention


def test_training_in_bfloat16_follows_float32() -> None:
    """Masks that are learned and biases of every head among it."""
    fields = {"relative_position_bias": "layer", "gated_tokens": {"registers": 2}, "num_register_tokens": 2}
    gradients = []
    for half in (False, True):
        model = filled(ViTCLSForImageClassification(tiny_config(**fields)))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            model(images(), labels=torch.tensor([0, 2])).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99

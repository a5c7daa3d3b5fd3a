"""Tokens that are added with closed gates change no output at first, and training opens the gates.

The gradients of closed gates are not zero.
"""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adaptation_cases import adapt_with_loader, get_logged_lines
from helpers.tiny_models import (
    IMAGE_LABELS,
    IMAGES,
    build_random,
    each_dtype,
    get_largest_difference,
    raises_one_line,
)
from pytest import LogCaptureFixture, approx
from torch import nn
from transformers import AutoModel

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel
from modeling_vitcls.conversion.weight_rules import Fields
from modeling_vitcls.model.attention_masks_vitcls import TokenGates


@pytest.mark.parametrize(
    "added",
    [{"num_register_tokens": 4}, {"num_cls_tokens": 3}, {"num_distillation_tokens": 1}],
    ids=str,
)
@torch.no_grad()
def test_a_closed_gate_holds_against_the_largest_scores(added: dict[str, int]) -> None:
    """Trained weights give a random token scores far above all others in images of one color."""
    model = build_random(ViTCLSForImageClassification)
    for layer in model.vitcls.layers:
        layer.attention.k_proj.weight *= 60
    model = model.double()  # The exact effect, without rounding
    images = torch.ones_like(IMAGES).double()
    adapted = model.adapt(**added)
    assert get_largest_difference(adapted(images).logits, model(images).logits) < 1e-5


@pytest.fixture
def gated() -> ViTCLSForImageClassification:
    """Return a classifier with four new registers."""
    torch.manual_seed(0)
    return build_random(ViTCLSForImageClassification).adapt(num_register_tokens=4)


def test_gradient_reaches_gates_in_float16(gated: ViTCLSForImageClassification) -> None:
    """float16 has no numbers as small as the attention to a closed gate."""
    with torch.autocast("cpu", dtype=torch.float16):
        loss = gated(IMAGES, labels=IMAGE_LABELS).loss
    (loss * 2**16).backward()  # As a gradient scaler does
    found = gated.vitcls.gates.gates.grad / 2**16

    gated.zero_grad()
    gated(IMAGES, labels=IMAGE_LABELS).loss.backward()
    assert found.tolist() == approx(gated.vitcls.gates.gates.grad.tolist(), rel=0.05)


def test_gradient_reaches_gates_and_new_tokens(gated: ViTCLSForImageClassification) -> None:
    """The gradient is as large as that of an open gate, and points to a lower loss."""
    gated.double()  # for a finite difference
    pixels = IMAGES.double()

    def loss(of: ViTCLSForImageClassification) -> torch.Tensor:
        return nn.functional.cross_entropy(of(pixels).logits, IMAGE_LABELS)

    loss(gated).backward()
    gradient = gated.vitcls.gates.gates.grad
    token_gradient = gated.vitcls.embeddings.register_tokens.grad
    assert token_gradient.isfinite().all()
    assert token_gradient.any(dim=-1).all()
    slopes = []
    for index in range(4):
        opened = copy.deepcopy(gated)
        opened.vitcls.gates.gates.data[index] += 1e-4
        slopes.append(((loss(opened) - loss(gated)) / 1e-4).item())
    assert gradient.tolist() == approx(slopes, rel=0.02)
    assert min(map(abs, slopes)) > 1e-4


@pytest.mark.parametrize("value", [-1e-4, 0.0])
def test_a_gate_at_zero_or_below_still_learns(
    gated: ViTCLSForImageClassification, value: float
) -> None:
    """Adam's first step is the learning rate, so half of all gates become negative."""
    nn.init.constant_(gated.vitcls.gates.gates, value)
    gated(IMAGES, labels=IMAGE_LABELS).loss.backward()
    assert gated.vitcls.gates.gates.grad.abs().min() > 1e-5


@pytest.mark.parametrize(
    "fields", [{"gated_tokens": {"cls": 1}}, {"relative_position_bias": "layer"}], ids=str
)
@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_attention_without_bias_support_is_an_error(implementation: str, fields: Fields) -> None:
    model = build_random(ViTCLSModel, **fields)
    # the package of flash attention need not be installed
    model.config._attn_implementation_internal = implementation
    with raises_one_line(*fields, implementation, "sdpa"), torch.no_grad():
        model(IMAGES)


@torch.no_grad()
@each_dtype
@pytest.mark.parametrize("loader", [ViTCLSModel, AutoModel])
def test_open_gates_are_removed_when_a_checkpoint_is_loaded(
    loader: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = build_random(ViTCLSModel).to(dtype).adapt(num_register_tokens=2)
    model.gates.gates.fill_(1.2 * TokenGates.OPEN)
    model.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)

    assert loaded.gates is None
    assert loaded.config.gated_tokens is None

    ungated = model.adapt(gated_tokens=None)
    images = IMAGES.to(dtype)
    found, expected, gated = (each(images).last_hidden_state for each in (loaded, ungated, model))
    assert torch.equal(found, expected)
    if dtype == torch.float32:
        assert get_largest_difference(found, gated) < 1e-5


@torch.no_grad()
def test_gates_that_are_not_all_open_are_kept(tmp_path: Path) -> None:
    model = build_random(ViTCLSModel).adapt(num_register_tokens=2)
    model.gates.gates.copy_(torch.tensor([1.0, 0.9]) * TokenGates.OPEN)
    model.save_pretrained(tmp_path)
    loaded = ViTCLSModel.from_pretrained(tmp_path)
    assert loaded.config.gated_tokens == {"registers": 2}
    assert loaded.gates.get_gate_values().tolist() == approx([1.0, 0.9])
    assert torch.equal(loaded(IMAGES).last_hidden_state, model(IMAGES).last_hidden_state)


@pytest.mark.parametrize("loader", [None, ViTCLSModel, AutoModel])
@torch.no_grad()
def test_gates_stay_with_their_tokens(
    loader: Any, tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    """Two open registers precede two gated ones, and one CLS token a gated one."""
    model = build_random(ViTCLSModel, num_register_tokens=2)
    gated = model.adapt(num_cls_tokens=2, num_register_tokens=4, gate_new_tokens=True)
    gated.gates.gates.copy_(torch.tensor([0.5, 0.2, 0.3]) * TokenGates.OPEN)

    for change, gated_tokens, values, logged in (  # numbers of kept, dropped and closed gates
        (
            {"num_register_tokens": 5},  # the added register gets one gate, not two
            {"cls": 1, "registers": 3},
            [0.5, 0.2, 0.3, 0.0],
            ["3", "0", "1"],
        ),
        ({"num_register_tokens": 3}, {"cls": 1, "registers": 1}, [0.5, 0.2], ["2", "1", "0"]),
        ({"num_register_tokens": 2}, {"cls": 1}, [0.5], ["1", "2", "0"]),
        ({"gated_tokens": {"registers": 3}}, {"registers": 3}, [1.0, 0.2, 0.3], ["2", "1", "0"]),
        ({"num_cls_tokens": 1}, {"registers": 2}, [0.2, 0.3], ["2", "1", "0"]),
        (
            {"num_distillation_tokens": 1, "gate_new_tokens": False},
            {"cls": 1, "registers": 2},
            [0.5, 0.2, 0.3],
            [],
        ),
    ):
        caplog.clear()
        changed = adapt_with_loader(gated, loader, tmp_path, **change)
        assert changed.config.gated_tokens == gated_tokens
        notes = [line for line in get_logged_lines(caplog) if line.startswith("gates.gates")]
        assert re.findall(r"\d+", " ".join(notes)) == logged
        assert changed.gates.get_gate_values().tolist() == approx(values, abs=2e-7)

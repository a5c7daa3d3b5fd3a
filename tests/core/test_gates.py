"""Tokens that are added with closed gates: outputs stay the same, gradients are not zero, and training opens the
gates.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adaptation_cases import adapt_with_loader, get_logged_lines
from helpers.tiny_models import (
    build_images,
    build_tiny_config,
    get_largest_difference,
    raises_one_line,
    randomize,
    save_and_load,
)
from sklearn.datasets import load_digits
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel
from modeling_vitcls.attention_masks_vitcls import TokenGates


GATED = {
    "plain": {},
    "scopes": {"num_cls_tokens": 2, "cls_scopes": ["image", [2, 2, 0, 1]]},
    "distances": {"relative_position_bias": "layer"},
    "rope": {"position_embedding_type": "rope_2d"},
    "mean": {"pooling": "mean"},
    "parallel": {"layer_type": "parallel"},
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("fields", GATED.values(), ids=GATED)
def test_gated_tokens_change_nothing_at_first(fields: dict[str, Any], implementation: str, tmp_path: Path) -> None:
    saved = randomize(ViTCLSForImageClassification(build_tiny_config(**fields)))
    saved.save_pretrained(tmp_path)
    for loader in (ViTCLSForImageClassification, AutoModelForImageClassification):
        options = {"num_register_tokens": 4, "attn_implementation": implementation}
        gated = loader.from_pretrained(tmp_path, gate_new_tokens=True, **options)
        with torch.no_grad():
            wanted, found = saved.vitcls(build_images()), gated.vitcls(build_images())
            assert get_largest_difference(gated(build_images()).logits, saved(build_images()).logits) < 1e-5
            for group in ("cls", "patches"):
                assert get_largest_difference(found.tokens[group], wanted.tokens[group]) < 1e-5
            # otherwise, the test could not detect unused tokens
            open_tokens = loader.from_pretrained(tmp_path, **options)
            assert get_largest_difference(open_tokens(build_images()).logits, saved(build_images()).logits) > 1e-3


def test_gates_work_with_attention_masks_of_the_caller() -> None:
    model = randomize(ViTCLSModel(build_tiny_config()))
    gated = model.adapt(num_register_tokens=2, gate_new_tokens=True)
    mask, longer = torch.ones(2, 17), torch.ones(2, 19)
    mask[:, 10:] = 0
    longer[:, 12:] = 0
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        gated.set_attn_implementation(implementation)
        with torch.no_grad():
            wanted, found = model(build_images(), attention_mask=mask), gated(build_images(), attention_mask=longer)
        assert get_largest_difference(found.tokens["cls"], wanted.tokens["cls"]) < 1e-5


def test_gradient_reaches_gates_and_new_tokens() -> None:
    """The gate's gradient is as large as the gradient of an open token's gate, and points to a lower loss."""
    model = randomize(ViTCLSForImageClassification(build_tiny_config()))
    torch.manual_seed(0)
    gated = model.adapt(num_register_tokens=4, gate_new_tokens=True).double()  # for a finite difference
    pixels, labels = build_images().double(), torch.tensor([0, 2])

    def loss(of: ViTCLSForImageClassification) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(of(pixels).logits, labels)

    loss(gated).backward()
    gradient, token_gradient = gated.vitcls.gates.gates.grad, gated.vitcls.embeddings.register_tokens.grad
    assert token_gradient.isfinite().all()
    assert token_gradient.any(dim=-1).all()
    slopes = []
    for index in range(4):
        opened = copy.deepcopy(gated)
        with torch.no_grad():
            opened.vitcls.gates.gates[index] += 1e-4
            slopes.append(((loss(opened) - loss(gated)) / 1e-4).item())
    assert gradient.tolist() == pytest.approx(slopes, rel=0.02)
    assert min(map(abs, slopes)) > 1e-4


@pytest.mark.parametrize("value", [-1e-4, 0.0])
def test_a_gate_at_zero_or_below_still_learns(value: float) -> None:
    """Adam's first step has the size of the learning rate for any gradient, so half of all gates become negative."""
    gated = randomize(ViTCLSForImageClassification(build_tiny_config())).adapt(
        num_register_tokens=4, gate_new_tokens=True
    )
    with torch.no_grad():
        gated.vitcls.gates.gates.fill_(value)
    gated(build_images(), labels=torch.tensor([0, 2])).loss.backward()
    assert gated.vitcls.gates.gates.grad.abs().min() > 1e-5


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2", "flash_attention_3"])
def test_attention_without_bias_support_is_an_error(implementation: str) -> None:
    gated = randomize(ViTCLSModel(build_tiny_config())).adapt(num_register_tokens=1, gate_new_tokens=True)
    gated.config._attn_implementation_internal = implementation  # the package of flash attention need not be installed
    with raises_one_line("gated_tokens", implementation, "sdpa"), torch.no_grad():
        gated(build_images())


def test_gates_are_saved_and_loaded(tmp_path: Path) -> None:
    gated = randomize(ViTCLSModel(build_tiny_config())).adapt(num_register_tokens=3, gate_new_tokens=True)
    with torch.no_grad():
        gated.gates.gates.copy_(torch.tensor([0.1, 0.5, 2.0]))
    again = save_and_load(gated, tmp_path)
    assert again.config.gated_tokens == {"registers": 3}
    assert torch.equal(again.gates.gates, gated.gates.gates)
    with torch.no_grad():
        assert torch.equal(again(build_images()).last_hidden_state, gated(build_images()).last_hidden_state)


@pytest.mark.parametrize("loader", [None, ViTCLSModel, AutoModel])
def test_gates_stay_with_their_tokens(loader: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Check two open registers followed by two gated registers, and one CLS token followed by a gated one."""
    model = randomize(ViTCLSModel(build_tiny_config(num_register_tokens=2)))
    gated = model.adapt(num_cls_tokens=2, num_register_tokens=4, gate_new_tokens=True)
    with torch.no_grad():
        gated.gates.gates.copy_(torch.tensor([0.5, 0.2, 0.3]) * TokenGates.OPEN)
    found = {}
    for name, change in {
        "more": {"num_register_tokens": 5},
        "fewer": {"num_register_tokens": 3},
        "none": {"num_register_tokens": 2},
        "cls": {"num_cls_tokens": 1},
        "another group": {"num_distillation_tokens": 1},
    }.items():
        caplog.clear()
        changed = adapt_with_loader(gated, loader, tmp_path, **change)
        gate_lines = [line for line in get_logged_lines(caplog) if "gates" in line]
        found[name] = changed.config.gated_tokens, changed.gates.get_gate_values().tolist(), gate_lines
    assert found == {
        "more": (
            {"cls": 1, "registers": 3},
            pytest.approx([0.5, 0.2, 0.3, 1e-6], abs=2e-7),
            ["gates.gates: 3 kept, 0 dropped, 1 closed"],
        ),
        "fewer": (
            {"cls": 1, "registers": 1},
            pytest.approx([0.5, 0.2], abs=2e-7),
            ["gates.gates: 2 kept, 1 dropped, 0 closed"],
        ),
        "none": ({"cls": 1}, pytest.approx([0.5], abs=2e-7), ["gates.gates: 1 kept, 2 dropped, 0 closed"]),
        "cls": ({"registers": 2}, pytest.approx([0.2, 0.3], abs=2e-7), ["gates.gates: 2 kept, 1 dropped, 0 closed"]),
        "another group": ({"cls": 1, "registers": 2}, pytest.approx([0.5, 0.2, 0.3], abs=2e-7), []),
    }


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return real handwritten digits, [1797, 1, 8, 8] in [-1, 1], and their labels, [1797]."""
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(data.target)


@pytest.fixture(scope="module")
def digit_model(digits: tuple[torch.Tensor, torch.Tensor]) -> ViTCLSForImageClassification:
    """Return a small model after a few training steps on the digits."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 32, "intermediate_size": 64}
    model = ViTCLSForImageClassification(build_tiny_config(**sizes, num_labels=10))
    train(model, *digits, num_steps=150)
    return model


@pytest.mark.slow
@pytest.mark.integration
def test_fine_tuning_opens_the_gates_and_uses_the_tokens(
    digits: tuple[torch.Tensor, torch.Tensor], digit_model: ViTCLSForImageClassification
) -> None:
    pixels, labels = digits
    gated = add_gated_registers(digit_model, pixels)
    before = copy.deepcopy(gated.vitcls.embeddings.register_tokens)
    losses = train(gated, pixels, labels, num_steps=250)
    assert sum(losses[-50:]) < sum(losses[:50])
    assert gated.vitcls.gates.get_gate_values().mean() > 0.01  # ten thousand times the initial value
    assert (gated.vitcls.embeddings.register_tokens - before).norm(dim=-1).min() > 0.02
    assert measure_effect_of_registers(gated, pixels) > 0.01  # a thousand times the initial effect


def add_gated_registers(model: ViTCLSForImageClassification, pixels: torch.Tensor) -> ViTCLSForImageClassification:
    """Return a model with the same outputs and four more tokens."""
    torch.manual_seed(1)
    gated = model.adapt(num_register_tokens=4, gate_new_tokens=True)
    with torch.no_grad():
        assert get_largest_difference(gated(pixels[:64]).logits, model(pixels[:64]).logits) < 1e-5
    return gated


def measure_effect_of_registers(model: ViTCLSForImageClassification, pixels: torch.Tensor) -> float:
    """Return the largest change of the logits if the gates are closed again."""
    shut = copy.deepcopy(model)
    with torch.no_grad():
        shut.vitcls.gates.gates.zero_()
        return get_largest_difference(shut(pixels[:64]).logits, model(pixels[:64]).logits)


def train(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, num_steps: int) -> list[float]:
    """Train with AdamW on batches of 64 images, and return the loss of each step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    generator, losses = torch.Generator().manual_seed(0), []
    model.train()
    for _ in range(num_steps):
        batch = torch.randint(0, len(labels), (64,), generator=generator)
        loss = model(pixels[batch], labels=labels[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses

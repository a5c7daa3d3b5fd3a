"""Effects find planted truths in small models, and raise no false alarms."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from helpers.digits_models import (
    HELD_OUT,
    LABELS,
    NUM_TRAINED,
    PIXELS,
    build_digits_config,
)
from helpers.tiny_models import build_images, build_tiny_config, randomize
from helpers.varied_models import center_logits

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSForMultiTaskClassification
from modeling_vitcls.analysis.ablation import MIN_IMAGES, Ablations, compute_ablations
from modeling_vitcls.analysis.token_use import TokenUse
from modeling_vitcls.inference.image_pass import ImageBatch


NUM_EPOCHS = 6  # For each register
TASKS = {"parity": 2, "size": 2}


def measure(
    model: Any,
    pixels: torch.Tensor = HELD_OUT[0],
    labels: torch.Tensor | None = HELD_OUT[1],
) -> Ablations:
    return compute_ablations(model, TokenUse(model.config), [ImageBatch(pixels, labels)])


@contextmanager
def hide_keys(model: Any, hidden: slice) -> Iterator[None]:
    """Mask the keys `hidden` for the CLS token in all layers."""

    def mask_keys(attention: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        mask = torch.ones(1, 1, states.shape[1], states.shape[1], dtype=torch.bool)
        mask[:, :, :1, hidden] = False
        if args[1] is not None:
            mask = mask & args[1]
        return (states, mask, *args[2:]), kwargs

    with ExitStack() as hooks:
        for layer in model.base_model.layers:
            hooks.enter_context(
                layer.attention.register_forward_pre_hook(mask_keys, with_kwargs=True)
            )
        yield


# One task -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_registers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_registers_that_carry_all_information_have_an_effect(num_registers: int) -> None:
    """CLS attends to itself and the registers only.

    Two registers may share the information; the group is found.
    """
    torch.manual_seed(0)
    config = build_digits_config(num_register_tokens=num_registers, num_labels=10)
    model = ViTCLSForImageClassification(config)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    with hide_keys(model, slice(1 + num_registers, None)):
        for _ in range(NUM_EPOCHS * num_registers):
            for indices in torch.randperm(NUM_TRAINED).split(100):
                optimizer.zero_grad()
                model(PIXELS[indices], labels=LABELS[indices]).loss.backward()
                optimizer.step()
        found = measure(model.eval())
    effect = found["register" if num_registers == 1 else "all register tokens"][""]
    assert effect.comparison == "costs accuracy"


# Several tasks ------------------------------------------------------------------------------------


def test_each_task_has_its_own_effects() -> None:
    """A head of zeros has no effects, and changes no value of the other task."""
    config = build_digits_config(num_cls_tokens=2, num_register_tokens=1, tasks=TASKS)
    model = center_logits(ViTCLSForMultiTaskClassification(config), HELD_OUT[0])
    labels = torch.stack([HELD_OUT[1] % 2, (HELD_OUT[1] >= 5).long()], dim=1)
    found = measure(model, labels=labels)
    assert found["CLS parity"]["parity"].comparison == "read by a head"
    assert found["CLS size"]["size"].comparison == "read by a head"
    assert found["register"].keys() == TASKS.keys()
    assert "all CLS tokens" in found  # both CLS tokens together

    model.classifiers["task_size"].weight.data.zero_()
    changed = measure(model, labels=labels)
    assert changed["CLS size"]["size"].comparison == "no change"
    for key in ("CLS parity", "register"):
        before, after = found[key]["parity"], changed[key]["parity"]
        assert after.size == pytest.approx(before.size, rel=1e-4)
        assert after.comparison == before.comparison


# Random models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 10))]
)
def test_random_models_raise_no_false_alarm(seed: int) -> None:
    torch.manual_seed(seed)
    tokens = {"num_distillation_tokens": 1, "num_register_tokens": 2}
    config = build_tiny_config(num_hidden_layers=3, num_labels=8, **tokens)
    model = randomize(ViTCLSForImageClassification(config), seed)
    model = center_logits(model, build_images(MIN_IMAGES))
    pixels = build_images(MIN_IMAGES, seed=seed)
    found = measure(model, pixels, torch.arange(len(pixels)) % 8)
    for key in ("register 1", "register 2", "all register tokens"):
        assert found[key][""].comparison in ("no more", "no change"), key

"""What tokens hold and what their places are worth: numbers, verdicts, and planted truths."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from helpers.digits_models import (
    HELD_OUT,
    LABELS,
    NUM_TRAINED,
    PIXELS,
    build_digits_config,
    train_digits_model,
)
from helpers.tiny_models import TASKS, build_images, build_tiny_config, randomize
from scipy.special import log_softmax

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)
from modeling_vitcls.evaluation.token_effects import (
    MIN_IMAGES,
    Change,
    Effects,
    choose_donors,
    compare,
    judge,
    list_token_sets,
    measure_effects,
)
from modeling_vitcls.frozen.targets import OneLabelTarget
from modeling_vitcls.inference.image_pass import ImageBatch


VERDICTS = {"content", "place", "not shown", "better without"}


def measure(
    model: Any,
    pixels: torch.Tensor = HELD_OUT[0],
    labels: torch.Tensor | None = HELD_OUT[1],
) -> Effects:
    batches = [
        ImageBatch(pixels[rows], None if labels is None else labels[rows], rows.tolist())
        for rows in torch.arange(len(pixels)).split(50)
    ]
    return measure_effects(model.eval(), list_token_sets(model.config), batches)


# Numbers ------------------------------------------------------------------------------------------


def test_a_change_has_paired_losses_and_accuracies() -> None:
    generator = np.random.default_rng(0)
    before, after = generator.normal(size=(2, 40, 3)).astype(np.float32)
    labels = generator.integers(0, 3, 40)
    found = compare(*map(torch.from_numpy, (before, after)), OneLabelTarget, torch.tensor(labels))

    losses = [-log_softmax(each, axis=1)[range(40), labels] for each in (before, after)]
    right = [each.argmax(axis=1) == labels for each in (before, after)]
    record = found.build_record()
    assert record["loss"] == pytest.approx(losses[1].mean(), abs=1e-6)
    assert record["loss_change"] == pytest.approx((losses[1] - losses[0]).mean(), abs=1e-6)
    assert record["accuracy"] == right[1].mean()
    assert record["gained"] == (right[1] & ~right[0]).sum()
    assert record["lost"] == (right[0] & ~right[1]).sum()
    assert record["num_changed"] == (before.argmax(axis=1) != after.argmax(axis=1)).sum()
    low, high = record["loss_interval"]
    spread = (losses[1] - losses[0]).std() / 40**0.5
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.15)


def test_images_without_a_known_label_are_left_out() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    found = compare(logits, -logits, OneLabelTarget, torch.tensor([0, -100, 0]))
    assert found.build_record()["lost"] == 2
    assert found.losses.shape == (2, 2)


def change(mean: float, right_before: float = 1, right_after: float = 1) -> Change:
    costs = mean + 0.01 * np.random.default_rng(0).normal(size=100)
    was, now = (np.arange(100) < 100 * share for share in (right_before, right_after))
    return Change(np.stack([0 * costs, costs]), 0, np.stack([was, now]))


@pytest.mark.parametrize(
    ("absent", "content", "verdict"),
    [
        (change(0.9), change(0.8), "content"),
        (change(0.9), change(0.0), "place"),
        (change(0.9), change(0.01), "place"),  # a tenth of the place would be content
        (change(0.0), change(0.0), "not shown"),
        (change(-0.03), change(0.0), "better without"),
        (change(-0.03), change(0.5), "content"),  # as of a token that a head reads
        (change(-0.03, 0.9, 0.7), change(0.0), "place"),  # a model that was too sure
        (change(0.0, 0.9, 0.7), change(0.0), "place"),
    ],
)
def test_four_cases_have_four_names(absent: Change, content: Change, verdict: str) -> None:
    assert judge(absent, content) == verdict


def test_without_labels_no_model_is_better_without_a_token() -> None:
    losses = np.stack([np.ones(50), np.full(50, 0.5)])
    assert judge(Change(losses, 3), Change(losses[[0, 0]], 0)) == "not shown"


def test_the_tokens_come_from_photos_of_other_classes() -> None:
    labels = torch.tensor([0] * 20 + [1] * 10)
    donors = choose_donors({"": labels}, 30)
    assert (labels[donors] != labels).all()
    assert len({*donors}) > 15
    assert all(donor != index for index, donor in enumerate(choose_donors({"": 0 * labels}, 30)))
    assert choose_donors({}, 1) == [0]


# Models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_class", "fields"),
    [
        (ViTCLSForImageClassification, {"num_labels": 4, "num_cls_tokens": 0, "pooling": "mean"}),
        (ViTCLSForImageClassification, {"num_labels": 4, "attention_type": "differential"}),
        (ViTCLSForImageClassification, {"num_labels": 4, "position_embedding_type": "rope_2d"}),
        (ViTCLSForMultiTaskClassification, {"tasks": TASKS, "num_cls_tokens": len(TASKS)}),
        (ViTCLSModel, {}),
    ],
    ids=str,
)
def test_any_model_is_measured_on_few_photos(model_class: Any, fields: dict[str, Any]) -> None:
    model = randomize(model_class(build_tiny_config(num_register_tokens=2, **fields)))
    for number in (1, MIN_IMAGES):
        found = measure(model, build_images(number), None)
        assert {"register 1", "register 2", "all register tokens"} <= found.keys()
        for effects in found.values():
            assert {effect.verdict for effect in effects.values()} <= VERDICTS
    assert all(
        effect.verdict == "not shown"
        for effects in measure(model, build_images(MIN_IMAGES - 1), None).values()
        for effect in effects.values()
    )


def test_a_model_without_special_tokens_has_no_effects() -> None:
    config = build_tiny_config(num_labels=4, num_cls_tokens=0, pooling="mean")
    assert measure(ViTCLSForImageClassification(config), build_images(2), None) == {}


def test_each_task_has_its_own_effects() -> None:
    """A head of zeros has no effects, and changes no value of the other task."""
    tasks = {"parity": 2, "size": 2}
    config = build_digits_config(num_cls_tokens=2, num_register_tokens=1, tasks=tasks)
    model = randomize(ViTCLSForMultiTaskClassification(config))
    labels = torch.stack([HELD_OUT[1] % 2, (HELD_OUT[1] >= 5).long()], dim=1)
    found = measure(model, labels=labels)
    assert found["register"].keys() == tasks.keys()

    model.classifiers["task_size"].weight.data.zero_()
    changed = measure(model, labels=labels)
    assert changed["CLS size"]["size"].content.cost == 0
    for key in ("CLS parity", "register"):
        before, after = found[key]["parity"], changed[key]["parity"]
        assert after.content.cost == pytest.approx(before.content.cost, rel=1e-4)


# Planted truths -----------------------------------------------------------------------------------


@contextmanager
def hide_keys(model: Any, hidden: slice) -> Iterator[None]:
    """Mask the keys `hidden` for the CLS token in all layers."""

    def mask_keys(attention: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        mask = torch.zeros(1, 1, states.shape[1], states.shape[1])
        mask[:, :, :1, hidden] = torch.finfo(mask.dtype).min
        if args[1] is not None:
            mask = mask + args[1]
        return (states, mask, *args[2:]), kwargs

    with ExitStack() as hooks:
        for layer in model.base_model.layers:
            hooks.enter_context(
                layer.attention.register_forward_pre_hook(mask_keys, with_kwargs=True)
            )
        yield


@pytest.mark.parametrize("num_registers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_registers_that_carry_all_information_have_content(num_registers: int) -> None:
    """CLS attends to itself and the registers only, which may share the information."""
    torch.manual_seed(0)
    config = build_digits_config(num_register_tokens=num_registers, num_labels=10)
    model = ViTCLSForImageClassification(config)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    with hide_keys(model, slice(1 + num_registers, None)):
        for _ in range(6 * num_registers):
            for indices in torch.randperm(NUM_TRAINED).split(100):
                optimizer.zero_grad()
                model(PIXELS[indices], labels=LABELS[indices]).loss.backward()
                optimizer.step()
        found = measure(model.eval())
    name = "register" if num_registers == 1 else "all register tokens"
    assert found[name][""].verdict == "content"
    assert found["CLS"][""].verdict == "content"


@pytest.mark.slow
def test_a_register_that_mends_a_bias_is_found_and_idle_ones_are_not() -> None:
    """Register 1 alone is trained, 2 is random behind a half-open gate, 3 behind a closed one."""
    model = train_digits_model(num_register_tokens=0)
    model = model.adapt(num_register_tokens=3)
    with torch.no_grad():
        model.classifier.bias[3] += 8
        model.vitcls.gates.gates.copy_(torch.tensor([1.0, 0.5, 0.0]) * model.vitcls.gates.OPEN)
    token = model.vitcls.embeddings.register_tokens
    optimizer = torch.optim.Adam([token], lr=0.05)
    for _ in range(4):
        for indices in torch.randperm(NUM_TRAINED).split(100):
            optimizer.zero_grad()
            model(PIXELS[indices], labels=LABELS[indices]).loss.backward()
            token.grad[:, 1:] = 0
            optimizer.step()

    found = {name: effects[""] for name, effects in measure(model).items()}
    assert found["register 1"].verdict in ("content", "place")
    assert found["register 1"].hidden.is_harmful
    assert found["register 2"].hidden.cost < found["register 1"].hidden.cost / 4
    assert found["register 2"].verdict != "content"
    for change in (found["register 3"].hidden, found["register 3"].content):
        assert change.cost == pytest.approx(0, abs=1e-7)
        assert change.num_changed == 0
    assert found["register 3"].verdict == "not shown"

"""The training loop: steps, checkpoints, tokens, losses, and signals."""

import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from helpers.accelerate_state import reset_accelerate
from helpers.batch_plans import build_plan
from helpers.read_datasets import read_training_data
from helpers.tiny_models import PROCESSOR, assert_same_bits, build_random
from helpers.tiny_options import PLAIN, TINY, build_initial_model
from helpers.warm_processes import SECONDS
from pytest import MonkeyPatch, approx
from rich.console import Console
from torch import nn
from torch.testing import assert_close

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
)
from modeling_vitcls.data.augmentation import build_augmentation
from modeling_vitcls.data.batches import (
    Normalizer,
    TrainingImages,
    iterate_training_batches,
)
from modeling_vitcls.runtime.errors import RunStopped
from modeling_vitcls.training.loop import (
    TrainingLoop,
)
from modeling_vitcls.training.losses import (
    compute_batch_losses,
    compute_multi_label_loss,
    compute_multi_task_loss,
    compute_single_label_loss,
)
from modeling_vitcls.training.optimizer import (
    build_parameter_groups,
)
from modeling_vitcls.training.signals import (
    LAUNCHER_ENVIRONMENT_VARIABLES,
    STOP_SIGNALS,
    SignalHandler,
)


DIGITS = read_training_data("digits")
DIGITS = replace(DIGITS, train=DIGITS.train.draw(360))


def build_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(build_parameter_groups(model, 0.05), lr=1e-3, fused=True)


def build_sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer that shows every difference in scale."""
    return torch.optim.SGD(build_parameter_groups(model, 0.0, 0.5), lr=0.5)


class RecordedLoop:
    """A training loop on digits that keeps the saved steps."""

    def __init__(
        self,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] = build_adamw,
        save_every: int | None = None,
        warmup: float = 0.1,
        **training: Any,
    ) -> None:
        reset_accelerate()
        self.plan = build_plan(len(DIGITS.train), **{"max_steps": 4, "batch_size": 8} | training)
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=self.plan.accumulation_steps
        )
        torch.manual_seed(0)
        self.model, processor, _ = build_initial_model(label_space=DIGITS.label_space, **vars(TINY))
        prepared = self.accelerator.prepare(self.model, optimizer(self.model))
        self.normalise = Normalizer(processor, self.accelerator.device)
        self.reporter = Mock(console=Console(quiet=True))
        self.saved: list[int] = []
        classification = partial(
            compute_batch_losses,
            normalize=self.normalise,
            compute_label_loss=partial(compute_single_label_loss, label_smoothing=0.1),
        )

        def objective(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
            assert self.model.training
            return classification(model, batch)

        self.loop = TrainingLoop(
            *prepared,
            objective,
            lambda model: self.evaluate(),
            self.plan,
            warmup,
            self.accelerator,
            reporter=self.reporter,
            store=Mock(save=lambda step, tensors, metadata: self.saved.append(step)),
            save_every=save_every,
            signals=Mock(get_signal=lambda: None),
        )

    def evaluate(self) -> dict[str, Any]:
        assert not self.model.training
        return {"loss": 1.0, "accuracy": 0.5, "num_images": 7, "per_class": []}

    def batches(self) -> Iterator[Any]:
        pictures = TrainingImages(
            DIGITS.train,
            *build_augmentation(PLAIN, PROCESSOR),
            label_space=DIGITS.label_space,
            to_rgb=True,
            seed=0,
            bit_depth=16,
            num_channels=3,
        )
        return iterate_training_batches(
            pictures, self.plan, process_index=0, num_workers=0, first_step=self.loop.step
        )

    def run(self) -> dict[str, Any]:
        return self.loop.run(self.batches())


def copy_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# Steps --------------------------------------------------------------------------------------------


def test_steps_equal_a_plain_training_loop(monkeypatch: MonkeyPatch) -> None:
    """Loss, accumulation, learning rates of all layers, clipping, and cleared gradients."""
    settings = {
        "max_steps": 3,
        "warmup": 0.0,
        "gradient_accumulation_steps": 2,
    }
    monkeypatch.setattr("modeling_vitcls.training.loop.MAX_GRADIENT_NORM", 0.1)
    bench = RecordedLoop(build_sgd, **settings)
    torch.manual_seed(0)
    reference = build_initial_model(label_space=DIGITS.label_space, **vars(TINY))[0].train()
    optimizer = build_sgd(reference)
    batches = bench.batches()
    norms = []
    for step in range(3):
        for batch in itertools.islice(batches, 2):
            logits = reference(bench.normalise(batch["pixels"])).logits
            loss = nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.1)
            (loss / 2).backward()
        norms.append(nn.utils.clip_grad_norm_(reference.parameters(), 0.1).item())
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * 0.5 * (1 + math.cos(math.pi * step / 3)) / 2
        optimizer.step()
        optimizer.zero_grad()

    bench.run()
    records = [call.args[0] for call in bench.reporter.log.call_args_list]
    assert [record["gradient_norm"] for record in records] == approx(norms, rel=1e-4)
    assert min(norms) > 0.2  # all steps are clipped
    for name, weight in reference.named_parameters():
        assert_close(bench.model.get_parameter(name), weight, atol=1e-6, rtol=0)


# Checkpoints and signals --------------------------------------------------------------------------


def test_checkpoints_are_saved_when_due(monkeypatch: MonkeyPatch) -> None:
    bench = RecordedLoop(max_steps=8, save_every=3)
    bench.run()
    assert bench.saved == [3, 6, 8]
    # two steps per epoch
    monkeypatch.setattr("modeling_vitcls.training.loop.MAX_EVALUATIONS", 2)
    at_evaluations = RecordedLoop(epochs=3, max_steps=None, batch_size=180)
    at_evaluations.run()
    assert at_evaluations.saved == [4, 6]


def build_overflowing_loop(**training: Any) -> RecordedLoop:
    """Return a loop as with fp16, in which all gradients are infinite.

    The loss scaler skips the steps.
    """
    bench = RecordedLoop(**training)
    scaler = bench.accelerator.scaler = torch.amp.GradScaler("cpu")
    bench.loop.optimizer = AcceleratedOptimizer(bench.loop.optimizer.optimizer, scaler=scaler)
    for parameter in bench.model.parameters():
        parameter.register_hook(lambda gradient: gradient * math.inf)
    return bench


@pytest.mark.parametrize(
    ("accumulation", "build"), [(1, RecordedLoop), (2, build_overflowing_loop)]
)
def test_a_non_finite_loss_stops_before_the_update(accumulation: int, build: Any) -> None:
    bench = build(max_steps=4, gradient_accumulation_steps=accumulation)
    batches = bench.batches()
    bench.loop.run_step(batches)
    before = copy_weights(bench.model)
    objective = bench.loop.objective
    factors = iter([math.nan, 1.0])
    bench.loop.objective = lambda model, batch: {
        "loss": objective(model, batch)["loss"] * next(factors)
    }

    with pytest.raises(RunStopped, match=r"not finite in step 2\. Set a lower `learning_rate`"):
        bench.loop.run_step(batches)
    assert_same_bits(copy_weights(bench.model), before)
    assert all(parameter.grad is None for parameter in bench.model.parameters())
    assert bench.loop.step == 1


@pytest.mark.parametrize(("build", "step"), [(build_overflowing_loop, 20), (RecordedLoop, 1)])
def test_permanently_non_finite_gradients_stop_the_run(build: Any, step: int) -> None:
    """A loss scaler skips the first steps."""
    bench = build(max_steps=40)
    bench.model.classifier.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(RunStopped, match=f"not finite in step {step}"):
        bench.run()
    assert bench.saved == []


# Losses -------------------------------------------------------------------------------------------


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    return pixels / 255


def test_soft_and_hard_labels_agree() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 4)
    labels = torch.randint(4, (6,))
    weights = torch.tensor([0.5, 1.0, 2.0, 0.1])
    plain = partial(compute_single_label_loss, label_smoothing=0.1)
    weighted = partial(compute_single_label_loss, label_smoothing=0.0, class_weights=weights)
    for loss in (plain, weighted):
        soft = nn.functional.one_hot(labels, 4).float()
        assert_close(loss(logits, soft), loss(logits, labels))
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert_close(plain(logits, labels), expected)
    half = logits.bfloat16()
    assert torch.equal(plain(half, labels), plain(half.float(), labels))
    other = labels.flip(0)
    mixed = 0.75 * soft + 0.25 * nn.functional.one_hot(other, 4)
    image_losses = nn.functional.cross_entropy(logits, mixed, reduction="none")
    expected = ((0.75 * weights[labels] + 0.25 * weights[other]) * image_losses).mean()

    assert_close(weighted(logits, mixed), expected)


def test_multi_label_loss_is_binary() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 4)
    labels = torch.randint(2, (6, 4)).float()
    smooth = torch.where(labels == 1, 0.9, 0.1)
    expected = nn.functional.binary_cross_entropy_with_logits(logits, smooth)
    assert_close(compute_multi_label_loss(logits, labels, 0.2), expected)
    half = logits.bfloat16()
    loss = partial(compute_multi_label_loss, labels=labels, label_smoothing=0.2)
    assert torch.equal(loss(half), loss(half.float()))


def test_multi_task_loss_ignores_missing_labels() -> None:
    fields = {"num_cls_tokens": 2, "tasks": {"age": 3, "kind": 2}}
    model = build_random(ViTCLSForMultiTaskClassification, **fields)
    labels = torch.tensor([[0, -100], [-100, -100]])
    batch = {"pixels": torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8), "labels": labels}
    multi_task_loss = partial(compute_multi_task_loss, label_smoothing=0.0)
    objective = partial(
        compute_batch_losses, model, normalize=normalize, compute_label_loss=multi_task_loss
    )
    loss = objective(batch)["loss"]
    logits = model(normalize(batch["pixels"])).logits["age"][:1]
    expected = nn.functional.cross_entropy(logits, torch.tensor([0]))
    assert_close(loss, expected / 2)
    loss.backward()
    # DDP waits for the gradients of all parameters
    assert all(parameter.grad is not None for parameter in model.parameters())
    complete = {"age": torch.tensor([0, 2]), "kind": torch.tensor([1, 0])}
    table = torch.stack(list(complete.values()), dim=1)
    loss = objective(batch | {"labels": table})["loss"]

    assert_close(loss, model(normalize(batch["pixels"]), labels=complete).loss)


def test_every_head_is_trained_without_a_teacher() -> None:
    """Also if only the class head predicts."""
    fields = {"num_distillation_tokens": 1, "distillation_inference": "cls"}
    model = build_random(ViTCLSForImageClassification, **fields).train()
    batch = {"pixels": torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "labels": torch.tensor([0, 1])}
    label_loss = partial(compute_single_label_loss, label_smoothing=0.0)
    losses = compute_batch_losses(model, batch, normalize=normalize, compute_label_loss=label_loss)
    own = model(normalize(batch["pixels"]), labels=batch["labels"]).loss  # of both (test_losses.py)
    assert_close(losses["loss"], own)


# Signals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signals_stop_training_at_the_next_check(
    number: signal.Signals, monkeypatch: MonkeyPatch
) -> None:
    """A busy machine may pause between the signals."""
    monkeypatch.setattr("modeling_vitcls.training.signals.MAX_FORWARDING_SECONDS", SECONDS)
    before = signal.getsignal(number)
    with SignalHandler() as interruption:
        assert interruption.get_signal() is None
        signal.raise_signal(number)
        assert interruption.get_signal() == number.name
        signal.raise_signal(number)  # the launcher sends the signal again
        assert interruption.get_signal() == number.name
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("earlier", [[signal.SIGINT] * 2, [signal.SIGTERM]], ids=str)
def test_an_interrupt_seconds_after_another_signal_ends_at_once(earlier: list[int]) -> None:
    """A launcher forwards an interrupt at once: after two, the checkpoint is still saved."""
    with SignalHandler() as interruption:
        for number in earlier:
            signal.raise_signal(number)
        interruption.signal_times[earlier[0]] -= 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
            time.sleep(1)


def test_ignored_signals_stay_ignored() -> None:
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with SignalHandler() as interruption:
            signal.raise_signal(signal.SIGINT)
            assert interruption.get_signal() is None
    finally:
        signal.signal(signal.SIGINT, old)


@pytest.mark.parametrize(
    ("launcher", "name"),
    [("ACCELERATE_MIXED_PRECISION", "SIGTERM"), ("TORCHELASTIC_RUN_ID", "SIGTERM"), ("HOME", None)],
)
def test_a_change_of_the_parent_process_is_a_signal(
    launcher: str, name: str | None, monkeypatch: MonkeyPatch
) -> None:
    """Only if a launcher has started this process."""
    parent = [100]
    for variable in LAUNCHER_ENVIRONMENT_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(launcher, "no")
    monkeypatch.setattr(os, "getppid", lambda: parent[0])
    handler = SignalHandler()
    assert handler.get_signal() is None
    parent[0] = 1
    assert handler.get_signal() == name

"""The training loop.

    batch -> objective -> gradients, accumulated -> clipped -> AdamW -> moving average
                                    and, now and then: a line of metrics, an evaluation, a checkpoint

What changes from step to step is in `TrainingState`. The order of the pictures, their augmentation, the learning rate
and the random numbers inside the model are all functions of the step, so nothing else describes where a run stands.
What is trained, on which loss, how it is evaluated and where it is saved is the caller's.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn

from ..data.batches import BatchPlan
from ..data.random_bits import seed_for
from ..inference.metrics import scalars
from ..options import TrainingOptions
from ..system import peak_memory
from .distributed_state import reshard
from .losses import Batch, Losses, Objective
from .optimizer import Ema, build_updates, learning_rate_at, set_learning_rate
from .token_monitor import TokenMonitor, Tokens
from .trainable import set_training


Metrics = dict[str, Any]

OVERFLOWS = 19  # steps in a row that fp16's loss scaler may leave out: at one more it has divided its scale by 2^20


@dataclass
class TrainingState:
    """All that a run changes; model and optimiser as `Accelerator.prepare` returned them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None
    step: int = 0  # optimiser steps done
    best_score: float | None = None  # of the evaluations so far
    window: list[dict[str, float]] = field(default_factory=list)  # losses of the batches since the last logged step
    attention: Metrics = field(default_factory=dict)  # measured since then
    record: Metrics = field(default_factory=dict)  # of the last step, while its evaluation is still to come


@dataclass
class Hooks:
    """What a run does besides training; each is called on all processes."""

    evaluate: Callable[[], Metrics]  # of the model as it is
    log: Callable[[Metrics], None]  # one record per logged step
    warn: Callable[[str], None]  # one line
    save: Callable[[bool], None]  # a checkpoint of the state; whether it is the best so far
    note_batch: Callable[[Batch], None] = lambda batch: None  # each batch, before it is used
    measure_attention: Callable[[Batch], Metrics] = lambda batch: {}  # every `health_every` steps
    note_speed: Callable[[int, float], Metrics] = lambda num_images, seconds: {}  # of the steps of each record
    stop_requested: Callable[[], str | None] = lambda: None  # the name of the signal, if one asks to stop
    publish: Callable[[], None] = lambda: None  # after each step but the last, whose weights are the result


class Interrupted(Exception):
    """A signal asked to stop; a checkpoint was saved."""


class NonFiniteLoss(Exception):
    """The loss, or its gradient, is no number any more. The weights are those before the step; under DeepSpeed, where
    gradients show only afterwards, those after it if the loss was still one."""

    def __init__(self, step: int, batches: list[Batch]) -> None:
        super().__init__(
            f"the loss or its gradient is not finite in step {step + 1}: try a lower --learning-rate, a longer "
            "--warmup, a smaller --max-gradient-norm, or --mixed-precision no"
        )
        self.step = step
        self.batches = batches  # of this process, accumulated in that step


class TrainingLoop:
    """Trains from `state.step` to `plan.num_steps`."""

    def __init__(
        self,
        state: TrainingState,
        objective: Objective,
        plan: BatchPlan,
        options: TrainingOptions,
        accelerator: Accelerator,
        hooks: Hooks,
        monitor: TokenMonitor,
        save_every: int | None = None,
    ) -> None:
        """`save_every`: steps between two checkpoints; None saves one at each evaluation."""
        self.state = state
        self.objective = objective
        self.plan = plan
        self.options = options
        self.accelerator = accelerator
        self.hooks = hooks
        self.save_every = save_every
        self.monitor = monitor
        self.updates = build_updates(accelerator, state.model, state.optimizer, options.max_gradient_norm)
        self.seconds: list[float] = []  # of the steps since the last logged one
        self.is_best = False  # whether the last step's evaluation was the best so far
        self.overflows = 0  # steps in a row that the loss scaler left out
        self.peak_memory = 0  # bytes, until the last logged step

    def run(self, batches: Iterator[Batch]) -> Metrics:
        """Train, and return the metrics of the evaluation at the end.

        Args:
            batches: this process's batches on the CPU, `gradient_accumulation_steps` of them per step, from
                `state.step` on.

        Raises:
            Interrupted: after a signal asked to stop, once a checkpoint was saved.
            NonFiniteLoss: before such a loss changes the weights.
        """
        set_training(self.state.model)
        metrics = self.evaluate_step() if self.state.record else {}
        while self.state.step < self.plan.num_steps:
            metrics = self.advance(batches)
            if self.state.step == self.plan.num_steps:
                break
            if signal := self.hooks.stop_requested():
                self.hooks.save(self.is_best)
                raise Interrupted(signal)
            self.hooks.publish()
        return metrics or self.evaluated()

    def advance(self, batches: Iterator[Batch]) -> Metrics:
        """One step, and what is due after it; returns the metrics if it was evaluated.

        A checkpoint that is due is saved before an evaluation, which may take longer than a cluster waits for a run to
        end. A run that goes on from it makes the evaluation first.
        """
        state, done = self.state, self.state.step + 1
        is_last = done == self.plan.num_steps
        evaluates = is_last or ends_epochs(done, self.options.evaluate_every, self.plan)
        logs = evaluates or done % self.options.log_every == 0
        saves = evaluates if self.save_every is None else is_last or done % self.save_every == 0

        started = time.perf_counter()
        record, batch = self.step(batches, with_health=logs)
        self.seconds.append(time.perf_counter() - started)

        if self.options.health_every and done % self.options.health_every == 0:
            state.attention = self.hooks.measure_attention(batch)
            reshard(state.model)
        self.is_best = False
        if logs:
            record |= self.means_since_last_log() | state.attention
            state.attention = {}
        if evaluates:
            state.record = record
        elif logs:
            self.hooks.log(record)
        if saves:
            self.hooks.save(False)
        return self.evaluate_step() if evaluates else {}

    def evaluate_step(self) -> Metrics:
        """Evaluate the last step, log its record, and save it if it is the best so far."""
        state = self.state
        metrics = self.evaluated()
        score = score_of(metrics)
        self.is_best = score is not None and (state.best_score is None or score > state.best_score)
        state.best_score = score if self.is_best else state.best_score
        self.hooks.log(state.record | {f"held_out_{name}": value for name, value in scalars(metrics).items()})
        state.record = {}
        if self.is_best:
            self.hooks.save(True)
        return metrics

    def step(self, batches: Iterator[Batch], with_health: bool) -> tuple[Metrics, Batch]:
        """One optimiser step over the accumulated batches: a record of it, and the last batch, on the device."""
        state, options, accelerator = self.state, self.options, self.accelerator
        learning_rate = learning_rate_at(state.step, self.plan.num_steps, options)
        set_learning_rate(state.optimizer, learning_rate)
        used: list[Batch] = []
        losses: list[Losses] = []
        before: list[tuple[Tokens, Tokens]] = []  # tokens and their gradients, when the step is made

        def check(norm: float) -> None:
            self.check_finite(losses, norm, used)

        def look() -> None:
            if with_health:
                before.append((self.monitor.tokens(), self.monitor.gradients()))

        for accumulated in range(self.plan.accumulation_steps):
            batch = next(batches)
            self.hooks.note_batch(batch)
            used.append(batch)
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            torch.manual_seed(seed_for(self.plan.seed, state.step, accumulated, accelerator.process_index))
            with accelerator.accumulate(state.model):
                found = self.objective(state.model, batch)
                losses.append({name: loss.detach() for name, loss in found.items()})
                self.updates.backward(found["loss"])
                if accelerator.sync_gradients:  # after the last accumulated batch
                    gradient_norm = self.updates.step(check, look)
        state.step += 1
        if state.ema is not None:
            state.ema.update(state.step)
        state.window += [{name: loss.item() for name, loss in found.items()} for found in losses]
        record: Metrics = {
            "step": state.step,
            "epoch": round(self.plan.epochs_after(state.step), 4),
            "learning_rate": learning_rate,
            "gradient_norm": round(gradient_norm, 6) if math.isfinite(gradient_norm) else None,
        }
        if before:
            health = self.monitor.health(*before[0])
            record |= health.record()
            for token in self.monitor.newly_without_gradient(health):
                self.hooks.warn(f"the token {token} got no gradient in step {state.step}: it cannot learn")
        return record, batch

    def check_finite(self, losses: list[Losses], gradient_norm: float, used: list[Batch]) -> None:
        """Raise NonFiniteLoss, on all processes if on one, unless losses and gradients are numbers.

        Under fp16 gradients overflow now and then: the loss scaler then leaves the step out and scales less. Where
        that does not help, they are no numbers at any scale.
        """
        self.overflows = 0 if math.isfinite(gradient_norm) else self.overflows + 1
        allowed = OVERFLOWS if self.accelerator.scaler is not None else 0
        is_finite = all(math.isfinite(found["loss"]) for found in losses) and self.overflows <= allowed
        if self.accelerator.num_processes > 1:
            others = torch.tensor(float(is_finite), device=self.accelerator.device)
            is_finite = bool(self.accelerator.reduce(others, "sum") == self.accelerator.num_processes)
        if not is_finite:
            self.raise_non_finite(used)

    def raise_non_finite(self, used: list[Batch]) -> NoReturn:
        """Leave the state as it was before the step."""
        self.state.optimizer.zero_grad()
        raise NonFiniteLoss(self.state.step, used)

    def evaluated(self) -> Metrics:
        """Metrics on held-out pictures, of the averaged weights where there are any."""
        self.state.model.eval()
        if self.state.ema is None:
            metrics = self.hooks.evaluate()
        else:
            with self.state.ema.in_place():
                metrics = self.hooks.evaluate()
        reshard(self.state.model)
        set_training(self.state.model)
        return metrics

    def means_since_last_log(self) -> Metrics:
        """Losses and speed (without evaluations and checkpoints) over all processes, and peak memory."""
        names = list(self.state.window[0])
        means = [math.fsum(found[name] for found in self.state.window) / len(self.state.window) for name in names]
        num_images, seconds = len(self.seconds) * self.plan.pictures_per_step, math.fsum(self.seconds)
        self.peak_memory = max(self.peak_memory, peak_memory(self.accelerator.device))  # `note_speed` resets it
        self.state.window.clear()
        self.seconds.clear()
        losses = self.accelerator.reduce(torch.tensor(means, device=self.accelerator.device), "mean").tolist()
        return {
            **{name: round(mean, 6) for name, mean in zip(names, losses, strict=True)},
            "images_per_second": round(num_images / seconds, 1),
            **self.hooks.note_speed(num_images, seconds),
            "peak_memory_mb": round(self.peak_memory / 2**20, 1),
        }


def ends_epochs(step: int, every: int, plan: BatchPlan) -> bool:
    """Whether the step completes another `every` epochs."""
    return math.floor(plan.epochs_after(step) / every) > math.floor(plan.epochs_after(step - 1) / every)


def score_of(metrics: Metrics) -> float | None:
    """What evaluations are compared by, higher being better: the first metric, negated if it is a loss. None where
    there is none, or it is not known."""
    name, value = next(iter(metrics.items()), ("", None))
    return -value if value is not None and name.endswith("loss") else value

"""The training loop.

    batch -> objective -> accumulated gradients -> clipping -> AdamW -> moving average
                          and at intervals: a metrics record, an evaluation, a checkpoint

`TrainingState` contains everything that changes during training. The order of the images, their augmentation, the
learning rate and the random numbers in the model are functions of the step, so they are not part of the state. The
caller provides model, loss, evaluation and checkpoint storage.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

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
from .optimizer import Ema, build_optimizer_step, get_learning_rate, set_learning_rate
from .token_monitor import TokenMonitor, Tokens
from .trainable import set_train_mode


Metrics = dict[str, Any]

# Maximum number of consecutive steps that fp16's loss scaler may skip. One more would reduce its scale by 2^20.
MAX_OVERFLOWS = 19


@dataclass
class TrainingState:
    """State that changes during training. Model and optimizer are wrapped by `Accelerator.prepare`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None
    step: int = 0  # number of completed optimizer steps
    best_score: float | None = None  # best score of the evaluations so far
    window: list[dict[str, float]] = field(default_factory=list)  # losses of the batches since the last logged step
    attention: Metrics = field(default_factory=dict)  # attention metrics since the last logged step
    record: Metrics = field(default_factory=dict)  # record of the last step until its evaluation is finished


@dataclass
class Hooks:
    """Callbacks of the training loop. Each is called on all processes."""

    evaluate: Callable[[], Metrics]  # evaluates the current model
    log: Callable[[Metrics], None]  # logs the record of a step
    warn: Callable[[str], None]  # prints a one-line warning
    save: Callable[[bool], None]  # saves a checkpoint; the argument is whether it is the best so far
    on_batch: Callable[[Batch], None] = lambda batch: None  # called for each batch before the forward pass
    measure_attention: Callable[[Batch], Metrics] = lambda batch: {}  # called every `health_every` steps
    record_speed: Callable[[int, float], Metrics] = lambda num_images, seconds: {}  # called for each record
    get_stop_signal: Callable[[], str | None] = lambda: None  # returns the name of the stop signal
    publish: Callable[[], None] = lambda: None  # called after each step except the last


class Interrupted(Exception):
    """Error that ends training after a signal, once a checkpoint is saved."""


class NonFiniteLoss(Exception):
    """Error that ends training if the loss or its gradient is not finite. The weights are unchanged, except with
    DeepSpeed: its gradient norm is available only after the update, so a step with a finite loss has already changed
    the weights."""

    def __init__(self, step: int, batches: list[Batch]) -> None:
        super().__init__(
            f"the loss or its gradient is not finite in step {step + 1}. Try a lower --learning-rate, a longer "
            "--warmup, a smaller --max-gradient-norm, or --mixed-precision no"
        )
        self.step = step
        self.batches = batches  # batches of this process in the failed step


class TrainingLoop:
    """Train from `state.step` to `plan.num_steps`."""

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
        """Store the components.

        Args:
            save_every: steps between two checkpoints; None saves one at each evaluation.
        """
        self.state = state
        self.objective = objective
        self.plan = plan
        self.options = options
        self.accelerator = accelerator
        self.hooks = hooks
        self.save_every = save_every
        self.monitor = monitor
        self.optimizer_step = build_optimizer_step(
            accelerator, state.model, state.optimizer, options.max_gradient_norm
        )
        self.seconds: list[float] = []  # durations of the steps since the last record
        self.is_best = False  # whether the last evaluation had the best score so far
        self.overflows = 0  # number of consecutive steps that the loss scaler skipped
        self.peak_memory = 0  # peak memory in bytes up to the last record

    def run(self, batches: Iterator[Batch]) -> Metrics:
        """Train, and return the metrics of the final evaluation.

        Args:
            batches: this process's batches on the CPU, `gradient_accumulation_steps` per step, starting at
                `state.step`.

        Raises:
            Interrupted: after a signal, once a checkpoint is saved.
            NonFiniteLoss: if a loss or gradient is not finite.
        """
        set_train_mode(self.state.model)
        metrics = self.evaluate_step() if self.state.record else {}
        while self.state.step < self.plan.num_steps:
            metrics = self.advance(batches)
            if self.state.step == self.plan.num_steps:
                break
            if signal := self.hooks.get_stop_signal():
                self.hooks.save(self.is_best)
                raise Interrupted(signal)
            self.hooks.publish()
        return metrics or self.evaluate()

    def advance(self, batches: Iterator[Batch]) -> Metrics:
        """Run one step and the actions that are due after it; return the metrics if the step was evaluated.

        A due checkpoint is saved before the evaluation, which may take longer than the time between a cluster's signal
        and the end of the process. A run that is resumed from this checkpoint starts with the evaluation.
        """
        state, done = self.state, self.state.step + 1
        is_last = done == self.plan.num_steps
        is_evaluated = is_last or is_end_of_epochs(done, self.options.evaluate_every, self.plan)
        is_logged = is_evaluated or done % self.options.log_every == 0
        is_saved = is_evaluated if self.save_every is None else is_last or done % self.save_every == 0

        started = time.perf_counter()
        record, batch = self.step(batches, with_health=is_logged)
        self.seconds.append(time.perf_counter() - started)

        if self.options.health_every and done % self.options.health_every == 0:
            state.attention = self.hooks.measure_attention(batch)
            reshard(state.model)
        self.is_best = False
        if is_logged:
            record |= self.compute_means() | state.attention
            state.attention = {}
        if is_evaluated:
            state.record = record
        elif is_logged:
            self.hooks.log(record)
        if is_saved:
            self.hooks.save(False)
        return self.evaluate_step() if is_evaluated else {}

    def evaluate_step(self) -> Metrics:
        """Evaluate the last step, log its record, and save a checkpoint if its score is the best so far."""
        state = self.state
        metrics = self.evaluate()
        score = get_score(metrics)
        self.is_best = score is not None and (state.best_score is None or score > state.best_score)
        state.best_score = score if self.is_best else state.best_score
        self.hooks.log(state.record | {f"held_out_{name}": value for name, value in scalars(metrics).items()})
        state.record = {}
        if self.is_best:
            self.hooks.save(True)
        return metrics

    def step(self, batches: Iterator[Batch], with_health: bool) -> tuple[Metrics, Batch]:
        """Run one optimizer step over the accumulated batches; return its record and the last batch on the device."""
        state, options, accelerator = self.state, self.options, self.accelerator
        learning_rate = get_learning_rate(state.step, self.plan.num_steps, options)
        set_learning_rate(state.optimizer, learning_rate)
        batches_used: list[Batch] = []
        losses: list[Losses] = []
        before: list[tuple[Tokens, Tokens]] = []  # tokens and gradients before the update

        def check(norm: float) -> None:
            self.check_finite(losses, norm, batches_used)

        def before_update() -> None:
            if with_health:
                before.append((self.monitor.get_tokens(), self.monitor.get_gradients()))

        for accumulated in range(self.plan.accumulation_steps):
            batch = next(batches)
            self.hooks.on_batch(batch)
            batches_used.append(batch)
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            torch.manual_seed(seed_for(self.plan.seed, state.step, accumulated, accelerator.process_index))
            with accelerator.accumulate(state.model):
                batch_losses = self.objective(state.model, batch)
                losses.append({name: loss.detach() for name, loss in batch_losses.items()})
                self.optimizer_step.backward(batch_losses["loss"])
                if accelerator.sync_gradients:  # after the last accumulated batch
                    gradient_norm = self.optimizer_step.step(check, before_update)
        state.step += 1
        if state.ema is not None:
            state.ema.update(state.step)
        state.window += [{name: loss.item() for name, loss in batch_losses.items()} for batch_losses in losses]
        record: Metrics = {
            "step": state.step,
            "epoch": round(self.plan.epochs_after(state.step), 4),
            "learning_rate": learning_rate,
            "gradient_norm": round(gradient_norm, 6) if math.isfinite(gradient_norm) else None,
        }
        if before:
            health = self.monitor.compute_health(*before[0])
            record |= health.to_record()
            for token in self.monitor.find_new_without_gradient(health):
                self.hooks.warn(f"the token {token} received no gradient in step {state.step} and is not trained")
        return record, batch

    def check_finite(self, losses: list[Losses], gradient_norm: float, batches: list[Batch]) -> None:
        """Discard the gradients and raise NonFiniteLoss on all processes if a loss or gradient is not finite on any.

        With fp16, single gradients may overflow: the loss scaler skips the step and reduces the scale. MAX_OVERFLOWS
            limits the number of consecutive skipped steps.
        """
        self.overflows = 0 if math.isfinite(gradient_norm) else self.overflows + 1
        allowed = MAX_OVERFLOWS if self.accelerator.scaler is not None else 0
        is_finite = all(math.isfinite(batch_losses["loss"]) for batch_losses in losses) and self.overflows <= allowed
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(is_finite), device=self.accelerator.device)
            is_finite = bool(self.accelerator.reduce(flag, "sum") == self.accelerator.num_processes)
        if not is_finite:
            self.state.optimizer.zero_grad()
            raise NonFiniteLoss(self.state.step, batches)

    def evaluate(self) -> Metrics:
        """Return the metrics on held-out images, with the averaged weights if EMA is used."""
        self.state.model.eval()
        if self.state.ema is None:
            metrics = self.hooks.evaluate()
        else:
            with self.state.ema.use_averaged_weights():
                metrics = self.hooks.evaluate()
        reshard(self.state.model)
        set_train_mode(self.state.model)
        return metrics

    def compute_means(self) -> Metrics:
        """Return the mean losses over all processes, the speed (without evaluations and checkpoints) and the peak
        memory since the last record."""
        names = list(self.state.window[0])
        means = [
            math.fsum(batch_losses[name] for batch_losses in self.state.window) / len(self.state.window)
            for name in names
        ]
        num_images, seconds = len(self.seconds) * self.plan.pictures_per_step, math.fsum(self.seconds)
        self.peak_memory = max(self.peak_memory, peak_memory(self.accelerator.device))  # `record_speed` resets it
        self.state.window.clear()
        self.seconds.clear()
        losses = self.accelerator.reduce(torch.tensor(means, device=self.accelerator.device), "mean").tolist()
        return {
            **{name: round(mean, 6) for name, mean in zip(names, losses, strict=True)},
            "images_per_second": round(num_images / seconds, 1),
            **self.hooks.record_speed(num_images, seconds),
            "peak_memory_mb": round(self.peak_memory / 2**20, 1),
        }


def is_end_of_epochs(step: int, every: int, plan: BatchPlan) -> bool:
    """Return whether the step completes another `every` epochs."""
    return math.floor(plan.epochs_after(step) / every) > math.floor(plan.epochs_after(step - 1) / every)


def get_score(metrics: Metrics) -> float | None:
    """Return the value that evaluations are compared by (higher is better): the first metric, negated if it is a loss.
    None if there is no metric or its value is unknown."""
    name, value = next(iter(metrics.items()), ("", None))
    return -value if value is not None and name.endswith("loss") else value

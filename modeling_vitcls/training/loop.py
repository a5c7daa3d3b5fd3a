"""The training loop.

    batch -> objective -> accumulated gradients -> clipping -> AdamW -> moving average
                          at intervals: metrics record, evaluation, checkpoint

`TrainingState` contains the state that changes during training. The learning rate, the order and augmentation of the
images, and the random numbers in the model are computed from the step and are not stored. The caller provides the
model, the loss, and callbacks for evaluation and checkpoints.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import distributed, nn

from ..data.batches import Batch
from ..data.sampling import BatchPlan, derive_seed
from ..inference.metrics import select_scalars
from ..options import TrainingOptions
from ..system import get_peak_memory
from .distributed_state import reshard
from .losses import Losses, Objective
from .model import set_train_mode
from .optimizer import Ema, get_learning_rate
from .token_monitor import TokenMonitor, Tokens


Metrics = dict[str, Any]

# Maximum number of consecutive steps that the fp16 loss scaler may skip. After one more skipped step, the scale would
# be 2^20 times smaller.
MAX_CONSECUTIVE_OVERFLOWS = 19
# environment variables that accelerate and torchrun set
LAUNCHER_ENVIRONMENT_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
MAX_FORWARDING_SECONDS = 1.0  # maximum delay in seconds between a Ctrl-C and the same signal forwarded by a launcher


@dataclass
class TrainingState:
    """State that changes during training. The model and the optimizer are wrapped by `Accelerator.prepare`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None
    step: int = 0  # number of completed optimizer steps
    best_score: float | None = None  # best score of all evaluations so far
    num_evaluations_since_best: int = 0  # number of evaluations since the best evaluation
    recent_losses: list[dict[str, float]] = field(default_factory=list)  # losses of the steps since the last record
    attention_metrics: Metrics = field(default_factory=dict)  # attention metrics since the last logged step
    # metrics of a step that has not been evaluated yet; otherwise empty
    pending_record: Metrics = field(default_factory=dict)

    @property
    def shadow(self) -> list[torch.Tensor] | None:
        return None if self.ema is None else self.ema.shadow

    def use_averaged_weights(self) -> AbstractContextManager[None]:
        return nullcontext() if self.ema is None else self.ema.use_averaged_weights()


@dataclass
class LoopCallbacks:
    """Callbacks of the training loop. All processes call each callback."""

    evaluate: Callable[[], Metrics]  # evaluates the current model
    log: Callable[[Metrics], None]  # logs the record of a step
    warn: Callable[[str], None]  # prints a one-line warning
    save: Callable[[bool], None]  # saves a checkpoint; the argument states whether the checkpoint is the best so far
    on_batch: Callable[[Batch], None] = lambda batch: None  # called for each batch before the forward pass
    measure_attention: Callable[[Batch], Metrics] = lambda batch: {}  # called every `log_attention_every` steps
    get_stop_signal: Callable[[], str | None] = lambda: None  # returns the name of the stop signal
    show_step: Callable[[int], None] = lambda step: None  # called after each optimizer step


class TrainingInterrupted(Exception):
    """Exception that ends training after a stop signal. A checkpoint is saved before the exception is raised."""


class NonFiniteLoss(Exception):
    """Exception that ends training if the loss or its gradient is not finite. The weights are unchanged."""

    def __init__(self, step: int, batches: list[Batch]) -> None:
        super().__init__(
            f"the loss or its gradient is not finite in step {step + 1}. Try a lower --learning-rate, a longer "
            "--warmup, a smaller --max-gradient-norm, or --mixed-precision no"
        )
        self.step = step
        self.batches = batches  # batches of this process in the failed step


@dataclass
class TrainingLoop:
    """Loop that trains from `state.step` to `plan.num_steps`."""

    state: TrainingState
    objective: Objective
    plan: BatchPlan
    options: TrainingOptions
    accelerator: Accelerator
    callbacks: LoopCallbacks
    monitor: TokenMonitor
    selection_metric: str  # name of the metric that selects the best checkpoint
    save_every: int | None = None  # number of steps between checkpoints; None to save at each evaluation
    evaluated_images: str = "held_out"  # "selection" if the best checkpoint is selected on separate images
    step_seconds: list[float] = field(default_factory=list)  # durations of the steps since the last record, in seconds
    is_best: bool = False  # whether the last step was evaluated and had the best score so far
    num_overflows: int = 0  # number of consecutive steps that the loss scaler skipped
    peak_memory: int = 0  # peak memory in bytes up to the last record

    def run(self, batches: Iterator[Batch]) -> Metrics:
        """Run the remaining steps, and return the metrics of the final evaluation. `batches` yields the batches of
        this process on the CPU; each step uses `gradient_accumulation_steps` batches. After a stop signal, save a
        checkpoint and raise TrainingInterrupted. Raise NonFiniteLoss if a loss or gradient is not finite."""
        set_train_mode(self.state.model)
        metrics = self.evaluate_step() if self.state.pending_record else {}
        while self.state.step < self.plan.num_steps and not self.should_stop_early:
            metrics = self.run_step(batches)
            if self.state.step == self.plan.num_steps or self.should_stop_early:
                break
            if name := self.callbacks.get_stop_signal():
                self.callbacks.save(self.is_best)
                raise TrainingInterrupted(name)
        return metrics or self.evaluate()

    @property
    def should_stop_early(self) -> bool:
        """Return whether none of the last `patience` evaluations improved the best score."""
        return self.options.patience is not None and self.state.num_evaluations_since_best >= self.options.patience

    def run_step(self, batches: Iterator[Batch]) -> Metrics:
        """Run one step and the actions that are due after this step. Return the metrics of the evaluation; empty if no
        evaluation is due. A checkpoint that is due is saved before the evaluation, because a cluster may kill the
        process during a long evaluation. A run that is resumed from this checkpoint starts with the evaluation."""
        state, next_step = self.state, self.state.step + 1
        is_last_step = next_step == self.plan.num_steps
        should_evaluate = is_last_step or is_end_of_epochs(next_step, self.options.evaluate_every, self.plan)
        should_log = should_evaluate or next_step % self.options.log_every == 0
        should_save = should_evaluate if self.save_every is None else is_last_step or next_step % self.save_every == 0

        start_time = time.perf_counter()
        record, batch = self.run_optimizer_step(batches, should_measure_tokens=should_log)
        self.step_seconds.append(time.perf_counter() - start_time)
        self.callbacks.show_step(state.step)

        if self.options.log_attention_every and next_step % self.options.log_attention_every == 0:
            state.attention_metrics = self.callbacks.measure_attention(batch)
            reshard(state.model)
        self.is_best = False
        if should_log:
            record |= self.compute_recent_metrics() | state.attention_metrics
            state.attention_metrics = {}
        if should_evaluate:
            state.pending_record = record
        elif should_log:
            self.callbacks.log(record)
        if should_save:
            self.callbacks.save(False)
        return self.evaluate_step() if should_evaluate else {}

    def evaluate_step(self) -> Metrics:
        """Evaluate the model, log the pending record, and save a checkpoint if the score is the best so far."""
        state = self.state
        metrics = self.evaluate()
        score = get_score(metrics, self.selection_metric)
        self.is_best = score is not None and (state.best_score is None or score > state.best_score)
        if self.is_best:
            state.best_score, state.num_evaluations_since_best = score, 0
        else:
            state.num_evaluations_since_best += 1
        scalars = {f"{self.evaluated_images}_{name}": value for name, value in select_scalars(metrics).items()}
        self.callbacks.log(state.pending_record | scalars)
        state.pending_record = {}
        if self.is_best:
            self.callbacks.save(True)
        return metrics

    def run_optimizer_step(self, batches: Iterator[Batch], should_measure_tokens: bool) -> tuple[Metrics, Batch]:
        """Run one optimizer step with gradients accumulated over several batches. Return the record of the step, and
        the last batch, which is on the device. If `should_measure_tokens` is set, the record contains metrics of the
        special tokens."""
        state, options, accelerator = self.state, self.options, self.accelerator
        learning_rate = get_learning_rate(state.step, self.plan.num_steps, options)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        step_batches: list[Batch] = []
        losses: list[Losses] = []
        tokens_and_gradients: tuple[Tokens, Tokens] | None = None  # before the update
        for batch_index in range(self.plan.accumulation_steps):
            batch = next(batches)
            self.callbacks.on_batch(batch)
            step_batches.append(batch)
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            torch.manual_seed(derive_seed(self.plan.seed, state.step, batch_index, accelerator.process_index))
            with accelerator.accumulate(state.model):
                batch_losses = self.objective(state.model, batch)
                losses.append({name: loss.detach() for name, loss in batch_losses.items()})
                accelerator.backward(batch_losses["loss"])
                if accelerator.sync_gradients:  # after the last accumulated batch
                    parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
                    gradient_norm = float(accelerator.clip_grad_norm_(parameters, options.max_gradient_norm))
                    self.check_finite(losses, step_batches, gradient_norm)
                    if should_measure_tokens:
                        tokens_and_gradients = self.monitor.copy_tokens(), self.monitor.copy_gradients()
                    state.optimizer.step()
                    state.optimizer.zero_grad()
        state.step += 1
        if state.ema is not None:
            state.ema.update(state.step)
        state.recent_losses.append(
            {name: math.fsum(loss[name] for loss in losses) / len(losses) for name in losses[0]}
        )
        record: Metrics = {
            "step": state.step,
            "epoch": round(self.plan.count_epochs(state.step), 4),
            "learning_rate": learning_rate,
            "gradient_norm": round(gradient_norm, 6) if math.isfinite(gradient_norm) else None,
        }
        if tokens_and_gradients:
            token_metrics = self.monitor.compute_token_metrics(*tokens_and_gradients)
            record |= token_metrics
            for token in self.monitor.find_new_tokens_without_gradient(token_metrics):
                self.callbacks.warn(f"the token {token} received no gradient in step {state.step} and is not trained")
        return record, batch

    def check_finite(self, losses: list[Losses], batches: list[Batch], gradient_norm: float) -> None:
        """Discard the gradients and raise NonFiniteLoss on all processes if a loss or gradient is not finite on any
        process. With fp16, gradients may overflow. The loss scaler then skips the step and reduces the scale.
        MAX_CONSECUTIVE_OVERFLOWS limits the number of consecutive skipped steps."""
        self.num_overflows = 0 if math.isfinite(gradient_norm) else self.num_overflows + 1
        max_overflows = MAX_CONSECUTIVE_OVERFLOWS if self.accelerator.scaler is not None else 0
        are_losses_finite = all(math.isfinite(batch_losses["loss"]) for batch_losses in losses)
        is_finite = are_losses_finite and self.num_overflows <= max_overflows
        if self.accelerator.num_processes > 1:
            is_finite_tensor = torch.tensor(float(is_finite), device=self.accelerator.device)
            is_finite = bool(self.accelerator.reduce(is_finite_tensor, "sum") == self.accelerator.num_processes)
        if not is_finite:
            self.state.optimizer.zero_grad()
            raise NonFiniteLoss(self.state.step, batches)

    def evaluate(self) -> Metrics:
        """Return the metrics on held-out images. If EMA is used, the averaged weights are evaluated."""
        self.state.model.eval()
        with self.state.use_averaged_weights():
            metrics = self.callbacks.evaluate()
        reshard(self.state.model)
        set_train_mode(self.state.model)
        return metrics

    def compute_recent_metrics(self) -> Metrics:
        """Return the losses (means over all processes and the steps since the last record), the speed of these steps
        (excluding evaluations and checkpoints), and the peak memory so far."""
        recent_losses = self.state.recent_losses
        local_means = [
            math.fsum(losses[name] for losses in recent_losses) / len(recent_losses) for name in recent_losses[0]
        ]
        num_images, seconds = len(self.step_seconds) * self.plan.images_per_step, math.fsum(self.step_seconds)
        self.peak_memory = max(self.peak_memory, get_peak_memory(self.accelerator.device))
        means = self.accelerator.reduce(torch.tensor(local_means, device=self.accelerator.device), "mean").tolist()
        mean_losses = {name: round(mean, 6) for name, mean in zip(recent_losses[0], means, strict=True)}
        recent_losses.clear()
        self.step_seconds.clear()
        return {
            **mean_losses,
            "images_per_second": round(num_images / seconds, 1),
            "peak_memory_mb": round(self.peak_memory / 2**20, 1),
        }


def is_end_of_epochs(step: int, num_epochs: int, plan: BatchPlan) -> bool:
    """Return whether the number of completed epochs reaches a multiple of `num_epochs` in this step."""
    return math.floor(plan.count_epochs(step) / num_epochs) > math.floor(plan.count_epochs(step - 1) / num_epochs)


def get_score(metrics: Metrics, selection_metric: str) -> float | None:
    """Return the selection metric, negated if the metric is a loss, or None if the metric is missing."""
    value = metrics.get(selection_metric)
    return -value if value is not None and selection_metric.endswith("loss") else value


# Signals ------------------------------------------------------------------------------------------------------------


class SignalHandler:
    """Context manager that stores the first Ctrl-C or SIGTERM. A second Ctrl-C raises KeyboardInterrupt.

    Clusters send SIGTERM some time before the machine is stopped. The launcher determines which processes receive a
    signal:

        python                    the process itself
        accelerate, 1 process     Ctrl-C: the launcher and the process; the shell prompt appears before the checkpoint
                                  is saved. SIGTERM: often only the launcher, which ends; `get_signal` detects that
                                  the parent process has changed
        accelerate, N processes   torchrun's agent forwards both signals to all processes, including DataLoader
                                  workers, and kills the processes after 30 s

    The launcher's exit status may differ from `exit_status`: torchrun's agent exits with 1 after any signal. Signal
    handlers are installed only in the main thread, because Python does not allow other threads to install handlers.
    Signals that are already ignored, for example Ctrl-C in background jobs of a shell, remain ignored.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.received_signal: signal.Signals | None = None
        self.signal_time = 0.0
        self.old_handlers: dict[signal.Signals, Any] = {}
        self.parent_pid = os.getppid() if any(name in os.environ for name in LAUNCHER_ENVIRONMENT_VARIABLES) else None
        # A process group for CPU tensors avoids synchronization with the device.
        self.process_group: Any = distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self.synchronized_signal: signal.Signals | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                old_handler = signal.getsignal(signum)
                if old_handler not in (signal.SIG_IGN, None):  # None: the handler was not installed from Python
                    self.old_handlers[signum] = old_handler
                    signal.signal(signum, self.handle_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self.old_handlers.items():
            signal.signal(signum, handler)
        self.old_handlers.clear()

    def handle_signal(self, signum: int, frame: FrameType | None) -> None:
        """Store the first signal. Raise KeyboardInterrupt on a later Ctrl-C, but not if a launcher only forwards the
        first Ctrl-C."""
        if self.received_signal is None:
            self.received_signal, self.signal_time = signal.Signals(signum), time.monotonic()
        elif signum == signal.SIGINT and time.monotonic() - self.signal_time > MAX_FORWARDING_SECONDS:
            raise KeyboardInterrupt

    def get_signal(self) -> str | None:
        """Return the name of the received stop signal, or None if no signal was received. The result is the same on
        all processes. This method must be called on all processes."""
        if self.received_signal is None and self.parent_pid not in (None, os.getppid()):
            self.received_signal = signal.SIGTERM
        signum = int(self.received_signal or 0)
        if self.process_group is not None:
            max_signum = torch.tensor(signum)
            distributed.all_reduce(max_signum, op=distributed.ReduceOp.MAX, group=self.process_group)
            signum = int(max_signum)
        self.synchronized_signal = signal.Signals(signum) if signum else None
        return self.synchronized_signal.name if self.synchronized_signal else None

    @property
    def exit_status(self) -> int:
        """Return the exit status: 130 after Ctrl-C, 143 after SIGTERM, 0 if no signal was received."""
        return 128 + self.synchronized_signal if self.synchronized_signal else 0

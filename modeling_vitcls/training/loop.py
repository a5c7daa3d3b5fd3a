"""The training loop: how a run trains, evaluates, logs and saves checkpoints.

    batch -> objective -> accumulated gradients -> clipping -> AdamW
                          at intervals: metrics record, evaluation, checkpoint

A checkpoint contains what changes during training. The learning rate, the order and augmentation of
the images, and the random numbers in the model are computed from the step and are not stored.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..data.batches import Batch
from ..data.images import count_unreadable
from ..data.sampling import BatchPlan, derive_seed
from ..inference.metrics import MetricValues, select_scalars
from ..inference.token_names import read_fade_in
from ..runtime.distributed import run_on_main
from ..runtime.errors import RunStopped, mark_errors_of_all_processes
from ..runtime.progress import track
from .checkpoints import Checkpoint, CheckpointStore
from .distributed_state import gather_state, reshard, scatter_state
from .losses import Losses, Objective
from .model import keep_old_tokens, set_train_mode
from .optimizer import get_learning_rate
from .options import FinetuneOptions
from .reporter import Reporter
from .signals import SignalHandler


Evaluate = Callable[[Any], MetricValues]

MAX_LOG_INTERVAL = 10  # Steps between records; runs of less than 100 steps have ten records
MAX_EVALUATIONS = 30  # An evaluation takes as long as many steps
MAX_GRADIENT_NORM = 1.0  # As in the ViT paper (arXiv 2010.11929, section 4.1)
# Maximum number of consecutive steps that the fp16 loss scaler may skip. After one more skipped
# step, the scale would be 2^20 times smaller.
MAX_CONSECUTIVE_OVERFLOWS = 19


@dataclass
class TrainingLoop:
    """Loop that trains from `step` to `plan.num_steps`."""

    # From `Accelerator.prepare`, which wraps them
    model: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    evaluate_model: Evaluate  # Evaluates the model from `Accelerator.prepare`
    plan: BatchPlan
    warmup: float  # Part of the steps in which the learning rate increases
    accelerator: Accelerator
    reporter: Reporter
    store: CheckpointStore
    signals: SignalHandler
    # Number of steps between checkpoints; None to save at each evaluation
    save_every: int | None = None
    # "selection" if there is a validation split beside a test split
    evaluated_images: str = "held_out"
    # Constant values that checkpoints contain
    run_metadata: dict[str, Any] = field(default_factory=dict)
    # Which tokens of a parameter are new (model.find_new_tokens); the others keep their values
    new_tokens: Mapping[str, Sequence[bool]] = field(default_factory=dict)
    # Trainable weights before the first step, by name; empty if they are not averaged with the last
    start: dict[str, Tensor] = field(default_factory=dict)

    # What a checkpoint restores, too
    step: int = 0  # Number of completed optimizer steps
    # Metrics of a step that has not been evaluated yet; otherwise empty
    pending_record: MetricValues = field(default_factory=dict)
    earlier_seconds: float = 0.0  # Training time before --resume

    def __post_init__(self) -> None:
        self.start_time = time.perf_counter()
        # Durations of the steps of this process since the last record, without evaluations and
        # checkpoints
        self.step_seconds: list[float] = []
        self.recent_losses: list[dict[str, float]] = []  # Losses of these steps
        self.unreadable_images: set[int] = set()  # The reported ones
        # Messages of unreadable images that are not reported yet
        self.unreported_errors: dict[int, str] = {}
        self.num_overflows = 0  # Number of consecutive steps that the loss scaler skipped
        self.unwrapped = self.accelerator.unwrap_model(self.model)
        # A checkpoint is loaded later: movement counts from the start of training, not from the
        # resumption.
        self.initial_tokens = copy_special_tokens(self.unwrapped)

    def run(self, batches: Iterator[Batch]) -> MetricValues:
        """Run the remaining steps, and return the metrics of the final evaluation.

        `batches` yields the batches of this process on the CPU; each step uses
        `gradient_accumulation_steps` batches. After a stop signal, save a checkpoint and raise
        RunStopped. Also raise RunStopped if a loss or gradient is not finite.
        """
        set_train_mode(self.model)
        # The checkpoint was saved before the evaluation of its step, and the run was then stopped.
        # Catch up before the next step changes the weights.
        metrics = self.evaluate_step() if self.pending_record else {}
        num_steps = self.plan.num_steps
        steps = track(
            range(self.step, num_steps),
            "training",
            num_steps,
            num_done=self.step,
            unit="steps",
            console=self.reporter.console,
        )
        for _ in steps:
            metrics = self.run_step(batches)
            # After the last step, a signal is ignored: only the results are missing, and a stopped
            # run would be resumed for nothing else.
            is_last_step = self.step == num_steps
            name = None if is_last_step else self.signals.get_signal()
            if name:
                self.save()
                raise RunStopped(
                    f"stopped by {name}; a checkpoint was saved. Repeat the command with "
                    "`resume=True` to continue the run",
                    # The exit status that shells use, such as 143 for SIGTERM
                    128 + signal.Signals[name],
                )

        return metrics or self.evaluate()

    def run_step(self, batches: Iterator[Batch]) -> MetricValues:
        """Run one step and the actions that are due after this step.

        Return the metrics of the evaluation; empty if no evaluation is due. A checkpoint that is
        due is saved before the evaluation, because a cluster may kill the process during a long
        evaluation. A run that is resumed from this checkpoint starts with the evaluation.
        """
        next_step = self.step + 1
        is_last_step = next_step == self.plan.num_steps
        should_evaluate = is_last_step or is_evaluation_due(next_step, self.plan)
        log_interval = min(max(self.plan.num_steps // 10, 1), MAX_LOG_INTERVAL)
        should_log = should_evaluate or next_step % log_interval == 0
        should_save = should_evaluate
        # The last step is always saved: if the results cannot be written, for example because the
        # disk is full, --resume starts here.
        if self.save_every is not None:
            should_save = is_last_step or next_step % self.save_every == 0

        start_time = time.perf_counter()
        record = self.run_optimizer_step(batches)
        self.step_seconds.append(time.perf_counter() - start_time)

        if should_log:
            record |= self.compute_recent_metrics()
        if should_evaluate:
            # This is set before the checkpoint is saved: a resumed run then evaluates this step
            # first.
            self.pending_record = record
        elif should_log:
            self.log(record)
        if should_save:
            self.save()
        return self.evaluate_step() if should_evaluate else {}

    def run_optimizer_step(self, batches: Iterator[Batch]) -> MetricValues:
        """Run one optimizer step with gradients accumulated over several batches.

        Return the record of the step.
        """
        accelerator = self.accelerator
        # Computed from the step. A scheduler would be one more state to save and to restore.
        learning_rate = get_learning_rate(
            self.step, self.plan.num_steps, self.optimizer.defaults["lr"], self.warmup
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]

        losses: list[Losses] = []
        for batch_index in range(self.plan.accumulation_steps):
            batch = next(batches)
            # The errors are collected here and reported with the next record, because each report
            # is a round of messages between all processes.
            self.unreported_errors |= batch["errors"]
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            # Seeded by the step, so a resumed run draws the same numbers without a stored generator.
            # The processes draw different ones, for example for dropout.
            torch.manual_seed(
                derive_seed(self.plan.seed, self.step, batch_index, accelerator.process_index)
            )

            with accelerator.accumulate(self.model):
                batch_losses = self.objective(self.model, batch)
                # Kept as tensors: a number would make the GPU wait for each batch.
                losses.append({name: loss.detach() for name, loss in batch_losses.items()})
                accelerator.backward(batch_losses["loss"])
                if accelerator.sync_gradients:  # After the last accumulated batch
                    keep_old_tokens(self.unwrapped, self.new_tokens)
                    parameters = [
                        parameter
                        for parameter in self.model.parameters()
                        if parameter.requires_grad
                    ]
                    gradient_norm = float(
                        accelerator.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
                    )
                    # Before the step: one gradient that is not finite would spoil the weights and
                    # both moments of AdamW for good, and the last checkpoint would be the only way
                    # back.
                    self.check_finite(losses, gradient_norm)
                    self.optimizer.step()
                    self.optimizer.zero_grad()

        self.step += 1
        self.recent_losses.append(
            {name: fmean(loss[name].item() for loss in losses) for name in losses[0]}
        )

        return {
            "step": self.step,
            "epoch": round(self.plan.count_epochs(self.step), 4),
            "learning_rate": learning_rate,
            "gradient_norm": round(gradient_norm, 6) if math.isfinite(gradient_norm) else None,
        }

    def check_finite(self, losses: list[Losses], gradient_norm: float) -> None:
        """Discard the gradients and raise RunStopped if a loss or gradient is not finite.

        All processes raise it.

        With fp16, gradients may overflow. The loss scaler then skips the step and reduces the
        scale. MAX_CONSECUTIVE_OVERFLOWS limits the number of consecutive skipped steps.
        """
        self.num_overflows = 0 if math.isfinite(gradient_norm) else self.num_overflows + 1
        max_overflows = MAX_CONSECUTIVE_OVERFLOWS if self.accelerator.scaler is not None else 0
        are_losses_finite = all(math.isfinite(batch_losses["loss"]) for batch_losses in losses)
        is_finite = are_losses_finite and self.num_overflows <= max_overflows

        # A loss may be NaN on one process only. If it stopped alone, the others would wait for it
        # in the next step until the timeout.
        num_finite = torch.tensor(int(is_finite), device=self.accelerator.device)
        if self.accelerator.reduce(num_finite, "sum") < self.accelerator.num_processes:
            self.optimizer.zero_grad()
            raise RunStopped(
                f"the loss or its gradient is not finite in step {self.step + 1}. Set a "
                "lower `learning_rate`, a longer `warmup`, or `mixed_precision='no'`"
            )

    # Evaluation and records -----------------------------------------------------------------------

    def evaluate(self) -> MetricValues:
        """Measure the current weights, and go on training as before."""
        self.model.eval()
        metrics = self.evaluate_model(self.model)
        # FSDP2 keeps the full weights after a forward pass without a backward pass.
        reshard(self.model)
        set_train_mode(self.model)
        return metrics

    def evaluate_step(self) -> MetricValues:
        """Evaluate the model, and log the pending record."""
        metrics = self.evaluate()
        record = self.pending_record | select_scalars(metrics, f"{self.evaluated_images}_")
        for task, task_metrics in metrics.get("tasks", {}).items():
            record |= select_scalars(task_metrics, f"{self.evaluated_images}_{task}_")
        self.log(record)
        self.reporter.print_evaluation(record)
        self.pending_record = {}
        return metrics

    def log(self, record: MetricValues) -> None:
        self.report_unreadable_images()
        self.reporter.log(record)

    def report_unreadable_images(self) -> None:
        with mark_errors_of_all_processes():
            # All processes add the same images, so they reach the limit, and raise the error,
            # together.
            errors = dict(gather_object(list(self.unreported_errors.items())))
            count_unreadable(self.unreadable_images, errors, self.reporter.warn)
        self.unreported_errors.clear()

    def compute_recent_metrics(self) -> MetricValues:
        """Measure the losses and the speed since the last record, and the norms of tokens.

        Losses are means over all processes and these steps. The speed excludes evaluations and
        checkpoints.
        """
        recent_losses = self.recent_losses
        local_means = [fmean(losses[name] for losses in recent_losses) for name in recent_losses[0]]
        num_images = len(self.step_seconds) * self.plan.images_per_step
        images_per_second = round(num_images / math.fsum(self.step_seconds), 1)
        self.step_seconds.clear()

        local_tensor = torch.tensor(local_means, device=self.accelerator.device)
        means = self.accelerator.reduce(local_tensor, "mean").tolist()
        record = {name: round(mean, 6) for name, mean in zip(recent_losses[0], means, strict=True)}
        recent_losses.clear()
        tokens = copy_special_tokens(self.unwrapped).items()
        norms = {f"norm_{name}": token.norm().item() for name, token in tokens}
        fade_in = read_fade_in(self.unwrapped.vitcls).items()
        values = {f"fade_in_{name}": value for name, value in fade_in}
        return record | {"images_per_second": images_per_second} | norms | values

    def measure_token_movement(self) -> dict[str, float]:
        """Measure how far each trained token has moved since the start of training (Euclidean norm)."""
        return {
            name: (token - self.initial_tokens[name]).norm().item()
            for name, token in copy_special_tokens(self.unwrapped).items()
        }

    # Checkpoints ----------------------------------------------------------------------------------

    def get_training_seconds(self) -> float:
        """Return the training time so far in seconds, including the time before --resume."""
        return self.earlier_seconds + time.perf_counter() - self.start_time

    def save(self) -> None:
        """Save a checkpoint with everything that `restore` requires.

        All processes must call this method.
        """
        # First, because the checkpoint lists the images that were reported.
        self.report_unreadable_images()
        metadata = self.run_metadata | {
            "step": self.step,
            "training_seconds": self.get_training_seconds(),
            # The main process alone saves its losses, because only means are logged
            "recent_losses": self.recent_losses,
            "pending_record": self.pending_record,
            "unreadable_images": sorted(self.unreadable_images),
        }
        tensors, non_tensor_state = gather_state(
            self.accelerator, self.model, self.optimizer, self.start
        )

        metadata |= non_tensor_state
        # Gathering needs all processes, writing only one.
        run_on_main(self.store.save, self.step, tensors, metadata)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint into the state.

        Raise ValueError if the checkpoint belongs to another model.
        """
        metadata = checkpoint.metadata
        scatter_state(checkpoint, self.accelerator, self.model, self.optimizer, self.start)
        self.step = checkpoint.step
        self.recent_losses = metadata["recent_losses"]
        self.pending_record = metadata["pending_record"]
        self.unreadable_images.update(metadata["unreadable_images"])
        self.earlier_seconds = metadata["training_seconds"]


def copy_special_tokens(model: Any) -> dict[str, Tensor]:
    """Copy the special tokens [D] that a model trains to the CPU, by name (`cls[0]`)."""
    copies: dict[str, Tensor] = {}
    for group, parameter in model.vitcls.embeddings.get_special_tokens().items():
        if not parameter.requires_grad:
            continue
        tensor = parameter.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()  # All processes call this
        # `clone`, because on a CPU the other methods return views, which training changes
        tokens = tensor.float().cpu().squeeze(0).clone()  # [n, D]
        copies |= {f"{group}[{index}]": token for index, token in enumerate(tokens)}
    return copies


def build_batch_plan(num_images: int, options: FinetuneOptions, num_processes: int) -> BatchPlan:
    """Plan the batches of `max_steps` steps, or of `epochs` epochs rounded up to whole steps."""
    assert options.batch_size is not None, "the defaults set it"
    accumulation_steps = options.gradient_accumulation_steps
    num_steps = options.max_steps
    if not num_steps:
        assert options.epochs is not None, "the plan sets it"
        images_per_step = options.batch_size * accumulation_steps * num_processes
        num_steps = math.ceil(options.epochs * num_images / images_per_step)

    return BatchPlan(
        num_images=num_images,
        batch_size=options.batch_size,
        accumulation_steps=accumulation_steps,
        num_processes=num_processes,
        num_steps=num_steps,
        seed=options.seed,
    )


def is_evaluation_due(step: int, plan: BatchPlan) -> bool:
    """Spread the evaluations: one per epoch, or fewer in runs of more than `MAX_EVALUATIONS` epochs."""
    # Rounded, because the last whole step ends a little after the last epoch.
    num_epochs = round(plan.count_epochs(plan.num_steps))
    interval = max(math.ceil(num_epochs / MAX_EVALUATIONS), 1)
    return plan.count_epochs(step) // interval > plan.count_epochs(step - 1) // interval

"""What fine-tuning and pre-training share: output folder, checkpoints, signals, trackers, and the loop in all that.

    session = open_session(options)        checks the output folder; finds the checkpoint to go on from
    metrics = session.train(...)           writes metrics.jsonl and checkpoints/ while it trains

What is trained on which data is the business of finetune.py and pretrain.py.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import nn

from .batches import BatchPlan
from .broken import NO_PICTURE, BrokenPictures
from .checkpoints import Checkpoint, CheckpointStore, newest_for_all, save_for_all
from .ema import Ema
from .environment import build_accelerator, shard_by_layer
from .health import TokenMonitor
from .interruption import Interruption
from .loop import Hooks, Interrupted, Metrics, NonFiniteLoss, TrainingLoop, TrainingState
from .losses import Batch, Objective
from .optimisation import build_optimizer
from .options import FinetuneOptions, PretrainOptions, RunOptions, as_flags
from .reporting import Reporter
from .states import gather_state, scatter_state


Options = TypeVar("Options", FinetuneOptions, PretrainOptions)

# Flags that a resumed run may have otherwise: they do not change what it computes.
MAY_DIFFER = (
    "output_dir num_workers max_broken_images batch_size gradient_accumulation_steps resume overwrite save_every "
    "keep_checkpoints log_with dry_run push_to_hub hub_model_id hub_private"
).split()


HOW_STARTED = ("resume", "overwrite", "dry_run")  # flags that are no part of the run's recipe
LENGTH = ("epochs", "max_steps")

TRAINS_TOKENS = ("full", "lora")  # values of --trainable under which a token that stays as it is is a mistake


class RunStopped(Exception):
    """A run that ended before its time, in one line for the person who started it."""

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


@dataclass
class Session:
    """One run in its output folder."""

    options: Any  # FinetuneOptions or PretrainOptions
    accelerator: Accelerator
    store: CheckpointStore
    checkpoint: Checkpoint | None  # to go on from; on the main process
    facts: dict[str, Any] | None  # of that checkpoint; on all processes
    reporter: Reporter
    seconds: float = 0.0  # spent training up to here, before --resume too
    started: float = 0.0  # when this process began to train
    state: TrainingState | None = field(default=None, repr=False)

    @property
    def folder(self) -> Path:
        """The output folder."""
        return self.options.output_dir

    @property
    def is_finished(self) -> bool:
        """Whether `--resume` finds a run that has written its results."""
        return self.facts is not None and (self.folder / "results.json").exists()

    def train(
        self,
        model: nn.Module,
        objective: Objective,
        plan: BatchPlan,
        batches: Callable[[int], Iterator[Batch]],
        evaluate: Callable[[nn.Module], Metrics],
        measure_attention: Callable[[Batch], Metrics],
        describe_broken: Callable[[int], str],
    ) -> Metrics:
        """Train from the beginning, or from the checkpoint; returns the metrics of the last evaluation. Afterwards
        the model has the averaged weights, where `--ema-decay` asks for them.

        Args:
            model: the plain model.
            batches: first step -> this process's batches.
            evaluate: prepared model -> metrics on held-out pictures.
            measure_attention: batch on the device -> figures to log every `health_every` steps.
            describe_broken: index of a picture that cannot be read -> what is wrong with it.

        Raises:
            RunStopped: by a signal, a loss that is not finite, too many broken images, or a full disk.
        """
        training, accelerator = self.options.training, self.accelerator
        if training.compile:
            model.compile()
        shard_by_layer(accelerator, model)
        state = TrainingState(*accelerator.prepare(model, build_optimizer(model, training)))
        state.ema = Ema(state.model, training.ema_decay) if training.ema_decay else None
        monitor = TokenMonitor(accelerator.unwrap_model(state.model))  # of the tokens as they start, also on --resume
        broken = BrokenPictures(describe_broken, self.reporter.warn, self.options.data.max_broken_images)
        met: list[int] = []  # broken pictures that this process met since all were told
        self.begin(plan, state, broken)
        self.state = state
        if self.options.run.log_with:
            flags = {name: shown(value) for name, value in as_flags(self.options).items()}
            accelerator.init_trackers(self.folder.resolve().name, config=flags)

        def tell_broken() -> None:
            broken.note(gather_object(met))
            met.clear()

        def log(record: Metrics) -> None:
            tell_broken()
            self.reporter.log(record)

        def save(is_best: bool) -> None:
            tell_broken()
            self.save_checkpoint(state, plan, broken, is_best)

        self.started = time.perf_counter()
        with Interruption(accelerator) as interruption, self.reporter, self.one_line(interruption):
            hooks = Hooks(
                evaluate=lambda: evaluate(state.model),
                log=log,
                warn=self.reporter.warn if training.trainable in TRAINS_TOKENS else ignored,
                save=save,
                note_batch=lambda batch: met.extend(batch["broken"][batch["broken"] != NO_PICTURE].tolist()),
                measure_attention=measure_attention,
                stop_requested=interruption.requested,
            )
            save_every = self.options.run.save_every
            loop = TrainingLoop(state, objective, plan, training, accelerator, hooks, monitor, save_every)
            metrics = loop.run(batches(state.step))
        self.seconds = self.seconds_so_far()
        if state.ema is not None:
            state.ema.load(state.ema.shadow)
        if training.trainable in TRAINS_TOKENS:
            for token in monitor.unmoved():
                self.reporter.warn(f"the token {token} did not move in {plan.num_steps} steps: it has learned nothing")
        if broken.count:
            self.reporter.warn(f"{broken.count} training image(s) could not be read and were skipped")
        return metrics | {"num_broken_training_images": broken.count, "token_movement": monitor.movement()}

    def check_plan(self, plan: BatchPlan) -> None:
        """Raise ValueError where --resume would go on in steps of another size or number."""
        facts = self.facts
        if facts and (facts["pictures_per_step"] != plan.pictures_per_step or facts["num_steps"] != plan.num_steps):
            raise ValueError(
                f"--resume: the run in {self.folder} has {facts['num_steps']:,} steps of {facts['pictures_per_step']} "
                f"images, and this is {plan.num_steps:,} of {plan.pictures_per_step}: make --batch-size x "
                "--gradient-accumulation-steps x processes what it was"
            )

    def check_unfinished(store: CheckpointStore, folder: Path, run: RunOptions) -> None:
    """Raise ValueError rather than throw away the checkpoints of a run that has not come to its end."""
    steps = store.steps()
    if steps and not run.overwrite and not (folder / "results.json").exists():
        raise ValueError(
            f"{folder} holds an unfinished run (a checkpoint of step {steps[-1]:,}): go on with --resume, start anew "
            "with --overwrite, or choose another --output-dir"
        )


def check_same_flags(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise ValueError where --resume would go on with another run than was started."""
    for name, value in before.items():
        if name in MAY_DIFFER or now.get(name) == value:
            continue
        what_to_do = "give the same flags, or choose another --output-dir"
        if name in LENGTH:
            what_to_do = (
                "the learning rate falls to 0 towards the end that was planned, so that end is fixed; to train on, "
                f"start another run with --model {folder}"
            )
        raise ValueError(
            f"--resume: the run in {folder} was started with --{name.replace('_', '-')} {shown(value)}, and this is "
            f"{shown(now.get(name))}: {what_to_do}"
        )


def shown(value: Any) -> str:
    """A flag's value as on the command line."""
    return "unset" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


@contextmanager
def dry_run(options: Options) -> Iterator[Options]:
    """The options for one step of everything, in a folder that is removed again."""
    parent = options.output_dir.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)  # where the run would write: it is to show that it can
    folder = Path(tempfile.mkdtemp(prefix=f".{options.output_dir.name}-dry-run-", dir=parent))
    try:
        yield replace(
            options,
            output_dir=folder / options.output_dir.name,
            training=replace(options.training, max_steps=1),
            run=replace(options.run, resume=False),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)

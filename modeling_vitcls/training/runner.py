"""What fine-tuning and pre-training share: output folder, checkpoints, signals, trackers, and the loop in all that.

    session = open_session(options)        checks the output folder; finds the checkpoint to go on from
    metrics = session.train(...)           writes metrics.jsonl and checkpoints/ while it trains

What is trained on which data is the business of finetune.py and pretrain.py.
"""

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import nn

from ..checkpoints import Checkpoint, CheckpointStore, Tensors, newest_for_all, save_for_all
from ..data.batches import BatchPlan
from ..data.fingerprint import describe_change
from ..data.images import NO_PICTURE, BrokenPictures
from ..distributed import build_accelerator, check_deepspeed_flags, on_main, set_deepspeed_batch_size, shard_by_layer
from ..errors import is_on_all_processes, on_all_processes
from ..hub.local_paths import BUILT_IN, is_same_place, settled
from ..hub.manifest import RECIPE
from ..inference.load_model import is_preset
from ..options import FinetuneOptions, PretrainOptions, as_flags
from .distributed_state import gather_state, scatter_state, unsupported
from .folder_lock import FolderLock
from .interruption import Interruption
from .loop import Hooks, Interrupted, Metrics, NonFiniteLoss, TrainingLoop, TrainingState
from .losses import Batch, Objective
from .mfu import Utilisation, start_utilisation
from .model import check_preset
from .optimizer import Ema, build_optimizer
from .output_folder import (
    CHECKPOINTS,
    METRICS,
    MODEL,
    NON_FINITE,
    NON_FINITE_STATE,
    RESULTS,
    check_no_other_files,
    check_replaceable,
    remove_run,
)
from .reporter import Reporter, duration
from .token_monitor import TokenMonitor


class Uploads(Protocol):
    """Checkpoints that are uploaded during training (branch_uploads.py)."""

    def publish(
        self, state: TrainingState, gather_checkpoint: Callable[[], tuple[dict[str, Tensors], dict[str, Any]]], /
    ) -> None:
        """Upload the model and, if asked for, a checkpoint of a step."""

    def __enter__(self) -> Any:
        """Prepare uploads in the background."""

    def __exit__(self, kind: Any, error: Any, traceback: Any, /) -> None:
        """Wait for the last upload."""


Options = TypeVar("Options", FinetuneOptions, PretrainOptions)

# Flags that a resumed run may have otherwise: they do not change what it computes.
MAY_DIFFER = (
    "output_dir num_workers max_broken_images batch_size gradient_accumulation_steps resume overwrite save_every "
    "keep_checkpoints log_with report dry_run push_to_hub hub_model_id hub_private hub_verify hub_checkpoint_every "
    "hub_checkpoint_branch hub_push_optimizer license card_samples eval_benchmark eval_task_id"
).split()


NAMES = ("dataset", "model", "teacher")  # that may be paths
HOW_STARTED = ("resume", "overwrite", "dry_run")  # flags that are no part of the run's recipe
LENGTH = ("epochs", "max_steps")
REHEARSED_STEPS = 3  # in a dry run: the first one takes longer

STEPS_BETWEEN_SAVES_OF_STREAMS = 1000  # unless --save-every says otherwise: streams have no epochs to evaluate after
TRAINS_TOKENS = ("full", "lora")  # values of --trainable under which a token that stays as it is is a mistake


class RunStopped(Exception):
    """A run that ended before its time, in one line for the person who started it."""

    def __init__(self, message: str, exit_status: int = 1, on_all: bool = True) -> None:
        """`on_all`: whether all processes stop for this reason."""
        super().__init__(message)
        self.exit_status = exit_status
        self.on_all = on_all


@dataclass
class Session:
    """One run in its output folder."""

    options: Any  # FinetuneOptions or PretrainOptions
    accelerator: Accelerator
    store: CheckpointStore
    checkpoint: Checkpoint | None  # to go on from; on the main process
    facts: dict[str, Any] | None  # of that checkpoint; on all processes
    reporter: Reporter
    lock: FolderLock  # of the output folder; held by the main process
    seconds: float = 0.0  # spent training up to here, before --resume too
    started: float = 0.0  # when this process began to train
    step_seconds: list[float] = field(default_factory=list)  # of each step of a dry run
    evaluation_seconds: list[float] = field(default_factory=list)  # of each evaluation
    state: TrainingState | None = field(default=None, repr=False)
    utilisation: Utilisation = field(default_factory=Utilisation)
    data: dict[str, Any] = field(default_factory=dict)  # what identifies the data, from `describe_data`

    @property
    def folder(self) -> Path:
        """The output folder."""
        return self.options.output_dir

    @property
    def is_finished(self) -> bool:
        """Whether `--resume` finds a run that has written its results."""
        return self.facts is not None and (self.folder / RESULTS).exists()

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether the run can be resumed under the launched configuration."""
        return unsupported(self.accelerator) is None

    def train(
        self,
        model: nn.Module,
        objective: Objective,
        plan: BatchPlan,
        batches: Callable[[int], Generator[Batch, None, None]],
        evaluate: Callable[[nn.Module], Metrics],
        measure_attention: Callable[[Batch], Metrics],
        describe_broken: Callable[[int], str],
        uploads: Uploads | None = None,
    ) -> Metrics:
        """Train from the beginning, or from the checkpoint; returns the metrics of the last evaluation. Afterwards
        the model has the averaged weights, where `--ema-decay` asks for them.

        Args:
            model: the plain model.
            batches: first step -> this process's batches.
            evaluate: prepared model -> metrics on held-out pictures.
            measure_attention: batch on the device -> figures to log every `health_every` steps.
            describe_broken: index of a picture that cannot be read -> what is wrong with it.
            uploads: of checkpoints to the Hub; None: none.

        Raises:
            RunStopped: by a signal, a loss that is not finite, too many broken images, or a full disk.
        """
        training, accelerator = self.options.training, self.accelerator
        if training.compile:
            model.compile()
        self.utilisation = start_utilisation(model, plan, accelerator, self.reporter.say)
        shard_by_layer(accelerator, model)
        set_deepspeed_batch_size(accelerator, training)
        state = TrainingState(*accelerator.prepare(model, build_optimizer(model, training)))
        state.ema = Ema(state.model, training.ema_decay) if training.ema_decay else None
        monitor = TokenMonitor(accelerator.unwrap_model(state.model))  # of the tokens as they start, also on --resume
        broken = BrokenPictures(describe_broken, self.reporter.warn, self.options.data.max_broken_images)
        met: list[int] = []  # broken pictures that this process met since all were told
        self.begin(plan, state, broken)
        self.state = state
        if self.options.run.log_with:
            self.start_trackers()

        def tell_broken() -> None:
            with on_all_processes():
                broken.note(gather_object(met))
            met.clear()

        def log(record: Metrics) -> None:
            tell_broken()
            self.reporter.log(record)

        def gather() -> tuple[dict[str, Tensors], dict[str, Any]]:
            tell_broken()
            return self.gather_checkpoint(state, plan, broken)

        def save(is_best: bool) -> None:
            if self.keeps_checkpoints:
                save_for_all(self.store, accelerator, state.step, *gather(), is_best)

        def timed_evaluate() -> Metrics:
            began = time.perf_counter()
            metrics = evaluate(state.model)
            self.evaluation_seconds.append(time.perf_counter() - began)
            return metrics

        def note_speed(num_images: int, seconds: float) -> Metrics:
            if self.options.run.dry_run:  # each step is logged
                self.step_seconds.append(seconds)
            return self.utilisation.note(num_images, seconds)

        def publish() -> None:
            if uploads is not None:
                uploads.publish(state, gather)

        self.started = time.perf_counter()
        in_background = uploads or nullcontext()
        with Interruption(accelerator) as interruption, self.reporter, self.one_line(interruption), in_background:
            hooks = Hooks(
                evaluate=timed_evaluate,
                log=log,
                warn=self.reporter.warn if training.trainable in TRAINS_TOKENS else ignored,
                save=save,
                note_batch=lambda batch: met.extend(batch["broken"][batch["broken"] != NO_PICTURE].tolist()),
                measure_attention=measure_attention,
                note_speed=note_speed,
                stop_requested=interruption.requested,
                publish=publish,
            )
            save_every = self.options.run.save_every or (None if plan.num_pictures else STEPS_BETWEEN_SAVES_OF_STREAMS)
            loop = TrainingLoop(state, objective, plan, training, accelerator, hooks, monitor, save_every)
            with closing(batches(state.step)) as mine:  # its workers end here, and not at a signal as Python exits
                metrics = loop.run(mine)
            self.seconds = self.seconds_so_far()
        if state.ema is not None:
            state.ema.load(state.ema.shadow)
        if training.trainable in TRAINS_TOKENS:
            for token in monitor.unmoved():
                self.reporter.warn(f"the token {token} did not move in {plan.num_steps} steps: it has learned nothing")
        if broken.count:
            self.reporter.warn(f"{broken.count} training image(s) could not be read and were skipped")
        return metrics | {
            "num_broken_training_images": broken.count,
            "token_movement": monitor.movement(),
            "utilisation": self.utilisation.results(),
        }

    def check_data(self, data: dict[str, Any]) -> None:
        """Keep what identifies the data, for checkpoints.

        Raises:
            ValueError: if --resume would continue on other data.
        """
        self.data = data
        if self.facts is None:
            return
        if "data" not in self.facts:
            raise ValueError(
                f"--resume: the checkpoint in {self.folder} was written by an older version, which held out other "
                "images: start anew with --overwrite, or choose another --output-dir"
            )
        if change := describe_change(self.facts["data"], data):
            raise ValueError(
                f"--resume: the data set has changed since the run in {self.folder} was started: {change}. Restore "
                "the data set, or choose another --output-dir"
            )

    def check_plan(self, plan: BatchPlan) -> None:
        """Raise ValueError where --resume would go on in steps of another size or number, or in another precision."""
        facts, precision = self.facts, self.accelerator.mixed_precision
        if facts and facts["mixed_precision"] != precision:
            raise ValueError(
                f"--resume: the run in {self.folder} was started in mixed precision {facts['mixed_precision']}, and "
                f"this is {precision}: launch it as before, or choose another --output-dir"
            )
        if facts and (facts["pictures_per_step"] != plan.pictures_per_step or facts["num_steps"] != plan.num_steps):
            raise ValueError(
                f"--resume: the run in {self.folder} has {facts['num_steps']:,} steps of {facts['pictures_per_step']} "
                f"images, and this is {plan.num_steps:,} of {plan.pictures_per_step}: make --batch-size x "
                "--gradient-accumulation-steps x processes what it was"
            )

    def check_folder(self) -> None:
        """Raise ValueError, in one line, if the run cannot continue or replace what is in the output folder."""
        if self.facts is None:
            check_replaceable(self.options, self.store)
            return
        check_same_flags(self.facts["flags"], as_flags(self.options), self.folder)
        if not (self.folder / MODEL).exists() and not self.options.run.overwrite:
            check_no_other_files(self.folder)

    def claim_folder(self) -> None:
        """Remove the files of the run that this one replaces, then write config.resolved.yaml.

        Raises:
            OSError: on all processes, if the folder cannot be written.
        """

        def claim() -> None:
            if self.facts is None:
                remove_run(self.folder, self.store)
            flags = {name: value for name, value in as_flags(self.options).items() if name not in HOW_STARTED}
            (self.folder / RECIPE).write_text(yaml.safe_dump(flags, sort_keys=False), encoding="utf-8")

        if not self.is_finished:
            on_main(self.accelerator, claim)

    @contextmanager
    def unlocked_on_error(self) -> Iterator[None]:
        """Release the lock of the output folder if an exception ends this block."""
        try:
            yield
        except BaseException:
            self.lock.release()
            raise

    def begin(self, plan: BatchPlan, state: TrainingState, broken: BrokenPictures) -> None:
        """Put the checkpoint into `state`, if the run is resumed."""
        if self.facts is not None:
            try:
                scatter_state(
                    self.checkpoint, self.facts, self.accelerator, state.model, state.optimizer, self.shadow(state)
                )
            except ValueError as error:  # another model's, in one line
                raise RunStopped(f"--resume: {error}", on_all=is_on_all_processes(error)) from error
            state.step = self.facts["step"]
            state.best_score = self.facts["best_score"]
            windows = self.facts["windows"]
            state.window = windows[self.accelerator.process_index % len(windows)]
            state.attention = self.facts["attention"]
            state.record = self.facts["record"]
            broken.known.update(self.facts["broken"])
            self.seconds = self.facts["seconds"]
            self.utilisation.go_on_from(self.facts.get("utilisation", {}))
            self.reporter.say("resumed", f"after step {state.step:,} of {plan.num_steps:,}")
        self.reporter.start_at(state.step - 1 if state.record else state.step, plan.num_steps)
        self.accelerator.wait_for_everyone()

    def gather_checkpoint(
        self, state: TrainingState, plan: BatchPlan, broken: BrokenPictures
    ) -> tuple[dict[str, Tensors], dict[str, Any]]:
        """All that `begin` needs: tensors, on the main process, and facts. All processes call it together."""
        facts = {
            "step": state.step,
            "best_score": state.best_score,
            "seconds": self.seconds_so_far(),
            "utilisation": self.utilisation.facts(),
            "windows": gather_object([state.window]),
            "attention": state.attention,
            "record": state.record,
            "broken": sorted(broken.known),
            "pictures_per_step": plan.pictures_per_step,
            "num_steps": plan.num_steps,
            "mixed_precision": self.accelerator.mixed_precision,
            "data": self.data,
            "flags": as_flags(self.options),
        }
        tensors, rest = gather_state(self.accelerator, state.model, state.optimizer, self.shadow(state))
        return tensors, facts | rest

    def report_rehearsal(
        self, started: float, plan: BatchPlan, evaluation_share: float, hub_model_id: str | None
    ) -> None:
        """Print what `--dry-run` tried since `started`, and how long the run itself takes.

        Args:
            started: when the dry run began.
            plan: of the run itself.
            evaluation_share: fraction of the held-out images that the dry run evaluates on.
            hub_model_id: repository that the result of the run is pushed to.
        """
        tried = [
            f"{len(self.step_seconds)} steps",
            "an evaluation",
            *(["a checkpoint"] if self.keeps_checkpoints else []),
            "saving",
        ]
        may_push = f"; {hub_model_id} may be pushed to" if hub_model_id else ""
        seconds = time.perf_counter() - started
        self.reporter.say(
            "dry run",
            f"{', '.join(tried)} went well in {seconds:.0f} s{may_push}; nothing was kept. The run itself has "
            f"{plan.num_steps:,} steps and takes about {duration(self.estimate_seconds(plan, evaluation_share))}",
        )

    def estimate_seconds(self, plan: BatchPlan, evaluation_share: float) -> float:
        """Return the expected duration of a run's steps and evaluations in seconds, from those of the dry run.

        The first step is left out if there are others, since it takes longer.
        """
        epochs = plan.epochs_after(plan.num_steps) if plan.num_pictures else 1.0
        num_evaluations = math.ceil(epochs / self.options.training.evaluate_every)
        step = min(self.step_seconds[1:] or self.step_seconds)
        return plan.num_steps * step + num_evaluations * min(self.evaluation_seconds) / evaluation_share

    def start_trackers(self) -> None:
        """Let Accelerate's trackers know the run; they write below the output folder."""
        folder = self.folder / "trackers"
        if self.accelerator.is_main_process:
            folder.mkdir(exist_ok=True)
        self.accelerator.wait_for_everyone()
        flags = {name: shown(value) for name, value in as_flags(self.options).items()}  # TensorBoard takes no lists
        self.accelerator.init_trackers(
            self.folder.resolve().name, config=flags, init_kwargs={"wandb": {"dir": str(folder)}}
        )

    def seconds_so_far(self) -> float:
        """Spent training until now, up to the checkpoint it went on from and since."""
        return self.seconds + time.perf_counter() - self.started

    def shadow(self, state: TrainingState) -> list[torch.Tensor] | None:
        """The averaged weights, if there are any."""
        return None if state.ema is None else state.ema.shadow

    @contextmanager
    def one_line(self, interruption: Interruption) -> Iterator[None]:
        """Turn what stops a run into RunStopped."""
        try:
            yield
        except Interrupted as error:
            what_is_left = "no checkpoint could be saved"
            if self.keeps_checkpoints:
                what_is_left = "a checkpoint was saved: go on with the same command and --resume"
            raise RunStopped(f"stopped by {error}; {what_is_left}", interruption.exit_status) from None
        except NonFiniteLoss as error:
            raise RunStopped(f"{error}. {self.save_non_finite(error)}") from None
        except (OSError, ValueError) as error:  # a full disk, broken images: in one line already
            raise RunStopped(str(error), on_all=is_on_all_processes(error)) from error

    def save_non_finite(self, error: NonFiniteLoss) -> str:
        """List the images of the step whose loss is not finite, and save the state before it, to look into; returns
        where they are listed, or why not, in one sentence."""
        try:
            return f"The images of that step are listed in {self.write_non_finite(error)}"
        except OSError as problem:
            return f"What led there could not be saved to look into: {problem}"

    def write_non_finite(self, error: NonFiniteLoss) -> Path:
        """`save_non_finite`, or OSError on all processes."""
        file = self.folder / NON_FINITE
        mine = [{"index": batch["index"].tolist(), "epoch": batch["epoch"].tolist()} for batch in error.batches]
        images = {"step": error.step + 1, "batches": gather_object(mine)}
        on_main(self.accelerator, lambda: file.write_text(json.dumps(images, indent=1) + "\n", encoding="utf-8"))
        if self.state is not None and self.keeps_checkpoints:
            store = CheckpointStore(self.folder / NON_FINITE_STATE, keep=1)
            shadow = self.shadow(self.state)
            tensors, rest = gather_state(self.accelerator, self.state.model, self.state.optimizer, shadow)
            save_for_all(store, self.accelerator, error.step, tensors, {"step": error.step} | rest, is_best=False)
        return file


def open_session(options: Options) -> Session:
    """Lock and check the output folder, and find the checkpoint to go on from. The session's options name files and
    folders by absolute paths.

    Raises:
        ValueError: for a preset that does not exist; for flags that DeepSpeed does not support; if another run uses
            the folder; if the run would replace another one or files that no run wrote, and neither --resume nor
            --overwrite is given; if all checkpoints are damaged, or are of a run with other flags; for a precision or
            tracker that is not available.
        OSError: if the folder cannot be written.
    """
    check_preset(options.model.model)
    options = with_settled_names(options)
    training, run = options.training, options.run
    accelerator = build_accelerator(
        training.gradient_accumulation_steps, training.mixed_precision, run.log_with, options.output_dir / "trackers"
    )
    check_deepspeed_flags(accelerator, training, run)
    set_seed(training.seed)
    reporter = Reporter(options.output_dir / METRICS, accelerator)
    store = CheckpointStore(options.output_dir / CHECKPOINTS, run.keep_checkpoints)
    if reason := unsupported(accelerator):
        reporter.warn(f"no checkpoints are saved, and the run cannot be resumed: {reason}")
    lock = FolderLock(options.output_dir)
    on_main(accelerator, lock.acquire)
    session = Session(options, accelerator, store, None, None, reporter, lock)
    with session.unlocked_on_error():
        if run.resume:
            session.checkpoint, session.facts = newest_for_all(store, accelerator, reporter.warn)
        on_main(accelerator, session.check_folder)
        return session


def with_settled_names(options: Any) -> Any:
    """With data set, model and teacher named as they are found from any folder."""
    dataset, model = options.data.dataset, options.model.model
    options = replace(
        options,
        data=replace(options.data, dataset=settled(dataset, known=dataset == BUILT_IN)),
        model=replace(options.model, model=settled(model, known=is_preset(model))),
    )
    if isinstance(options, PretrainOptions) or options.distillation.teacher is None:
        return options
    teacher = settled(options.distillation.teacher)
    return replace(options, distillation=replace(options.distillation, teacher=teacher))


def ignored(message: str) -> None:
    """Takes a warning that does not concern this run."""


def check_same_flags(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise ValueError where --resume would go on with another run than was started."""
    for name, value in before.items():
        if name in MAY_DIFFER or now.get(name) == value or (name in NAMES and is_same_place(value, now.get(name))):
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
    """The options for a few steps and one of everything else, in a folder that is removed again.

    Raises:
        ValueError: if the run itself would be refused for what is in its output folder.
    """
    if not options.run.resume:
        check_replaceable(with_settled_names(options), CheckpointStore(options.output_dir / CHECKPOINTS, keep=1))
    parent, name = options.output_dir.absolute().parent, f".{options.output_dir.name}-dry-run-"
    folder = parent / name
    if os.environ.get("RANK", "0") == "0":  # the others write nothing; Accelerate does not know about them yet
        parent.mkdir(parents=True, exist_ok=True)  # where the run would write: it is to show that it can
        folder = Path(tempfile.mkdtemp(prefix=name, dir=parent))
    try:
        yield replace(
            options,
            output_dir=folder / options.output_dir.name,
            training=replace(options.training, max_steps=REHEARSED_STEPS, log_every=1),
            run=replace(options.run, resume=False, dry_run=True),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)

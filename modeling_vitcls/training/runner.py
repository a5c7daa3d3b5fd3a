"""Output folder, checkpoints, signal handling and trackers for the training loop.

    runner = build_runner(options)        locks and checks the output folder; finds the checkpoint to resume from
    metrics = runner.train(...)           trains, and writes metrics.jsonl and checkpoints/

task.py implements the complete run, and loop.py implements the training steps.
"""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import nn

from ..checkpoints import Checkpoint, CheckpointStore, Tensors
from ..conversion.any_checkpoint import is_pinned, pin_revision
from ..data.batches import Batch
from ..data.images import UnreadableImageCounter
from ..data.sampling import BatchPlan
from ..data.splits import describe_change
from ..distributed import (
    build_accelerator,
    configure_layer_sharding,
    run_on_main,
)
from ..errors import is_raised_on_all_processes, mark_errors_of_all_processes
from ..files import write_json
from ..hub.local_paths import BUILT_IN_DATASET, is_same_source, make_relative, resolve_name
from ..hub.model_files import RECIPE_FILE
from ..inference.load_model import is_preset
from ..options import FinetuneOptions, PretrainOptions, to_flags
from . import output_folder
from .defaults import DEFAULTS
from .distributed_state import gather_state, scatter_state, scatter_weights_and_ema
from .loop import (
    LoopCallbacks,
    Metrics,
    NonFiniteLoss,
    SignalHandler,
    TrainingInterrupted,
    TrainingLoop,
    TrainingState,
)
from .losses import Objective
from .model import check_preset_name
from .optimizer import Ema, build_optimizer
from .reporter import Reporter
from .token_monitor import TokenMonitor


@dataclass
class TrainingComponents:
    """Module to train, batches, loss and evaluation of a run."""

    model: nn.Module  # unwrapped model, or a module with the heads of the model
    objective: Objective
    iterate_batches: Callable[[int], Generator[Batch, None, None]]  # first step -> batches of this process
    evaluate: Callable[[nn.Module], Metrics]  # model from `Accelerator.prepare` -> metrics on held-out images
    describe_unreadable_image: Callable[[int], str]  # index of an unreadable image -> error message
    # batch on the device -> values to log every `log_attention_every` steps
    measure_attention: Callable[[Batch], Metrics] = lambda batch: {}


# Flags that may change on --resume, because these flags do not affect the result.
CHANGEABLE_FLAGS = (
    "output_dir num_workers max_unreadable_images batch_size gradient_accumulation_steps resume overwrite save_every "
    "keep_checkpoints log_with report dry_run push_to_hub hub_model_id hub_private hub_verify hub_checkpoint_every "
    "hub_checkpoint_branch hub_push_optimizer license card_samples eval_benchmark eval_task_id"
).split()
PATH_FLAGS = ("dataset", "model", "teacher")  # flags whose values may be paths

DEFAULT_STREAM_SAVE_EVERY = 1000  # default of --save-every in steps for streams, which have no epochs


class RunStopped(Exception):
    """Exception that ends a run early, with a one-line message for the user."""

    def __init__(self, message: str, exit_status: int = 1, is_on_all_processes: bool = True) -> None:
        super().__init__(message)
        self.exit_status = exit_status  # exit status of the program
        self.is_on_all_processes = is_on_all_processes  # whether all processes stop for the same reason


@dataclass
class Runner:
    """Training run with an output folder."""

    options: Any  # FinetuneOptions or PretrainOptions
    accelerator: Accelerator
    store: CheckpointStore
    checkpoint: Checkpoint | None  # checkpoint to resume from; None if the run is not resumed
    reporter: Reporter
    lock: output_folder.FolderLock  # lock of the output folder, held by the main process
    training_seconds: float = 0.0  # training time in seconds, including the time before --resume
    start_time: float = 0.0  # time at which this process started training
    step_seconds: list[float] = field(default_factory=list)  # duration in seconds of each step of a dry run
    evaluation_seconds: list[float] = field(default_factory=list)  # duration in seconds of each evaluation
    peak_memory_mb: float = 0.0  # peak memory of this process
    state: TrainingState = field(init=False, repr=False)  # set by `train`
    selected_step: int | None = None  # step of the weights that `--select best` selected
    data_fingerprint: dict[str, Any] = field(default_factory=dict)  # from `describe_data`

    @property
    def folder(self) -> Path:
        return self.options.output_dir

    @property
    def is_finished(self) -> bool:
        """Return whether the resumed run has already written results.json."""
        return self.checkpoint is not None and (self.folder / output_folder.RESULTS_FILE).exists()

    def train(
        self,
        components: TrainingComponents,
        plan: BatchPlan,
        selection_metric: str,
        evaluated_images: str = "held_out",
    ) -> Metrics:
        """Train from the beginning or from the checkpoint, and return the metrics of the last evaluation. With
        `--ema-decay`, the model contains the averaged weights after training. Raise RunStopped after a signal, a
        non-finite loss, too many unreadable images, or a full disk."""
        model = components.model
        training_options, accelerator = self.options.training, self.accelerator
        should_warn_about_tokens = training_options.trainable in ("full", "lora")  # both train all tokens
        if training_options.compile:
            model.compile()
        configure_layer_sharding(accelerator, model)
        state = TrainingState(*accelerator.prepare(model, build_optimizer(model, training_options)))
        state.ema = Ema(state.model, training_options.ema_decay) if training_options.ema_decay else None
        # The monitor stores the initial tokens, so it is built before the checkpoint is loaded.
        monitor = TokenMonitor(accelerator.unwrap_model(state.model))
        unreadable_images = UnreadableImageCounter(
            components.describe_unreadable_image, self.reporter.warn, self.options.data.max_unreadable_images
        )
        unreported_indices: list[int] = []  # indices of unreadable images that are not reported yet
        self.restore(plan, state, unreadable_images)
        self.state = state
        if self.options.run.log_with:
            self.start_trackers()

        def report_unreadable_images() -> None:
            with mark_errors_of_all_processes():
                unreadable_images.add(gather_object(unreported_indices))
            unreported_indices.clear()

        def log(record: Metrics) -> None:
            report_unreadable_images()
            self.peak_memory_mb = record["peak_memory_mb"]
            if self.options.run.dry_run:  # a dry run logs each step
                self.step_seconds.append(plan.images_per_step / record["images_per_second"])
            self.reporter.log(record, None if self.options.run.dry_run else selection_metric)

        def gather_for_checkpoint() -> tuple[dict[str, Tensors], dict[str, Any]]:
            report_unreadable_images()
            return self.gather_checkpoint(state, plan, unreadable_images)

        def save(is_best: bool) -> None:
            tensors, metadata = gather_for_checkpoint()
            run_on_main(accelerator, lambda: self.store.save(state.step, tensors, metadata, is_best))

        def evaluate_with_timing() -> Metrics:
            start_time = time.perf_counter()
            metrics = components.evaluate(state.model)
            self.evaluation_seconds.append(time.perf_counter() - start_time)
            return metrics

        self.start_time = time.perf_counter()
        with (
            SignalHandler(accelerator) as signal_handler,
            self.reporter.progress,
            self.convert_errors(signal_handler),
        ):
            callbacks = LoopCallbacks(
                evaluate=evaluate_with_timing,
                log=log,
                warn=self.reporter.warn if should_warn_about_tokens else lambda message: None,
                save=save,
                on_batch=lambda batch: unreported_indices.extend(batch["replaced"][batch["replaced"] >= 0].tolist()),
                measure_attention=components.measure_attention,
                get_stop_signal=signal_handler.get_signal,
                show_step=self.reporter.show_step,
            )
            save_every = self.options.run.save_every or (None if plan.num_images else DEFAULT_STREAM_SAVE_EVERY)
            loop = TrainingLoop(
                state,
                components.objective,
                plan,
                training_options,
                accelerator,
                callbacks,
                monitor,
                selection_metric,
                save_every,
                evaluated_images,
            )
            with closing(components.iterate_batches(state.step)) as batches:  # closing stops the data loading workers
                metrics = loop.run(batches)
                if training_options.select == "best":
                    self.load_best_weights(state)
            self.training_seconds = self.get_training_seconds()
        if state.ema is not None:
            state.ema.copy_to_model(state.ema.shadow)
        token_movement = monitor.compute_token_movement()
        for token, distance in token_movement.items():
            if distance == 0 and should_warn_about_tokens:
                self.reporter.warn(f"token {token} did not change during training")
        if len(unreadable_images):
            self.reporter.warn(
                f"{len(unreadable_images)} training image(s) could not be read and were replaced with other images"
            )
        return metrics | {
            "num_broken_training_images": len(unreadable_images),
            "token_movement": token_movement,
        }

    def load_best_weights(self, state: TrainingState) -> None:
        """Load the weights of the checkpoint with the best evaluation into `state`, and print the step of this
        checkpoint. Raise ValueError if the checkpoint is damaged or missing."""
        checkpoint: Checkpoint = run_on_main(self.accelerator, self.store.load_best)
        scatter_weights_and_ema(checkpoint, self.accelerator, state.model, state.shadow)
        self.selected_step = checkpoint.step
        self.reporter.print_line(
            "selected", f"the checkpoint of step {self.selected_step:,}, with the best evaluation"
        )

    def set_data_fingerprint(self, data_fingerprint: dict[str, Any]) -> None:
        """Store the fingerprint of the data. Raise ValueError if --resume would continue with different data."""
        self.data_fingerprint = data_fingerprint
        if self.checkpoint is None:
            return
        if "data" not in self.checkpoint.metadata:
            raise ValueError(
                f"--resume: the checkpoint in {self.folder} was written by an older version of modeling_vitcls, with "
                "a different held-out split. Restart the run with --overwrite, or choose a different --output-dir"
            )
        if change := describe_change(self.checkpoint.metadata["data"], data_fingerprint):
            raise ValueError(
                f"--resume: the dataset has changed since the run in {self.folder} was started: {change}. Restore "
                "the dataset, or choose a different --output-dir"
            )

    def pin_models(self, options: Any) -> Any:
        """Return the options with Hub models pinned to commits. A resumed run uses the commits that are stored in the
        flags of the checkpoint. Raise ValueError or OSError if a model cannot be found."""
        stored_flags = self.checkpoint.metadata["flags"] if self.checkpoint else {}

        def pin(flag: str, source: str) -> str:
            if flag == "model" and is_preset(source):
                return source
            return stored_flags[flag] if is_pinned(stored_flags.get(flag), source) else pin_revision(source)

        return replace_sources(options, pin)

    def set_options(self, options: Any) -> None:
        """Set the resolved options. Raise ValueError if --resume would continue the run with different flags."""
        self.options = options
        if self.checkpoint is not None:
            check_flags_unchanged(self.checkpoint.metadata["flags"], to_flags(options), self.folder)

    def check_plan(self, plan: BatchPlan) -> None:
        """Raise ValueError if --resume would change the precision, the number of steps, or the images per step."""
        if self.checkpoint is None:
            return
        metadata, precision = self.checkpoint.metadata, self.accelerator.mixed_precision
        if metadata["mixed_precision"] != precision:
            raise ValueError(
                f"--resume: the run in {self.folder} uses the mixed precision {metadata['mixed_precision']!r}, but "
                f"the mixed precision of this run is {precision!r}. Use the same mixed precision, or choose a "
                "different --output-dir"
            )
        if (metadata["images_per_step"], metadata["num_steps"]) != (plan.images_per_step, plan.num_steps):
            raise ValueError(
                f"--resume: the run in {self.folder} has {metadata['num_steps']:,} steps of "
                f"{metadata['images_per_step']} images, but this run has {plan.num_steps:,} steps of "
                f"{plan.images_per_step} images. Do not change the product of --batch-size, "
                "--gradient-accumulation-steps and the number of processes"
            )

    def check_folder(self) -> None:
        """Raise ValueError if the run would replace files without --overwrite, or if --resume would continue the run
        with different flags."""
        if self.checkpoint is None:
            output_folder.check_replaceable(self.options, self.store)
            return
        check_flags_unchanged(self.checkpoint.metadata["flags"], to_flags(self.options), self.folder)
        if not (self.folder / output_folder.CONFIG_FILE).exists() and not self.options.run.overwrite:
            output_folder.check_no_unrelated_files(self.folder)

    def prepare_folder(self) -> None:
        """Remove the files of an earlier run unless that run is resumed, then write config.resolved.yaml."""

        def replace_files() -> None:
            if self.checkpoint is None:
                output_folder.remove_run_files(self.folder, self.store)
            unsaved_flags = ("resume", "overwrite", "dry_run")
            flags = {name: value for name, value in self.get_flags().items() if name not in unsaved_flags}
            (self.folder / RECIPE_FILE).write_text(yaml.safe_dump(flags, sort_keys=False), encoding="utf-8")

        if not self.is_finished:
            run_on_main(self.accelerator, replace_files)

    def get_flags(self) -> dict[str, Any]:
        """Return all flags of the run, with paths relative to the current directory."""
        flags = to_flags(self.options)
        return flags | {name: make_relative(flags.get(name)) for name in ("output_dir", *PATH_FLAGS) if name in flags}

    @contextmanager
    def release_lock_on_error(self) -> Iterator[None]:
        """Release the lock of the output folder if an exception ends the `with` block."""
        try:
            yield
        except BaseException:
            self.lock.release()
            raise

    def restore(self, plan: BatchPlan, state: TrainingState, unreadable_images: UnreadableImageCounter) -> None:
        """If the run is resumed, load the checkpoint into `state`. Start the reporter."""
        if self.checkpoint is not None:
            metadata = self.checkpoint.metadata
            try:
                scatter_state(self.checkpoint, self.accelerator, state.model, state.optimizer, state.shadow)
            except ValueError as error:
                raise RunStopped(
                    f"--resume: {error}", is_on_all_processes=is_raised_on_all_processes(error)
                ) from error
            state.step = self.checkpoint.step
            state.best_score = metadata["best_score"]
            state.num_evaluations_since_best = metadata.get("num_worse", 0)
            losses_by_process = metadata["windows"]
            state.recent_losses = losses_by_process[self.accelerator.process_index % len(losses_by_process)]
            state.attention_metrics = metadata["attention"]
            state.pending_record = metadata["record"]
            unreadable_images.indices.update(metadata["broken"])
            self.training_seconds = metadata["seconds"]
            self.reporter.print_line("resumed", f"after step {state.step:,} of {plan.num_steps:,}")
        self.reporter.start_after(state.step - 1 if state.pending_record else state.step, plan.num_steps)
        self.accelerator.wait_for_everyone()

    def gather_checkpoint(
        self, state: TrainingState, plan: BatchPlan, unreadable_images: UnreadableImageCounter
    ) -> tuple[dict[str, Tensors], dict[str, Any]]:
        """Return the tensors and the metadata that `restore` requires. The tensors are returned only on the main
        process. This method must be called on all processes."""
        metadata = {
            "step": state.step,
            "best_score": state.best_score,
            "num_worse": state.num_evaluations_since_best,
            "seconds": self.get_training_seconds(),
            "windows": gather_object([state.recent_losses]),
            "attention": state.attention_metrics,
            "record": state.pending_record,
            "broken": sorted(unreadable_images.indices),
            "images_per_step": plan.images_per_step,
            "num_steps": plan.num_steps,
            "mixed_precision": self.accelerator.mixed_precision,
            "data": self.data_fingerprint,
            "flags": self.get_flags(),
        }
        tensors, non_tensor_state = gather_state(self.accelerator, state.model, state.optimizer, state.shadow)
        return tensors, metadata | non_tensor_state

    def start_trackers(self) -> None:
        folder = self.folder / "trackers"
        if self.accelerator.is_main_process:
            folder.mkdir(exist_ok=True)
        self.accelerator.wait_for_everyone()
        # Flags are formatted as text, because TensorBoard does not accept lists.
        flags = {name: format_flag_value(value) for name, value in to_flags(self.options).items()}
        init_kwargs = {"wandb": {"dir": str(folder)}}
        self.accelerator.init_trackers(self.folder.resolve().name, config=flags, init_kwargs=init_kwargs)

    def get_training_seconds(self) -> float:
        """Return the training time so far in seconds, including the time before --resume."""
        return self.training_seconds + time.perf_counter() - self.start_time

    @contextmanager
    def convert_errors(self, signal_handler: SignalHandler) -> Iterator[None]:
        """Convert stop signals, non-finite losses, OSError and ValueError inside the `with` block to RunStopped."""
        try:
            yield
        except TrainingInterrupted as error:
            raise RunStopped(
                f"stopped by {error}; a checkpoint was saved. Repeat the command with --resume to continue the run",
                signal_handler.exit_status,
            ) from None
        except NonFiniteLoss as error:
            raise RunStopped(f"{error}. {self.save_non_finite_step(error)}") from None
        except (OSError, ValueError) as error:  # a full disk or unreadable images
            raise RunStopped(str(error), is_on_all_processes=is_raised_on_all_processes(error)) from error

    def save_non_finite_step(self, error: NonFiniteLoss) -> str:
        """Save the image indices and the initial state of the step with the non-finite loss. Return a sentence that
        contains the file name, or the error if saving fails."""
        file, accelerator, state = self.folder / output_folder.NON_FINITE_FILE, self.accelerator, self.state
        local_batches = [{name: batch[name].tolist() for name in ("index", "epoch")} for batch in error.batches]
        failed_step = {"step": error.step + 1, "batches": gather_object(local_batches)}
        try:
            run_on_main(accelerator, lambda: write_json(file, failed_step))
            store = CheckpointStore(self.folder / output_folder.NON_FINITE_FOLDER, num_kept=1)
            tensors, metadata = gather_state(accelerator, state.model, state.optimizer, state.shadow)
            metadata = {"step": error.step} | metadata
            run_on_main(accelerator, lambda: store.save(error.step, tensors, metadata, is_best=False))
        except OSError as saving_error:
            saved_data = f"The images of step {error.step + 1} and the state before this step"
            return f"{saved_data} could not be saved: {saving_error}"
        return f"The images of step {error.step + 1} are listed in {file}"


def build_runner(options: FinetuneOptions | PretrainOptions) -> Runner:
    """Lock and check the output folder, find the checkpoint to resume from, and build the runner. The options of the
    runner contain absolute paths. Raise ValueError if options are invalid, another run uses the folder, files would be
    replaced without --overwrite, or the run cannot be resumed. Raise OSError if the folder cannot be written."""
    check_preset_name(options.model.model)
    options = resolve_local_paths(options)
    training_options, run_options = options.training, options.run
    accelerator = build_accelerator(
        training_options.gradient_accumulation_steps,
        training_options.mixed_precision,
        run_options.log_with,
        options.output_dir / "trackers",
    )
    set_seed(training_options.seed)
    reporter = Reporter(options.output_dir / output_folder.METRICS_FILE, accelerator)
    store = CheckpointStore(options.output_dir / output_folder.CHECKPOINTS_FOLDER, run_options.keep_checkpoints)
    lock = output_folder.FolderLock(options.output_dir)
    run_on_main(accelerator, lock.acquire)
    runner = Runner(options, accelerator, store, None, reporter, lock)
    with runner.release_lock_on_error():
        if run_options.resume:
            load_newest = partial(store.load_newest, reporter.warn)
            runner.checkpoint = run_on_main(accelerator, load_newest)
        run_on_main(accelerator, runner.check_folder)
        return runner


def resolve_local_paths(options: Any) -> Any:
    """Return the options with absolute paths for a local dataset, model and teacher."""
    dataset = resolve_name(options.data.dataset, is_built_in=options.data.dataset == BUILT_IN_DATASET)
    options = replace(options, data=replace(options.data, dataset=dataset))
    return replace_sources(
        options, lambda flag, source: resolve_name(source, is_built_in=flag == "model" and is_preset(source))
    )


def replace_sources(options: Any, convert: Callable[[str, str], str]) -> Any:
    """Return the options with the values of --model and --teacher replaced with `convert(flag, value)`."""
    options = replace(options, model=replace(options.model, model=convert("model", options.model.model)))
    if isinstance(options, PretrainOptions) or options.distillation.teacher is None:
        return options
    teacher = convert("teacher", options.distillation.teacher)
    return replace(options, distillation=replace(options.distillation, teacher=teacher))


def check_flags_unchanged(stored_flags: dict[str, Any], current_flags: dict[str, Any], folder: Path) -> None:
    """Raise ValueError if --resume would continue the run with flags that differ from the flags of the checkpoint.

    A current value of None is accepted if the default value of the flag depends on the run. A current model without a
    commit hash is accepted if the stored model is the same model with a commit hash.
    """
    for name, value in stored_flags.items():
        current_value = current_flags.get(name)
        if (
            name in CHANGEABLE_FLAGS
            or current_value == value
            or (name in PATH_FLAGS and is_same_source(value, current_value))
            or is_pinned(value, current_value)
            or (current_value is None and any(name == default.name for default in DEFAULTS))
        ):
            continue
        advice = "Use the same flags, or choose a different --output-dir"
        if name in ("epochs", "max_steps"):
            advice = (
                "The number of steps is fixed, because the learning rate decays to 0 over these steps. To continue "
                f"training, start another run with --model {folder}"
            )
        raise ValueError(
            f"--resume: the run in {folder} was started with --{name.replace('_', '-')} "
            f"{format_flag_value(value)}, but the value in this run is {format_flag_value(current_value)}. {advice}"
        )


def format_flag_value(value: Any) -> str:
    """Format a flag's value for messages: as on the command line, or "unset" if the value is None."""
    return "unset" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)

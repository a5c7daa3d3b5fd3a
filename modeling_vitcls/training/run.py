"""One training run, from options to a model folder.

    folder = train(options)

A run has two collaborators: the task is what is trained (finetune.py, pretrain.py), and the loop is how the steps run
(loop.py). The run writes weights, configuration, code, image processor, config.resolved.yaml, metrics.jsonl,
checkpoints and finally results.json, which marks the folder as complete. publishing/ builds the report and the card
from the folder, and pushes the folder.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.distributed.fsdp import FSDPModule

from ..checkpoints import Checkpoint, CheckpointStore
from ..data.batches import Normalizer, iterate_training_batches
from ..data.held_out import HELD_OUT_RECORD_KEY
from ..data.images import LabeledImages, UnreadableImageCounter
from ..data.sampling import BatchPlan
from ..data.splits import TrainingData, describe_data, load_on_main
from ..data.streaming import StreamedImages
from ..distributed import build_accelerator, configure_layer_sharding, run_on_main, set_mixed_precision
from ..errors import RunStopped, is_raised_on_all_processes
from ..options import FinetuneOptions, PretrainOptions, to_flags
from ..system import describe_device
from . import finetune, output_folder, pretrain
from .calibration import FITTED, MIN_IMAGES, REPORTED, calibrate, compute_calibration_errors
from .defaults import describe_random_weights, resolve_defaults
from .distributed_state import reshard
from .dry_run import NUM_PROBE_IMAGES, NUM_STEPS, build_dry_run_options, describe_dry_run
from .loop import TrainingLoop, TrainingState
from .model import InitialModel, check_preset_name, choose_image_size, resolve_initial_model
from .optimizer import Ema, build_optimizer
from .output_folder import CHECKPOINTS_FOLDER, RESULTS_FILE, FolderLock, save_output
from .probe import MIN_SELECTION_IMAGES
from .reporter import Reporter, describe_batches, describe_model, describe_run, describe_splits, format_result
from .resume import (
    check_flags_unchanged,
    check_run_unchanged,
    format_flag_value,
    get_relative_flags,
    pin_models,
    resolve_local_paths,
)
from .signals import SignalHandler
from .task import Task, build_training_images


DEFAULT_STREAM_SAVE_EVERY = 1000  # default of --save-every in steps for streams, which have no epochs


def train(options: FinetuneOptions | PretrainOptions, on_checkpoint: Callable[[Path], None] | None = None) -> Path:
    """Train and evaluate a model, and return the folder with the model and its results. With `--dry-run`, run a few
    steps, print the expected duration and memory of the full run, and keep no files, not even the returned folder.

    Args:
        options: flags of the run.
        on_checkpoint: called on the main process with the folder of each saved checkpoint.

    Raises:
        ValueError, OSError: if data or models cannot be read or do not match the options, another run uses the
            folder, files would be replaced without --overwrite, or the run cannot be resumed.
        RunStopped: after a signal, a non-finite loss, too many unreadable images, or a full disk.
    """
    check_preset_name(options.model.model)
    kind: Any = pretrain if isinstance(options, PretrainOptions) else finetune
    options = resolve_local_paths(kind.check_options(options))
    if options.run.dry_run:
        with build_dry_run_options(options) as dry_run_options:
            return Run(kind, dry_run_options, None).run()
    return Run(kind, options, on_checkpoint).run()


class Run:
    """The stages of `train`, in the order of the methods. `kind` is the module finetune or pretrain."""

    data: TrainingData
    task: Task
    plan: BatchPlan
    full_plan: BatchPlan  # of the run that a dry run tests
    loop: TrainingLoop
    metrics: dict[str, Any]  # of the last evaluation
    evaluate: Any  # functions from a model to metrics; `Evaluator`s if there are images
    evaluate_held_out: Any

    def __init__(self, kind: Any, options: Any, on_checkpoint: Callable[[Path], None] | None) -> None:
        self.kind, self.options, self.on_checkpoint = kind, options, on_checkpoint
        self.folder, self.is_dry_run = options.output_dir, options.run.dry_run
        self.start_time = time.perf_counter()
        training, trackers = options.training, options.run.log_with
        self.accelerator = build_accelerator(
            training.gradient_accumulation_steps, training.mixed_precision, trackers, self.folder / "trackers"
        )
        set_seed(training.seed)
        self.reporter = Reporter(self.folder / output_folder.METRICS_FILE, self.accelerator)
        self.store = CheckpointStore(self.folder / CHECKPOINTS_FOLDER, options.run.keep_checkpoints)
        self.checkpoint: Checkpoint | None = None  # to resume from

    def run(self) -> Path:
        """Run all stages, and return the output folder."""
        with FolderLock(self.folder) as lock:
            run_on_main(self.accelerator, lock.acquire)
            if self.options.run.resume:
                self.checkpoint = run_on_main(self.accelerator, partial(self.store.load_newest, self.reporter.warn))
            if run_on_main(self.accelerator, self.check_folder):
                shutil.rmtree(self.folder / output_folder.STAGING_FOLDER, ignore_errors=True)  # killed at the end
                self.reporter.print_line("finished", f"{self.folder} already contains the results of this run")
                return self.folder
            self.load()
            self.describe()
            self.fit_probe()
            self.train()
            self.calibrate()
            self.save()
            del self.loop  # DDP must not outlive its process group: with torch 2.11, gloo may wait forever
            self.accelerator.free_memory()
            self.accelerator.end_training()
            return self.folder

    def check_folder(self) -> bool:
        """Check the output folder, and return whether the resumed run is already finished."""
        if self.checkpoint is None:
            output_folder.check_replaceable(self.options, self.store)
            return False
        check_flags_unchanged(self.checkpoint.metadata["flags"], to_flags(self.options), self.folder)
        return (self.folder / RESULTS_FILE).exists()

    def load(self) -> None:
        """Load the data and the models, resolve all defaults, and prepare the output folder."""
        accelerator = self.accelerator
        with accelerator.main_process_first():  # only the main process downloads files
            self.options = pin_models(self.options, self.checkpoint)
            self.initial = resolve_initial_model(self.options.model.model)
        load_data = partial(self.kind.load_data, self.options, self.initial)
        self.data = load_on_main(accelerator, self.options.data.dataset, load_data)
        with accelerator.main_process_first():
            self.options, self.default_lines = resolve_options(self.options, self.initial, self.data)
            self.task = self.kind.build_task(self.options, self.initial, self.data, self.reporter)
            self.forward_flops = (self.task.encoder or self.task.model).flops()
        if self.options.training.gradient_checkpointing:
            self.task.model.gradient_checkpointing_enable()
        recorded = None if self.checkpoint is None else self.checkpoint.metadata["mixed_precision"]
        self.precision_text = set_mixed_precision(
            accelerator, self.options.training.mixed_precision, self.task.model.config, recorded
        )
        self.plan = self.full_plan = BatchPlan.from_options(
            self.data.num_training_images, self.options.training, accelerator.num_processes
        )
        if self.is_dry_run:
            self.plan = replace(self.plan, num_steps=NUM_STEPS)
        self.metadata = {  # of checkpoints
            "images_per_step": self.plan.images_per_step,
            "mixed_precision": accelerator.mixed_precision,
            "data": run_on_main(accelerator, partial(describe_data, self.data)),
            "flags": get_relative_flags(self.options, self.options.run.hub_checkpoint_branch is not None),
        }
        if self.checkpoint is not None:
            check_flags_unchanged(self.checkpoint.metadata["flags"], to_flags(self.options), self.folder)
            check_run_unchanged(self.checkpoint.metadata, self.metadata, self.folder)
        flags = get_relative_flags(self.options)
        run_on_main(accelerator, lambda: output_folder.prepare(self.folder, self.store, flags, self.checkpoint))

    def describe(self) -> None:
        """Print the summary, and decide whether the probe is followed by training steps."""
        data, task = self.data, self.task
        lines: dict[str, str | None] = {**describe_splits(data, task.processor, task.labels_text)}
        lines |= describe_model(self.initial.name, task.model, self.forward_flops)
        lines |= self.default_lines | task.summary_lines
        self.num_selection = len(data.selection) if isinstance(data.selection, LabeledImages) else None
        has_few_images = self.num_selection is not None and self.num_selection < MIN_SELECTION_IMAGES
        is_head_only = self.options.training.trainable == "head"
        self.has_no_steps = task.probe is not None and (is_head_only or has_few_images)
        if self.has_no_steps:
            lines["defaults"] = None
        if self.has_no_steps and has_few_images:
            lines["selection"] = (
                f"{self.num_selection} separate images are too few to compare fine-tuning with the frozen model, "
                "which is saved. Set --select last to fine-tune on all images"
            )
        lines["batches"] = None if self.has_no_steps else describe_batches(self.plan)
        lines["device"] = f"{describe_device(self.accelerator)}, mixed precision: {self.precision_text}"
        for name, text in lines.items():
            if text:
                self.reporter.print_line(name, text)
        for warning in task.warnings:
            self.reporter.warn(warning)
        if self.is_dry_run:
            self.draw_few_images()
        else:
            self.reporter.printed_metrics = task.printed_metrics

    def draw_few_images(self) -> None:
        """Replace the evaluated images and those of the probe with a few images, for a dry run."""
        data, num_images = self.data, self.plan.batch_size * self.plan.num_processes
        held_out, selection = (
            images.read_first(num_images) if isinstance(images, StreamedImages) else images and images.draw(num_images)
            for images in (data.held_out, data.selection)
        )
        evaluated = data.held_out if data.selection is None else data.selection
        self.evaluated_fraction = 1.0
        if isinstance(evaluated, LabeledImages) and len(evaluated):
            self.evaluated_fraction = min(num_images / len(evaluated), 1.0)
        self.data = replace(data, held_out=held_out, selection=selection)
        if self.task.probe is not None:
            self.task.probe = replace(self.task.probe, max_images=NUM_PROBE_IMAGES)

    def fit_probe(self) -> None:
        """Start the classifier from the probe, unless the run is resumed; and measure features before pre-training."""
        if self.checkpoint is not None:
            self.metadata["probe"] = self.checkpoint.metadata["probe"]
        else:
            self.metadata["probe"] = self.task.probe and self.task.probe.run(self.data, self.reporter)
        self.has_held_out = self.data.num_held_out_images != 0
        if self.is_dry_run or not self.has_held_out:
            self.task.measure_features = None
        if self.task.measure_features is not None:
            self.features_before = self.task.measure_features(self.task.model.to(self.accelerator.device).eval())

    def train(self) -> None:
        """Run the remaining steps, and load the selected weights."""
        options, data, task, accelerator = self.options, self.data, self.task, self.accelerator
        no_metrics = {"num_images": 0, "num_unreadable_images": 0}  # if no images are held out
        self.evaluate_held_out = task.build_evaluator(data.held_out) if self.has_held_out else lambda model: no_metrics
        self.evaluate = self.evaluate_held_out if data.selection is None else task.build_evaluator(data.selection)
        images = build_training_images(options, data, task.processor, task.model.config.num_channels, task.num_views)
        self.unreadable_images = UnreadableImageCounter(self.reporter.warn, options.data.max_unreadable_images)
        self.state = state = prepare_state(options, task, accelerator)
        with SignalHandler(accelerator) as signals, self.reporter.progress, stop_on_errors():
            self.loop = loop = TrainingLoop(
                state,
                task.objective,
                self.evaluate,
                self.plan,
                options.training,
                accelerator,
                self.reporter,
                self.store,
                task.selection_metric,
                self.unreadable_images,
                options.run.save_every or (None if self.plan.num_images else DEFAULT_STREAM_SAVE_EVERY),
                "held_out" if data.selection is None else "selection",
                Normalizer(task.processor, accelerator.device) if task.model.config.num_cls_tokens else None,
                signals,
                self.metadata,
                self.on_checkpoint,
            )
            if self.checkpoint is not None:
                loop.restore(self.checkpoint)
                self.reporter.print_line("resumed", f"after step {state.step:,} of {self.plan.num_steps:,}")
            self.reporter.start_after(state.step - bool(state.pending_record), self.plan.num_steps)
            accelerator.wait_for_everyone()
            if options.run.log_with:
                start_trackers(accelerator, options)
            is_frozen_selectable = self.checkpoint is None and task.probe is not None and data.selection is not None
            batches = iterate_training_batches(
                images, self.plan, accelerator.process_index, options.data.num_workers, state.step
            )
            with closing(batches):  # closing stops the data loading workers
                if self.has_no_steps or is_frozen_selectable:
                    self.metrics = loop.evaluate_step()  # the frozen model takes part in the selection
                if not self.has_no_steps:
                    self.metrics = loop.run(batches)
            self.selected_step = None
            if options.training.select == "best":
                self.selected_step = loop.load_best_weights()
                text = f"the checkpoint of step {self.selected_step:,}, with the best evaluation"
                if self.selected_step == 0:
                    text = "the frozen model: fine-tuning was not clearly better"
                if not self.has_no_steps:
                    self.reporter.print_line("selected", text)
            self.training_seconds = loop.get_training_seconds()
        if state.ema is not None:
            state.ema.copy_to_model(state.ema.shadow)

    def calibrate(self) -> None:
        """Calibrate the classifier, and measure the metrics of the held-out images unless the loop has done so."""
        data, task, model = self.data, self.task, self.state.model
        self.calibration: dict[str, Any] | None = None
        fitted, fitted_images, reported_images = self.evaluate, slice(None), slice(None)
        if data.selection is None or (self.num_selection is not None and self.num_selection < MIN_IMAGES):
            fitted, fitted_images, reported_images = self.evaluate_held_out, FITTED, REPORTED
        self.keeps_predictions = task.can_calibrate and self.has_held_out and not self.is_dry_run
        if self.keeps_predictions:
            fitted.keep_logits = self.evaluate_held_out.keep_logits = True
            fitted(model.eval())
            self.calibration = calibrate(task.model.config, fitted, fitted_images)
            reshard(model)
        can_refit = self.selected_step == 0 and not self.is_dry_run and not isinstance(model, FSDPModule)
        if can_refit and task.probe is not None:
            task.probe.refit(data, self.accelerator)
        if data.selection is not None or self.calibration is not None:
            self.metrics = self.evaluate_held_out(model.eval())
            reshard(model)
        if self.calibration is not None:
            temperature, num_images = self.calibration["temperature"], self.calibration["num_images"]
            errors = compute_calibration_errors(self.evaluate_held_out, temperature, reported_images)
            self.calibration |= errors
            self.metrics["calibration_error"] = errors["calibration_error"]
            before, after = 100 * errors["calibration_error_before"], 100 * errors["calibration_error"]
            text = f"temperature {temperature:.2f}, fitted to {num_images:,} images that are not reported; "
            self.reporter.print_line("calibration", f"{text}calibration error {before:.1f} -> {after:.1f} points")

    def save(self) -> None:
        """Write the model and its results, and print the result."""
        data, task, loop, reporter = self.data, self.task, self.loop, self.reporter
        if data.selection is not None:
            self.metrics["selection"] = {
                "images": data.selection_name,
                "num_images": self.num_selection,
                "step": self.selected_step,
                task.selection_metric: self.state.best_score,
            }
        if num_unreadable := len(self.unreadable_images.indices):
            reporter.warn(f"{num_unreadable} training image(s) could not be read and were replaced with other images")
        results = {
            "dataset": data.name,
            "split": data.held_out_name,
            HELD_OUT_RECORD_KEY: asdict(data.record),
            "num_training_images": data.num_training_images,
            **task.results,
            **({"frozen": self.metadata["probe"]} if self.metadata["probe"] else {}),
            "calibration": self.calibration,
            "selection_metric": task.selection_metric,
            "forward_flops_per_image": self.forward_flops,
            **describe_run(self.plan, self.state.step, task.model, self.accelerator, self.training_seconds),
            **self.metrics,
            "num_unreadable_training_images": num_unreadable,
            "token_movement": loop.monitor.compute_token_movement(),
        }
        if task.measure_features is not None:
            after = task.measure_features(self.state.model.eval())
            reshard(self.state.model)
            summary = pretrain.compare_features(self.features_before, after)
            results["features"] = {"before": self.features_before, "after": after, "summary": summary}
        evaluator = self.evaluate_held_out if self.keeps_predictions else None
        save_output(task, results, self.options, self.initial, self.accelerator, evaluator)
        if self.is_dry_run:
            seconds = time.perf_counter() - self.start_time
            text = describe_dry_run(loop, self.full_plan, self.options, self.evaluated_fraction, seconds)
            reporter.print_line("dry run", text)
            return
        reporter.print_line("result", format_result(self.metrics, task.result_metrics))
        if "features" in results:
            reporter.print_line("features", results["features"]["summary"])
        reporter.print_line("saved", f"{self.folder} (model, image processor, {RESULTS_FILE})")


# Stages --------------------------------------------------------------------------------------------------------------


def resolve_options(options: Any, initial: InitialModel, data: TrainingData) -> tuple[Any, dict[str, str | None]]:
    """Return the options with a value for each flag whose default depends on the run (defaults.py), and the summary
    lines about these values."""
    select = "last" if data.selection is None else "best"
    options, size_line = replace(options, training=replace(options.training, select=select)), None
    if isinstance(options, FinetuneOptions):
        model_options, size_line = choose_image_size(options.model, initial)
        options = replace(options, model=model_options)
    options, defaults_line = resolve_defaults(options, initial, data.num_training_images)
    lines = {"weights": describe_random_weights(initial), "image size": size_line, "defaults": defaults_line}
    return options, lines


def prepare_state(options: Any, task: Task, accelerator: Accelerator) -> TrainingState:
    """Prepare the model and the optimizer for the launch configuration, and build the moving average."""
    if options.training.compile:
        task.model.compile()
    configure_layer_sharding(accelerator, task.model)
    state = TrainingState(*accelerator.prepare(task.model, build_optimizer(task.model, options.training)))
    if options.training.ema_decay:
        state.ema = Ema(state.model, options.training.ema_decay)
    return state


def start_trackers(accelerator: Accelerator, options: Any) -> None:
    folder = options.output_dir / "trackers"
    run_on_main(accelerator, partial(folder.mkdir, exist_ok=True))
    # Flags are formatted as text, because TensorBoard does not accept lists.
    flags = {name: format_flag_value(value) for name, value in to_flags(options).items()}
    accelerator.init_trackers(
        options.output_dir.resolve().name, config=flags, init_kwargs={"wandb": {"dir": str(folder)}}
    )


@contextmanager
def stop_on_errors() -> Iterator[None]:
    """Convert OSError and ValueError inside the `with` block to RunStopped: a full disk, unreadable images, or a
    checkpoint of another model."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise RunStopped(str(error), is_on_all_processes=is_raised_on_all_processes(error)) from error

"""Implementation of a complete run, shared by fine-tuning and pre-training.

    task = FinetuneTask(options)    checks the options, locks the output folder, and loads data and model
    results = run_task(task)        trains and evaluates the model, then writes and pushes the output folder
    dry_run(FinetuneTask, options)  runs a few steps in a temporary folder (`--dry-run`)

The tasks (finetune.py, pretrain.py) supply data, model, loss, evaluator and card. runner.py trains the model.
"""

import math
import os
import random
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ..checkpoints import WRITE_ERRORS, CheckpointStore, Tensors
from ..conversion.any_checkpoint import has_random_weights
from ..data.augmentation import build_augmentation
from ..data.batches import Normalizer, TrainingImages, iterate_training_batches
from ..data.fit import describe_fit
from ..data.held_out import HELD_OUT_RECORD_KEY
from ..data.images import LabeledImages
from ..data.sampling import BatchPlan
from ..data.splits import HELD_OUT_SPLITS, TrainingData, describe_data
from ..data.streaming import TrainingStream, build_training_dataset
from ..distributed import run_on_main
from ..errors import format_error
from ..files import read_json, write_json
from ..hub.connection import silence_transformers
from ..hub.model_files import RESULTS_FILE, hash_weights
from ..hub.provenance import find_provenance
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..inference.evaluator import Evaluator
from ..inference.load_model import is_preset
from ..inference.metrics import drop_large_matrices
from ..inference.speed import measure_inference_speed
from ..intervals import compute_mean_interval
from ..options import AugmentationOptions, FinetuneOptions, TrainingOptions
from .adapter import write_adapter
from .defaults import describe_random_weights, get_run_properties, resolve_defaults
from .distributed_state import gather_weights, reshard
from .loop import Metrics
from .losses import Objective
from .model import choose_image_size, merge_lora
from .output_folder import ADAPTER_FOLDER, CHECKPOINTS_FOLDER, check_replaceable
from .reporter import describe_batches, describe_model, describe_run, format_duration, format_metric
from .runner import Runner, RunStopped, TrainingComponents, build_runner, resolve_local_paths
from .token_monitor import build_attention_callback


EvaluationFunction = Callable[[nn.Module], Metrics]  # model from `Accelerator.prepare` -> metrics on held-out images

FOLDS_FILE = "folds.json"  # results of a cross-validation
NUM_DECIMALS = 6  # number of decimals in folds.json
NO_EVALUATION_TEXT = "the model was trained on all images and not evaluated, because --held-out-fraction is 0"
NUM_DRY_RUN_STEPS = 3  # number of steps of a dry run; more than 1, because the first step is slower than later steps


class Task(ABC):
    """Options, data and model of a run."""

    options: Any  # FinetuneOptions or PretrainOptions, with absolute paths
    runner: Runner  # holds the lock of the output folder until `run_task` ends
    data: TrainingData
    # Name of the metric that selects the best checkpoint. Lower values are better if the name ends with "loss".
    selection_metric: str
    plan: BatchPlan
    model: Any  # unwrapped ViTCLS model; parameters that are not trained are frozen
    processor: ViTCLSImageProcessor
    forward_flops: int  # FLOPs of a forward pass for one image
    warnings: list[str]  # warnings to print before training
    summary_lines: dict[str, str | None]  # lines about the initial weights and the default values, keyed by name

    def __init__(self, options: Any) -> None:
        """Check the options, lock the output folder, load data and model, and write config.resolved.yaml. Raise
        ValueError or OSError if data or models cannot be read or do not match the options."""
        self.runner = build_runner(self.check_options(options))
        self.options = self.runner.options
        accelerator = self.runner.accelerator
        with self.runner.release_lock_on_error():
            with accelerator.main_process_first():  # only the main process downloads files
                self.data = self.load_data()
                self.runner.set_data_fingerprint(describe_data(self.data))
                self.resolve_options()
                self.plan = self.build_plan(self.options.training)
                self.load_model()
                self.forward_flops = self.model.flops()
                self.warnings = self.find_warnings()
            if self.options.training.gradient_checkpointing:
                self.model.gradient_checkpointing_enable()
            self.runner.check_plan(self.plan)
            self.runner.prepare_folder()

    def resolve_options(self) -> None:
        """Set the flags whose default depends on the run (defaults.py), and pin Hub models to commits."""
        self.options = self.runner.pin_models(self.options)
        size_line = None
        if isinstance(self.options, FinetuneOptions):
            model_options, size_line = choose_image_size(self.options.model)
            self.options = replace(self.options, model=model_options)
        run_properties = get_run_properties(self.options, self.data.num_training_images)
        self.options, defaults_line = resolve_defaults(self.options, run_properties)
        self.runner.set_options(self.options)
        weights_line = describe_random_weights(self.options.model.model, run_properties)
        self.summary_lines = {"weights": weights_line, "image size": size_line, "defaults": defaults_line}

    # Supplied by each task -------------------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def check_options(options: Any) -> Any:
        """Return the options with defaults that depend on other flags. Raise ValueError if flags are incompatible."""

    @abstractmethod
    def load_data(self) -> TrainingData:
        """Load the training split and the held-out split."""

    @abstractmethod
    def load_model(self) -> None:
        """Set `model` and `processor`, and load other objects that the task requires."""

    @abstractmethod
    def build_evaluator(self, images: LabeledImages) -> Evaluator:
        """Build the evaluator for the given held-out images."""

    @abstractmethod
    def build_objective(self, normalize: Normalizer) -> Objective:
        """Build the training loss."""

    @abstractmethod
    def describe_labels(self) -> str:
        """Return a description of the labels for the summary line about the data."""

    @abstractmethod
    def get_summary_lines(self) -> dict[str, str]:
        """Return the summary lines about the task as {name: text}."""

    @abstractmethod
    def get_task_results(self) -> dict[str, Any]:
        """Return the fields of results.json that are specific to this task."""

    @abstractmethod
    def format_result(self, metrics: Metrics) -> str:
        """Format the evaluation metrics as one line of text."""

    def find_warnings(self) -> list[str]:
        """Return the warnings to print before training."""
        return []

    # Shared by the tasks ---------------------------------------------------------------------------------------------

    def build_plan(self, training_options: TrainingOptions) -> BatchPlan:
        labels = self.data.train.labels if isinstance(self.data.train, LabeledImages) else None
        return BatchPlan.from_options(
            self.data.num_training_images,
            training_options,
            self.runner.accelerator.num_processes,
            labels,
            self.options.augmentation.repeated_augmentation,
        )

    def build_components(self, evaluator: EvaluationFunction) -> TrainingComponents:
        """Build the components that train the model on pixels."""
        accelerator, num_workers = self.runner.accelerator, self.options.data.num_workers
        normalize = Normalizer(self.processor, accelerator.device)
        images = self.build_training_images(self.options.augmentation, self.get_num_views())
        return TrainingComponents(
            self.model,
            self.build_objective(normalize),
            partial(iterate_training_batches, images, self.plan, accelerator.process_index, num_workers),
            evaluator,
            images.describe_unreadable_image,
            build_attention_callback(self.model, normalize),
        )

    def get_num_views(self) -> int:
        """Return the number of different views per image, or 0 if every epoch uses a new view."""
        return 0

    def build_training_images(
        self, augmentation: AugmentationOptions, num_views: int
    ) -> TrainingImages | TrainingStream:
        """Build the augmented training images. `num_views` is the number of views per image, or 0 for a new view in
        every epoch."""
        processor, config = self.processor, self.model.config
        transform = build_augmentation(augmentation, processor)
        to_rgb, seed = bool(processor.do_convert_rgb), self.options.training.seed
        return build_training_dataset(self.data.train, transform, to_rgb, seed, num_views, config.num_channels)

    def get_evaluator_arguments(self) -> dict[str, Any]:
        return {
            "batch_size": self.plan.batch_size,
            "num_workers": self.options.data.num_workers,
            "accelerator": self.runner.accelerator,
            "max_unreadable_images": self.options.data.max_unreadable_images,
            "warn": self.runner.reporter.warn,
            "num_channels": self.model.config.num_channels,
        }


# A run ---------------------------------------------------------------------------------------------------------------


def run_task(task: Task) -> dict[str, Any]:
    """Train and evaluate the model, write the output folder, and return the contents of results.json. Raise RunStopped
    for the same reasons as `Runner.train`, or if the output folder cannot be written."""
    runner, reporter = task.runner, task.runner.reporter
    with runner.lock:
        if runner.is_finished:
            reporter.print_line("finished", f"{runner.folder} already contains the results of this run")
            return read_json(runner.folder / RESULTS_FILE)
        for name, text in collect_summary_lines(task).items():
            reporter.print_line(name, text)
        for warning in task.warnings:
            reporter.warn(warning)

        held_out, selection = task.data.held_out, task.data.selection
        empty_metrics = {"num_images": 0, "num_unreadable_images": 0}  # metrics if no images are held out
        evaluate_held_out = task.build_evaluator(held_out) if len(held_out) else lambda model: empty_metrics
        components = task.build_components(evaluate_held_out if selection is None else task.build_evaluator(selection))
        evaluated_images = "held_out" if selection is None else "selection"
        metrics = runner.train(components, task.plan, task.selection_metric, evaluated_images)
        metrics |= evaluate_trained_model(task, components, evaluate_held_out)

        results = collect_results(task) | drop_large_matrices(metrics)
        save_output(task, results)
        if not task.options.run.dry_run:  # a few steps, evaluated on a few images, have no meaningful result
            reporter.print_line("result", task.format_result(metrics))
        reporter.print_line("saved", f"{runner.folder} (model, image processor, {RESULTS_FILE})")
        runner.accelerator.end_training()
        return results


def evaluate_trained_model(
    task: Task, components: TrainingComponents, evaluate_held_out: EvaluationFunction
) -> Metrics:
    """Evaluate the trained model on the held-out images. Return the metrics; empty if the last evaluation during
    training used these images."""
    has_only_heads = components.model is not task.model
    if task.data.selection is None and not has_only_heads:
        return {}
    model = task.model if has_only_heads else task.runner.state.model
    metrics = evaluate_held_out(model.eval())
    reshard(model)
    if task.data.selection is None:
        return metrics
    selection_results = {"images": task.data.selection_name, "num_images": len(task.data.selection)}
    selection_results |= {"step": task.runner.selected_step, task.selection_metric: task.runner.state.best_score}
    return metrics | {"selection": selection_results}


def collect_summary_lines(task: Task) -> dict[str, str]:
    """Return the summary lines that are printed before training, as {name: text}."""
    data = task.data
    size_text = "a stream of" if data.num_training_images is None else f"{data.num_training_images:,}"
    summary_lines = {}
    if data.train_split in HELD_OUT_SPLITS:
        summary_lines["split"] = (
            f"training uses the split named {data.train_split!r}, because {data.name} has no split named 'train'"
        )
    summary_lines |= {
        "data": f"{data.name}: {size_text} training images, {len(data.held_out):,} held-out images "
        f"({data.held_out_name}); {task.describe_labels()}"
    }
    if data.selection is not None:
        summary_lines["selection"] = (
            f"the best checkpoint is selected on {len(data.selection):,} separate images ({data.selection_name})"
        )
    summary_lines["fit"] = describe_fit(task.processor, data.held_out.images)
    summary_lines |= describe_model(task.options.model.model, task.model)
    summary_lines["tokens"] += f", {task.forward_flops / 1e9:.3g} GFLOP per image"
    summary_lines |= {name: line for name, line in task.summary_lines.items() if line}
    return summary_lines | task.get_summary_lines() | describe_batches(task.plan, task.runner.accelerator)


def collect_results(task: Task) -> dict[str, Any]:
    """Return the contents of results.json, except the metrics."""
    runner, data = task.runner, task.data
    return {
        "dataset": data.name,
        "split": data.held_out_name,
        HELD_OUT_RECORD_KEY: asdict(data.record),
        "num_training_images": data.num_training_images,
        **task.get_task_results(),
        "selection_metric": task.selection_metric,
        "forward_flops_per_image": task.forward_flops,
        **describe_run(task.plan, runner.state.step, task.model, runner.accelerator, runner.training_seconds),
    }


def format_metrics(metrics: Metrics, *names: str) -> str:
    """Format the metrics in `names` as one line of text. Missing metrics are omitted."""
    return ", ".join(format_metric(name, metrics[name]) for name in names if name in metrics)


# Output --------------------------------------------------------------------------------------------------------------


def save_output(task: Task, results: dict[str, Any]) -> None:
    """Write the model, the image processor, and finally results.json, which marks the folder as complete. Add the
    inference speed, the hash of the weights and the provenance of the initial weights to `results`. This function must
    be called on all processes. Raise RunStopped on all processes if the folder cannot be written."""
    runner, options, folder = task.runner, task.options, task.runner.folder
    weights = gather_weights(task.model, runner.accelerator.is_main_process)

    def write_files() -> None:
        write_model(task.model, task.processor, folder, weights)
        results["weights_sha256"] = hash_weights(folder)
        results["provenance"] = None  # random initial weights
        if not is_preset(options.model.model) and not has_random_weights(options.model.model):
            provenance = find_provenance(options.model.model)
            provenance.copy_license(folder)
            results["provenance"] = provenance.to_dict()
        if results.get("teacher"):
            results["teacher_provenance"] = find_provenance(options.distillation.teacher).to_dict()
        # The training model may be sharded.
        saved_model = get_unsharded_class(task.model).from_pretrained(folder).to(runner.accelerator.device).eval()
        results["inference"] = measure_inference_speed(saved_model, runner.accelerator.device)
        if any(".lora_" in name for name in weights):
            write_adapter(folder / ADAPTER_FOLDER, weights, options.training.lora_rank, options.model.model)
            task.model.config.save_pretrained(folder / ADAPTER_FOLDER)
            write_json(folder / ADAPTER_FOLDER / RESULTS_FILE, results)
        write_json(folder / RESULTS_FILE, results)

    def write_and_convert_errors() -> None:
        try:
            with silence_transformers(hide_warnings=False):
                write_files()
        except WRITE_ERRORS as error:
            raise OSError(format_error(error)) from error

    try:
        run_on_main(runner.accelerator, write_and_convert_errors)
    except OSError as error:
        raise RunStopped(
            f"cannot write the model to {folder} ({error}). Free disk space, then repeat the command with --resume"
        ) from error


def write_model(model: PreTrainedModel, processor: ViTCLSImageProcessor, folder: Path, weights: Tensors) -> None:
    """Write weights, configuration, code and image processor. LoRA weights are merged. Only the main process may call
    this function. `weights` are full tensors, because the model may be sharded."""
    # With the subclass, transformers would save PyTorch's source files as the model's code.
    wrapped_class = type(model)
    model.__class__ = get_unsharded_class(model)
    try:
        model.save_pretrained(folder, state_dict=merge_lora(weights))
    finally:
        model.__class__ = wrapped_class
    processor.save_pretrained(folder)


def get_unsharded_class(model: PreTrainedModel) -> Any:
    """Return the class of a model, which FSDP2 replaces with a subclass."""
    return next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))


# Cross-validation ----------------------------------------------------------------------------------------------------


def run_folds(task_class: type[Task], options: Any) -> dict[str, Any]:
    """Run one task per fold in OUTPUT_DIR/fold-1, fold-2, ... (`--folds`). Write folds.json and return its content.

    Each image is held out in exactly one fold. The confidence interval of the mean uses Student's t-distribution. This
    interval is too narrow, because the training images of the folds overlap (Bengio and Grandvalet 2004, "No unbiased
    estimator of the variance of k-fold cross-validation"). Raise ValueError if --push-to-hub is set.
    """
    if options.run.push_to_hub:
        raise ValueError(
            "--folds trains several models, but --push-to-hub pushes only one model. Remove one of the two flags"
        )
    results = []
    for fold in range(1, options.data.folds + 1):
        folder = options.output_dir / f"fold-{fold}"
        task = task_class(replace(options, output_dir=folder, data=replace(options.data, fold=fold)))
        task.runner.reporter.print_line("fold", f"{fold} of {options.data.folds}, in {folder}")
        results.append(run_task(task))
    metric = results[0]["selection_metric"]
    values = [result[metric] for result in results]
    mean, half_width = compute_mean_interval(values)
    summary = {
        "metric": metric,
        "mean": round(mean, NUM_DECIMALS),
        "interval": [round(mean - half_width, NUM_DECIMALS), round(mean + half_width, NUM_DECIMALS)],
        "folds": [{"folder": f"fold-{index + 1}", metric: value} for index, value in enumerate(values)],
    }
    runner = task.runner
    run_on_main(runner.accelerator, lambda: write_json(options.output_dir / FOLDS_FILE, summary))
    low, high = (format_metric(metric, value).split()[-1] for value in summary["interval"])
    runner.reporter.print_line(
        "folds", f"mean {format_metric(metric, mean)} (95% interval: {low} to {high}) over {len(values)} folds"
    )
    return summary


# Dry run -------------------------------------------------------------------------------------------------------------


def dry_run(task_class: type[Task], options: Any) -> None:
    """Train for a few steps, evaluate a few images, and write a checkpoint and the results to a temporary folder
    (`--dry-run`). Print the actions that succeeded and the expected duration of the full run."""
    start_time = time.perf_counter()
    with build_dry_run_options(options) as dry_run_options:
        task = task_class(dry_run_options)
        full_training_options = replace(task.options.training, max_steps=options.training.max_steps)
        runner, plan, data = task.runner, task.build_plan(full_training_options), task.data
        num_held_out = len(data.held_out if data.selection is None else data.selection)
        num_evaluated = min(num_held_out, plan.batch_size * plan.num_processes)
        selection = None if data.selection is None else draw_images(data.selection, num_evaluated)
        task.data = replace(data, held_out=draw_images(data.held_out, num_evaluated), selection=selection)
        if dry_run_options.training.trainable == "head":
            limit_training_images(task)
        run_task(task)
    evaluated_fraction = num_evaluated / num_held_out if num_held_out else 1.0
    duration = format_duration(estimate_run_seconds(runner, plan, evaluated_fraction))
    runner.reporter.print_line(
        "dry run",
        f"ran {len(runner.step_seconds)} steps and an evaluation, and saved a checkpoint and the model, in "
        f"{time.perf_counter() - start_time:.0f} s; no files were kept. The full run has "
        f"{plan.num_steps:,} steps, takes about {duration}, and needs "
        f"about {runner.peak_memory_mb:,.0f} MiB of memory per process",
    )


def draw_images(images: LabeledImages, num_images: int) -> LabeledImages:
    """Draw at most `num_images` images at random, with a fixed seed, because datasets are often sorted by class."""
    return images.select(sorted(random.Random(0).sample(range(len(images)), min(num_images, len(images)))))


@contextmanager
def build_dry_run_options(options: Any) -> Iterator[Any]:
    """Yield the options of a dry run, which writes to a temporary folder. The folder is removed at the end of the
    `with` block. Raise ValueError if the full run would not be allowed to replace the files in the output folder."""
    if not options.run.resume:
        check_replaceable(
            resolve_local_paths(options), CheckpointStore(options.output_dir / CHECKPOINTS_FOLDER, num_kept=1)
        )
    parent, prefix = options.output_dir.absolute().parent, f".{options.output_dir.name}-dry-run-"
    folder = parent / prefix
    if os.environ.get("RANK", "0") == "0":  # Accelerate is not initialized yet
        parent.mkdir(parents=True, exist_ok=True)  # fails without the write permission that the full run requires
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield replace(
            options,
            output_dir=folder / options.output_dir.name,
            training=replace(options.training, max_steps=NUM_DRY_RUN_STEPS, log_every=1),
            run=replace(options.run, resume=False, dry_run=True),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def limit_training_images(task: Task) -> None:
    """Keep only the training images that the steps of a dry run use, because linear probing encodes all training
    images before the first step."""
    if isinstance(task.data.train, LabeledImages):
        plan = task.plan
        batches = [batch for process_index in range(plan.num_processes) for batch in plan.iterate_keys(process_index)]
        indices = sorted({index for batch in batches for _, index in batch})
        task.data = replace(task.data, train=task.data.train.select(indices))
        task.plan = task.build_plan(task.options.training)


def estimate_run_seconds(runner: Runner, plan: BatchPlan, evaluated_fraction: float) -> float:
    """Return the expected duration in seconds of the steps and evaluations of the full run. `plan` is the batch plan
    of the full run. `evaluated_fraction` is the fraction of the held-out images that the dry run evaluated."""
    epochs = plan.count_epochs(plan.num_steps) if plan.num_images else 1.0
    num_evaluations = math.ceil(epochs / runner.options.training.evaluate_every)
    seconds_per_step = min(runner.step_seconds[1:] or runner.step_seconds)  # the first step is slower than later steps
    seconds_per_evaluation = min(runner.evaluation_seconds) / evaluated_fraction
    return plan.num_steps * seconds_per_step + num_evaluations * seconds_per_evaluation

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
from accelerate.utils import gather_object, set_seed
from torch.distributed.fsdp import FSDPModule

from ..checkpoints import WRITE_ERRORS, CheckpointStore
from ..data.augmentation import build_augmentation
from ..data.batches import Normalizer, iterate_training_batches
from ..data.held_out import HELD_OUT_RECORD_KEY
from ..data.images import LabeledImages, UnreadableImageCounter
from ..data.sampling import BatchPlan
from ..data.splits import TrainingData, describe_data, load_on_main
from ..data.streaming import build_training_dataset
from ..distributed import build_accelerator, configure_layer_sharding, run_on_main
from ..errors import RunStopped, format_error, is_raised_on_all_processes
from ..files import write_json
from ..hub.connection import silence_transformers
from ..hub.model_files import PREDICTIONS_FILE
from ..inference.evaluator import Evaluator
from ..inference.per_image import write_predictions
from ..options import FinetuneOptions, PretrainOptions, to_flags
from . import finetune, output_folder, pretrain
from .calibration import FITTED, MIN_IMAGES, REPORTED, calibrate, compute_calibration_errors, rescale
from .defaults import describe_random_weights, get_run_properties, resolve_defaults
from .distributed_state import gather_state, gather_weights, reshard
from .dry_run import NUM_PROBE_IMAGES, build_dry_run_options, describe_dry_run, draw_images
from .loop import NonFiniteLoss, TrainingLoop, TrainingState
from .model import check_preset_name, choose_image_size
from .optimizer import Ema, build_optimizer
from .output_folder import CHECKPOINTS_FOLDER, RESULTS_FILE, FolderLock, stage_files, write_model_files
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
from .task import Task


DEFAULT_STREAM_SAVE_EVERY = 1000  # default of --save-every in steps for streams, which have no epochs


def train(options: FinetuneOptions | PretrainOptions, on_checkpoint: Callable[[Path], None] | None = None) -> Path:
    """Train and evaluate a model, and return the folder with the model and its results. With `--dry-run`, run a few
    steps, print the expected duration and memory of the full run, and keep no files.

    Args:
        options: flags of the run.
        on_checkpoint: called on the main process with the folder of each saved checkpoint.

    Raises:
        ValueError, OSError: if data or models cannot be read or do not match the options, another run uses the
            folder, files would be replaced without --overwrite, or the run cannot be resumed.
        RunStopped: after a signal, a non-finite loss, too many unreadable images, or a full disk.
    """
    kind: Any = pretrain if isinstance(options, PretrainOptions) else finetune
    check_preset_name(options.model.model)
    options = resolve_local_paths(kind.check_options(options))
    if options.run.dry_run:
        with build_dry_run_options(options) as dry_run_options:
            run(kind, dry_run_options, None, full_max_steps=options.training.max_steps)
        return options.output_dir
    return run(kind, options, on_checkpoint)


def run(
    kind: Any,
    options: Any,
    on_checkpoint: Callable[[Path], None] | None = None,
    full_max_steps: int | None = None,
) -> Path:
    """Run the stages of `train`. `kind` is the module finetune or pretrain. In a dry run, `full_max_steps` is
    `--max-steps` of the full run."""
    run_start_time, folder, is_dry_run = time.perf_counter(), options.output_dir, options.run.dry_run
    accelerator = build_accelerator(
        options.training.gradient_accumulation_steps,
        options.training.mixed_precision,
        options.run.log_with,
        folder / "trackers",
    )
    set_seed(options.training.seed)
    reporter = Reporter(folder / output_folder.METRICS_FILE, accelerator)
    store = CheckpointStore(folder / CHECKPOINTS_FOLDER, options.run.keep_checkpoints)
    with FolderLock(folder) as lock:
        run_on_main(accelerator, lock.acquire)
        checkpoint = None
        if options.run.resume:
            checkpoint = run_on_main(accelerator, partial(store.load_newest, reporter.warn))

        def check_folder() -> bool:
            """Return whether the resumed run is already finished."""
            if checkpoint is None:
                output_folder.check_replaceable(options, store)
                return False
            check_flags_unchanged(checkpoint.metadata["flags"], to_flags(options), folder)
            if not (folder / output_folder.CONFIG_FILE).exists() and not options.run.overwrite:
                output_folder.check_no_unrelated_files(folder)
            return (folder / RESULTS_FILE).exists()

        if run_on_main(accelerator, check_folder):
            shutil.rmtree(folder / output_folder.STAGING_FOLDER, ignore_errors=True)  # killed at the very end
            reporter.print_line("finished", f"{folder} already contains the results of this run")
            return folder

        # Data and model
        data = load_on_main(accelerator, options.data.dataset, partial(kind.load_data, options))
        with accelerator.main_process_first():  # only the main process downloads files
            options, default_lines = resolve_options(options, data, checkpoint)
            task: Task = kind.build_task(options, data, reporter)
            forward_flops = task.model.flops()
        if options.training.gradient_checkpointing:
            task.model.gradient_checkpointing_enable()
        plan = build_plan(options, data, accelerator)
        run_metadata = {
            "images_per_step": plan.images_per_step,
            "num_steps": plan.num_steps,
            "mixed_precision": accelerator.mixed_precision,
            "data": run_on_main(accelerator, partial(describe_data, data)),
            "flags": get_relative_flags(options, should_strip=options.run.hub_checkpoint_branch is not None),
        }
        if checkpoint is not None:
            check_flags_unchanged(checkpoint.metadata["flags"], to_flags(options), folder)
            check_run_unchanged(checkpoint.metadata, run_metadata, folder)
        run_on_main(accelerator, lambda: output_folder.prepare(folder, store, get_relative_flags(options), checkpoint))

        # Summary
        lines: dict[str, str | None] = {**describe_splits(data, task.processor, task.labels_text)}
        lines |= describe_model(options.model.model, task.model, forward_flops) | default_lines | task.summary_lines
        num_selection = len(data.selection) if isinstance(data.selection, LabeledImages) else None
        has_few_images = num_selection is not None and num_selection < MIN_SELECTION_IMAGES
        has_finished_training = task.probe is not None and (options.training.trainable == "head" or has_few_images)
        if has_finished_training:  # no steps
            lines["defaults"] = None
            if has_few_images:
                lines["selection"] = (
                    f"{num_selection} separate images are too few to tell whether fine-tuning is better than "
                    "the frozen model, so the frozen model is saved. Set --select last to fine-tune on all images"
                )
        for name, text in (lines | describe_batches(plan, accelerator, has_finished_training)).items():
            if text:
                reporter.print_line(name, text)
        for warning in task.warnings:
            reporter.warn(warning)
        num_evaluated, full_num_images = 0, 0
        if is_dry_run:
            num_evaluated = plan.batch_size * plan.num_processes
            evaluated_data = data.held_out if data.selection is None else data.selection
            if isinstance(evaluated_data, LabeledImages):
                full_num_images = len(evaluated_data)
                num_evaluated = min(num_evaluated, full_num_images)
            data = replace(
                data,
                held_out=draw_images(data.held_out, num_evaluated),
                selection=None if data.selection is None else draw_images(data.selection, num_evaluated),
            )
            if task.probe is not None:
                task.probe = replace(task.probe, max_images=NUM_PROBE_IMAGES)

        # Probe
        reporter.printed_metric = None if is_dry_run else task.selection_metric
        if checkpoint is not None:
            run_metadata["probe"] = checkpoint.metadata["probe"]
        elif task.probe is None:
            run_metadata["probe"] = None
        else:
            run_metadata["probe"] = task.probe.run(data, reporter)

        # Training
        empty_metrics = {"num_images": 0, "num_unreadable_images": 0}  # metrics if no images are held out
        has_held_out = data.num_held_out_images != 0
        evaluate_held_out = task.build_evaluator(data.held_out) if has_held_out else lambda model: empty_metrics
        evaluated = evaluate_held_out if data.selection is None else task.build_evaluator(data.selection)
        images = build_training_images(options, data, task)
        unreadable_images = UnreadableImageCounter(reporter.warn, options.data.max_unreadable_images)
        should_compare = task.compare is not None and has_held_out and not is_dry_run
        if should_compare:
            task.compare.before = task.compare.measure(task.model.to(accelerator.device))
        state = prepare_state(options, task, accelerator)
        with SignalHandler(accelerator) as signals, reporter.progress, stop_on_errors():
            loop = TrainingLoop(
                state,
                task.objective,
                evaluated,
                plan,
                options.training,
                accelerator,
                reporter,
                store,
                task.selection_metric,
                unreadable_images,
                options.run.save_every or (None if plan.num_images else DEFAULT_STREAM_SAVE_EVERY),
                "held_out" if data.selection is None else "selection",
                Normalizer(task.processor, accelerator.device) if task.model.config.num_cls_tokens else None,
                signals,
                run_metadata,
                on_checkpoint,
            )
            if checkpoint is not None:
                loop.restore(checkpoint)
                reporter.print_line("resumed", f"after step {state.step:,} of {plan.num_steps:,}")
            reporter.start_after(state.step - 1 if state.pending_record else state.step, plan.num_steps)
            accelerator.wait_for_everyone()
            if options.run.log_with:
                start_trackers(accelerator, options)
            batches = iterate_training_batches(
                images, plan, accelerator.process_index, options.data.num_workers, state.step
            )
            try:
                with closing(batches):  # closing stops the data loading workers
                    if has_finished_training or (
                        checkpoint is None and task.probe is not None and data.selection is not None
                    ):
                        metrics = loop.evaluate_step()  # the frozen model takes part in the selection
                    if not has_finished_training:
                        metrics = loop.run(batches)
            except NonFiniteLoss as error:
                raise RunStopped(f"{error}. {save_non_finite_step(error, loop, folder)}") from None
            selected_step = None
            if options.training.select == "best":
                selected_step = loop.load_best_weights()
                selected_text = f"the checkpoint of step {selected_step:,}, with the best evaluation"
                if selected_step == 0:
                    selected_text = "the frozen model: fine-tuning was not better by more than two standard errors"
                if not has_finished_training:
                    reporter.print_line("selected", selected_text)
            training_seconds = loop.get_training_seconds()
        if state.ema is not None:
            state.ema.copy_to_model(state.ema.shadow)

        # Calibration and results
        calibration, reported_images = None, slice(None)
        held_out_evaluator: Evaluator | None = None  # only if the model is calibrated
        if task.can_calibrate and has_held_out and not is_dry_run:
            assert isinstance(evaluate_held_out, Evaluator) and isinstance(evaluated, Evaluator)
            held_out_evaluator, fitted_evaluator, fitted_images = evaluate_held_out, evaluated, slice(None)
            if data.selection is None or (num_selection is not None and num_selection < MIN_IMAGES):
                fitted_evaluator, fitted_images, reported_images = evaluate_held_out, FITTED, REPORTED
            fitted_evaluator.keep_logits = held_out_evaluator.keep_logits = True
            metrics = fitted_evaluator(state.model.eval())
            calibration = calibrate(task.model.config, fitted_evaluator, fitted_images)
            reshard(state.model)
        if (
            selected_step == 0
            and task.probe is not None
            and not is_dry_run
            and not isinstance(state.model, FSDPModule)
        ):
            task.probe.refit(data, accelerator)
        if data.selection is not None:
            metrics = evaluate_held_out(state.model.eval())
            reshard(state.model)
        elif held_out_evaluator is not None and calibration is not None:
            metrics["loss"] = rescale(held_out_evaluator, calibration["temperature"])
        if held_out_evaluator is not None and calibration is not None:
            temperature = calibration["temperature"]
            calibration |= compute_calibration_errors(held_out_evaluator, temperature, reported_images)
            metrics["calibration_error"] = calibration["calibration_error"]
            reporter.print_line(
                "calibration",
                f"temperature {temperature:.2f}, from {calibration['num_images']:,} images that are not reported: the "
                f"calibration error is {100 * calibration['calibration_error']:.1f} points, and was "
                f"{100 * calibration['calibration_error_before']:.1f}",
            )
        if data.selection is not None:
            metrics["selection"] = {
                "images": data.selection_name,
                "num_images": num_selection,
                "step": selected_step,
                task.selection_metric: state.best_score,
            }
        token_movement = loop.monitor.compute_token_movement()
        for token, distance in token_movement.items():
            if distance == 0 and selected_step != 0 and loop.should_warn_about_tokens:
                reporter.warn(f"token {token} did not change during training")
        if num_unreadable := len(unreadable_images.indices):
            reporter.warn(f"{num_unreadable} training image(s) could not be read and were replaced with other images")
        results = {
            "dataset": data.name,
            "split": data.held_out_name,
            HELD_OUT_RECORD_KEY: asdict(data.record),
            "num_training_images": data.num_training_images,
            **task.results,
            **({"frozen": run_metadata["probe"]} if run_metadata["probe"] else {}),
            "calibration": calibration,
            "selection_metric": task.selection_metric,
            "forward_flops_per_image": forward_flops,
            **describe_run(plan, state.step, task.model, accelerator, training_seconds),
            **metrics,
            "num_unreadable_training_images": num_unreadable,
            "token_movement": token_movement,
        }
        if should_compare:
            after = task.compare.measure(state.model)
            reshard(state.model)
            results["features"] = {"before": task.compare.before, "after": after}
            results["features"]["summary"] = task.compare.describe(after)
        save_output(task, results, options, accelerator, held_out_evaluator)
        if is_dry_run:
            full_options = replace(options, training=replace(options.training, max_steps=full_max_steps))
            full_plan = build_plan(full_options, data, accelerator)
            fraction = num_evaluated / full_num_images if full_num_images else 1.0
            text = describe_dry_run(loop, full_plan, options, fraction, time.perf_counter() - run_start_time)
            reporter.print_line("dry run", text)
        else:
            reporter.print_line("result", format_result(metrics, task.result_metrics, task.evaluated_text))
            if should_compare:
                reporter.print_line("features", results["features"]["summary"])
            reporter.print_line("saved", f"{folder} (model, image processor, {RESULTS_FILE})")
        accelerator.end_training()
        return folder


# Stages --------------------------------------------------------------------------------------------------------------


def resolve_options(options: Any, data: TrainingData, checkpoint: Any) -> tuple[Any, dict[str, str | None]]:
    """Return the options with pinned models and a value for each flag whose default depends on the run (defaults.py),
    and the summary lines about these values."""
    options = pin_models(options, checkpoint)
    options = replace(
        options,
        training=replace(options.training, select="last" if data.selection is None else "best"),
    )
    size_line = None
    if isinstance(options, FinetuneOptions):
        model_options, size_line = choose_image_size(options.model)
        options = replace(options, model=model_options)
    run_properties = get_run_properties(options, data.num_training_images)
    options, defaults_line = resolve_defaults(options, run_properties)
    weights_line = describe_random_weights(options.model.model, run_properties)
    return options, {"weights": weights_line, "image size": size_line, "defaults": defaults_line}


def build_plan(options: Any, data: TrainingData, accelerator: Accelerator) -> BatchPlan:
    labels = data.train.labels if isinstance(data.train, LabeledImages) else None
    return BatchPlan.from_options(
        data.num_training_images,
        options.training,
        accelerator.num_processes,
        labels,
    )


def build_training_images(options: Any, data: TrainingData, task: Task) -> Any:
    """Build the augmented training images (`TrainingImages` or `TrainingStream`)."""
    config, processor = task.model.config, task.processor
    transform = build_augmentation(options.augmentation, processor)
    to_rgb, seed = bool(processor.do_convert_rgb), options.training.seed
    return build_training_dataset(data.train, transform, to_rgb, seed, task.num_views, config.num_channels)


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
    if accelerator.is_main_process:
        folder.mkdir(exist_ok=True)
    accelerator.wait_for_everyone()
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


def save_non_finite_step(error: NonFiniteLoss, loop: TrainingLoop, folder: Path) -> str:
    """Save the image indices and the initial state of the step with the non-finite loss. Return a sentence that
    contains the file name, or the error if saving fails."""
    file, accelerator, state = folder / output_folder.NON_FINITE_FILE, loop.accelerator, loop.state
    local_batches = [{name: batch[name].tolist() for name in ("index", "epoch")} for batch in error.batches]
    failed_step = {"step": error.step + 1, "batches": gather_object(local_batches)}
    try:
        run_on_main(accelerator, lambda: write_json(file, failed_step))
        store = CheckpointStore(folder / output_folder.NON_FINITE_FOLDER, num_kept=1)
        tensors, metadata = gather_state(accelerator, state.model, state.optimizer, state.shadow)
        metadata = {"step": error.step} | metadata
        run_on_main(accelerator, lambda: store.save(error.step, tensors, metadata, is_best=False))
    except OSError as saving_error:
        saved_data = f"The images of step {error.step + 1} and the state before this step"
        return f"{saved_data} could not be saved: {saving_error}"
    return f"The images of step {error.step + 1} are listed in {file}"


def save_output(
    task: Task, results: dict[str, Any], options: Any, accelerator: Accelerator, evaluator: Evaluator | None
) -> None:
    """Write the evaluator's predictions, the model, the image processor and finally results.json. All processes must
    call this function. Raise RunStopped on all processes if the folder cannot be written."""
    folder, weights = options.output_dir, gather_weights(task.model)
    if task.encoder is not None:
        weights = {name.removeprefix("vitcls."): weights[name] for name in weights if name.startswith("vitcls.")}

    def write() -> None:
        try:
            with stage_files(folder) as staging, silence_transformers(hide_warnings=False):
                if evaluator is not None:
                    write_predictions(staging / PREDICTIONS_FILE, evaluator)
                write_model_files(task.encoder or task.model, task.processor, staging, weights, results, options)
        except WRITE_ERRORS as error:
            raise OSError(format_error(error)) from error

    try:
        run_on_main(accelerator, write)
    except OSError as error:
        raise RunStopped(
            f"cannot write the model to {folder} ({error}). Free disk space, then repeat the command with --resume"
        ) from error

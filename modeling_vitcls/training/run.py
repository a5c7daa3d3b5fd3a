"""One training run, from options to a model folder. `run` reads from top to bottom.

    options -> load -> describe -> probe of the frozen encoder -> steps -> calibration -> folder

What is trained is a `TrainingSetup` (finetune.py, pretrain.py); how the steps run is a
`TrainingLoop` (loop.py). The run writes weights, configuration, code, image processor,
config.resolved.yaml, metrics.jsonl, checkpoints and finally results.json, which marks the folder as
complete. publishing/ builds the report and the card from the folder.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule

from ..data.batches import iterate_training_batches
from ..data.image_folder import check_output_is_not_read
from ..data.images import LabeledImages, UnreadableImageCounter
from ..data.workers import explain_worker_errors
from ..inference.evaluator import round_floats
from ..inference.frozen_features import HeadEvaluator
from ..inference.per_image import Predictions, get_outputs, is_labeled
from ..runtime.distributed import configure_layer_sharding, run_on_main
from ..runtime.errors import RunStopped, describe_error, is_raised_on_all_processes
from ..runtime.flags import to_flags
from ..runtime.staging import STAGING_FOLDER, FolderLock
from . import finetune, pretrain
from .calibration import (
    Calibration,
    describe_probe_calibration,
    explain_missing_calibration,
    find_calibration,
    has_enough_images,
    measure_errors,
)
from .distributed_state import reshard
from .dry_run import build_dry_run_options, reduce_for_dry_run
from .loop import Evaluate, TrainingLoop, TrainingState
from .model import check_preset_name
from .optimizer import Ema, build_optimizer
from .options import FinetuneOptions, PretrainOptions
from .output_folder import save_output
from .probe import FittedProbe
from .resume import format_flag_value, resolve_local_paths
from .run_inputs import Environment, Loaded, Options, load, print_summary, set_up
from .run_results import (
    Result,
    Trained,
    build_results,
    print_estimate,
    print_result,
    store_statistics,
)
from .signals import SignalHandler
from .training_setup import TrainingSetup, build_training_images


# default of --save-every in steps for streams, which have no epochs
DEFAULT_STREAM_SAVE_EVERY = 1000
ALL = slice(None)
FIRST_HALF = slice(0, None, 2)
SECOND_HALF = slice(1, None, 2)  # of the held-out images


@dataclass(frozen=True)
class Evaluators:
    """The evaluations of a run: an `Evaluator`, or `evaluate_nothing` without images."""

    selection: Evaluate  # of the selection images or, without them, of the held-out images
    held_out: Evaluate
    has_held_out: bool


def train(
    options: FinetuneOptions | PretrainOptions, on_checkpoint: Callable[[Path], None] | None = None
) -> Path:
    """Train and evaluate a model, and return the folder with the model and its results.

    With `--dry-run`, run a few steps, print the expected duration and memory of the full run, and
    keep no files, not even the returned folder.

    Args:
        options: flags of the run.
        on_checkpoint: called on the main process with the folder of each saved checkpoint.

    Raises:
        ValueError, OSError: if data or models cannot be read or do not match the options, another
            run uses the folder, files would be replaced without --overwrite, or the run cannot be
            resumed.
        RunStopped: after a signal, a non-finite loss, too many unreadable images, or a full disk.
    """
    check_preset_name(options.model)
    kind = pretrain if isinstance(options, PretrainOptions) else finetune
    options = resolve_local_paths(options)
    check_output_is_not_read(options.output_dir, options.dataset)
    if options.dry_run:
        with build_dry_run_options(options) as dry_run_options:
            return run(kind, dry_run_options, None)
    return run(kind, options, on_checkpoint)


def run(kind: ModuleType, asked: Options, on_checkpoint: Callable[[Path], None] | None) -> Path:
    """Run all stages, and return the output folder.

    `asked` are the options as the person set them.
    """
    options = kind.check_options(asked)
    folder = options.output_dir
    with FolderLock(folder) as lock:
        environment = set_up(asked, lock)
        accelerator, reporter = environment.accelerator, environment.reporter
        if environment.is_finished:
            # killed at the end
            shutil.rmtree(folder / STAGING_FOLDER, ignore_errors=True)
            if options.keep_checkpoints is None:
                environment.store.clear()
            reporter.print_line("finished", f"{folder} already contains the results of this run")
            return folder

        loaded = load(kind, options, environment)
        if options.dry_run:
            loaded = reduce_for_dry_run(loaded)
        print_summary(loaded, environment)

        frozen = fit_probe(loaded, environment)
        features_before = measure_features(loaded, environment)

        evaluators = build_evaluators(loaded)
        trained = train_steps(loaded, frozen, evaluators, environment, on_checkpoint)
        result = finish_model(loaded, frozen, evaluators, trained, environment)

        store_statistics(loaded, trained.loop.state.model)
        features_after = measure_features(loaded, environment, trained.loop.state.model)
        results = build_results(
            loaded, trained, result, environment, features_before, features_after
        )
        save_output(
            loaded.setup,
            loaded.data,
            results,
            loaded.options,
            loaded.initial,
            accelerator,
            evaluator=result.evaluator,
            nearest_images=result.nearest_images,
        )
        if options.keep_checkpoints is None:
            run_on_main(accelerator, environment.store.clear)
        print_end = print_estimate if options.dry_run else print_result
        print_end(results, loaded, trained, environment)

        # DDP must not outlive its process group: with torch 2.11, gloo may wait forever
        del trained
        accelerator.free_memory()
        accelerator.end_training()
        return folder


# Stages -------------------------------------------------------------------------------------------


def fit_probe(loaded: Loaded, environment: Environment) -> FittedProbe | None:
    """Start the classifier from a regression on the frozen encoder.

    A resumed run restores what the regression reads; the weights are those of the checkpoint.
    """
    checkpoint, probe = environment.checkpoint, loaded.setup.probe
    if checkpoint is not None:
        record = loaded.metadata["probe"] = checkpoint.metadata["probe"]
        if record and probe is not None:
            probe.restore(record)
        return None
    frozen = None
    if probe is not None:
        frozen = probe.run(loaded.data, environment.reporter, is_final=not loaded.has_steps)
    loaded.metadata["probe"] = frozen and frozen.record
    return frozen


def measure_features(
    loaded: Loaded, environment: Environment, model: Any = None
) -> dict[str, Any] | None:
    """Measure the features of an encoder before or after pre-training.

    Returns None if there is nothing to measure.
    """
    measure = loaded.setup.measure_features
    if measure is None or loaded.data.num_held_out_images == 0:
        return None
    model = loaded.setup.model.to(environment.accelerator.device) if model is None else model
    features = measure(model.eval())
    reshard(model)
    return features


def build_evaluators(loaded: Loaded) -> Evaluators:
    """Build the evaluations of selection and held-out images."""
    data, setup = loaded.data, loaded.setup
    has_held_out = data.num_held_out_images != 0
    held_out: Evaluate = evaluate_nothing
    if has_held_out:
        held_out = setup.build_evaluator(data.held_out)
    selection = held_out if data.selection is None else setup.build_evaluator(data.selection)
    return Evaluators(selection, held_out, has_held_out)


def evaluate_nothing(model: Any) -> dict[str, Any]:
    """Return the metrics of a run without held-out images."""
    return {"num_images": 0, "num_unreadable_images": 0}


def train_steps(
    loaded: Loaded,
    frozen: FittedProbe | None,
    evaluators: Evaluators,
    environment: Environment,
    on_checkpoint: Callable[[Path], None] | None,
) -> Trained:
    """Run the remaining steps, and load the selected weights.

    Without steps, the frozen model is selected.
    """
    options = loaded.options
    data = loaded.data
    setup = loaded.setup
    plan = loaded.plan
    accelerator = environment.accelerator
    reporter = environment.reporter

    images = build_training_images(options, data, setup.processor, setup.model.config.num_channels)
    state = prepare_state(options, setup, accelerator)
    default_save_every = None if plan.num_images else DEFAULT_STREAM_SAVE_EVERY
    metrics: dict[str, Any] = {}
    selected_step = None

    with (
        SignalHandler(accelerator) as signals,
        reporter.progress,
        stop_on_errors(options.num_workers),
    ):
        loop = TrainingLoop(
            state=state,
            objective=setup.objective,
            evaluate_model=evaluators.selection,
            plan=plan,
            options=options,
            accelerator=accelerator,
            reporter=reporter,
            store=environment.store,
            selection_metric=setup.selection_metric,
            unreadable_images=UnreadableImageCounter(reporter.warn, options.max_unreadable_images),
            save_every=options.save_every or default_save_every,
            evaluated_images="held_out" if data.selection is None else "selection",
            signals=signals,
            run_metadata=loaded.metadata,
            on_checkpoint=on_checkpoint,
        )
        if environment.checkpoint is not None:
            loop.restore(environment.checkpoint)
            reporter.print_line("resumed", f"after step {state.step:,} of {plan.num_steps:,}")
        reporter.start_after(state.step - bool(state.pending_record), plan.num_steps)
        accelerator.wait_for_everyone()
        if options.log_with:
            start_trackers(accelerator, options)

        if not loaded.has_steps:
            return Trained(loop, metrics, 0, loop.get_training_seconds())

        if frozen is not None and frozen.selection is not None:
            # the frozen model takes part in the selection, as step 0
            loop.evaluate_step(HeadEvaluator(frozen.selection, frozen.probe.candidate_))

        batches = iterate_training_batches(
            images, plan, accelerator.process_index, options.num_workers, state.step
        )
        with closing(batches):  # closing stops the data loading workers
            metrics = loop.run(batches)

        if options.select == "best":
            selected_step = loop.load_best_weights()
            text = f"the checkpoint of step {selected_step:,}, with the best evaluation"
            if selected_step == 0:
                text = "the frozen model: fine-tuning was not clearly better"
            reporter.print_line("selected", text)
        seconds = loop.get_training_seconds()

    if state.ema is not None:
        state.ema.copy_to_model(state.ema.shadow)
    return Trained(loop, metrics, selected_step, seconds)


def finish_model(
    loaded: Loaded,
    frozen: FittedProbe | None,
    evaluators: Evaluators,
    trained: Trained,
    environment: Environment,
) -> Result:
    """Fit the classifier of a frozen model, calibrate it, and measure the held-out images.

    A frozen model is fitted to all images that are not held out.
    """
    model = trained.loop.state.model.eval()
    final = None
    if trained.selected_step == 0:
        final = refit_frozen_model(loaded, frozen, model, environment)
    if final is not None and final.held_out is None and final.probe.num_folds_:
        return measure_by_cross_validation(loaded, final, environment)

    evaluate = evaluators.held_out
    if final is not None and final.held_out is not None:
        evaluate = HeadEvaluator(final.held_out, final.probe.candidate_)

    calibration, reported = None, ALL
    if loaded.setup.can_calibrate:
        calibration, reported = calibrate(loaded, final, evaluators, evaluate, model)
    if calibration is not None and calibration.is_fitted:
        calibration.apply(loaded.setup.model.config)

    keeps_predictions = loaded.setup.can_calibrate and evaluators.has_held_out
    metrics = trained.metrics
    if keeps_predictions or loaded.data.selection is not None or final is not None:
        if keeps_predictions:
            evaluate.keep_logits = True  # type: ignore[attr-defined]
        metrics = evaluate(model)
        reshard(model)

    record: dict[str, Any] = {}
    if calibration is not None:
        text = calibration.text
        if calibration.is_fitted:
            record = calibration.to_dict()
        if calibration.is_fitted and evaluators.has_held_out:
            outputs = get_outputs(evaluate, reported)  # type: ignore[arg-type]
            errors, errors_text = measure_errors(calibration, *outputs)
            record |= errors
            for key in ("calibration_error", "calibration_error_by_chance"):
                metrics[key] = errors[key]
            text += errors_text
        environment.reporter.print_line("calibration", text)
    if not keeps_predictions:
        return Result(metrics, record or None, evaluator=None, nearest_images=None)
    nearest_images = find_nearest_images(final or frozen, evaluate)
    return Result(metrics, record or None, evaluate, nearest_images)


def measure_by_cross_validation(
    loaded: Loaded, final: FittedProbe, environment: Environment
) -> Result:
    """Return the result of a frozen model that was fitted to all images.

    Each image is predicted by a classifier that was not fitted to it, and the accuracy is corrected
    for the choice among the candidates.
    """
    setup, probe = loaded.setup, final.probe
    rows = final.list_out_of_fold_rows(setup.model.config.num_labels)
    predictions = Predictions(loaded.data.label_space, rows)
    metrics = predictions.compute_metrics()
    assert probe.estimate_ is not None
    metrics |= round_floats(
        {"accuracy": probe.estimate_.accuracy, "accuracy_interval": probe.estimate_.interval}
    )
    metrics["num_unreadable_images"] = 0

    calibration = describe_probe_calibration(probe, len(rows))
    environment.reporter.print_line("calibration", calibration.text)
    record = calibration.to_dict() | {
        key: metrics[key] for key in ("calibration_error", "calibration_error_by_chance")
    }
    wrong = [row for row in rows if row.values.argmax() != row.label]
    return Result(metrics, record, predictions, final.find_nearest_images(wrong))


def calibrate(
    loaded: Loaded,
    final: FittedProbe | None,
    evaluators: Evaluators,
    evaluate: Evaluate,
    model: Any,
) -> tuple[Calibration | None, slice]:
    """Find the temperature of the classifier, on images that it was not fitted to.

    Args:
        loaded: what the run trains on.
        final: the probe of a frozen model; None for a trained model.
        evaluators: the evaluations of the run.
        evaluate: the evaluation of the held-out images by the final model.
        model: the final model.

    Returns:
        The calibration, None without images for it, and the held-out images that may measure its
        error.
    """
    selection = loaded.data.selection
    if final is not None and final.probe.num_folds_:
        return describe_probe_calibration(final.probe, final.num_chosen_images), ALL

    if selection is not None and loaded.has_steps:
        if isinstance(selection, LabeledImages) and not has_enough_images(len(selection)):
            return explain_missing_calibration(len(selection), images="selection"), ALL
        outputs = compute_outputs(evaluators.selection, model)
        return find_calibration(*outputs, images="selection"), ALL

    if evaluators.has_held_out:
        logits, labels = compute_outputs(evaluate, model)
        calibration = find_calibration(logits[FIRST_HALF], labels[FIRST_HALF], images="held-out")
        return calibration, SECOND_HALF
    return None, ALL


def find_nearest_images(frozen: FittedProbe | None, evaluate: Any) -> dict[int, list[str]] | None:
    """Return the nearest training images of each wrong prediction, by frozen features.

    Returns None without these features (random weights, a resumed run), or if images have several
    labels.
    """
    if frozen is None or frozen.held_out is None:
        return None
    rows = [row for row in evaluate.rows if is_labeled(row)]
    wrong = [row for row in rows if row.values.argmax() != row.label]
    return frozen.find_nearest_images(wrong)


def refit_frozen_model(
    loaded: Loaded, frozen: FittedProbe | None, model: Any, environment: Environment
) -> FittedProbe | None:
    """Fit the classifier of the frozen model to the training and selection images.

    A resumed run computes the features again. Returns None for a sharded model, whose classifier is
    kept.
    """
    probe = loaded.setup.probe
    if probe is None or isinstance(model, FSDPModule):
        return None
    if frozen is None:
        return probe.run(loaded.data, environment.reporter, is_final=True)
    if loaded.has_steps:
        probe.set_classifier(frozen, is_final=True)
    return frozen


def compute_outputs(evaluate: Any, model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [N, L] and labels [N] of the images of an evaluator."""
    evaluate.keep_logits = True
    evaluate(model)
    reshard(model)
    return get_outputs(evaluate)


# Parts --------------------------------------------------------------------------------------------


def prepare_state(options: Any, setup: TrainingSetup, accelerator: Accelerator) -> TrainingState:
    """Prepare model and optimizer for the launch configuration, and build the moving average."""
    if options.compile:
        setup.model.compile()
    configure_layer_sharding(accelerator, setup.model)
    state = TrainingState(*accelerator.prepare(setup.model, build_optimizer(setup.model, options)))
    if options.ema_decay:
        state.ema = Ema(state.model, options.ema_decay)
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
def stop_on_errors(num_workers: int) -> Iterator[None]:
    """Convert OSError and ValueError inside the `with` block to RunStopped.

    They are raised for a full disk, unreadable images, stalled data loading processes, or a
    checkpoint of another model.
    """
    try:
        with explain_worker_errors(num_workers):
            yield
    except (OSError, ValueError) as error:
        raise RunStopped(
            describe_error(error), is_on_all_processes=is_raised_on_all_processes(error)
        ) from error

"""One training run, from options to a model folder. `run` reads from top to bottom.

    options -> load -> describe -> frozen model -> steps -> choice -> calibration -> result -> folder

What is trained is a `Recipe` (finetune.py, pretrain.py); how the steps run is a
`TrainingLoop` (loop.py). The run writes weights, configuration, code, image processor,
config.resolved.yaml, metrics.jsonl, checkpoints and finally results.json, which marks the folder as
complete. publishing/ builds the report and the card from the folder.
"""

import math
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from scipy.stats import norm
from torch.distributed.fsdp import FSDPModule

from ..data.batches import iterate_training_batches
from ..data.image_folder import check_output_is_not_read
from ..data.images import LabeledImages, UnreadableImageCounter
from ..data.sampling import BatchPlan
from ..data.workers import explain_worker_errors
from ..inference.evaluator import Evaluator, Predictions, build_predictions, round_floats
from ..runtime.distributed import configure_layer_sharding, run_on_main
from ..runtime.errors import RunStopped, describe_error, is_raised_on_all_processes
from ..runtime.flags import to_flags
from ..runtime.staging import STAGING_FOLDER, FolderLock
from .calibration import (
    ERROR_METRICS,
    HELD_OUT,
    SELECTION,
    Calibration,
    describe_probe_calibration,
    explain_missing_calibration,
    find_calibration,
    has_enough_images,
    measure_errors,
)
from .distributed_state import reshard
from .finetune import FineTuning
from .loop import Evaluate, TrainingLoop, TrainingState
from .model import check_preset_name
from .optimizer import build_optimizer
from .options import PretrainOptions, TrainOptions
from .output_folder import save_output
from .pretrain import PreTraining
from .probe import FrozenModel, describe_frozen, describe_probe
from .resume import format_flag_value, resolve_local_paths
from .run_inputs import Environment, Loaded, load, print_summary, set_up
from .run_results import (
    Best,
    Result,
    Trained,
    build_results,
    print_result,
    store_statistics,
)
from .signals import SignalHandler
from .training_setup import Recipe, TrainingSetup, build_training_images


# default of --save-every in steps for streams, which have no epochs
DEFAULT_STREAM_SAVE_EVERY = 1000
# maximum fraction of runs in which the best evaluation replaces an equal frozen model by chance
MAX_CHANCE = 0.05


class Evaluators(NamedTuple):
    """The evaluations of a run: an `Evaluator`, or `evaluate_nothing` without images."""

    selection: Evaluate  # of the selection images or, without them, of the held-out images
    held_out: Evaluate


@dataclass(frozen=True)
class Frozen:
    """The frozen model of a run, and its score.

    Attributes:
        record: its choice, for results.json and checkpoints; None without a probe.
        score: of the selection images.
        num_images: number of the selection images.
        model: the model; None in a resumed run, which has only what checkpoints contain.
    """

    record: dict[str, Any] | None = None
    score: float | None = None
    num_images: int = 0
    model: FrozenModel | None = None


def train(options: TrainOptions) -> Path:
    """Train and evaluate a model, and return the folder with the model and its results.

    Args:
        options: flags of the run.

    Raises:
        ValueError, OSError: if data or models cannot be read or do not match the options, another
            run uses the folder, files would be replaced without --overwrite, or the run cannot be
            resumed.
        RunStopped: after a signal, a non-finite loss, too many unreadable images, or a full disk.
    """
    check_preset_name(options.model)
    recipe: Recipe = PreTraining() if isinstance(options, PretrainOptions) else FineTuning()
    options = resolve_local_paths(options)
    check_output_is_not_read(options.output_dir, options.dataset)
    return run(recipe, options)


def run(recipe: Recipe, asked: TrainOptions) -> Path:
    """Run all stages, and return the output folder.

    `asked` are the options as the person set them.
    """
    options = recipe.check_options(asked)
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

        loaded = load(recipe, options, environment)
        print_summary(recipe, loaded, environment)

        frozen = fit_frozen(loaded, environment)
        features_before = measure_features(loaded, environment)
        evaluators = build_evaluators(loaded)
        trained = train_steps(loaded, frozen, evaluators, environment)

        best = choose(loaded, frozen, trained, environment)
        calibration = calibrate(loaded, best, evaluators)
        result = measure(loaded, frozen, trained, best, calibration, evaluators)
        environment.reporter.print_lines(result.lines)
        store_statistics(loaded, best.model)
        features_after = measure_features(loaded, environment, best.model)

        results = build_results(
            loaded=loaded,
            frozen_record=frozen.record,
            trained=trained,
            best=best,
            result=result,
            environment=environment,
            features=(features_before, features_after),
        )
        save_output(
            loaded.setup,
            loaded.data,
            results,
            loaded.options,
            loaded.initial,
            accelerator,
            predictions=result.predictions,
            nearest_images=result.nearest_images,
        )
        if options.keep_checkpoints is None:
            run_on_main(accelerator, environment.store.clear)
        print_result(results, loaded, trained, environment)

        # DDP must not outlive its process group: with torch 2.11, gloo may wait forever
        del trained, best
        accelerator.free_memory()
        accelerator.end_training()
        return folder


# Stages -------------------------------------------------------------------------------------------


def fit_frozen(loaded: Loaded, environment: Environment) -> Frozen:
    """Start the classifier from one that is fitted to the frozen encoder.

    A resumed run restores what the classifier reads; the weights are those of the checkpoint. If
    the classifier is fitted again, the result is that of the frozen model, which is computed again.
    """
    checkpoint, probe, data = environment.checkpoint, loaded.setup.probe, loaded.data
    if checkpoint is not None and not loaded.options.refit:
        record = checkpoint.metadata["probe"]
        if record and probe is not None:
            probe.restore(record)
        return Frozen(record, checkpoint.metadata["frozen_score"])
    if probe is None:
        return Frozen()

    reporter = environment.reporter
    model = probe.run(data, reporter.warn, is_final=not loaded.has_steps)
    assert isinstance(data.train, LabeledImages)
    images = data.train.images
    reporter.print_lines(describe_frozen(probe, model, images, not loaded.has_steps))
    if model.selection is None:
        return Frozen(model.record, model=model)
    metrics = probe.predict(model, model.selection, data.label_space).metrics
    score = metrics[loaded.setup.selection_metric]
    return Frozen(model.record, score, metrics["num_images"], model)


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
    data, build = loaded.data, loaded.setup.build_evaluator
    held_out: Evaluate = evaluate_nothing
    if data.num_held_out_images:
        held_out = build(data.held_out)
    return Evaluators(held_out if data.selection is None else build(data.selection), held_out)


def evaluate_nothing(model: Any) -> dict[str, Any]:
    """Return the metrics of a run without held-out images."""
    return {"num_images": 0, "num_unreadable_images": 0}


def train_steps(
    loaded: Loaded,
    frozen: Frozen,
    evaluators: Evaluators,
    environment: Environment,
) -> Trained:
    """Run the remaining steps; none if the run stops at the frozen model."""
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
            run_metadata=loaded.metadata | {"probe": frozen.record, "frozen_score": frozen.score},
        )
        if environment.checkpoint is not None:
            loop.restore(environment.checkpoint)
            reporter.print_line("resumed", f"after step {state.step:,} of {plan.num_steps:,}")
        reporter.start_after(state.step - bool(state.pending_record), plan.num_steps)
        accelerator.wait_for_everyone()
        if options.log_with:
            start_trackers(accelerator, options)

        if loaded.has_steps:
            if options.select == "best" and frozen.score is not None and frozen.model is not None:
                # the frozen model takes part in the selection, as step 0
                loop.save_as_best(compute_bar(frozen, plan, options.evaluate_every))
            batches = iterate_training_batches(
                images, plan, accelerator.process_index, options.num_workers, state.step
            )
            with closing(batches):  # closing stops the data loading workers
                metrics = loop.run(batches)
    return Trained(loop, metrics, loop.get_training_seconds())


def compute_bar(frozen: Frozen, plan: BatchPlan, evaluate_every: int) -> float:
    """Return the accuracy that an evaluation must exceed to be chosen over the frozen model.

    It is so many standard errors above that of the frozen model that the best of all evaluations
    exceeds it by chance in at most `MAX_CHANCE` of runs (one-sided, Bonferroni): 2.6 standard
    errors for 10 evaluations, 2.9 for 30.
    """
    assert frozen.score is not None
    num_evaluations = plan.count_epochs(plan.num_steps) // evaluate_every
    num_evaluations = max(min(num_evaluations, plan.num_steps), 1)
    num_errors = float(norm.isf(MAX_CHANCE / num_evaluations))
    return frozen.score + num_errors * math.sqrt(
        frozen.score * (1 - frozen.score) / frozen.num_images
    )


def choose(loaded: Loaded, frozen: Frozen, trained: Trained, environment: Environment) -> Best:
    """Load the weights of the model that is saved: the best evaluation, or the last step.

    The classifier of a frozen model, or one that is fitted again, is fitted to all images that are
    not held out.
    """
    loop, probe = trained.loop, loaded.setup.probe
    step = None if loaded.has_steps else 0
    if loaded.has_steps and loaded.options.select == "best":
        with stop_on_errors(loaded.options.num_workers):
            step = loop.load_best_weights()
        text = f"the checkpoint of step {step:,}, with the best evaluation"
        if step == 0:
            text = "the frozen model: fine-tuning was not clearly better"
        environment.reporter.print_line("selected", text)

    score = frozen.score if step == 0 else loop.state.score_to_exceed
    model = loop.state.model.eval()
    # the classifier of a sharded model is kept
    if probe is None or isinstance(model, FSDPModule):
        return Best(model, step, score)
    if loaded.has_steps and loaded.options.refit:
        assert frozen.model is not None
        fitted = probe.run_again(loaded.data, environment.reporter.warn, frozen.model)
        environment.reporter.print_line("refitted", describe_probe(fitted.record))
        return Best(model, step, score, fitted)
    if step != 0:
        return Best(model, step, score)
    final = frozen.model
    if final is None:  # a resumed run computes the features again
        final = probe.run(loaded.data, environment.reporter.warn, is_final=False)
    if loaded.has_steps:
        probe.set_classifier(final, is_final=True)
    return Best(model, step, score, final)


def calibrate(loaded: Loaded, best: Best, evaluators: Evaluators) -> Calibration | None:
    """Set the temperature of the classifier, from images that it was not fitted to.

    Returns None without such images.
    """
    setup, selection = loaded.setup, loaded.data.selection
    if not setup.can_calibrate:
        return None
    if best.frozen is not None and best.frozen.probe.num_folds_:
        return describe_probe_calibration(best.frozen.probe, is_trained=best.step != 0)

    calibration = None
    if selection is not None and loaded.has_steps:
        if not has_enough_images(len(selection)):
            return explain_missing_calibration(len(selection), SELECTION)
        assert isinstance(evaluators.selection, Evaluator)
        calibration = find_calibration(evaluators.selection.predict(best.model), SELECTION)
    elif predictions := predict_held_out(loaded, best, evaluators):
        calibration = find_calibration(predictions, HELD_OUT)
    reshard(best.model)
    if calibration is not None and calibration.is_fitted:
        setup.model.config.temperature = calibration.temperature
    return calibration


def predict_held_out(loaded: Loaded, best: Best, evaluators: Evaluators) -> Predictions | None:
    """Return the predictions of the held-out images; None without images or one label for each."""
    frozen, probe = best.frozen, loaded.setup.probe
    if frozen is not None and probe is not None:
        if frozen.held_out is None:
            return None
        return probe.predict(frozen, frozen.held_out, loaded.data.label_space)
    if loaded.setup.can_calibrate and isinstance(evaluators.held_out, Evaluator):
        return evaluators.held_out.predict(best.model)
    return None


def measure(
    loaded: Loaded,
    frozen: Frozen,
    trained: Trained,
    best: Best,
    calibration: Calibration | None,
    evaluators: Evaluators,
) -> Result:
    """Measure the held-out images or, for a frozen model without them, the training images.

    Each training image is then predicted by a classifier that was not fitted to it, and the
    accuracy is corrected for the choice among the candidates.
    """
    # trained features know the labels: cross-validation of them would be too good
    start = frozen.model or best.frozen
    predictions = predict_held_out(loaded, best, evaluators)
    errors: dict[str, float] = {}
    text = "" if calibration is None else calibration.text
    if predictions is not None:
        metrics = predictions.metrics
        if calibration is not None and calibration.is_fitted:
            errors, errors_text = measure_errors(calibration, predictions)
            metrics |= {name: errors[name] for name in ERROR_METRICS}
            text += errors_text
    elif best.frozen is not None and best.frozen.probe.num_folds_:
        assert start is not None
        predictions = predict_out_of_fold(loaded, start)
        metrics = predictions.metrics
        errors = {name: metrics[name] for name in ERROR_METRICS}
    elif best.frozen is not None or loaded.data.selection is not None:
        metrics = evaluators.held_out(best.model)
    else:
        metrics = trained.metrics  # of the last evaluation
    reshard(best.model)

    record = None
    if calibration is not None and calibration.is_fitted:
        record = calibration.to_dict() | errors
    nearest_images = None
    if predictions is not None and start is not None:
        nearest_images = start.find_nearest_images(predictions.list_wrong())
    return Result(metrics, record, predictions, nearest_images, {"calibration": text})


def predict_out_of_fold(loaded: Loaded, frozen: FrozenModel) -> Predictions:
    """Return the predictions of training images by classifiers that were not fitted to them."""
    probe = loaded.setup.probe
    assert probe is not None
    assert frozen.probe.estimate_ is not None
    estimate = frozen.probe.estimate_
    rows = frozen.list_out_of_fold_rows(probe.model.config.num_labels)
    predictions = build_predictions(loaded.data.label_space, rows, probe.accelerator)
    predictions.metrics.update(
        round_floats({"accuracy": estimate.accuracy, "accuracy_interval": estimate.interval})
    )
    predictions.metrics["num_unreadable_images"] = frozen.features.num_unreadable
    return predictions


# Parts --------------------------------------------------------------------------------------------


def prepare_state(
    options: TrainOptions, setup: TrainingSetup, accelerator: Accelerator
) -> TrainingState:
    """Prepare model and optimizer for the launch configuration."""
    if options.compile:
        setup.model.compile()
    configure_layer_sharding(accelerator, setup.model)
    return TrainingState(*accelerator.prepare(setup.model, build_optimizer(setup.model, options)))


def start_trackers(accelerator: Accelerator, options: TrainOptions) -> None:
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

"""One training run, from options to a model folder. `run` reads from top to bottom.

    options -> load -> describe -> probe of the frozen encoder -> steps -> calibration -> folder

What is trained is a `TrainingSetup` (finetune.py, pretrain.py); how the steps run is a `TrainingLoop`
(loop.py). The run writes weights, configuration, code, image processor, config.resolved.yaml,
metrics.jsonl, checkpoints and finally results.json, which marks the folder as complete. publishing/
builds the report and the card from the folder.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.distributed.fsdp import FSDPModule

from ..data.batches import Normalizer, iterate_training_batches
from ..data.held_out import HELD_OUT_RECORD_KEY
from ..data.image_folder import compute_files_digest
from ..data.images import LabeledImages, UnreadableImageCounter
from ..data.sampling import BatchPlan
from ..data.splits import TrainingData, describe_data, load_on_main
from ..data.streaming import StreamedImages
from ..data.workers import explain_worker_errors
from ..inference.frozen_features import HeadEvaluator
from ..inference.per_image import get_outputs, is_labeled
from ..runtime.distributed import (
    build_accelerator,
    configure_layer_sharding,
    run_on_main,
    set_mixed_precision,
)
from ..runtime.errors import RunStopped, is_raised_on_all_processes
from ..runtime.flags import to_flags
from ..runtime.system import describe_device
from . import finetune, output_folder, pretrain
from .calibration import (
    MIN_ERROR_IMAGES,
    compute_calibration_errors,
    explain_missing_calibration,
    find_calibration,
    has_enough_images,
)
from .checkpoints import Checkpoint, CheckpointStore
from .defaults import choose_learning_rate_after_probe, describe_random_weights, resolve_defaults
from .distributed_state import reshard
from .dry_run import (
    NUM_PROBE_IMAGES,
    NUM_STEPS,
    build_dry_run_options,
    describe_dry_probe,
    describe_dry_run,
)
from .loop import TrainingLoop, TrainingState, build_batch_plan
from .model import InitialModel, check_preset_name, choose_image_size, resolve_initial_model
from .optimizer import Ema, build_optimizer
from .options import FinetuneOptions, PretrainOptions
from .output_folder import CHECKPOINTS_FOLDER, RESULTS_FILE, FolderLock, save_output
from .probe import FittedProbe, explain_missing_steps
from .reporter import (
    Reporter,
    describe_batches,
    describe_model,
    describe_run,
    describe_splits,
    format_result,
)
from .resume import (
    check_flags_unchanged,
    check_run_unchanged,
    format_flag_value,
    get_relative_flags,
    pin_models,
    resolve_local_paths,
)
from .signals import SignalHandler
from .training_setup import TrainingSetup, build_training_images


DEFAULT_STREAM_SAVE_EVERY = (
    1000  # default of --save-every in steps for streams, which have no epochs
)
# with fewer training images per class, the held-out fifth costs up to 4 points of accuracy
FEW_IMAGES_PER_CLASS = 100
ALL = slice(None)
FIRST_HALF = slice(0, None, 2)
SECOND_HALF = slice(1, None, 2)  # of the held-out images

Options = Any  # FinetuneOptions or PretrainOptions
# from a model to metrics; an `Evaluator` if there are images
Evaluate = Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class Environment:
    """Where and how a run takes place."""

    folder: Path
    accelerator: Accelerator
    reporter: Reporter
    store: CheckpointStore
    checkpoint: Checkpoint | None  # to resume from
    is_dry_run: bool
    start_time: float


@dataclass(frozen=True)
class Loaded:
    """What a run trains on, with all defaults resolved."""

    options: Options
    initial: InitialModel
    data: TrainingData
    setup: TrainingSetup
    plan: BatchPlan
    full_plan: BatchPlan  # of the run that a dry run tests
    evaluated_fraction: float  # of the images that the full run evaluates, evaluated in a dry run
    missing_steps_reason: str | None  # why the run ends at the probe; None if it trains
    lines: dict[str, str | None]  # of the printed summary
    forward_flops: int
    metadata: dict[str, Any]  # of checkpoints

    @property
    def has_steps(self) -> bool:
        return self.missing_steps_reason is None


@dataclass(frozen=True)
class Evaluators:
    """The evaluations of a run. Without held-out images, they return no metrics."""

    selection: Evaluate  # of the selection images or, without them, of the held-out images
    held_out: Evaluate
    has_held_out: bool


@dataclass(frozen=True)
class Trained:
    """The model after the last step, with the selected weights."""

    loop: TrainingLoop
    metrics: dict[str, Any]  # of the last evaluation; empty if the run has no steps
    selected_step: int | None  # None if no step was selected; 0 for the frozen model
    seconds: float


@dataclass(frozen=True)
class Result:
    """The metrics of the model that is saved, and its calibration."""

    metrics: dict[str, Any]
    calibration: dict[str, Any] | None
    evaluator: Any  # whose outputs are written to predictions.parquet; None without predictions
    # names of the nearest training images of each wrong prediction, by its index
    nearest_images: dict[int, list[str]] | None


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
        ValueError, OSError: if data or models cannot be read or do not match the options, another run uses the
            folder, files would be replaced without --overwrite, or the run cannot be resumed.
        RunStopped: after a signal, a non-finite loss, too many unreadable images, or a full disk.
    """
    check_preset_name(options.model.model)
    kind = pretrain if isinstance(options, PretrainOptions) else finetune
    options = resolve_local_paths(kind.check_options(options))  # type: ignore[arg-type]
    if options.run.dry_run:
        with build_dry_run_options(options) as dry_run_options:
            return run(kind, dry_run_options, None)
    return run(kind, options, on_checkpoint)


def run(kind: ModuleType, options: Options, on_checkpoint: Callable[[Path], None] | None) -> Path:
    """Run all stages, and return the output folder."""
    folder = options.output_dir
    with FolderLock(folder) as lock:
        environment = set_up(options, lock)
        accelerator, reporter = environment.accelerator, environment.reporter
        if run_on_main(accelerator, partial(check_folder, options, environment)):
            # killed at the end
            shutil.rmtree(folder / output_folder.STAGING_FOLDER, ignore_errors=True)
            reporter.print_line("finished", f"{folder} already contains the results of this run")
            return folder

        loaded = load(kind, options, environment)
        print_summary(loaded, environment)

        frozen = fit_probe(loaded, environment)
        features_before = measure_features(loaded, environment)

        evaluators = build_evaluators(loaded)
        trained = train_steps(loaded, frozen, evaluators, environment, on_checkpoint)
        result = finish_model(loaded, frozen, evaluators, trained, environment)

        features_after = measure_features(loaded, environment, trained.loop.state.model)
        results = build_results(
            loaded, trained, result, environment, features_before, features_after
        )
        save_output(
            loaded.setup,
            results,
            loaded.options,
            loaded.initial,
            accelerator,
            evaluator=result.evaluator,
            nearest_images=result.nearest_images,
        )
        print_result(results, loaded, trained, environment)

        # DDP must not outlive its process group: with torch 2.11, gloo may wait forever
        del trained
        accelerator.free_memory()
        accelerator.end_training()
        return folder


# Start ---------------------------------------------------------------------------------------------------------------


def set_up(options: Options, lock: FolderLock) -> Environment:
    """Build the accelerator, lock the output folder, and load the checkpoint of a resumed run."""
    start_time = time.perf_counter()
    folder, training = options.output_dir, options.training
    accelerator = build_accelerator(
        training.gradient_accumulation_steps,
        training.mixed_precision,
        options.run.log_with,
        folder / "trackers",
    )
    set_seed(training.seed)
    reporter = Reporter(folder / output_folder.METRICS_FILE, accelerator)
    store = CheckpointStore(folder / CHECKPOINTS_FOLDER, options.run.keep_checkpoints)
    run_on_main(accelerator, lock.acquire)
    checkpoint = None
    if options.run.resume:
        checkpoint = run_on_main(accelerator, partial(store.load_newest, reporter.warn))
    return Environment(
        folder=folder,
        accelerator=accelerator,
        reporter=reporter,
        store=store,
        checkpoint=checkpoint,
        is_dry_run=options.run.dry_run,
        start_time=start_time,
    )


def check_folder(options: Options, environment: Environment) -> bool:
    """Check the output folder, and return whether the resumed run is already finished."""
    if environment.checkpoint is None:
        output_folder.check_replaceable(options, environment.store)
        return False
    check_flags_unchanged(
        environment.checkpoint.metadata["flags"], to_flags(options), environment.folder
    )
    return (environment.folder / RESULTS_FILE).exists()


def load(kind: Any, options: Options, environment: Environment) -> Loaded:
    """Load the data and the models, resolve all defaults, and prepare the output folder."""
    accelerator, checkpoint, folder = (
        environment.accelerator,
        environment.checkpoint,
        environment.folder,
    )
    with accelerator.main_process_first():  # only the main process downloads files
        options = pin_models(options, checkpoint)
        initial = resolve_initial_model(options.model.model)
    data = load_on_main(
        accelerator, options.data.dataset, partial(kind.load_data, options, initial)
    )
    is_rate_set = options.training.learning_rate is not None
    is_length_set = options.training.epochs is not None or options.training.max_steps is not None
    with accelerator.main_process_first():
        options, default_lines = resolve_options(options, initial, data)
        setup = kind.build_training_setup(options, initial, data, environment.reporter)
        forward_flops = (setup.encoder or setup.model).flops()
    if setup.probe is not None and not is_rate_set:
        rate = choose_learning_rate_after_probe(setup.model.config.hidden_size)
        options = replace(options, training=replace(options.training, learning_rate=rate))
        default_lines["rate"] = (
            f"{rate:g}, because the classifier starts from the regression on the frozen encoder"
        )
    if options.training.gradient_checkpointing:
        setup.model.gradient_checkpointing_enable()
    recorded_precision = None if checkpoint is None else checkpoint.metadata["mixed_precision"]
    precision_text = set_mixed_precision(
        accelerator, options.training.mixed_precision, setup.model.config, recorded_precision
    )

    plan = build_batch_plan(data.num_training_images, options.training, accelerator.num_processes)
    metadata = {
        "images_per_step": plan.images_per_step,
        "mixed_precision": accelerator.mixed_precision,
        "data": run_on_main(accelerator, partial(describe_data, data)),
        "files": run_on_main(
            accelerator, partial(compute_files_digest, Path(options.data.dataset))
        ),
        "flags": get_relative_flags(options, options.run.hub_checkpoint_branch is not None),
    }
    if checkpoint is not None:
        check_flags_unchanged(checkpoint.metadata["flags"], to_flags(options), folder)
        check_run_unchanged(checkpoint.metadata, metadata, folder)
    flags = get_relative_flags(options)
    run_on_main(
        accelerator, lambda: output_folder.prepare(folder, environment.store, flags, checkpoint)
    )

    lines = {
        **describe_splits(data, setup.processor, setup.labels_text),
        **describe_model(initial.name, setup.model, forward_flops),
        **default_lines,
        **setup.summary_lines,
        "device": f"{describe_device(accelerator)}, mixed precision: {precision_text}",
    }
    reason = None
    if setup.probe is not None:
        reason = explain_missing_steps(
            options, data, forward_flops, accelerator.device, is_length_set
        )
    loaded = Loaded(
        options=options,
        initial=initial,
        data=data,
        setup=setup,
        plan=plan,
        full_plan=plan,
        evaluated_fraction=1.0,
        missing_steps_reason=reason,
        lines=lines,
        forward_flops=forward_flops,
        metadata=metadata,
    )
    return reduce_for_dry_run(loaded) if environment.is_dry_run else loaded


def reduce_for_dry_run(loaded: Loaded) -> Loaded:
    """Return the inputs of a dry run: a few steps, and a few images for evaluations and for the probe."""
    data, evaluated_fraction = draw_few_images(loaded.data, loaded.plan)
    setup = loaded.setup
    setup.measure_features = None
    if setup.probe is not None:
        setup.probe = replace(setup.probe, max_images=NUM_PROBE_IMAGES)
    return replace(
        loaded,
        data=data,
        plan=replace(loaded.plan, num_steps=NUM_STEPS),
        evaluated_fraction=evaluated_fraction,
    )


def draw_few_images(data: TrainingData, plan: BatchPlan) -> tuple[TrainingData, float]:
    """Return data with one batch of held-out and selection images, and the fraction of the evaluated images."""
    num_images = plan.batch_size * plan.num_processes
    held_out, selection = (
        images.read_first(num_images)
        if isinstance(images, StreamedImages)
        else images and images.draw(num_images)
        for images in (data.held_out, data.selection)
    )
    evaluated = data.held_out if data.selection is None else data.selection
    fraction = 1.0
    if isinstance(evaluated, LabeledImages) and len(evaluated):
        fraction = min(num_images / len(evaluated), 1.0)
    return replace(data, held_out=held_out, selection=selection), fraction


def resolve_options(
    options: Any, initial: InitialModel, data: TrainingData
) -> tuple[Any, dict[str, str | None]]:
    """Return the options with a value for each flag whose default depends on the run, and summary lines.

    The defaults are in defaults.py, and the lines are about these values.
    """
    select = "last" if data.selection is None else "best"
    options = replace(options, training=replace(options.training, select=select))
    size_line = None
    if isinstance(options, FinetuneOptions):
        model_options, size_line = choose_image_size(options.model, initial)
        options = replace(options, model=model_options)
    options, defaults_line = resolve_defaults(options, initial, data.num_training_images)
    lines = {
        "weights": describe_random_weights(initial),
        "image size": size_line,
        "defaults": defaults_line,
    }
    return options, lines


def print_summary(loaded: Loaded, environment: Environment) -> None:
    """Print what the run does, before it starts."""
    reporter = environment.reporter
    lines = dict(loaded.lines)
    if loaded.has_steps:
        lines["batches"] = describe_batches(loaded.plan)
    else:
        lines |= {
            "defaults": None,
            "rate": None,
            "selection": None,
            "steps": loaded.missing_steps_reason,
        }
    for name, text in lines.items():
        if text:
            reporter.print_line(name, text)
    for warning in loaded.setup.warnings:
        reporter.warn(warning)
    if not environment.is_dry_run:
        reporter.printed_metrics = loaded.setup.printed_metrics


# Stages --------------------------------------------------------------------------------------------------------------


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
    """Measure the features of an encoder before and after pre-training; None if there is nothing to measure."""
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
    """Run the remaining steps, and load the selected weights. Without steps, the frozen model is selected."""
    options, data, setup, plan = loaded.options, loaded.data, loaded.setup, loaded.plan
    accelerator, reporter, checkpoint = (
        environment.accelerator,
        environment.reporter,
        environment.checkpoint,
    )
    images = build_training_images(
        options, data, setup.processor, setup.model.config.num_channels, setup.num_views
    )
    state = prepare_state(options, setup, accelerator)
    metrics: dict[str, Any] = {}
    selected_step = None

    with (
        SignalHandler(accelerator) as signals,
        reporter.progress,
        stop_on_errors(options.data.num_workers),
    ):
        loop = TrainingLoop(
            state=state,
            objective=setup.objective,
            evaluate_model=evaluators.selection,
            plan=plan,
            options=options.training,
            accelerator=accelerator,
            reporter=reporter,
            store=environment.store,
            selection_metric=setup.selection_metric,
            unreadable_images=UnreadableImageCounter(
                reporter.warn, options.data.max_unreadable_images
            ),
            save_every=options.run.save_every
            or (None if plan.num_images else DEFAULT_STREAM_SAVE_EVERY),
            evaluated_images="held_out" if data.selection is None else "selection",
            normalize=Normalizer(setup.processor, accelerator.device)
            if setup.model.config.num_cls_tokens
            else None,
            signals=signals,
            run_metadata=loaded.metadata,
            on_checkpoint=on_checkpoint,
        )
        if checkpoint is not None:
            loop.restore(checkpoint)
            reporter.print_line("resumed", f"after step {state.step:,} of {plan.num_steps:,}")
        reporter.start_after(state.step - bool(state.pending_record), plan.num_steps)
        accelerator.wait_for_everyone()
        if options.run.log_with:
            start_trackers(accelerator, options)

        if not loaded.has_steps:
            return Trained(loop, metrics, 0, loop.get_training_seconds())
        if frozen is not None and frozen.selection is not None:
            evaluate_frozen_model(loop, HeadEvaluator(frozen.selection, frozen.choice.candidate))
        batches = iterate_training_batches(
            images, plan, accelerator.process_index, options.data.num_workers, state.step
        )
        with closing(batches):  # closing stops the data loading workers
            metrics = loop.run(batches)
        if options.training.select == "best":
            selected_step = loop.load_best_weights()
            text = f"the checkpoint of step {selected_step:,}, with the best evaluation"
            if selected_step == 0:
                text = "the frozen model: fine-tuning was not clearly better"
            reporter.print_line("selected", text)
        seconds = loop.get_training_seconds()
    if state.ema is not None:
        state.ema.copy_to_model(state.ema.shadow)
    return Trained(loop, metrics, selected_step, seconds)


def evaluate_frozen_model(loop: TrainingLoop, evaluate: HeadEvaluator) -> None:
    """Let the frozen model take part in the selection, as step 0, with the features of the probe."""
    evaluate_model = loop.evaluate_model
    loop.evaluate_model = evaluate
    loop.evaluate_step()
    loop.evaluate_model = evaluate_model


def finish_model(
    loaded: Loaded,
    frozen: FittedProbe | None,
    evaluators: Evaluators,
    trained: Trained,
    environment: Environment,
) -> Result:
    """Fit the classifier of a frozen model, calibrate the classifier, and measure the held-out images.

    A frozen model is fitted to all images that are not held out.
    """
    data, setup, model = loaded.data, loaded.setup, trained.loop.state.model
    model.eval()
    is_frozen = trained.selected_step == 0
    initial = frozen
    frozen = refit_frozen_model(loaded, frozen, model, environment) if is_frozen else None
    evaluate = evaluators.held_out
    if frozen is not None and frozen.held_out is not None:
        evaluate = HeadEvaluator(frozen.held_out, frozen.choice.candidate)

    can_calibrate = setup.can_calibrate and not environment.is_dry_run
    calibration, reported = None, ALL
    if (
        can_calibrate
        and frozen is not None
        and (outputs := frozen.get_held_out_logits()) is not None
    ):
        calibration = find_calibration(*outputs, images="cross-validation")
    elif can_calibrate and data.selection is not None and loaded.has_steps:
        if isinstance(data.selection, StreamedImages) or has_enough_images(len(data.selection)):
            calibration = find_calibration(
                *compute_outputs(evaluators.selection, model), images="selection"
            )
        else:
            calibration = explain_missing_calibration(len(data.selection), images="selection")
    elif can_calibrate and evaluators.has_held_out:
        logits, labels = compute_outputs(evaluate, model)
        calibration = find_calibration(logits[FIRST_HALF], labels[FIRST_HALF], images="held-out")
        reported = SECOND_HALF
    if calibration is not None and calibration.is_fitted:
        calibration.apply(setup.model.config)

    keeps_predictions = can_calibrate and evaluators.has_held_out
    metrics = trained.metrics
    if keeps_predictions or data.selection is not None or frozen is not None:
        if keeps_predictions:
            evaluate.keep_logits = True  # type: ignore[attr-defined]
        metrics = evaluate(model)
        reshard(model)
    record = None
    if calibration is not None:
        text = calibration.text
        record = calibration.to_dict() if calibration.is_fitted else None
        if record is not None and evaluators.has_held_out:
            logits, labels = get_outputs(evaluate, reported)  # type: ignore[arg-type]
            errors = compute_calibration_errors(logits, labels, record["temperature"])
            record |= errors
            metrics["calibration_error"] = errors["calibration_error"]
            if len(labels) >= MIN_ERROR_IMAGES:
                before = 100 * errors["calibration_error_before"]
                after = 100 * errors["calibration_error"]
                text += f"; calibration error {before:.1f} -> {after:.1f} points"
        environment.reporter.print_line("calibration", text)
    if not keeps_predictions:
        return Result(metrics, record, evaluator=None, nearest_images=None)
    return Result(metrics, record, evaluate, find_nearest_images(frozen or initial, evaluate))


def find_nearest_images(frozen: FittedProbe | None, evaluate: Any) -> dict[int, list[str]] | None:
    """Return the nearest training images of each wrong prediction, by the features of the frozen encoder.

    Returns None without these features (random weights, a resumed run), or if images have several
    labels.
    """
    if frozen is None or frozen.held_out is None or frozen.labels.ndim > 1:
        return None
    rows = [row for row in evaluate.rows if is_labeled(row)]
    wrong = [row.index for row in rows if row.values.argmax() != row.label]
    return frozen.find_nearest_images(wrong)


def refit_frozen_model(
    loaded: Loaded, frozen: FittedProbe | None, model: Any, environment: Environment
) -> FittedProbe | None:
    """Fit the classifier of the frozen model to the training and selection images.

    A resumed run computes the features again. Returns None for a sharded model, whose classifier is kept.
    """
    probe = loaded.setup.probe
    if probe is None or isinstance(model, FSDPModule):
        return None
    if frozen is None:
        return probe.run(loaded.data, environment.reporter, is_final=True)
    if loaded.has_steps:
        probe.fit_classifier(frozen, with_selection=True)
    return frozen


def compute_outputs(evaluate: Any, model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [N, L] and labels [N] of the images of an evaluator."""
    evaluate.keep_logits = True
    evaluate(model)
    reshard(model)
    return get_outputs(evaluate)


# Results -------------------------------------------------------------------------------------------------------------


def build_results(
    loaded: Loaded,
    trained: Trained,
    result: Result,
    environment: Environment,
    features_before: dict[str, Any] | None,
    features_after: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the content of results.json."""
    data, setup, loop = loaded.data, loaded.setup, trained.loop
    results: dict[str, Any] = {
        "dataset": data.name,
        "split": data.held_out_name,
        HELD_OUT_RECORD_KEY: run_on_main(
            environment.accelerator, lambda: asdict(data.build_record())
        ),
        "num_training_images": count_training_images(loaded),
        **setup.results,
    }
    seconds = trained.seconds
    if probe_record := loaded.metadata["probe"]:
        results["frozen"] = probe_record
        if not loaded.has_steps:
            seconds = probe_record["seconds"]
    results |= {
        "calibration": result.calibration,
        "selection_metric": setup.selection_metric,
        "forward_flops_per_image": loaded.forward_flops,
        **describe_run(loaded.plan, loop.state.step, setup.model, environment.accelerator, seconds),
        **result.metrics,
        "num_unreadable_training_images": len(loop.unreadable_images.indices),
        "token_movement": loop.monitor.compute_token_movement(),
    }
    if data.selection is not None and loaded.has_steps:
        results["selection"] = {
            "images": data.selection_name,
            "num_images": len(data.selection)
            if isinstance(data.selection, LabeledImages)
            else None,
            "step": trained.selected_step,
            setup.selection_metric: loop.state.best_score,
        }
    if features_before is not None and features_after is not None:
        summary = pretrain.compare_features(features_before, features_after)
        results["features"] = {
            "before": features_before,
            "after": features_after,
            "summary": summary,
        }
    return results


def count_training_images(loaded: Loaded) -> int | None:
    """Return the number of images that the model was fitted to; None for a stream.

    It includes the selection images of a run without steps.
    """
    data = loaded.data
    if loaded.has_steps or data.selection is None or data.num_training_images is None:
        return data.num_training_images
    return data.num_training_images + len(data.selection)


def print_result(
    results: dict[str, Any], loaded: Loaded, trained: Trained, environment: Environment
) -> None:
    """Print the last lines of the run."""
    reporter, loop = environment.reporter, trained.loop
    if environment.is_dry_run:
        seconds = time.perf_counter() - environment.start_time
        if loaded.has_steps:
            text = describe_dry_run(
                loop, loaded.full_plan, loaded.options, loaded.evaluated_fraction, seconds
            )
        else:
            text = describe_dry_probe(results, loaded.full_plan, seconds)
        reporter.print_line("dry run", text)
        return
    if num_unreadable := len(loop.unreadable_images.indices):
        reporter.warn(
            f"{num_unreadable} training image(s) could not be read and were replaced with other images"
        )
    reporter.print_line("result", format_result(results, loaded.setup.result_metrics))
    if "features" in results:
        reporter.print_line("features", results["features"]["summary"])
    reporter.print_line("saved", f"{environment.folder} (model, image processor, {RESULTS_FILE})")
    if suggestion := suggest_all_images(loaded):
        reporter.print_line("next", suggestion)


def suggest_all_images(loaded: Loaded) -> str | None:
    """Return how to train on the held-out images as well, for a frozen model and few images per class.

    The part of the images that is held out then costs accuracy (model_cards/studies/first_answer.md).
    """
    data = loaded.data
    rule = data.record.rule
    num_held_out = data.num_held_out_images
    num_images = count_training_images(loaded)
    if loaded.has_steps or rule is None or rule.num_folds or not num_held_out or not num_images:
        return None
    num_classes = max(map(len, data.label_space.columns.values()))
    if num_images >= FEW_IMAGES_PER_CLASS * num_classes:
        return None
    return (
        f"{num_held_out} images are held out for this result. To train on them as well, repeat the command with "
        "`held_out_fraction=0` and another `output_dir`"
    )


# Parts ---------------------------------------------------------------------------------------------------------------


def prepare_state(options: Any, setup: TrainingSetup, accelerator: Accelerator) -> TrainingState:
    """Prepare the model and the optimizer for the launch configuration, and build the moving average."""
    if options.training.compile:
        setup.model.compile()
    configure_layer_sharding(accelerator, setup.model)
    state = TrainingState(
        *accelerator.prepare(setup.model, build_optimizer(setup.model, options.training))
    )
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
def stop_on_errors(num_workers: int) -> Iterator[None]:
    """Convert OSError and ValueError inside the `with` block to RunStopped.

    They are raised for a full disk, unreadable images, stalled data loading processes, or a checkpoint of another
    model.
    """
    try:
        with explain_worker_errors(num_workers):
            yield
    except (OSError, ValueError) as error:
        raise RunStopped(
            str(error), is_on_all_processes=is_raised_on_all_processes(error)
        ) from error

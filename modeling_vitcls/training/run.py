"""One training run, from options to a model folder. `train` reads from top to bottom.

    options -> inputs -> plan -> division of the images -> frozen run or steps -> folder

What is trained is a `Recipe` (finetune.py, pretrain.py); what a run is, is decided in plan.py. The
run writes weights, configuration, code, image processor, config.resolved.yaml, metrics.jsonl,
checkpoints and finally results.json, which marks the folder as complete. publishing/ builds the
report and the card from the folder.
"""

import math
import shutil
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.distributed.fsdp import FSDPModule

from ..data.aspect_ratio import get_output_size
from ..data.augmentation import build_augmentation
from ..data.batches import Batch, TrainingImages, iterate_training_batches
from ..data.image_folder import check_output_is_not_read
from ..data.images import LabeledImages, UnreadableImageCounter
from ..data.splits import TrainingData, divide_images
from ..data.workers import explain_worker_errors
from ..hub.local_paths import resolve_name
from ..inference.class_statistics import ClassStatistics, Token
from ..inference.evaluator import Evaluator, Predictions
from ..inference.frozen_features import FeatureLayout
from ..inference.linear_probe import KNOWN_RECALL, MIN_DISTANCE_IMAGES, NUM_LAST_LAYERS
from ..model.modeling_vitcls import count_output_tokens
from ..runtime.distributed import configure_layer_sharding, run_on_main
from ..runtime.errors import RunStopped, describe_error, is_raised_on_all_processes
from ..runtime.flags import to_flags
from ..runtime.staging import STAGING_FOLDER, FolderLock
from .calibration import (
    HELD_OUT,
    SELECTION,
    Calibration,
    describe_probe_calibration,
    find_calibration,
    measure_errors,
    select_error_metrics,
)
from .distributed_state import reshard
from .finetune import FineTuning
from .loop import Evaluate, TrainingLoop, TrainingState, build_batch_plan
from .model import check_model_config, check_preset_name
from .optimizer import average_with_start, build_parameter_groups
from .options import PretrainOptions, TrainOptions
from .output_folder import prepare, save_output
from .plan import RunPlan, plan_run
from .pretrain import PreTraining, compare_features
from .probe import (
    MAX_PROBE_IMAGES,
    FrozenModel,
    describe_frozen,
    explain_missing_threshold,
    ignore_message,
)
from .reporter import describe_batches
from .resume import convert_sources, format_flag_value, make_flags_relative
from .run_inputs import Launch, RunInputs, load, set_up
from .run_results import (
    Outcome,
    build_results,
    build_run_record,
    print_result,
    print_summary,
)
from .signals import SignalHandler
from .training_setup import Recipe, TrainingSetup


MAX_STATISTICS_IMAGES = 5000  # of which the statistics of a trained model are


def train(asked: TrainOptions) -> Path:
    """Train and evaluate a model, and return the folder with the model and its results.

    Raises:
        ValueError, OSError: if data or models cannot be read or do not match the options, another
            run uses the folder, files would be replaced without --overwrite, or the run cannot be
            resumed.
        RunStopped: after a signal, a non-finite loss, too many unreadable images, or a full disk.
    """
    check_preset_name(asked.model)
    check_model_config(asked.model_config or ())
    recipe: Recipe = PreTraining() if isinstance(asked, PretrainOptions) else FineTuning()
    asked = convert_sources(asked, resolve_name)
    folder = asked.output_dir
    check_output_is_not_read(folder, asked.dataset)
    # The main process takes the lock in `set_up`. It is held until the last file is in its place:
    # two runs in one folder would mix their checkpoints.
    with FolderLock(folder) as lock:
        launch = set_up(asked, lock)
        accelerator = launch.accelerator
        # A job script repeats its command with --resume, also after a run that was killed between
        # its last file and its cleanup. Clean up what that run could not, and do nothing else.
        if launch.is_finished:
            shutil.rmtree(folder / STAGING_FOLDER, ignore_errors=True)
            if asked.keep_checkpoints is None:
                launch.store.clear()
            launch.reporter.print_line(
                "finished", f"{folder} already contains the results of this run"
            )
            return folder

        # What the run is. The division of the images depends on it, so it comes first.
        inputs = load(recipe, launch)
        plan = plan_run(inputs.options, inputs.initial, inputs.images, inputs.setup, launch)
        options = plan.options
        assert options.held_out_fraction is not None, "the plan sets it"
        data = divide_images(inputs.images, options.held_out_fraction, options.select == "best")
        # Compared with the checkpoint first: nothing is written if the run is another one.
        record = run_on_main(partial(build_run_record, plan, data, inputs, launch))
        run_on_main(
            partial(
                prepare,
                folder,
                launch.store,
                make_flags_relative(to_flags(options)),
                launch.checkpoint,
            ),
        )
        print_summary(inputs, plan, data, launch)

        # Both kinds end in the same record, so nothing below asks what the run was.
        if plan.kind == "frozen":
            outcome = run_frozen(inputs, data, launch)
        else:
            outcome = run_steps(inputs, plan, data, record, launch)

        # Everything that is known about the saved model; then the folder, whole or not at all.
        chosen_flags = record["flags"]["chosen"]
        results = build_results(inputs, data, outcome, chosen_flags)
        save_output(
            folder,
            inputs.setup,
            data,
            results,
            initial=inputs.initial,
            teacher=getattr(options, "teacher", None),
            predictions=outcome.predictions,
            nearest_images=outcome.nearest_images,
        )
        # Not before the folder is whole: until then, --resume needs the checkpoints.
        if options.keep_checkpoints is None:
            run_on_main(launch.store.clear)
        print_result(results, inputs, plan, data, launch)

        # DDP must not outlive its process group: with torch 2.11, gloo may wait forever
        accelerator.free_memory()
        accelerator.end_training()
        return folder


# Frozen -------------------------------------------------------------------------------------------


def run_frozen(inputs: RunInputs, data: TrainingData, launch: Launch) -> Outcome:
    """Fit the classifier to every label that is not held out, and measure it.

    Without held-out images, each training image is predicted by a classifier that was not fitted to
    it, and the accuracy is corrected for the choice among the candidates.
    """
    probe = inputs.setup.probe
    assert probe is not None, "only a run with a probe can be frozen"
    reporter = launch.reporter
    # Without steps there is no checkpoint to select, so the labels of a validation split are free
    # to train the classifier. The test split still measures it.
    parts = [data.train] if data.selection is None else [data.train, data.selection]
    frozen = probe.fit(parts, data.held_out, reporter.warn)
    # Everything below is measured with the classifier and the temperature in the model, which are
    # what the folder will contain.
    probe.set_classifier(frozen.probe)
    reporter.print_lines(describe_frozen(probe, frozen))
    reporter.print_lines(explain_missing_threshold(frozen.probe))

    calibration = describe_probe_calibration(frozen.probe)
    split = data.held_out_name
    predictions = None
    metrics = evaluate_nothing()
    errors: dict[str, float] = {}
    text = ""
    if frozen.held_out is not None:
        predictions = probe.predict(frozen, frozen.held_out, data.label_space)
        errors, text = measure_errors(calibration, predictions)
        metrics = predictions.metrics | select_error_metrics(errors)
    elif frozen.probe.estimate_ is not None:
        split = "cross-validation"
        predictions = probe.predict_out_of_fold(frozen, data.label_space)
        metrics = predictions.metrics
        # The out-of-fold probabilities contain the temperature already, so there is no error before
        # it.
        errors = select_error_metrics(metrics)
    reporter.print_line("calibration", calibration.text + text)
    return Outcome(
        metrics=metrics,
        split=split,
        num_training_images=sum(map(len, parts)),
        calibration=calibration.build_record(errors),
        predictions=predictions,
        nearest_images=find_nearest_images(frozen, predictions),
        seconds=frozen.record["seconds"],
        results={"frozen": frozen.record},
    )


# Steps --------------------------------------------------------------------------------------------


def run_steps(
    inputs: RunInputs, plan: RunPlan, data: TrainingData, record: dict[str, Any], launch: Launch
) -> Outcome:
    """Train, and measure what is saved on images that did not train it."""
    setup, options, reporter = inputs.setup, plan.options, launch.reporter
    measure_features = None
    if setup.build_feature_measure is not None and len(data.held_out):
        measure_features = setup.build_feature_measure(data)
    # Pre-training has no accuracy of its own. Its result is the difference on the same images, so
    # the first half must be measured before anything trains.
    features_before = measure(setup.model, measure_features)

    # The probe gives the model a new pooler and a new classifier, and may change how images are
    # resized. Evaluators, which keep resized images, and the optimizer, which keeps parameters,
    # would otherwise hold on to the old ones.
    frozen, start_record = start_from_frozen(setup, data, launch)
    held_out: Evaluate = evaluate_nothing
    if len(data.held_out):
        held_out = setup.build_evaluator(data, data.held_out)
    # If no checkpoint is selected, looking at the held-out images during training is harmless.
    selection = held_out
    if data.selection is not None:
        selection = setup.build_evaluator(data, data.selection)

    # A resumed run takes the choice from its checkpoint. Choosing again would cost a pass over the
    # images, and the model has moved on since.
    metadata = record | {"probe": start_record}
    # Signals are caught from here on, not earlier: before the first step, there is nothing that a
    # checkpoint could save, and Ctrl-C may end the program at once.
    with (
        SignalHandler() as signals,
        reporter.progress,
        stop_on_errors(options.num_workers),
    ):
        loop = build_loop(setup, plan, data, launch, signals, selection, metadata)
        # An iterator that is only forgotten would leave its data loading processes running.
        with closing(iterate_augmented_batches(setup, plan, data, loop)) as batches:
            metrics = loop.run(batches)
        # Inside the block, because the best checkpoint is read from disk, which can fail like any
        # step.
        step = set_saved_weights(loop, plan)
    model = loop.state.model.eval()

    predictions = calibration = None
    errors: dict[str, float] = {}
    if setup.build_pass is not None and len(data.held_out):
        assert isinstance(held_out, Evaluator), "only a classifier is calibrated"
        assert isinstance(selection, Evaluator), "only a classifier is calibrated"
        images = HELD_OUT if data.selection is None else SELECTION
        # The temperature comes first: predictions and metrics describe the model as it is saved.
        calibration = calibrate(setup, model, selection, images)
        predictions = held_out.predict(model)
        errors, text = measure_errors(calibration, predictions)
        metrics = predictions.metrics | select_error_metrics(errors)
        reporter.print_line("calibration", calibration.text + text)
    # The last evaluation of the loop was of other weights, or of the images that select.
    elif step != loop.state.step or plan.averaging or data.selection is not None:
        metrics = held_out(model)
    reshard(model)
    # After the measurement, which a distance to the classes would only slow down.
    if options.select == "last" and not isinstance(model, FSDPModule):
        store_statistics(setup, data)

    results: dict[str, Any] = {} if start_record is None else {"frozen": start_record}
    if options.select == "best" and data.selection is not None:
        results["selection"] = {
            "images": data.selection_name,
            "num_images": len(data.selection),
            "step": step,
            setup.selection_metric: loop.state.best_score,
        }
    if plan.averaging:
        results["average_with_start"] = plan.averaging
    features_after = measure(model, measure_features)
    if features_before is not None and features_after is not None:
        results["features"] = {
            "before": features_before,
            "after": features_after,
            "summary": compare_features(features_before, features_after),
        }
    return Outcome(
        metrics=metrics,
        split=data.held_out_name,
        num_training_images=len(data.train),
        calibration=None if calibration is None else calibration.build_record(errors),
        predictions=predictions,
        nearest_images=find_nearest_images(frozen, predictions),
        seconds=loop.get_training_seconds(),
        num_steps=loop.state.step,
        epochs=loop.plan.count_epochs(loop.state.step),
        images_per_step=loop.plan.images_per_step,
        num_unreadable=len(loop.unreadable_images.indices),
        results=results | {"token_movement": loop.monitor.compute_token_movement()},
    )


def start_from_frozen(
    setup: TrainingSetup, data: TrainingData, launch: Launch
) -> tuple[FrozenModel | None, dict[str, Any] | None]:
    """Let the classifier start from the frozen model's classifier; also return what was chosen.

    A resumed run restores the choice only: its weights come from the checkpoint.
    """
    probe = setup.probe
    if probe is None:
        return None, None
    if launch.checkpoint is not None:
        record = launch.checkpoint.metadata["probe"]
        probe.restore(record)
        return None, record
    # The steps report the unreadable images.
    frozen = probe.fit([data.train], data.held_out, ignore_message, MAX_PROBE_IMAGES)
    probe.set_start(frozen.probe)
    launch.reporter.print_lines(describe_frozen(probe, frozen))
    return frozen, frozen.record


def build_loop(
    setup: TrainingSetup,
    plan: RunPlan,
    data: TrainingData,
    launch: Launch,
    signals: SignalHandler,
    evaluate: Evaluate,
    metadata: dict[str, Any],
) -> TrainingLoop:
    """Prepare model, optimizer and trackers, and load the checkpoint to resume from."""
    options, accelerator, reporter = plan.options, launch.accelerator, launch.reporter
    if options.compile:
        # Compiled in place. The wrapper that `torch.compile(model)` returns would put `_orig_mod.`
        # before the name of every weight.
        setup.model.compile()
    # Accelerate reads in `prepare` which layers to shard.
    configure_layer_sharding(accelerator, setup.model)
    assert options.learning_rate and options.layer_decay, "the plan sets them"
    groups = build_parameter_groups(setup.model, options.weight_decay, options.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)
    # Model and optimizer are prepared in one call: FSDP2 replaces the parameters, and only this
    # call puts the new ones into the optimizer.
    state = TrainingState(*accelerator.prepare(setup.model, optimizer))
    if plan.averaging:
        # Copied after `prepare`, so each process keeps the start of its own shard on its own
        # device.
        trainable = (each for each in state.model.parameters() if each.requires_grad)
        state.start = [each.detach().clone() for each in trainable]

    batch_plan = build_batch_plan(len(data.train), options, accelerator.num_processes)
    reporter.print_line("batches", describe_batches(batch_plan))
    loop = TrainingLoop(
        state=state,
        objective=setup.build_objective(data),
        evaluate_model=evaluate,
        plan=batch_plan,
        options=options,
        accelerator=accelerator,
        reporter=reporter,
        store=launch.store,
        selection_metric=setup.selection_metric,
        unreadable_images=UnreadableImageCounter(reporter.warn),
        save_every=options.save_every,
        evaluated_images="held_out" if data.selection is None else "selection",
        signals=signals,
        run_metadata=metadata,
    )
    # Restored last, over everything above: also over the start weights, which a resumed run cannot
    # compute again, because its model is no longer at the start.
    if launch.checkpoint is not None:
        loop.restore(launch.checkpoint)
        reporter.print_line("resumed", f"after step {state.step:,} of {batch_plan.num_steps:,}")
    # A checkpoint saved before the evaluation of its step has a record that was never logged.
    reporter.start_after(state.step - bool(state.pending_record), batch_plan.num_steps)
    accelerator.wait_for_everyone()
    if options.log_with:
        folder = options.output_dir / "trackers"
        run_on_main(partial(folder.mkdir, exist_ok=True))
        # Flags are formatted as text, because TensorBoard does not accept lists.
        accelerator.init_trackers(
            options.output_dir.resolve().name,
            config={name: format_flag_value(value) for name, value in to_flags(options).items()},
            init_kwargs={"wandb": {"dir": str(folder)}},
        )
    return loop


def iterate_augmented_batches(
    setup: TrainingSetup, plan: RunPlan, data: TrainingData, loop: TrainingLoop
) -> Generator[Batch, None, None]:
    """Yield the augmented images of this process, from the step on that the loop continues."""
    options, processor = plan.options, setup.processor
    num_channels = setup.model.config.num_channels
    images = TrainingImages(
        data.train,
        build_augmentation(options, processor),
        data.label_space,
        bool(processor.do_convert_rgb),
        seed=options.seed,
        bit_depth=processor.bit_depth,
        num_channels=num_channels,
        image_bytes=num_channels * math.prod(get_output_size(processor)),
    )
    return iterate_training_batches(
        images,
        loop.plan,
        loop.accelerator.process_index,
        options.num_workers,
        loop.state.step,
    )


def set_saved_weights(loop: TrainingLoop, plan: RunPlan) -> int:
    """Replace the last weights with those that the run saves, and tell of which step they are."""
    # Averaging serves the last weights only. The best checkpoint was measured as it is, and its
    # mean with the start never was.
    if plan.options.select == "best":
        step = loop.load_best_weights()
        loop.reporter.print_line("selected", f"the checkpoint of step {step:,}")
        return step
    if plan.averaging:
        average_with_start(loop.model, loop.state.start, plan.averaging)
        loop.reporter.print_line(
            "averaged",
            f"{plan.averaging:g} of the weights before the first step, the rest after it",
        )
    return loop.state.step


def evaluate_nothing(model: Any = None) -> dict[str, Any]:
    """Stand in for an evaluator if no images are held out."""
    return {"num_images": 0, "num_unreadable_images": 0}


def measure(model: Any, measure_features: Any) -> dict[str, Any] | None:
    """Measure the features of an encoder; None if there is nothing to measure."""
    if measure_features is None:
        return None
    features: dict[str, Any] = measure_features(model.to(PartialState().device).eval())
    reshard(model)
    return features


# Measurements -------------------------------------------------------------------------------------


def calibrate(setup: TrainingSetup, model: Any, evaluate: Evaluator, images: str) -> Calibration:
    """Fit and set the temperature of a trained classifier, on images that did not train it."""
    calibration = find_calibration(evaluate.predict(model), images)
    reshard(model)
    if calibration.temperature is not None:
        setup.model.config.temperature = calibration.temperature
    return calibration


def find_nearest_images(
    frozen: FrozenModel | None, predictions: Predictions | None
) -> dict[int, list[str]] | None:
    """Find the training images that the frozen model sees as similar to each wrong prediction."""
    if frozen is None or predictions is None:
        return None
    return frozen.find_nearest_images(predictions.list_wrong())


def store_statistics(setup: TrainingSetup, data: TrainingData) -> None:
    """Store class statistics in a trained model, from one pass over some of its training images.

    An image is unknown if it is farther away than most images that the model was not trained on.
    """
    if setup.build_pass is None:
        return
    model = setup.model.eval()
    compute = partial(compute_tokens, setup.build_pass, model)
    tokens, labels = compute(data.train)
    statistics = ClassStatistics.fit(tokens, labels, model.config.num_labels)
    other_images = data.held_out if data.selection is None else data.selection
    # The threshold comes from images that the model was not trained on: training images lie closer
    # to the means of their classes than any new image does.
    if len(other_images) >= MIN_DISTANCE_IMAGES:
        distances = statistics.compute_distances(compute(other_images)[0])
        threshold = float(np.quantile(distances, KNOWN_RECALL, method="higher"))
        model.config.distance_threshold = threshold
    statistics.set_in_model(model)


def compute_tokens(
    build_pass: Any, model: Any, images: LabeledImages
) -> tuple[dict[Token, np.ndarray], np.ndarray]:
    """Compute what the class statistics are made of: the features of each token, and the labels."""
    layout = FeatureLayout.for_extra_heads(model.config, NUM_LAST_LAYERS)
    # the steps and evaluations have named the unreadable images
    statistics_pass = build_pass(images.draw(MAX_STATISTICS_IMAGES), layout, warn=ignore_message)
    features = statistics_pass(model)
    # An image without a label (-100) belongs to no mean.
    features = features.take(features.labels >= 0)
    tokens = features.get_tokens()
    # A classifier on CLS skips the patches of the last layer, so at inference they have no
    # distance.
    if count_output_tokens(model.vitcls, None, {}) is not None:
        del tokens[-1, "mean"]
    return tokens, features.labels


# Errors -------------------------------------------------------------------------------------------


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

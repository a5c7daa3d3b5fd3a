"""One training run, from options to a model folder. `train` reads from top to bottom.

    options -> inputs -> plan -> division of the images -> frozen run or steps -> folder

What is trained is a `Recipe` (finetune.py, pretrain.py); what a run is, is decided in plan.py. The
run writes weights, configuration, code, image processor, config.resolved.yaml, metrics.jsonl,
checkpoints and finally results.json, which marks the folder as complete. publishing/ builds the
report and the card from the folder.
"""

import math
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch.distributed.fsdp import FSDPModule

from ..data.aspect_ratio import get_output_size
from ..data.augmentation import build_augmentation
from ..data.batches import Batch, TrainingImages, iterate_training_batches
from ..data.image_folder import check_output_is_not_read
from ..data.images import LabeledImages, UnreadableImageCounter
from ..data.sources import load_on_main
from ..data.splits import TrainingData, divide_images, load_undivided_images
from ..data.workers import explain_worker_errors
from ..hub.local_paths import resolve_name
from ..hub.model_files import METRICS_FILE
from ..hub.model_folder import ModelFolder
from ..inference.class_statistics import ClassStatistics, Token
from ..inference.evaluator import Evaluator
from ..inference.frozen_features import FeatureLayout
from ..inference.linear_probe import KNOWN_RECALL, MIN_DISTANCE_IMAGES, NUM_LAST_LAYERS
from ..model.modeling_vitcls import count_output_tokens
from ..runtime.distributed import build_accelerator, configure_layer_sharding, run_on_main
from ..runtime.errors import RunStopped, describe_error, is_raised_on_all_processes
from ..runtime.flags import to_flags
from ..runtime.staging import STAGING_FOLDER, FolderLock
from .calibration import (
    calibrate,
    describe_probe_calibration,
    measure_errors,
    select_error_metrics,
)
from .checkpoints import Checkpoint, CheckpointStore
from .distributed_state import reshard, scatter_model
from .finetune import FineTuning
from .loop import Evaluate, TrainingLoop, TrainingState, build_batch_plan, describe_batches
from .model import check_model_flags
from .optimizer import average_with_start, build_parameter_groups
from .options import PretrainOptions, TrainOptions
from .plan import RunPlan, plan_run
from .pretrain import PreTraining
from .probe import (
    MAX_PROBE_IMAGES,
    describe_frozen,
    describe_threshold,
    ignore_message,
)
from .reporter import Reporter
from .resume import convert_sources, format_flag_value
from .run_folder import CHECKPOINTS_FOLDER, check_finished, find_run, prepare_folder
from .run_inputs import load
from .run_results import Outcome, build_results, build_run_record, print_result, print_summary
from .save import save_output
from .signals import SignalHandler
from .training_setup import Recipe, TrainingSetup


MAX_STATISTICS_IMAGES = 5000  # maximum number of images for the statistics of a trained model
NUM_KEPT_DURING_RUN = 2  # checkpoints, besides the best one; none is kept after the run


def train(asked: TrainOptions) -> Path:
    """Train and evaluate a model, and return the folder with the model and its results.

    Raises:
        ValueError, OSError: if data or models cannot be read or do not match the options, another
            run uses the folder, files would be replaced without --overwrite, or the run cannot be
            resumed.
        RunStopped: after a signal, a non-finite loss, too many unreadable images, or a full disk.
    """
    # What was asked is checked before anything else is done.
    asked = convert_sources(asked, resolve_name)
    check_model_flags(asked.model, asked.model_config or (), asked.trainable)
    folder = asked.output_dir
    check_output_is_not_read(folder, asked.dataset)
    flags = to_flags(asked)

    accelerator = build_accelerator(
        asked.gradient_accumulation_steps,
        asked.mixed_precision,
        asked.log_with,
        folder / "trackers",
    )
    # Before any model is built: every process must draw the same random weights.
    set_seed(asked.seed)
    reporter = Reporter(folder / METRICS_FILE, accelerator)
    store = CheckpointStore(
        folder / CHECKPOINTS_FOLDER, asked.keep_checkpoints or NUM_KEPT_DURING_RUN
    )
    # Held until the last file is in its place: two runs in one folder would mix their checkpoints.
    with FolderLock(folder) as lock:

        def open_folder() -> tuple[Checkpoint | None, bool]:
            lock.acquire()
            return find_run(folder, store, flags, reporter.warn)

        # One process looks at the folder for all of them. The others would wait for its lock.
        checkpoint, is_finished = run_on_main(open_folder)
        # A job script repeats its command with --resume, also after a run that was killed between
        # its last file and its cleanup. Clean up what that run could not, and do nothing else.
        if is_finished:
            clean_up_finished(asked, store, reporter)
            return folder

        # What the run is. The division of the images depends on it, so it comes first.
        recipe: Recipe = PreTraining() if isinstance(asked, PretrainOptions) else FineTuning()
        inputs = load(recipe, asked, checkpoint, reporter)
        setup = inputs.setup
        plan = plan_run(inputs, accelerator, is_resumed=checkpoint is not None)
        options = plan.options
        assert options.held_out_fraction is not None, "the plan sets it"
        data = divide_images(inputs.images, options.held_out_fraction, options.select == "best")
        # Compared with the checkpoint first: nothing is written if the run is another one.
        record = run_on_main(
            partial(build_run_record, plan, data, setup.model.config, flags, checkpoint)
        )
        run_on_main(partial(prepare_folder, folder, store, to_flags(options), checkpoint))
        is_measured = len(data.held_out) or plan.kind == "frozen"
        num_seen = data.count_seen(setup.encoder_rows) if is_measured else 0
        print_summary(inputs, plan, data, num_seen, reporter)

        # Both kinds end in the same record.
        if plan.kind == "frozen":
            outcome = run_frozen(setup, data, reporter.warn)
        else:
            outcome = run_steps(setup, plan, data, record, checkpoint, store, reporter)
        reporter.print_lines(outcome.lines)

        results = build_results(inputs, data, outcome, record["flags"]["chosen"])
        if num_seen:
            results.pop("accuracy_interval", None)
            results["num_images_of_encoder"] = num_seen
        save_output(
            folder,
            setup,
            data,
            results,
            initial=inputs.initial,
            teacher=getattr(options, "teacher", None),
            predictions=outcome.predictions,
            nearest_images=outcome.nearest_images,
        )
        # After the folder is whole, because --resume needs the checkpoints until then.
        if options.keep_checkpoints is None:
            run_on_main(store.clear)
        print_result(results, setup.result_metrics, plan, data, asked, reporter)

        # DDP must not outlive its process group: with torch 2.11, gloo may wait forever
        accelerator.free_memory()
        accelerator.end_training()
        return folder


def clean_up_finished(asked: TrainOptions, store: CheckpointStore, reporter: Reporter) -> None:
    """Check that a finished run has today's photos, labels and weights, and remove what it left.

    Raises:
        ValueError, OSError: if they have changed, or cannot be read.
    """
    folder = ModelFolder(asked.output_dir)
    results = folder.results_of_any_weights
    # Read as the run has read them: a test split may have come since.
    load_images = partial(
        load_undivided_images,
        asked,
        reads_all=results["held_out_split"] == "test",
        use_labels=bool(results["data"]["classes"]),
    )
    # The photos and labels may have changed since, although the flags are the same.
    check_finished(folder, load_on_main(asked.dataset, load_images))
    shutil.rmtree(folder.path / STAGING_FOLDER, ignore_errors=True)
    if asked.keep_checkpoints is None:
        store.clear()
    reporter.print_line("finished", f"{folder.path} already contains the results of this run")


# Frozen -------------------------------------------------------------------------------------------


def run_frozen(setup: TrainingSetup, data: TrainingData, warn: Callable[[str], None]) -> Outcome:
    """Fit the classifier to every label that is not held out, and measure it.

    Without held-out images, each training image is predicted by a classifier that was not fitted to
    it, and the accuracy is corrected for the choice among the candidates.
    """
    probe = setup.probe
    assert probe is not None, "only a run with a probe can be frozen"
    # Without steps there is no checkpoint to select, so the labels of a validation split are free
    # to train the classifier. The test split still measures it.
    parts = [data.train] if data.selection is None else [data.train, data.selection]
    frozen = probe.fit(parts, data.held_out, warn)
    # Everything below is measured with the heads in the model, which are what the folder will
    # contain.
    probe.set_frozen(frozen)

    calibration = describe_probe_calibration(frozen.probe)
    split = data.held_out_name
    predictions = nearest_images = None
    metrics = evaluate_nothing()
    if frozen.held_out is not None:
        predictions = probe.predict(frozen, frozen.held_out, data.label_space)
        calibration = measure_errors(calibration, predictions)
        metrics = predictions.metrics | select_error_metrics(calibration.errors)
    elif frozen.estimate is not None:
        split = "cross-validation"
        predictions = probe.predict_out_of_fold(frozen, data.label_space)
        metrics = predictions.metrics
        # The out-of-fold probabilities contain the temperature already, so there is no error before
        # it.
        calibration = replace(calibration, errors=select_error_metrics(metrics))
    if predictions is not None:
        nearest_images = frozen.find_nearest_images(predictions.list_wrong())
    return Outcome(
        metrics=metrics,
        split=split,
        num_training_images=sum(map(len, parts)) - frozen.features.num_unreadable,
        calibration=calibration.build_record(),
        predictions=predictions,
        nearest_images=nearest_images,
        seconds=frozen.record["seconds"],
        results={"frozen": frozen.record},
        lines={
            **describe_frozen(frozen.record),
            "unknown": describe_threshold(frozen.probe),
            "calibration": calibration.text,
        },
    )


# Steps --------------------------------------------------------------------------------------------


def run_steps(
    setup: TrainingSetup,
    plan: RunPlan,
    data: TrainingData,
    record: dict[str, Any],
    checkpoint: Checkpoint | None,
    store: CheckpointStore,
    reporter: Reporter,
) -> Outcome:
    """Train, and measure what is saved on images that did not train it."""
    options = plan.options
    compare = setup.start_comparison(data)
    # The probe gives the model a new pooler and a new classifier, and may change how images are
    # resized. Evaluators, which keep resized images, and the optimizer, which keeps parameters,
    # would otherwise hold on to the old ones.
    probe = setup.probe
    frozen = start_record = None
    if probe is not None and checkpoint is not None:
        # Choosing again would cost a pass over the images, and the model has moved on since. The
        # weights come from the checkpoint.
        start_record = checkpoint.metadata["probe"]
        probe.restore(start_record)
    elif probe is not None:
        # The steps report the unreadable images.
        frozen = probe.fit([data.train], data.held_out, ignore_message, MAX_PROBE_IMAGES)
        probe.set_heads(frozen)
        start_record = frozen.record
        if frozen.held_out is not None:
            start = probe.predict(frozen, frozen.held_out, data.label_space).metrics
            start_record = start_record | {"held_out_accuracy": start["accuracy"]}
        reporter.print_lines(describe_frozen(start_record))

    held_out: Evaluate = evaluate_nothing
    if len(data.held_out):
        held_out = setup.build_evaluator(data, data.held_out)
    # If no checkpoint is selected, looking at the held-out images during training is harmless.
    selection = held_out
    if data.selection is not None:
        selection = setup.build_evaluator(data, data.selection)

    # Signals are caught from here on, not earlier: before the first step, there is nothing that a
    # checkpoint could save, and Ctrl-C may end the program at once.
    with (
        SignalHandler() as signals,
        reporter.progress,
        stop_on_errors(options.num_workers),
    ):
        loop, batches = build_loop(
            setup,
            plan,
            data,
            reporter,
            checkpoint=checkpoint,
            store=store,
            signals=signals,
            evaluate_model=selection,
            run_metadata=record | {"probe": start_record},
        )
        # An iterator that is only forgotten would leave its data loading processes running.
        with closing(batches):
            metrics = loop.run(batches)
        # Inside the block, because the best checkpoint is read from disk, which can fail like any
        # step.
        step = set_saved_weights(loop, plan)
    model = loop.state.model.eval()

    predictions = calibration = nearest_images = heads_text = None
    if setup.build_pass is not None and len(data.held_out):
        assert isinstance(held_out, Evaluator), "only a classifier is calibrated"
        assert isinstance(selection, Evaluator), "only a classifier is calibrated"
        calibration, predictions, heads_text = calibrate(setup.model, model, held_out, selection)
        metrics = predictions.metrics | select_error_metrics(calibration.errors)
    # The last evaluation of the loop was of other weights, or of the images that select.
    elif step != loop.state.step or plan.averaging or data.selection is not None:
        metrics = held_out(model)
    reshard(model)
    # After the measurement, which a distance to the classes would only slow down.
    if options.select == "last" and not isinstance(model, FSDPModule):
        store_statistics(setup, data)
    if frozen is not None and predictions is not None:
        nearest_images = frozen.find_nearest_images(predictions.list_wrong())

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
    return Outcome(
        metrics=metrics,
        split=data.held_out_name,
        num_training_images=len(data.train),
        calibration=None if calibration is None else calibration.build_record(),
        predictions=predictions,
        nearest_images=nearest_images,
        seconds=loop.get_training_seconds(),
        num_steps=loop.state.step,
        epochs=loop.plan.count_epochs(loop.state.step),
        images_per_step=loop.plan.images_per_step,
        num_unreadable=len(loop.unreadable_images.indices),
        results=results | compare(model) | {"token_movement": loop.measure_token_movement()},
        lines={
            "heads": heads_text,
            "calibration": None if calibration is None else calibration.text,
        },
    )


def build_loop(
    setup: TrainingSetup,
    plan: RunPlan,
    data: TrainingData,
    reporter: Reporter,
    *,
    checkpoint: Checkpoint | None,
    store: CheckpointStore,
    signals: SignalHandler,
    evaluate_model: Evaluate,
    run_metadata: dict[str, Any],
) -> tuple[TrainingLoop, Generator[Batch, None, None]]:
    """Prepare model, optimizer and trackers, load the checkpoint to resume from, and start batches.

    The batches are the augmented images of this process, from the step on that the loop continues.
    """
    options = plan.options
    accelerator = reporter.accelerator
    if options.compile:
        # Compiled in place. The wrapper that `torch.compile(model)` returns would put `_orig_mod.`
        # before the name of every weight.
        setup.model.compile()
    # Accelerate reads in `prepare` which layers to shard.
    configure_layer_sharding(setup.model)
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

    loop = TrainingLoop(
        state=state,
        objective=setup.build_objective(data),
        evaluate_model=evaluate_model,
        plan=build_batch_plan(len(data.train), options, accelerator.num_processes),
        options=options,
        accelerator=accelerator,
        reporter=reporter,
        store=store,
        selection_metric=setup.selection_metric,
        unreadable_images=UnreadableImageCounter(reporter.warn),
        save_every=options.save_every,
        evaluated_images="held_out" if data.selection is None else "selection",
        signals=signals,
        run_metadata=run_metadata,
    )
    num_steps = loop.plan.num_steps
    reporter.print_line("batches", describe_batches(loop.plan))
    # Restored last, over everything above: also over the start weights, which a resumed run cannot
    # compute again, because its model is no longer at the start.
    if checkpoint is not None:
        loop.restore(checkpoint)
        reporter.print_line("resumed", f"after step {state.step:,} of {num_steps:,}")
    # A checkpoint saved before the evaluation of its step has a record that was never logged.
    reporter.start_after(state.step - bool(state.pending_record), num_steps)
    used_flags = run_metadata["flags"]["flags"] | run_metadata["flags"]["chosen"]
    # Flags are formatted as text, because TensorBoard does not accept lists.
    reporter.start_trackers({name: format_flag_value(used_flags[name]) for name in used_flags})

    processor = setup.processor
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
    batches = iterate_training_batches(
        images,
        loop.plan,
        accelerator.process_index,
        options.num_workers,
        state.step,
    )
    return loop, batches


def set_saved_weights(loop: TrainingLoop, plan: RunPlan) -> int:
    """Replace the last weights with the weights to save, and return the step that they are from.

    Raise ValueError if the best checkpoint is damaged or missing.
    """
    # Averaging serves the last weights only. The best checkpoint was measured as it is, and its
    # mean with the start never was.
    if plan.options.select == "best":
        checkpoint: Checkpoint = run_on_main(loop.store.load_best)
        # The moments of the optimizer are not needed after the last step.
        scatter_model(checkpoint, loop.state.model)
        loop.reporter.print_line("selected", f"the checkpoint of step {checkpoint.step:,}")
        return checkpoint.step
    if plan.averaging:
        average_with_start(loop.model, loop.state.start, plan.averaging)
        loop.reporter.print_line(
            "averaged",
            f"saved: {plan.averaging:g} x the weights before the first step + "
            f"{1 - plan.averaging:g} x those after the last",
        )
    return loop.state.step


def evaluate_nothing(model: Any = None) -> dict[str, Any]:
    """Stand in for an evaluator if no images are held out."""
    return {"num_images": 0, "num_unreadable_images": 0}


# Class statistics ---------------------------------------------------------------------------------


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
    """Compute the inputs of the class statistics: the features of each token, and the labels."""
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

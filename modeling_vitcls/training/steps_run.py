"""A run with steps: where they start, the loop, and what is measured after the last one."""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from ..data.augmentation import build_augmentation
from ..data.batches import Batch, Normalizer, TrainingImages, iterate_training_batches
from ..data.splits import TrainingData
from ..data.splits_table import find_trained_images
from ..data.workers import explain_worker_errors
from ..evaluation.evaluator import Evaluator, Predictions, build_predictions
from ..frozen.head_search import (
    EncodedImages,
    describe_frozen,
    ignore_message,
    warn_about_unreadable_classes,
)
from ..frozen.linear_probe import ABSENT_CLASS_MARGIN
from ..inference.metrics import compute_mean, get_task_metrics, select_scalars
from ..inference.token_names import read_fade_in
from ..model.configuration_vitcls import ViTCLSConfig
from ..runtime.distributed import configure_layer_sharding
from ..speed.packed import count_output_tokens
from .calibration import Calibration, MeasuredClassifier, calibrate
from .checkpoints import Checkpoint, CheckpointStore
from .distributed_state import distribute_like, reshard
from .loop import Evaluate, TrainingLoop, build_batch_plan
from .losses import build_objective
from .model import list_last_layers
from .new_tokens import measure_tokens
from .optimizer import average_with_start, build_parameter_groups
from .plan import RunPlan
from .reporter import Reporter
from .resume import format_flag_value
from .run_inputs import RunInputs
from .run_results import Outcome, list_measurements
from .signals import SignalHandler
from .statistics import store_statistics
from .teacher import measure


# Left and right classes: 0.58; up and down, 75 % right: 0.32
MAX_MIRRORED = 0.4


def run_steps(
    inputs: RunInputs,
    plan: RunPlan,
    data: TrainingData,
    *,
    record: dict[str, Any],
    checkpoint: Checkpoint | None,
    store: CheckpointStore,
    reporter: Reporter,
) -> Outcome:
    """Train, and measure what is saved on images that did not train it.

    Args:
        inputs, plan, data: of the run.
        record: what checkpoints contain about the run, and its start.
        checkpoint: to resume from.
        store: the checkpoints of the run.
        reporter: output of the run.
    """
    options = plan.options
    start = dict(record["start"])
    held_out = Evaluator(data.held_out, **inputs.pass_arguments)
    if inputs.teacher is not None and len(data.held_out) and checkpoint is None:
        start["teacher_accuracy"] = measure(inputs.teacher, inputs.model, held_out)["accuracy"]
        reporter.print_line("teacher", describe_teacher(start, len(data.held_out)))
    # No checkpoint is selected, so looking at the held-out images during training is harmless.
    selection = held_out
    if data.selection is not None:
        selection = Evaluator(data.selection, **inputs.pass_arguments)

    # Signals are caught from here on, not earlier: before the first step, there is nothing that a
    # checkpoint could save, and Ctrl-C may end the program at once.
    with (
        SignalHandler() as signals,
        explain_worker_errors(options.num_workers),
        # Before the model is sharded: a run with FSDP2 and one with DDP compute the same
        computing_tokens_of_heads(inputs.model),
    ):
        loop, batches = build_loop(
            inputs,
            plan,
            data,
            reporter,
            checkpoint=checkpoint,
            store=store,
            signals=signals,
            evaluate_model=selection,
            run_metadata=record | {"start": start},
        )
        # An iterator that is only forgotten would leave its data loading processes running.
        with closing(batches):
            metrics = loop.run(batches)
        if plan.averaging:
            average_with_start(loop.unwrapped, loop.start, plan.averaging, plan.new_tokens)
            reporter.print_line(
                "averaged",
                f"saved: {plan.averaging:g} x the weights before the first step + "
                f"{1 - plan.averaging:g} x those after the last"
                f"{', alone for new tokens' if plan.new_tokens else ''}",
            )
    model = loop.model.eval()
    exclude_unreadable_classes(inputs.model, data, loop.unreadable_images, reporter)

    predictions, heads_text = None, None
    calibration = Calibration(None, "")
    if len(data.held_out):
        measured = measure_classifier(inputs, data, model, held_out, selection)
        predictions, calibration = measured.predictions, measured.calibration
        heads_text = measured.heads_text
        metrics = predictions.metrics
    reporter.accelerator.log(select_scalars(metrics, "saved_"), step=loop.step)
    if data.label_space.kind == "multi_task":
        predictions = None
    if predictions is not None and options.flip:
        warn_about_mirrors(predictions, held_out.predict(model, is_mirrored=True), reporter)
    reshard(model)
    tokens, tokens_text, predictions = measure_tokens(inputs, data.held_out, predictions)
    # After the measurement, which a distance to the classes would only slow down.
    trained_scenes = unknown_text = None
    if data.label_space.kind == "single_label_classification" and not isinstance(model, FSDPModule):
        statistics = store_statistics(inputs, data)
        trained_scenes, unknown_text = statistics.trained_scenes, statistics.unknown_text

    seconds = loop.get_training_seconds()
    num_unreadable = len(loop.unreadable_images)
    return Outcome(
        data=data,
        measured=list_measurements(
            get_task_metrics(metrics),
            inputs.selection_metric,
            num_seen=data.count_seen(inputs.encoder_rows, is_frozen=False),
        ),
        metrics=metrics,
        split=data.held_out_name,
        num_training_images=len(data.train) - num_unreadable,
        calibration=calibration.record,
        predictions=predictions,
        seconds=seconds,
        num_unreadable=num_unreadable,
        trained_scenes=trained_scenes,
        in_trained_scenes=start.get("in_trained_scenes", ()),
        results=build_step_results(loop, plan, data, start=start, seconds=seconds) | tokens,
        lines={
            "heads": heads_text,
            "calibration": calibration.text,
            "tokens": tokens_text,
            "unknown": unknown_text,
        },
    )


def measure_classifier(
    inputs: RunInputs, data: TrainingData, model: Any, held_out: Evaluator, selection: Evaluator
) -> MeasuredClassifier:
    """Measure what is saved on held-out images: the last evaluation of the loop may be of other weights.

    Args:
        inputs, data: of the run.
        model: the classifier, which may be wrapped, in evaluation mode.
        held_out: images that did not train it.
        selection: images to fit the temperature of one label per image to.
    """
    if data.label_space.kind == "single_label_classification":
        inference = inputs.options.get_config_values().get("distillation_inference")
        measured = calibrate(inputs.model, model, held_out, selection, inference)
    else:
        measured = MeasuredClassifier(held_out.predict(model), Calibration(None, ""), None)
    if inputs.options.answers:
        measured.predictions.metrics.update(data.build_counted_record())
    return measured


def warn_about_mirrors(predictions: Predictions, mirrored: Predictions, reporter: Reporter) -> None:
    """Warn if many predictions change in the mirror, although the model was trained on mirror images."""
    if (part := (predictions.answers != mirrored.answers).mean()) > MAX_MIRRORED:
        reporter.warn(
            f"{part:.0%} of the held-out predictions change if the images are mirrored, and the model was trained "
            "on mirror images. If left and right matter, set `flip=False`"
        )


def build_step_results(
    loop: TrainingLoop,
    plan: RunPlan,
    data: TrainingData,
    *,
    start: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Build the fields of results.json that only a run with steps has."""
    step = loop.step
    results: dict[str, Any] = {
        "steps": step,
        "epochs": round(loop.plan.count_epochs(step), 4),
        "images_per_second": round(step * loop.plan.images_per_step / seconds, 1),
        # New tokens are trained although `trainable` is "head"
        "steps_train_encoder": any(
            each.requires_grad for each in loop.unwrapped.vitcls.parameters()
        ),
        "token_movement": loop.measure_token_movement(),
    }
    for name in ("frozen", "before_steps", "teacher_accuracy", "initial_classifier"):
        if name in start:
            results[name] = start[name]
    if fade_in := read_fade_in(loop.unwrapped.vitcls):
        results["fade_in"] = fade_in
    if plan.averaging:
        results["average_with_start"] = plan.averaging
    return results


@torch.no_grad()
def exclude_unreadable_classes(
    model: Any, data: TrainingData, unreadable: set[int], reporter: Reporter
) -> None:
    """Keep the model from predicting classes that no image has trained."""
    if not data.train.is_stratified or not unreadable:
        return
    readable = np.delete(data.train.labels, sorted(unreadable))
    missing = warn_about_unreadable_classes(data, readable, reporter.warn)
    for layer in list_last_layers(model):
        margins = torch.zeros(len(layer.bias))
        margins[missing] = ABSENT_CLASS_MARGIN
        layer.bias.sub_(distribute_like(margins, layer.bias))


def measure_initial_classifier(inputs: RunInputs, data: TrainingData) -> dict[str, Any]:
    """Measure a model with the same labels as it is, before its classifier is fitted again.

    Returns:
        The metric of the held-out images, as "initial_classifier", or None if they trained the model;
        nothing without such a model, or without held-out images.
    """
    if inputs.fitted_rows is None or not len(data.held_out):
        return {}
    if find_trained_images(data.held_out, inputs.fitted_rows).any():
        return {"initial_classifier": None}
    metrics = get_task_metrics(Evaluator(data.held_out, **inputs.pass_arguments)(inputs.model))
    name = inputs.selection_metric
    value = compute_mean([each[name] for each in metrics.values()])
    return {"initial_classifier": {name: value}}


def start_steps(
    inputs: RunInputs,
    data: TrainingData,
    images: EncodedImages | None,
    checkpoint: Checkpoint | None,
    reporter: Reporter,
) -> dict[str, Any]:
    """Start from the frozen model, or from a checkpoint.

    The frozen encoder gets a new pooler and new heads, and may change how images are resized. It comes
    before evaluators, which keep resized images, and the optimizer, which keeps parameters.

    Returns:
        What only the start can say, for checkpoints: what `measure_initial_classifier` returns and, of
        the frozen model, the groups of the images with their scenes ("groups"), the record of what was
        chosen ("frozen"), the metric of the held-out images ("before_steps"), and their photos of a scene
        that trains ("in_trained_scenes").
    """
    search = inputs.head_search
    if checkpoint is not None:
        # Choosing again would cost a pass over the images, and the model has moved on since. The
        # weights come from the checkpoint.
        start: dict[str, Any] = checkpoint.metadata["start"]
        if search is not None:
            search.set_choice(start["frozen"])
        return start

    start = measure_initial_classifier(inputs, data)
    if search is not None and images is not None:
        fitted = search.fit(images, data, ignore_message)
        for head in fitted.by_task.values():
            head.copy_to(inputs.model)
        fitted.examine(data, is_result=False)
        reporter.print_lines(describe_frozen(fitted.record))
        start |= {
            "frozen": fitted.record,
            "groups": images.groups.tolist(),
            "in_trained_scenes": fitted.in_trained_scenes,
        }
        metric = inputs.selection_metric
        values = [
            build_predictions(head.labels, head.predict_held_out()).metrics[metric]
            for head in fitted.by_task.values()
            if head.held_out is not None
        ]
        if values:
            start["before_steps"] = {metric: compute_mean(values)}
    return start


def choose_fade_in_steps(num_passes: int) -> int:
    """Choose over how many training passes of a run new tokens are faded in: at most a third of it."""
    return min(ViTCLSConfig.token_fade_in_steps, max(num_passes // 3, 1))


def describe_teacher(start: dict[str, Any], num_images: int) -> str:
    """Say what a teacher reaches on the held-out images, compared with the frozen model, if any."""
    text = (
        f"right on {round(num_images * start['teacher_accuracy'])} of {num_images} held-out images"
    )
    if "before_steps" not in start:
        return text
    accuracy = start["before_steps"]["accuracy"]
    text += f", the frozen model on {round(num_images * accuracy)}"
    return text if start["teacher_accuracy"] > accuracy else f"{text}: it has little to teach"


@contextmanager
def computing_tokens_of_heads(model: Any) -> Iterator[None]:
    """Compute only what the heads read in the last layer, as a packed model does: 5 % less of a step."""
    model.num_output_tokens = count_output_tokens(model.vitcls)
    try:
        yield
    finally:
        model.num_output_tokens = None


def build_loop(
    inputs: RunInputs,
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
    model, processor = inputs.model, inputs.processor
    if options.compile:
        # Compiled in place. The wrapper that `torch.compile(model)` returns would put `_orig_mod.`
        # before the name of every weight.
        model.compile()
    # Accelerate reads in `prepare` which layers to shard.
    configure_layer_sharding(model)
    rate = options.learning_rate
    assert rate and options.layer_decay, "the plan sets them"
    groups = build_parameter_groups(
        model, options.weight_decay, options.layer_decay, plan.new_tokens
    )
    optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)
    # Model and optimizer are prepared in one call: FSDP2 replaces the parameters, and only this
    # call puts the new ones into the optimizer.
    prepared, optimizer = accelerator.prepare(model, optimizer)
    start_weights = {}
    if plan.averaging:
        # Copied after `prepare`, so each process keeps the start of its own shard on its own
        # device.
        start_weights = {
            name: parameter.detach().clone()
            for name, parameter in accelerator.unwrap_model(prepared).named_parameters()
            if parameter.requires_grad
        }

    loop = TrainingLoop(
        model=prepared,
        optimizer=optimizer,
        objective=build_objective(
            options,
            data,
            teacher=inputs.teacher,
            normalize=Normalizer(processor, accelerator.device),
            accelerator=accelerator,
        ),
        evaluate_model=evaluate_model,
        plan=build_batch_plan(len(data.train), options, accelerator.num_processes),
        warmup=options.warmup,
        accelerator=accelerator,
        reporter=reporter,
        store=store,
        save_every=options.save_every,
        evaluated_images="held_out" if data.selection is None else "selection",
        signals=signals,
        run_metadata=run_metadata,
        new_tokens=plan.new_tokens,
        start=start_weights,
    )
    num_steps = loop.plan.num_steps
    fade_in = model.vitcls.fade_in
    if fade_in is not None:
        num_passes = num_steps * loop.plan.accumulation_steps
        if options.token_fade_in_steps is None:
            fade_in.config.token_fade_in_steps = choose_fade_in_steps(num_passes)
        text = f"new tokens over the first {fade_in.config.token_fade_in_steps:,} of {num_passes:,} passes"
        reporter.print_line("fade-in", text)
    reporter.print_line(
        "batches",
        f"{loop.plan.images_per_step} images per step; {num_steps:,} steps = "
        f"{loop.plan.count_epochs(num_steps):.1f} epochs",
    )
    # Restored last, over everything above: also over the start weights, which a resumed run cannot
    # compute again, because its model is no longer at the start.
    if checkpoint is not None:
        loop.restore(checkpoint)
        reporter.print_line("resumed", f"after step {loop.step:,} of {num_steps:,}")
    # A checkpoint saved before the evaluation of its step has a record that was never logged.
    reporter.start_after(loop.step - bool(loop.pending_record), num_steps, inputs.selection_metric)
    used_flags = run_metadata["flags"] | run_metadata["chosen_flags"]
    # TensorBoard accepts no lists, and its axes are of numbers.
    reporter.start_trackers(
        {
            name: value if isinstance(value, int | float) else format_flag_value(value)
            for name, value in used_flags.items()
        }
    )
    before = run_metadata["start"].get("before_steps", {})
    reporter.accelerator.log(select_scalars(before, f"{loop.evaluated_images}_"), step=0)

    images = TrainingImages(
        data.train,
        *build_augmentation(options, processor),
        label_space=data.label_space,
        to_rgb=bool(processor.do_convert_rgb),
        seed=options.seed,
        bit_depth=processor.bit_depth,
        num_channels=model.config.num_channels,
    )
    return loop, iterate_training_batches(
        images, loop.plan, accelerator.process_index, options.num_workers, loop.step
    )

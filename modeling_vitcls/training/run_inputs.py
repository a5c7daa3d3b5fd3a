"""Start of a run: the folder, the data, the models, and all defaults (run.py).

environment = set_up(asked, lock)               where the run takes place
loaded = load(recipe, options, environment)     what it trains on
print_summary(recipe, loaded, environment)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from ..data.image_folder import compute_files_digest
from ..data.sampling import BatchPlan
from ..data.splits import (
    TrainingData,
    describe_data,
    hold_out_nothing,
    load_on_main,
    select_nothing,
)
from ..runtime.distributed import build_accelerator, run_on_main, set_mixed_precision
from ..runtime.flags import to_flags
from ..runtime.staging import FolderLock
from ..runtime.system import describe_device
from . import output_folder
from .checkpoints import Checkpoint, CheckpointStore
from .defaults import (
    describe_random_weights,
    resolve_defaults,
    resolve_schedule,
    should_refit,
)
from .duration import estimate_step_seconds, format_minutes, measure_forward_seconds
from .loop import build_batch_plan
from .model import InitialModel, choose_image_size, resolve_initial_model
from .options import FinetuneOptions, TrainOptions
from .output_folder import CHECKPOINTS_FOLDER
from .probe import explain_missing_steps
from .reporter import Reporter, describe_batches, describe_model, describe_splits
from .resume import (
    RecordedFlags,
    build_flags_record,
    check_flags_unchanged,
    check_run_unchanged,
    get_relative_flags,
    pin_models,
    read_finished_flags,
    use_chosen_values,
)
from .training_setup import Recipe, TrainingSetup


NUM_KEPT_DURING_RUN = 2  # checkpoints, besides the best one; none is kept after the run


@dataclass(frozen=True)
class Environment:
    """Where and how a run takes place."""

    accelerator: Accelerator
    reporter: Reporter
    store: CheckpointStore
    asked: TrainOptions  # as the person set them, without derived values
    checkpoint: Checkpoint | None  # to resume from
    is_finished: bool  # whether the resumed run has written its results


@dataclass(frozen=True)
class Loaded:
    """What a run trains on, with all defaults resolved."""

    options: TrainOptions
    initial: InitialModel
    data: TrainingData
    setup: TrainingSetup
    plan: BatchPlan
    missing_steps_reason: str | None  # why the run ends at the probe; None if it trains
    forward_seconds: float | None  # of an image, on a CPU, if it was measured
    lines: dict[str, str | None]  # of the printed summary
    forward_flops: int
    metadata: dict[str, Any]  # of checkpoints

    @property
    def has_steps(self) -> bool:
        return self.missing_steps_reason is None


def set_up(asked: TrainOptions, lock: FolderLock) -> Environment:
    """Build the accelerator, open the output folder, and load the checkpoint to resume from."""
    folder = asked.output_dir
    accelerator = build_accelerator(
        asked.gradient_accumulation_steps,
        asked.mixed_precision,
        asked.log_with,
        folder / "trackers",
    )
    set_seed(asked.seed)

    reporter = Reporter(folder / output_folder.METRICS_FILE, accelerator)
    store = CheckpointStore(
        folder / CHECKPOINTS_FOLDER, asked.keep_checkpoints or NUM_KEPT_DURING_RUN
    )
    checkpoint, is_finished = run_on_main(
        accelerator, partial(open_folder, asked, lock, store, reporter.warn)
    )
    return Environment(
        accelerator=accelerator,
        reporter=reporter,
        store=store,
        asked=asked,
        checkpoint=checkpoint,
        is_finished=is_finished,
    )


def open_folder(
    asked: TrainOptions, lock: FolderLock, store: CheckpointStore, warn: Callable[[str], None]
) -> tuple[Checkpoint | None, bool]:
    """Lock and check the output folder.

    Returns:
        The checkpoint to resume from, and whether the run to resume is finished.
    """
    folder = asked.output_dir
    lock.acquire()
    if asked.resume and output_folder.is_finished(folder):
        check_flags_unchanged(read_finished_flags(folder), to_flags(asked), folder)
        return None, True
    checkpoint = store.load_newest(warn) if asked.resume else None
    if checkpoint is None:
        output_folder.check_replaceable(asked, store)
        return None, False
    recorded = RecordedFlags(**checkpoint.metadata["flags"])
    check_flags_unchanged(recorded, to_flags(asked), folder)
    return checkpoint, False


def load(recipe: Recipe, options: TrainOptions, environment: Environment) -> Loaded:
    """Load the data and the models, resolve all defaults, and prepare the output folder."""
    accelerator = environment.accelerator
    checkpoint = environment.checkpoint
    asked = environment.asked

    if checkpoint is not None:
        options = use_chosen_values(options, checkpoint.metadata["flags"]["chosen"])
    with accelerator.main_process_first():  # only the main process downloads files
        options = pin_models(options)
        initial = resolve_initial_model(options.model)
    data = load_on_main(accelerator, options.dataset, partial(recipe.load_data, options, initial))

    with accelerator.main_process_first():
        options, default_lines = resolve_options(options, initial, data)
        setup = recipe.build_setup(options, initial, data, environment.reporter)
        forward_flops = (setup.encoder or setup.model).flops()

    recorded_precision = None if checkpoint is None else checkpoint.metadata["mixed_precision"]
    precision_text = set_mixed_precision(
        accelerator, options.mixed_precision, setup.model.config, recorded_precision
    )

    options, data_of_all = decide_refit(
        options, asked, initial, data, setup, is_sharded=accelerator.is_fsdp2
    )
    if options.refit:
        data = data_of_all
    options, schedule_lines = resolve_schedule(
        options, initial, data.num_training_images, setup.probe is not None
    )

    reason = forward_seconds = None
    if setup.probe is not None and checkpoint is None:  # a checkpoint is one of steps
        seconds = None
        if accelerator.device.type == "cpu":
            forward_seconds = measure_forward_seconds(setup.model, accelerator)
            if asked.epochs is None and asked.max_steps is None:
                assert options.epochs is not None
                seconds = estimate_step_seconds(
                    forward_seconds,
                    options.epochs,
                    data.num_training_images,
                    accelerator.num_processes,
                )
        reason = explain_missing_steps(options, data, seconds)
        if reason is None and seconds is not None:
            schedule_lines["steps"] = f"about {format_minutes(seconds)} on this CPU"
    if reason is not None:
        data = data_of_all
    if reason is not None or options.refit:
        options = replace(options, select="last")
        if data.undivided is not None and not len(data.held_out):
            options = replace(options, held_out_fraction=0.0)

    if options.gradient_checkpointing:
        setup.model.gradient_checkpointing_enable()

    plan = build_batch_plan(data.num_training_images, options, accelerator.num_processes)
    if reason is not None:  # the same command decides again
        options = replace(options, epochs=asked.epochs, refit=asked.refit)
    metadata = run_on_main(
        accelerator,
        partial(prepare_folder, options, data, plan, setup.model.config.to_dict(), environment),
    )

    has_probe = setup.probe is not None  # which chooses the geometry and the tokens
    lines = {
        **describe_splits(data, setup.processor, setup.labels_text, is_resize_known=not has_probe),
        **describe_model(initial.name, setup.model, forward_flops, is_pooling_known=not has_probe),
        **default_lines,
        **schedule_lines,
        **setup.summary_lines,
        "device": f"{describe_device(accelerator)}, mixed precision: {precision_text}",
    }

    return Loaded(
        options=options,
        initial=initial,
        data=data,
        setup=setup,
        plan=plan,
        missing_steps_reason=reason,
        forward_seconds=forward_seconds,
        lines=lines,
        forward_flops=forward_flops,
        metadata=metadata,
    )


def decide_refit(
    options: TrainOptions,
    asked: TrainOptions,
    initial: InitialModel,
    data: TrainingData,
    setup: TrainingSetup,
    is_sharded: bool,
) -> tuple[TrainOptions, TrainingData]:
    """Return the options with `refit`, and the data of a run that trains on all labels.

    A frozen model is measured by cross-validation, without held-out images, unless the person held
    out images, or the dataset has a split for it. Raise ValueError if the classifier cannot be
    fitted again.
    """
    data_of_all = data
    if data.undivided is not None and asked.held_out_fraction is None:
        data_of_all = hold_out_nothing(data)
    data_of_all = select_nothing(data_of_all)

    has_probe = setup.probe is not None
    if options.refit and not has_probe:
        reason = setup.summary_lines.get("probe", "off")
        raise ValueError(f"`refit=True` requires a frozen model, which is {reason}. Remove `refit`")
    if options.refit and is_sharded:
        raise ValueError("`refit=True` does not support sharded weights. Remove `refit`")
    num_images, num_labels = data_of_all.num_training_images, setup.model.config.num_labels
    can_refit = has_probe and not is_sharded
    is_default = should_refit(asked, initial, num_images, num_labels, can_refit)
    return replace(options, refit=options.refit or is_default), data_of_all


def prepare_folder(
    options: TrainOptions,
    data: TrainingData,
    plan: BatchPlan,
    config: dict[str, Any],
    environment: Environment,
) -> dict[str, Any]:
    """Prepare the output folder, and return the metadata of the checkpoints of the run.

    Raise ValueError if the run differs from the run of the checkpoint to resume from.
    """
    folder = options.output_dir
    checkpoint = environment.checkpoint
    recorded = None
    if checkpoint is not None:
        recorded = RecordedFlags(**checkpoint.metadata["flags"])
    path = Path(options.dataset)
    metadata = {
        "images_per_step": plan.images_per_step,
        "mixed_precision": environment.accelerator.mixed_precision,
        "data": describe_data(data),
        # the keys of other images are in "data"
        "files": compute_files_digest(path) if options.streaming else None,
        "flags": build_flags_record(
            environment.asked,
            options,
            config,
            recorded=recorded,
        ),
    }
    if checkpoint is not None:
        check_run_unchanged(checkpoint.metadata, metadata, folder)
    output_folder.prepare(folder, environment.store, get_relative_flags(options), checkpoint)
    return metadata


def resolve_options(
    options: TrainOptions, initial: InitialModel, data: TrainingData
) -> tuple[TrainOptions, dict[str, str | None]]:
    """Return the options with the defaults that depend on the run, and summary lines.

    The defaults are in defaults.py, and the lines are about these values.
    """
    options = replace(options, select="last" if data.selection is None else "best")
    size_line = None
    if isinstance(options, FinetuneOptions):
        options, size_line = choose_image_size(options, initial)
    options, defaults_line = resolve_defaults(options, initial, data.num_training_images)
    lines = {
        "weights": describe_random_weights(initial),
        "image size": size_line,
        "defaults": defaults_line,
    }
    return options, lines


def print_summary(recipe: Recipe, loaded: Loaded, environment: Environment) -> None:
    """Print what the run does, before it starts."""
    reporter = environment.reporter
    lines = dict(loaded.lines)
    if loaded.has_steps:
        lines["batches"] = describe_batches(loaded.plan)
    else:
        lines |= {
            "defaults": None,
            "epochs": None,
            "rate": None,
            "selection": None,
            "steps": loaded.missing_steps_reason,
        }

    reporter.print_lines(lines)
    for warning in recipe.describe_data(
        loaded.options, loaded.initial, loaded.data, loaded.has_steps
    ):
        reporter.warn(warning)
    reporter.printed_metrics = loaded.setup.printed_metrics

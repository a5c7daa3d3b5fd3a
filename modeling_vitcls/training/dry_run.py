"""Dry run: a few steps, an evaluation, a checkpoint and a model in a temporary folder.

The run prints the expected duration and memory of the full run, and keeps no files.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..data.sampling import BatchPlan
from ..data.splits import TrainingData
from .checkpoints import CheckpointStore
from .loop import TrainingLoop
from .options import TrainOptions
from .output_folder import CHECKPOINTS_FOLDER, check_replaceable
from .run_inputs import Loaded


NUM_STEPS = 3  # more than 1, because the first step is slower than later steps
NUM_PROBE_IMAGES = 256  # maximum number of training images for the probe


@contextmanager
def build_dry_run_options(options: TrainOptions) -> Iterator[TrainOptions]:
    """Yield the options of a dry run, which writes to a temporary folder.

    The folder is removed at the end of the `with` block. Raise ValueError if the full run would not
    be allowed to replace the files in the output folder.
    """
    if not options.resume:
        check_replaceable(
            options, CheckpointStore(options.output_dir / CHECKPOINTS_FOLDER, num_kept=1)
        )
    parent = options.output_dir.absolute().parent
    prefix = f".{options.output_dir.name}-dry-run-"
    folder = parent / prefix
    if os.environ.get("RANK", "0") == "0":  # Accelerate is not initialized yet
        # fails without the write permission that the full run requires
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield replace(
            options,
            output_dir=folder / options.output_dir.name,
            log_every=1,
            resume=False,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def reduce_for_dry_run(loaded: Loaded) -> Loaded:
    """Return the inputs of a dry run: a few steps, and few images for evaluations and probe."""
    data, evaluated_fraction = draw_few_images(loaded.data, loaded.plan)
    setup = loaded.setup
    setup.measure_features = None
    setup.printed_metrics = ()
    setup.can_calibrate = False
    if setup.probe is not None:
        setup.probe = replace(setup.probe, max_images=NUM_PROBE_IMAGES)
    return replace(
        loaded,
        data=data,
        plan=replace(loaded.plan, num_steps=NUM_STEPS),
        evaluated_fraction=evaluated_fraction,
    )


def draw_few_images(data: TrainingData, plan: BatchPlan) -> tuple[TrainingData, float]:
    """Return data with a batch of held-out and selection images, and the fraction evaluated."""
    num_images = plan.batch_size * plan.num_processes
    held_out = data.held_out and data.held_out.draw(num_images)
    selection = data.selection and data.selection.draw(num_images)
    evaluated = data.held_out if data.selection is None else data.selection
    fraction = min(num_images / len(evaluated), 1.0) if len(evaluated) else 1.0
    return replace(data, held_out=held_out, selection=selection), fraction


def describe_dry_run(
    loop: TrainingLoop,
    full_plan: BatchPlan,
    evaluate_every: int,
    evaluated_fraction: float,
    seconds: float,
) -> str:
    """Return the expected duration and memory of the full run as text.

    Args:
        loop: the loop after the dry run.
        full_plan: batch plan of the full run.
        evaluate_every: number of epochs between evaluations.
        evaluated_fraction: fraction of the evaluated images in the images that the full run
            evaluates.
        seconds: duration of the dry run.
    """
    epochs = full_plan.count_epochs(full_plan.num_steps) if full_plan.num_images else 1.0
    num_evaluations = math.ceil(epochs / evaluate_every)
    # The first step is slower than later steps.
    full_seconds = full_plan.num_steps * min(
        loop.step_seconds[1:] or loop.step_seconds, default=0.0
    )
    full_seconds += num_evaluations * min(loop.evaluation_seconds) / evaluated_fraction
    return (
        f"ran {len(loop.step_seconds)} steps and an evaluation, and saved a checkpoint and the "
        f"model, in {seconds:.0f} s; no files were kept. The full run has {full_plan.num_steps:,} "
        f"steps, takes about {timedelta(seconds=math.ceil(full_seconds))}, and needs about "
        f"{loop.peak_memory / 2**20:,.0f} MiB of memory per process"
    )


def describe_dry_probe(results: dict[str, Any], full_plan: BatchPlan, seconds: float) -> str:
    """Return the expected duration of a full run without steps as text.

    `results` are those of the dry run.
    """
    record = results["frozen"]
    scale = (full_plan.num_images or 0) / record["num_training_images"]
    duration = timedelta(seconds=math.ceil(max(scale, 1.0) * record["seconds"]))
    return (
        f"computed the features of {record['num_training_images']:,} training images and fitted "
        f"the classifier, in {seconds:.0f} s; no files were kept. The full run has no steps, and "
        f"takes about {duration}"
    )

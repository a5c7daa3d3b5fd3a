"""One training run, from options to a model folder. `train` reads from top to bottom.

    options -> inputs -> plan -> features, if the encoder is trained -> division of the images
            -> frozen run or steps -> folder

What a run is, is decided in plan.py. Photos of a scene stay on one side of the division, and only features
tell which they are. The run writes weights, configuration, code, image processor,
config.resolved.yaml, metrics.jsonl, checkpoints and finally results.json, which marks the folder as
complete. publishing/ builds the report and the card from the folder.
"""

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from ..data.image_folder import check_output_is_not_read
from ..data.splits import TrainingData, divide_images
from ..frozen.head_search import EncodedImages
from ..hub.local_paths import resolve_name
from ..hub.model_files import METRICS_FILE
from ..runtime.distributed import build_accelerator, run_on_main
from ..runtime.flags import to_flags
from ..runtime.staging import STAGING_FOLDER, lock_folder
from .checkpoints import Checkpoint, CheckpointStore
from .frozen_run import encode_images, run_frozen
from .model import check_model_flags
from .options import FinetuneOptions
from .plan import RunPlan, plan_run
from .reporter import Reporter
from .resume import build_run_record, convert_sources
from .run_folder import CHECKPOINTS_FOLDER, find_run, prepare_folder
from .run_inputs import RunInputs, load
from .run_results import build_results, print_result
from .save import save_output
from .steps_run import run_steps, start_steps
from .summary import print_division, print_summary


NUM_KEPT_DURING_RUN = 2  # Checkpoints; none is kept after the run


def train(asked: FinetuneOptions) -> Path:
    """Train and evaluate a model, and return the folder with the model and its results.

    Raises:
        ValueError, OSError: if data or models cannot be read or do not match the options, another
            run uses the folder, files would be replaced without --overwrite, the run cannot be
            resumed, or the disk is full.
        RunStopped: after a signal or a non-finite loss, or if the model cannot be written.
    """
    asked = convert_sources(asked, resolve_name)
    check_asked(asked)  # Before anything else is done
    folder = asked.output_dir
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
    with ExitStack() as stack:

        def open_folder() -> tuple[dict[str, Any] | None, Checkpoint | None]:
            stack.enter_context(lock_folder(folder))
            return find_run(folder, store, asked, reporter.warn)

        # One process looks at the folder for all of them. The others would wait for its lock.
        recorded, checkpoint = run_on_main(open_folder)

        inputs = load(asked, recorded, reporter)
        plan = plan_run(inputs, accelerator, is_resumed=recorded is not None)
        options = plan.options
        # Compared with the earlier run first: nothing is written if the run is another one.
        record = run_on_main(build_run_record, options, inputs.images, to_flags(asked), recorded)
        # A job script repeats its command with --resume, also after a run that was killed between
        # its last file and its cleanup. Clean up what that run could not, and do nothing else.
        if recorded is not None and checkpoint is None:
            run_on_main(clean_up, asked, store)
            reporter.print_line("finished", f"{folder} already contains the results of this run")
            return folder

        resolved = to_flags(options) | {"mixed_precision": record["mixed_precision"]}
        run_on_main(prepare_folder, folder, store, resolved, recorded is not None)
        print_summary(inputs, plan, reporter)
        data, encoded = divide_run(inputs, plan, checkpoint, reporter)

        # Both kinds end in the same record.
        if plan.kind == "frozen":
            outcome = run_frozen(inputs, data, encoded, reporter)
        else:
            start = start_steps(inputs, data, encoded, checkpoint, reporter)
            del encoded  # The features may take gigabytes, which the steps do not need
            outcome = run_steps(
                inputs,
                plan,
                data,
                record=record | {"start": start},
                checkpoint=checkpoint,
                store=store,
                reporter=reporter,
            )
        reporter.print_lines(outcome.lines)

        results = build_results(inputs, outcome, record)
        save_output(folder, inputs, outcome, results)
        # After the folder is whole, because --resume needs the checkpoints until then.
        run_on_main(clean_up, asked, store)
        print_result(inputs.model.config, outcome, plan, reporter)

        # DDP must not outlive its process group: with torch 2.11, gloo may wait forever
        accelerator.free_memory()
        accelerator.end_training()
        return folder


def clean_up(asked: FinetuneOptions, store: CheckpointStore) -> None:
    """Remove what a complete run no longer needs: checkpoints, and what a killed one was writing."""
    shutil.rmtree(asked.output_dir / STAGING_FOLDER, ignore_errors=True)
    if asked.keep_checkpoints is None:
        store.clear()


def check_asked(asked: FinetuneOptions) -> None:
    """Raise ValueError if flags of the model contradict one another, or the output is a part of the data."""
    check_model_flags(
        asked.model, asked.model_config or (), asked.trainable, asked.token_fade_in_steps
    )
    for dataset in (asked.dataset, *asked.more_data):
        check_output_is_not_read(asked.output_dir, dataset)


def divide_run(
    inputs: RunInputs, plan: RunPlan, checkpoint: Checkpoint | None, reporter: Reporter
) -> tuple[TrainingData, EncodedImages | None]:
    """Divide the images of the run; if a frozen encoder sees them first, by their scenes.

    A checkpoint has the division of the start, so no image passes the encoder again.
    """
    encoded = groups = None
    if checkpoint is not None:
        groups = checkpoint.metadata["start"].get("groups")
    elif inputs.head_search is not None:
        encoded = encode_images(inputs, plan, reporter)
        groups = encoded.groups
    data = divide_images(
        plan.images,
        plan.options.held_out_fraction or 0.0,
        groups if plan.is_drawn else None,  # The splits of a dataset keep their own
    )
    print_division(inputs, plan, data, reporter)
    return data, encoded

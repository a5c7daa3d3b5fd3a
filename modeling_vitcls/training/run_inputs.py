"""Start of a run: where it takes place, and what it reads (run.py).

launch = set_up(asked, lock)          accelerator, output folder, checkpoint to resume from
inputs = load(recipe, launch)         labels and keys of all images, the model with its initial weights
"""

from dataclasses import dataclass, replace
from functools import partial

from accelerate import Accelerator
from accelerate.utils import set_seed

from ..conversion.open_model import is_preset
from ..data.sources import Splits
from ..data.splits import load_on_main
from ..hub.loading import pin_revision
from ..runtime.distributed import build_accelerator, run_on_main, set_mixed_precision
from ..runtime.flags import to_flags
from ..runtime.staging import FolderLock
from ..runtime.system import describe_device
from . import output_folder
from .checkpoints import Checkpoint, CheckpointStore
from .defaults import describe_random_weights, resolve_defaults
from .model import InitialModel, choose_image_size, resolve_initial_model
from .options import PretrainOptions, TrainOptions
from .output_folder import CHECKPOINTS_FOLDER
from .reporter import Reporter
from .resume import (
    SOURCE_FLAGS,
    check_flags_unchanged,
    convert_sources,
    read_finished_flags,
    select_chosen_values,
)
from .training_setup import Recipe, TrainingSetup


NUM_KEPT_DURING_RUN = 2  # checkpoints, besides the best one; none is kept after the run


@dataclass(frozen=True)
class Launch:
    """Where and how a run takes place."""

    accelerator: Accelerator
    reporter: Reporter
    store: CheckpointStore
    asked: TrainOptions  # as the person set them, without derived values
    checkpoint: Checkpoint | None  # to resume from
    is_finished: bool  # whether the resumed run has written its results


@dataclass(frozen=True)
class RunInputs:
    """What a run reads, before it is decided what it does with it."""

    options: TrainOptions  # with the defaults that do not depend on the kind of run
    initial: InitialModel
    images: Splits
    setup: TrainingSetup
    forward_flops: int
    lines: dict[str, str | None]  # about the defaults and the device


def set_up(asked: TrainOptions, lock: FolderLock) -> Launch:
    """Build the accelerator, open the output folder, and load the checkpoint to resume from."""
    folder = asked.output_dir
    accelerator = build_accelerator(
        asked.gradient_accumulation_steps,
        asked.mixed_precision,
        asked.log_with,
        folder / "trackers",
    )
    # Before any model is built: every process must draw the same random weights.
    set_seed(asked.seed)

    reporter = Reporter(folder / output_folder.METRICS_FILE, accelerator)
    store = CheckpointStore(
        folder / CHECKPOINTS_FOLDER, asked.keep_checkpoints or NUM_KEPT_DURING_RUN
    )

    def open_folder() -> tuple[Checkpoint | None, bool]:
        """Find the checkpoint to resume from, and tell whether the run to resume is finished."""
        lock.acquire()
        # The results are looked for first: a finished run may have no checkpoints left to continue
        # from, and has nothing left to do.
        if asked.resume and output_folder.is_finished(folder):
            check_flags_unchanged(read_finished_flags(folder), to_flags(asked), folder)
            return None, True
        checkpoint = store.load_newest(reporter.warn) if asked.resume else None
        if checkpoint is not None:
            check_flags_unchanged(checkpoint.metadata["flags"], to_flags(asked), folder)
        # Nothing is removed yet. `prepare` removes the old files after the data and the model were
        # read without an error, so a typo costs no finished run.
        elif asked.overwrite:
            sources = {name: getattr(asked, name, None) for name in SOURCE_FLAGS}
            output_folder.check_sources_not_removed(folder, sources)
        else:
            output_folder.check_replaceable(folder, store)
        return checkpoint, False

    # One process looks at the folder for all of them. The others would wait for its lock.
    checkpoint, is_finished = run_on_main(open_folder)
    return Launch(accelerator, reporter, store, asked, checkpoint, is_finished)


def load(recipe: Recipe, launch: Launch) -> RunInputs:
    """Read the labels of the images, and load the models. No image is decoded."""
    accelerator = launch.accelerator
    checkpoint = launch.checkpoint
    options = recipe.check_options(launch.asked)
    recorded_precision = None
    if checkpoint is not None:
        # Derived values come from the record: this machine might derive others.
        chosen = checkpoint.metadata["flags"]["chosen"]
        options = replace(options, **select_chosen_values(chosen, to_flags(options)))
        recorded_precision = checkpoint.metadata["mixed_precision"]
    with accelerator.main_process_first():  # only the main process downloads files
        # a preset is on no Hub
        pinned = ("teacher",) if is_preset(options.model) else SOURCE_FLAGS
        # The commit is fixed before the first file is read. Otherwise, a push to the Hub in the
        # meantime could combine the configuration of one version with the weights of another.
        options = convert_sources(options, pin_revision, pinned)
        initial = resolve_initial_model(options.model)
    load_images = partial(recipe.load_images, options, initial)
    # Before the model is built, which needs to know the labels.
    images = load_on_main(options.dataset, load_images)

    with accelerator.main_process_first():
        size_line = None
        # The size is chosen before the weights are read, because they are resampled to it as they
        # load.
        keeps_size = isinstance(options, PretrainOptions) or options.image_size is not None
        if not keeps_size and initial.folder is not None:
            config_values = options.get_config_values()
            size, size_line = choose_image_size(initial.folder.path, config_values)
            options = replace(options, image_size=size)
        # Some defaults depend on the number of images and on the image size, hence after both.
        options, defaults_line = resolve_defaults(options, initial, len(images.train))
        setup = recipe.build_setup(options, initial, images, launch.reporter)
        # Counted on the part that is saved, not on the decoder or projector of pre-training.
        forward_flops = (setup.encoder or setup.model).flops()
    # The default depends on the width of the model, so the accelerator gets it only now.
    precision_text = set_mixed_precision(
        accelerator, options.mixed_precision, setup.model.config, recorded_precision
    )
    return RunInputs(
        options=options,
        initial=initial,
        images=images,
        setup=setup,
        forward_flops=forward_flops,
        lines={
            "weights": describe_random_weights(initial),
            "image size": size_line,
            "defaults": defaults_line,
            **setup.summary_lines,
            "device": f"{describe_device()}, mixed precision: {precision_text}",
        },
    )

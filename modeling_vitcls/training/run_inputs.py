"""What a run reads: labels and keys of all images, and the model with its initial weights."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
from accelerate import PartialState

from ..conversion.open_model import is_preset
from ..data.sources import Splits, load_on_main
from ..data.splits_table import find_trained_images, list_encoder_rows
from ..hub.loading import pin_revision
from ..hub.model_files import SPLITS_FILE
from ..hub.model_folder import ModelFolder
from ..inference.speed import count_flops
from ..runtime.distributed import set_mixed_precision
from ..runtime.system import describe_device
from .defaults import resolve_defaults
from .frozen_encoder import FrozenEncoder
from .model import InitialModel, has_labels, resolve_initial_model
from .options import FinetuneOptions
from .reporter import Reporter
from .resume import convert_sources, take_derived_values
from .run_folder import SOURCE_FLAGS, EarlierRun
from .training_setup import Recipe, TrainingSetup


@dataclass(frozen=True)
class RunInputs:
    """What a run reads before plan.py decides what it does."""

    recipe: Recipe
    options: FinetuneOptions  # With the defaults that do not depend on the kind of run
    initial: InitialModel
    images: Splits
    setup: TrainingSetup
    frozen_encoder: FrozenEncoder | None
    missing_start_reason: str  # Why there is no frozen encoder, so the run has steps
    # Rows of splits.parquet: images that trained the encoder, or the teacher, before this run
    encoder_rows: pd.DataFrame
    # Images to which the initial classifier was fitted; None if it has other labels, or there is none
    fitted_rows: pd.DataFrame | None
    forward_flops: int
    lines: dict[str, str | None]  # About the defaults and the device

    @property
    def num_fitted(self) -> int:
        """The number of training images to which the initial classifier was fitted."""
        rows = self.fitted_rows
        return 0 if rows is None else int(find_trained_images(self.images.train, rows).sum())


def load(
    recipe: Recipe, options: FinetuneOptions, earlier: EarlierRun | None, reporter: Reporter
) -> RunInputs:
    """Read the labels of the images, and load the models. No image is decoded.

    Args:
        recipe: what is trained.
        options: as the person set them.
        earlier: run that is resumed.
        reporter: output of the run, with its accelerator.

    Raises:
        ValueError, OSError: if data or models cannot be read or do not match the options, or the
            earlier run had other flags.
    """
    recorded_precision = None
    if earlier is not None:
        # Derived values come from the record: this machine might derive others.
        options = take_derived_values(options, earlier)
        recorded_precision = earlier.metadata["mixed_precision"]
    state = PartialState()
    with (
        state.main_process_first()
    ):  # The main process downloads files, and the others find them in the cache
        # The commit is fixed before the first file is read. Otherwise, a push to the Hub in the
        # meantime could combine the configuration of one version with the weights of another.
        options = convert_sources(
            options, lambda name: name if is_preset(name) else pin_revision(name), SOURCE_FLAGS
        )
        initial = resolve_initial_model(options.model)
    load_images = partial(recipe.load_images, options, initial)
    # Before the model is built, which needs to know the labels.
    images = load_on_main(options.dataset, load_images)

    with state.main_process_first():
        # Some defaults depend on the number of images and on the image size, hence after both.
        options, lines = resolve_defaults(options, initial, len(images.train))
        setup = recipe.build_setup(options, initial, images, reporter)
        frozen_encoder, reason = recipe.build_frozen_encoder(options, initial, images, setup)
        encoder_rows = [
            # Without a fitted start, the classifier stays the checkpoint's.
            list_encoder_rows(initial.folder, frozen_encoder is None and setup.has_trained_heads),
            list_teacher_rows(options.teacher),
        ]
        forward_flops = count_flops(setup.model)
    # The default depends on the width of the model, so the accelerator gets it only now.
    precision_text = set_mixed_precision(
        reporter.accelerator, options.mixed_precision, setup.model.config, recorded_precision
    )
    lines |= setup.summary_lines
    lines["device"] = f"{describe_device()}, mixed precision: {precision_text}"
    return RunInputs(
        recipe=recipe,
        options=options,
        initial=initial,
        images=images,
        setup=setup,
        frozen_encoder=frozen_encoder,
        missing_start_reason=reason,
        encoder_rows=pd.concat(encoder_rows),
        fitted_rows=list_fitted_rows(initial, images),
        forward_flops=forward_flops,
        lines=lines,
    )


def list_fitted_rows(initial: InitialModel, images: Splits) -> pd.DataFrame | None:
    """List the images to which the initial classifier was fitted, if it has the same labels."""
    if initial.has_random_weights or not has_labels(initial.config, images.label_space):
        return None
    return list_encoder_rows(initial.folder, keeps_classifier=True)


def list_teacher_rows(teacher: str | None) -> pd.DataFrame:
    """List the images that trained the teacher in a run: the student learns their labels from it."""
    folder = None
    if teacher is not None and (Path(teacher) / SPLITS_FILE).is_file():
        folder = ModelFolder(Path(teacher))
    return list_encoder_rows(folder, keeps_classifier=True)

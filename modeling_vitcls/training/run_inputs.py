"""What a run reads: labels and keys of all images, and the models with their initial weights."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState

from ..conversion.open_model import is_preset
from ..data.dataset import Dataset
from ..data.sources import load_on_main
from ..data.splits import load_undivided_images
from ..data.splits_table import find_trained_images, list_encoder_rows
from ..frozen.head_search import HeadSearch
from ..hub.loading import pin_revision
from ..hub.model_files import SPLITS_FILE
from ..hub.model_folder import ModelFolder
from ..inference.features import FrozenEncoder, has_searchable_pooling
from ..inference.metrics import SELECTION_METRICS
from ..inference.speed import count_flops
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..runtime.distributed import set_mixed_precision
from ..runtime.system import describe_device
from .defaults import resolve_defaults
from .model import (
    InitialModel,
    build_model,
    has_labels,
    resolve_initial_model,
    set_trainable_parameters,
)
from .options import FinetuneOptions
from .reporter import Reporter
from .resume import convert_sources, take_derived_values
from .run_folder import MODEL_FLAGS
from .teacher import Teacher, load_teacher


@dataclass(frozen=True)
class RunInputs:
    """What a run reads before plan.py decides what it does."""

    options: FinetuneOptions  # With the defaults that do not depend on the kind of run
    initial: InitialModel
    images: Dataset
    model: Any  # ViTCLS model without wrappers; parameters that do not train are frozen
    processor: ViTCLSImageProcessor
    teacher: Teacher | None
    pass_arguments: dict[str, Any]  # Arguments of each `ImagePass` of this run, without the images
    has_trained_heads: bool  # Whether the checkpoint contains every head
    head_search: HeadSearch | None
    missing_start_reason: str  # Why there is none, so the run has steps
    # Rows of splits.parquet: images that trained the encoder, or the teacher, before this run
    encoder_rows: pd.DataFrame
    # Images to which the initial classifier was fitted; None if it has other labels, or there is none
    fitted_rows: pd.DataFrame | None
    forward_flops: int
    lines: dict[str, str | None]  # About the defaults and the device

    @property
    def selection_metric(self) -> str:
        """The metric that is printed. Higher values are better."""
        return SELECTION_METRICS[self.images.label_space.kind]

    @property
    def num_fitted(self) -> int:
        """The number of training images to which the initial classifier was fitted."""
        rows = self.fitted_rows
        return 0 if rows is None else int(find_trained_images(self.images.train, rows).sum())


def load(
    options: FinetuneOptions, recorded: dict[str, Any] | None, reporter: Reporter
) -> RunInputs:
    """Read the labels of the images, and load the models. No image is decoded.

    Args:
        options: as the person set them.
        recorded: record of the run that is resumed.
        reporter: output of the run, with its accelerator.

    Raises:
        ValueError, OSError: if data or models cannot be read or do not match the options, or the
            earlier run had other flags.
    """
    if recorded is not None:
        # Derived values come from the record: this machine might derive others.
        options = take_derived_values(options, recorded)
    accelerator = reporter.accelerator
    state = PartialState()

    # The main process downloads files, and the others find them in the cache.
    with state.main_process_first():
        # The commit is fixed before the first file is read. Otherwise, a push to the Hub in the
        # meantime could combine the configuration of one version with the weights of another.
        options = convert_sources(
            options, lambda name: name if is_preset(name) else pin_revision(name), MODEL_FLAGS
        )
        initial = resolve_initial_model(options.model)
    # Before the model is built, which needs to know the labels.
    images = load_on_main(options.dataset, partial(load_images, options))
    labels = images.label_space

    with state.main_process_first():
        # Some defaults depend on the number of images and on the image size, hence after both.
        options, lines = resolve_defaults(options, initial, len(images.train))
        model, processor, new_parameter_names = build_model(
            initial, labels, options.get_config_values(), options.resize, options.bit_depth
        )
        teacher = None
        if options.teacher is not None:
            teacher = load_teacher(options.teacher, labels, model.config, accelerator.device)
            lines["teacher"] = teacher.description
        set_trainable_parameters(model, options.trainable, new_parameter_names)
        forward_flops = count_flops(model)

    pass_arguments = {
        "processor": processor,
        "label_space": labels,
        "batch_size": options.batch_size,
        "accelerator": accelerator,
        "num_workers": options.num_workers,
        "num_channels": model.config.num_channels,
        "warn": reporter.warn,
    }

    # What fits classifiers to frozen features, or the first reason why nothing can.
    has_distillation_head = getattr(model, "distillation_classifier", None) is not None
    reasons = {
        "the initial weights are random": initial.has_random_weights,
        "`probe=False` is set": not options.probe,
        "the distillation head has no features": has_distillation_head
        and not has_searchable_pooling(model.config),
        "the head is an MLP": model.config.head_type != "linear",
        "the pooler has random weights": any(
            name.startswith("vitcls.pooler.") for name in new_parameter_names
        ),
    }
    missing_start_reason = next((reason for reason, applies in reasons.items() if applies), "")
    head_search = None
    if not missing_start_reason:
        head_search = HeadSearch(
            encoder=FrozenEncoder(model, **pass_arguments),
            processor=processor,
            label_space=labels,
            resize=options.resize,
            pooling=options.pooling,
            pooled_layers=options.pooled_layers,
            class_weight="balanced" if options.class_balance == "weights" else None,
            inference=options.get_config_values().get("distillation_inference"),
        )

    # What trained the weights before this run.
    has_trained_heads = all(name.startswith("vitcls.") for name in new_parameter_names)
    teacher_folder = None
    if options.teacher is not None and (Path(options.teacher) / SPLITS_FILE).is_file():
        teacher_folder = ModelFolder(Path(options.teacher))
    encoder_rows = [
        # Without a fitted start, the classifier stays the checkpoint's.
        list_encoder_rows(initial.folder, head_search is None and has_trained_heads),
        # The student learns their labels from the teacher.
        list_encoder_rows(teacher_folder, keeps_classifier=True),
    ]
    # The images to which the initial classifier was fitted, if it has the same labels
    fitted_rows = None
    if not initial.has_random_weights and has_labels(initial.config, labels):
        fitted_rows = list_encoder_rows(initial.folder, keeps_classifier=True)

    # The default depends on the width of the model, so the accelerator gets it only now.
    precision_text = set_mixed_precision(
        accelerator,
        options.mixed_precision,
        model.config,
        recorded["mixed_precision"] if recorded else None,
    )
    lines["device"] = f"{describe_device()}, mixed precision: {precision_text}"
    return RunInputs(
        options=options,
        initial=initial,
        images=images,
        model=model,
        processor=processor,
        teacher=teacher,
        pass_arguments=pass_arguments,
        has_trained_heads=has_trained_heads,
        head_search=head_search,
        missing_start_reason=missing_start_reason,
        encoder_rows=pd.concat(encoder_rows),
        fitted_rows=fitted_rows,
        forward_flops=forward_flops,
        lines=lines,
    )


def load_images(options: FinetuneOptions) -> Dataset:
    """Read the labels and keys of the images.

    Raises:
        ValueError: as `load_undivided_images` does, and for a flag that requires one label per image
            if the images have others.
    """
    # The validation split selects, calibrates or trains the model, and the test split measures it.
    images = load_undivided_images(options, reads_all=True)
    kind = images.label_space.kind
    flags = {
        "mixup": options.mixup,
        "class_balance": options.class_balance != "none",
        "teacher": options.teacher,
        "augment cutmix": (options.augment or {}).get("cutmix"),
    }
    for flag, value in flags.items():
        if value and kind != "single_label_classification":
            raise ValueError(
                f"`{flag}` requires one label per image, but the labels are {kind}. Remove `{flag}`"
            )
    return images

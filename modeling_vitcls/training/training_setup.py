"""What a run trains: the interface of run.py to finetune.py and pretrain.py.

Each of the two files has a `Recipe`, which builds a `TrainingSetup`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..data.aspect_ratio import get_output_size
from ..data.augmentation import build_augmentation
from ..data.batches import BatchBuilder, TrainingImages
from ..data.images import LabeledImages
from ..data.splits import TrainingData
from ..data.streaming import StreamedImages, TrainingStream
from ..inference.frozen_features import FrozenPass
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from .losses import Objective
from .model import InitialModel
from .options import TrainOptions
from .probe import Probe
from .reporter import Reporter


class Recipe(Protocol):
    """A kind of training: what its flags mean, and what it reads and trains."""

    def check_options(self, options: Any) -> Any:
        """Return the options with defaults, before data and models are loaded.

        Raise ValueError if flags contradict each other.
        """

    def load_data(self, options: Any, initial: InitialModel) -> TrainingData:
        """Load the training images and the held-out images."""

    def build_setup(
        self, options: Any, initial: InitialModel, data: TrainingData, reporter: Reporter
    ) -> "TrainingSetup":
        """Load the model, and build loss and evaluation."""

    def describe_data(
        self, options: Any, initial: InitialModel, data: TrainingData, has_steps: bool
    ) -> list[str]:
        """Return warnings about the data, for a run with or without training steps."""


@dataclass
class TrainingSetup:
    """Model, loss and evaluation of a run, and its texts."""

    model: Any  # unwrapped ViTCLS model; parameters that are not trained are frozen
    processor: ViTCLSImageProcessor
    objective: Objective
    # Returns a function from a model to metrics; an `Evaluator` if the model can be calibrated.
    build_evaluator: Callable[[LabeledImages], Callable[[Any], dict[str, Any]]]
    # Name of the metric that selects the best checkpoint. Higher values are better.
    selection_metric: str
    printed_metrics: tuple[str, ...]  # metrics of evaluations that are printed during training
    result_metrics: tuple[str, ...]  # metrics of the printed result
    labels_text: str
    # whether the model has a temperature: a classifier with one label per image
    can_calibrate: bool = False
    # lines to print before training, keyed by name
    summary_lines: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)  # fields of results.json
    # images, layout -> pass with the features of class statistics; None for other models
    build_pass: Callable[..., FrozenPass] | None = None
    probe: Probe | None = None  # sets the classifier from the features of the frozen encoder
    encoder: Any = None  # part of the model that is saved; None to save the model
    measure_features: Callable[[Any], dict[str, Any]] | None = None  # before and after pre-training


def build_evaluator_arguments(
    options: TrainOptions,
    data: TrainingData,
    processor: Any,
    num_channels: int,
    reporter: Reporter,
) -> dict[str, Any]:
    """Return the keyword arguments of the evaluators of a run, except for the images."""
    return {
        "processor": processor,
        "label_space": data.label_space,
        "batch_size": options.batch_size,
        "accelerator": reporter.accelerator,
        "num_workers": options.num_workers,
        "max_unreadable_images": options.max_unreadable_images,
        "num_channels": num_channels,
        "warn": reporter.warn,
    }


def build_training_images(
    options: TrainOptions, data: TrainingData, processor: Any, num_channels: int
) -> Any:
    """Build the augmented training images (`TrainingImages` or `TrainingStream`)."""
    augmentation = build_augmentation(options, processor)
    to_rgb = bool(processor.do_convert_rgb)
    builder = BatchBuilder(
        augmentation,
        data.label_space,
        to_rgb,
        seed=options.seed,
        bit_depth=processor.bit_depth,
        num_channels=num_channels,
        image_bytes=num_channels * math.prod(get_output_size(processor)),
    )
    if isinstance(data.train, StreamedImages):
        return TrainingStream(data.train, builder)
    return TrainingImages(data.train, builder)

"""What a run trains: the interface of run.py to finetune.py and pretrain.py.

Each of the two files has three functions: `check_options(options)`, `load_data(options, initial)`
and `build_training_setup(options, initial, data, reporter)`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..data.aspect_ratio import get_output_size
from ..data.augmentation import build_augmentation
from ..data.batches import BatchBuilder, TrainingImages
from ..data.images import LabeledImages
from ..data.splits import TrainingData
from ..data.streaming import StreamedImages, TrainingStream
from ..inference.frozen_features import FrozenPass
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from .losses import Objective
from .probe import Probe
from .reporter import Reporter


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
    # data -> warnings to print before training
    describe_data: Callable[[TrainingData], list[str]] = lambda data: []
    # data, whether the run has training steps -> warnings about classes of different sizes
    describe_imbalance: Callable[[TrainingData, bool], list[str]] = lambda data, has_steps: []
    results: dict[str, Any] = field(default_factory=dict)  # fields of results.json
    # images, layout -> pass with the features of class statistics; None for other models
    build_pass: Callable[..., FrozenPass] | None = None
    probe: Probe | None = None  # sets the classifier from the features of the frozen encoder
    encoder: Any = None  # part of the model that is saved; None to save the model
    measure_features: Callable[[Any], dict[str, Any]] | None = None  # before and after pre-training


def build_evaluator_arguments(
    options: Any, data: TrainingData, processor: Any, num_channels: int, reporter: Reporter
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
    options: Any, data: TrainingData, processor: Any, num_channels: int
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

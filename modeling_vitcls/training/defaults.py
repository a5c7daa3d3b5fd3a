"""Flags whose default values depend on the run. A value set by the user overrides the default.

flag               random weights             pre-trained weights        --trainable lora   --trainable head
learning_rate      1e-3 at width 96           5e-5 at width 768          5e-4               1e-3
layer_decay        1                          0.75                       1                  1
initializer_range  0.8 / sqrt(width)          checkpoint's value         checkpoint's value checkpoint's value
epochs             30                         30, or 10 (large dataset)  30                 30

flag               at most 64 pixels per side larger images
crop_scale         1                          0.35
shift              0.04                       0

flag               fewer than 10,000 images   large dataset: at least 10,000 images, or a stream
batch_size         32                         64

Learning rates for random and pre-trained weights are proportional to 1 / width (muP, arXiv 2203.03466) within fixed
limits. Narrow models learn slowly with the common initializer range of 0.02. The default range is therefore the larger
of 0.02 and 0.8 / sqrt(width), which lies between the Xavier standard deviations for the attention (1 / sqrt(width))
and the MLP (0.63 / sqrt(width)). Layer decay follows BEiT (arXiv 2106.08254). Pre-training uses a learning rate
of 5e-4 and no layer decay.

The default values are printed with their reasons and written to config.resolved.yaml.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from ..configuration_vitcls import ViTCLSConfig, to_pair
from ..conversion.any_checkpoint import has_random_weights, resolve_checkpoint
from ..hub.loading import MODEL_FILE_PATTERNS, check_is_vitcls
from ..hub.model_files import PARITY_REPORT_FILE
from ..inference.load_model import is_preset
from ..options import FinetuneOptions, PretrainOptions


Options = TypeVar("Options", FinetuneOptions, PretrainOptions)
TrainingMethod = Literal[
    "random weights", "pre-trained weights", "LoRA", "new head on frozen weights", "self-supervised"
]

# Checkpoint suggested if the initial weights are random.
EXAMPLE_CHECKPOINT = "timm:vit_small_patch14_reg4_dinov2.lvd142m"
MAX_SMALL_IMAGE_SIZE = 64  # maximum length of the longer side of a small image, in pixels
MIN_LARGE_DATASET_SIZE = 10_000  # minimum number of training images in a large dataset


@dataclass(frozen=True)
class RunProperties:
    """Properties of a run that determine the default values of flags."""

    method: TrainingMethod
    has_random_weights: bool  # whether the initial weights are random
    width: int  # hidden size of the model
    image_size: int  # length of the longer side of the model's input images, in pixels
    num_training_images: int | None  # number of training images; None for a stream
    is_random_conversion: bool = False  # whether the model was converted with --random-init

    @property
    def is_large_dataset(self) -> bool:
        """Return whether the dataset is large; a stream counts as large."""
        return self.num_training_images is None or self.num_training_images >= MIN_LARGE_DATASET_SIZE

    @property
    def has_small_images(self) -> bool:
        """Return whether the images are so small that random crops would leave too few pixels."""
        return self.image_size <= MAX_SMALL_IMAGE_SIZE

    @property
    def dataset_size_text(self) -> str:
        """Return the number of training images as text, or "a stream"."""
        return "a stream" if self.num_training_images is None else f"{self.num_training_images:,} images"


@dataclass(frozen=True)
class FlagDefault:
    """Default value of one flag, and the reason for this value."""

    group: str  # options field that contains the flag, for example "training"
    name: str  # name of the flag
    compute_value: Callable[[RunProperties], float]
    reason: str  # format string; the argument is a `RunProperties` object


def choose_learning_rate(run_properties: RunProperties) -> float:
    """Return the default learning rate, rounded to two significant digits."""
    match run_properties.method:
        case "random weights":
            learning_rate = min(1e-3 * 96 / run_properties.width, 1e-3)
        case "pre-trained weights":
            learning_rate = min(max(5e-5 * 768 / run_properties.width, 5e-5), 4e-4)
        case "new head on frozen weights":
            learning_rate = 1e-3
        case _:
            learning_rate = 5e-4
    return float(f"{learning_rate:.1e}")


WIDTH_REASON = "{0.method}, width {0.width}"
DATASET_REASON = "{0.method}, {0.dataset_size_text}"
IMAGES_REASON = "image size {0.image_size}"

DEFAULTS: tuple[FlagDefault, ...] = (
    FlagDefault("training", "learning_rate", choose_learning_rate, WIDTH_REASON),
    FlagDefault(
        "model", "initializer_range", lambda run: max(round(0.8 / math.sqrt(run.width), 3), 0.02), WIDTH_REASON
    ),
    FlagDefault(
        "training", "layer_decay", lambda run: 0.75 if run.method == "pre-trained weights" else 1.0, "{0.method}"
    ),
    FlagDefault(
        "training",
        "epochs",
        lambda run: 10.0 if run.method == "pre-trained weights" and run.is_large_dataset else 30.0,
        DATASET_REASON,
    ),
    FlagDefault("training", "batch_size", lambda run: 64 if run.is_large_dataset else 32, DATASET_REASON),
    FlagDefault("augmentation", "crop_scale", lambda run: 1.0 if run.has_small_images else 0.35, IMAGES_REASON),
    FlagDefault("augmentation", "shift", lambda run: 0.04 if run.has_small_images else 0.0, IMAGES_REASON),
)


def get_run_properties(options: FinetuneOptions | PretrainOptions, num_training_images: int | None) -> RunProperties:
    """Return the properties of a run. Only the configuration of a checkpoint is read, not the weights. Raise
    ValueError if the checkpoint is not a vitcls model, and OSError if the checkpoint cannot be found or read."""
    name, config_values = options.model.model, options.model.get_config_values()
    is_random_conversion = False
    if is_preset(name):
        config = ViTCLSConfig.from_preset(name)
    else:
        folder = resolve_checkpoint(name, [*MODEL_FILE_PATTERNS, PARITY_REPORT_FILE])
        check_is_vitcls(name, folder)
        config = ViTCLSConfig.from_pretrained(folder)
        is_random_conversion = has_random_weights(folder)
    has_random_initial_weights = is_preset(name) or is_random_conversion
    method: TrainingMethod = "random weights" if has_random_initial_weights else "pre-trained weights"
    if isinstance(options, PretrainOptions):
        method = "self-supervised"
    elif options.training.trainable == "head":
        method = "new head on frozen weights"
    elif options.training.trainable == "lora":
        method = "LoRA"
    width = config_values.get("hidden_size", config.hidden_size)
    image_size = max(to_pair(config_values.get("image_size", config.image_size)))
    return RunProperties(
        method, has_random_initial_weights, width, image_size, num_training_images, is_random_conversion
    )


def resolve_defaults(options: Options, run_properties: RunProperties) -> tuple[Options, str]:
    """Return the options with a value for every flag in `DEFAULTS`, and a line of text with the default values that
    affect the run, grouped by reason. For checkpoints, `initializer_range` remains None."""
    values_by_reason: dict[str, list[str]] = {}
    for default in DEFAULTS:
        group: Any = getattr(options, default.group)
        is_checkpoint = run_properties.is_random_conversion or not run_properties.has_random_weights
        uses_checkpoint_value = default.name == "initializer_range" and is_checkpoint
        if getattr(group, default.name) is not None or uses_checkpoint_value:
            continue
        value = default.compute_value(run_properties)
        options = replace(options, **{default.group: replace(group, **{default.name: value})})
        if default.name != "epochs" or options.training.max_steps is None:
            values = values_by_reason.setdefault(default.reason.format(run_properties), [])
            values.append(f"{default.name.replace('_', ' ')} {value:g}")
    return options, "; ".join(f"{reason}: {', '.join(values)}" for reason, values in values_by_reason.items())


def describe_random_weights(name: str, run_properties: RunProperties) -> str | None:
    """Return the summary line about random initial weights, or None if the initial weights are pre-trained."""
    remedy = f"For better results on a small dataset, set --model to a checkpoint, for example {EXAMPLE_CHECKPOINT}"
    reason = "was converted with --random-init" if run_properties.is_random_conversion else "is a preset"
    return f"random, because {name} {reason}. {remedy}" if run_properties.has_random_weights else None

"""Default values of flags that depend on the run. Every flag that is set overrides its default.

flag               random weights             pre-trained weights        --trainable lora   --trainable head
learning_rate      1e-3 at width 96           5e-5 at width 768          5e-4               1e-3
layer_decay        1                          0.75                       1                  1
initializer_range  0.8 / sqrt(width)          of the checkpoint          of the checkpoint  of the checkpoint
epochs             30                         30, or 10 from 10,000 images on

flag               images up to 64 pixels     larger images
crop_scale         1                          0.35
shift              0.04                       0

flag               fewer than 10,000 images   more, or a stream
batch_size         32                         64

Learning rates for all weights are proportional to 1 / width (muP, arXiv 2203.03466), within limits. The initial
standard deviation is between Xavier's values for the attention (1 / sqrt(width)) and the MLP (0.63 / sqrt(width));
narrow models learn slowly with the common value 0.02. Layer decay: BEiT, arXiv 2106.08254. Pre-training by masked
images uses the learning rate 5e-4 and no layer decay.

The resolved values are printed with the reason and written to config.resolved.yaml.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from ..configuration_vitcls import ViTCLSConfig, to_pair
from ..conversion.any_checkpoint import resolve_checkpoint
from ..hub.loading import check_is_vitcls
from ..inference.load_model import is_preset
from ..options import FinetuneOptions, PretrainOptions


Options = TypeVar("Options", FinetuneOptions, PretrainOptions)
Weights = Literal["random weights", "pre-trained weights", "LoRA", "new head on frozen weights", "masked images"]

EXAMPLE = "timm:vit_small_patch14_reg4_dinov2.lvd142m"  # checkpoint that is suggested instead of random weights
SMALL_IMAGE = 64  # longest side of a small image in pixels
LARGE_DATASET = 10_000  # number of training images
MIN_RANGE = 0.02  # minimum standard deviation of initial weights


@dataclass(frozen=True)
class RunFacts:
    """Facts about a run on which the defaults depend."""

    weights: Weights  # source of the initial weights, and the trained weights
    is_preset: bool  # whether the initial weights are random
    width: int  # hidden size of the model
    image_size: int  # longest side of the model's images in pixels
    num_training_images: int | None  # None for a stream

    @property
    def is_large_dataset(self) -> bool:
        """Whether the dataset is large; a stream counts as large."""
        return self.num_training_images is None or self.num_training_images >= LARGE_DATASET

    @property
    def has_small_images(self) -> bool:
        """Whether random crops would leave too few pixels."""
        return self.image_size <= SMALL_IMAGE

    @property
    def dataset_size(self) -> str:
        """The number of training images as text."""
        return "a stream" if self.num_training_images is None else f"{self.num_training_images:,} images"


@dataclass(frozen=True)
class Default:
    """The default of one flag, and the reason for it as a format of `RunFacts`."""

    group: str  # field of the options
    name: str
    value: Callable[[RunFacts], float]
    reason: str


def choose_learning_rate(facts: RunFacts) -> float:
    """Return the learning rate, rounded to two digits."""
    match facts.weights:
        case "random weights":
            rate = min(1e-3 * 96 / facts.width, 1e-3)
        case "pre-trained weights":
            rate = min(max(5e-5 * 768 / facts.width, 5e-5), 4e-4)
        case "new head on frozen weights":
            rate = 1e-3
        case _:
            rate = 5e-4
    return float(f"{rate:.1e}")


def choose_epochs(facts: RunFacts) -> float:
    """Return the number of epochs."""
    return 10.0 if facts.weights == "pre-trained weights" and facts.is_large_dataset else 30.0


# Reasons.
WEIGHTS = "{0.weights}"
WIDTH = "{0.weights}, width {0.width}"
DATASET = "{0.weights}, {0.dataset_size}"
IMAGES = "images of {0.image_size} pixels"

DEFAULTS: tuple[Default, ...] = (
    Default("training", "learning_rate", choose_learning_rate, WIDTH),
    Default("model", "initializer_range", lambda run: max(round(0.8 / math.sqrt(run.width), 3), MIN_RANGE), WIDTH),
    Default("training", "layer_decay", lambda run: 0.75 if run.weights == "pre-trained weights" else 1.0, WEIGHTS),
    Default("training", "epochs", choose_epochs, DATASET),
    Default("training", "batch_size", lambda run: 64 if run.is_large_dataset else 32, DATASET),
    Default("augmentation", "crop_scale", lambda run: 1.0 if run.has_small_images else 0.35, IMAGES),
    Default("augmentation", "shift", lambda run: 0.04 if run.has_small_images else 0.0, IMAGES),
)


def get_facts(options: FinetuneOptions | PretrainOptions, num_training_images: int | None) -> RunFacts:
    """Return the facts on which the defaults depend. Only the configuration of the model is read. Raise ValueError if
    the checkpoint is another kind of model, and OSError if it cannot be found or read."""
    name, values = options.model.model, options.model.get_config_values()
    from_scratch = is_preset(name)
    if from_scratch:
        config = ViTCLSConfig.from_preset(name)
    else:
        folder = resolve_checkpoint(name)
        check_is_vitcls(name, folder)
        config = ViTCLSConfig.from_pretrained(folder)
    weights: Weights = "random weights" if from_scratch else "pre-trained weights"
    if isinstance(options, PretrainOptions):
        weights = "masked images"
    elif options.training.trainable == "head":
        weights = "new head on frozen weights"
    elif options.training.trainable == "lora":
        weights = "LoRA"
    width = values.get("hidden_size", config.hidden_size)
    image_size = max(to_pair(values.get("image_size", config.image_size)))
    return RunFacts(weights, from_scratch, width, image_size, num_training_images)


def resolve_defaults(options: Options, facts: RunFacts) -> tuple[Options, dict[str, list[str]]]:
    """Return the options with a value for every flag that has a default here, and {reason: ["learning rate 5e-05",
    ...]} for the flags that were not set and that the run uses."""
    reasons: dict[str, list[str]] = {}
    for default in DEFAULTS:
        group: Any = getattr(options, default.group)
        keeps_own_value = default.name == "initializer_range" and not facts.is_preset
        if getattr(group, default.name) is not None or keeps_own_value:
            continue
        value = default.value(facts)
        options = replace(options, **{default.group: replace(group, **{default.name: value})})
        if default.name != "epochs" or options.training.max_steps is None:
            reasons.setdefault(default.reason.format(facts), []).append(f"{default.name.replace('_', ' ')} {value:g}")
    return options, reasons


def format_defaults(reasons: dict[str, list[str]]) -> str:
    """Format the values by reason in one line."""
    return "; ".join(f"{reason}: {', '.join(values)}" for reason, values in reasons.items())


def describe_random_weights(name: str, facts: RunFacts) -> str | None:
    """Return the line about random initial weights; None for trained weights."""
    remedy = f"For better results on few images, start from trained weights, for example --model {EXAMPLE}"
    return f"random, because {name} is a preset. {remedy}" if facts.is_preset else None

"""Flags whose default values depend on the run. A value set by the user overrides the default.

flag               random weights             pre-trained weights        lora, tokens       --trainable head
learning_rate      `LEARNING_RATES`, for each kind of initial weights
layer_decay        1                          0.75                       1                  1
initializer_range  0.8 / sqrt(width)*         checkpoint's value         checkpoint's value checkpoint's value
epochs             30                         30, or 10 (large dataset)  5                  30
                   5 from the frozen model's classifier (the study in model_cards/studies/finetuning.md).

flag               at most 64 pixels per side larger images
crop_scale         1                          0.35
shift              0.04                       0

flag               fewer than 10,000 images   large dataset: at least 10,000 images
batch_size         32                         64

* at least 0.02

The values that a run reads are written to config.resolved.yaml. A value that no study has compared with
others is called a guess where it is assigned.
"""

import math
from dataclasses import replace
from typing import Any, Literal

from ..model.configuration_vitcls import ViTCLSConfig
from ..model.field_checks_vitcls import Size, to_pair
from .model import InitialModel
from .options import FinetuneOptions


TrainingMethod = Literal[
    "random weights",
    "pre-trained weights",
    "from the frozen model's classifier",
    "LoRA",
    "special tokens",
    "new head on frozen weights",
]

# `trainable` -> the method that determines the defaults; others are those of the initial weights
METHODS: dict[str, TrainingMethod] = {
    "head": "new head on frozen weights",
    "lora": "LoRA",
    "tokens": "special tokens",
}

# A rate, the width at which it holds, the power of 1 / width that it is proportional to, and its
# limits. The more of the weights is known at the start, the lower is the rate. A rate for all
# weights follows the width (muP, arXiv 2203.03466); for new weights on frozen ones, it does not
# depend on the width.
LEARNING_RATES: dict[TrainingMethod, tuple[float, int, int, float, float]] = {
    "random weights": (1e-3, 96, 1, 0.0, 1e-3),
    "pre-trained weights": (5e-5, 768, 1, 5e-5, 4e-4),
    # The features must stay near those that the classifier was fitted to. With the rate for a new
    # classifier, the loss of a ViT-S on 130 photographs rose from 0.7 to 1.2 and came back after 30
    # steps; with this rate, it fell.
    "from the frozen model's classifier": (3e-5, 384, 2, 1e-5, 4e-4),
    # The matrices start from zero, also after a frozen start (model_cards/studies/tokens.md).
    "LoRA": (5e-4, 1, 0, 0.0, 1.0),
    # The rate of LoRA, because here, too, the encoder keeps its weights
    "special tokens": (5e-4, 1, 0, 0.0, 1.0),
    "new head on frozen weights": (1e-3, 1, 0, 0.0, 1.0),
}

# Checkpoint suggested if the initial weights are random.
EXAMPLE_CHECKPOINT = "timm:vit_small_patch14_reg4_dinov2.lvd142m"
# Image sides in pixels: largest side that is kept, and its replacement.
MAX_NATIVE_SIDE = 256
FINETUNING_SIDE = 224
MAX_SMALL_IMAGE_SIZE = 64  # Maximum length of the longer side of a small image, in pixels
MIN_LARGE_DATASET_SIZE = 10_000  # Minimum number of training images in a large dataset
FINE_TUNING_EPOCHS = 5.0  # Enough if the classifier already fits the encoder, and for LoRA


def resolve_defaults(
    options: FinetuneOptions, initial: InitialModel, num_training_images: int
) -> tuple[FinetuneOptions, dict[str, str | None]]:
    """Fill in the flags that every run reads, if they are not set; also return lines about weights and size.

    Steps read others, too (`resolve_schedule`).
    """
    # 1. The image size, before the weights are read: they are resampled to it as they load
    size_line = weights_line = None
    if options.image_size is None:
        height_width, size_line = choose_image_size(initial, options.get_config_values())
        options = replace(options, image_size=height_width)
    config_values = options.get_config_values()

    # 2. The batches. Large ones leave a small dataset few steps. Both sizes are guesses.
    if options.batch_size is None:
        is_large = num_training_images >= MIN_LARGE_DATASET_SIZE
        options = replace(options, batch_size=64 if is_large else 32)

    # 3. The start of the weights
    if initial.has_random_weights:
        # Between the Xavier standard deviations for the attention (1 / sqrt(width)) and the MLP
        # (0.63 / sqrt(width)); the factor is a guess. Narrow models learn slowly with 0.02.
        width = config_values.get("hidden_size", initial.config.hidden_size)
        initializer_range = max(round(0.8 / math.sqrt(width), 3), 0.02)
        model_config = {"initializer_range": initializer_range} | (options.model_config or {})
        options = replace(options, model_config=model_config)
        weights_line = (
            f"random, because {initial.name} is a preset. For better results on a small dataset, "
            f"set `model` to a checkpoint, for example {EXAMPLE_CHECKPOINT}"
        )
    return options, {"weights": weights_line, "image size": size_line}


def choose_image_size(
    initial: InitialModel, config_values: dict[str, Any]
) -> tuple[int | Size | None, str | None]:
    """Choose 224 pixels instead of a large native side of a checkpoint, which costs too much.

    Also return a line about it. Both are None for a small side.
    """
    native_size = initial.config.image_height_width
    if initial.folder is None or max(native_size) <= MAX_NATIVE_SIDE:
        return None, None

    config = ViTCLSConfig.from_pretrained(initial.folder.path, **config_values)
    scale = FINETUNING_SIDE / max(native_size)
    size = [
        max(round(scale * side / patch), 1) * patch
        for side, patch in zip(native_size, config.patch_height_width, strict=True)
    ]

    num_times = math.prod(native_size) / math.prod(size)
    height, width = size
    chosen_size = height if height == width else (height, width)
    return chosen_size, (
        f"{max(size)} px. The checkpoint's {max(native_size)} px (`image_size='native'`) would need "
        f"{num_times:.1f} times as many patches"
    )


def resolve_schedule(
    options: FinetuneOptions,
    initial: InitialModel,
    num_training_images: int,
    has_frozen_start: bool,
) -> tuple[FinetuneOptions, dict[str, str | None]]:
    """Fill in the flags that only steps read, if they are not set; also return lines about them.

    Args:
        options: flags of the run.
        initial: initial model.
        num_training_images: number of training images.
        has_frozen_start: whether the classifier starts from the frozen model's.
    """
    config_values = options.get_config_values()
    width = config_values.get("hidden_size", initial.config.hidden_size)
    start: TrainingMethod = (
        "random weights" if initial.has_random_weights else "pre-trained weights"
    )
    method = METHODS.get(options.trainable, start)

    # 1. The augmentation. A crop of a small image keeps few pixels. Both numbers are guesses.
    image_size = max(to_pair(config_values.get("image_size", initial.config.image_size)))
    has_small_images = image_size <= MAX_SMALL_IMAGE_SIZE
    shift = 0.04 if has_small_images else 0.0
    changes: dict[str, Any] = {"augment": {"shift": shift} | (options.augment or {})}
    if options.crop_scale is None:
        changes["crop_scale"] = 1.0 if has_small_images else 0.35

    # 2. How far each layer may leave the start of its weights (BEiT, arXiv 2106.08254)
    if options.layer_decay is None:
        changes["layer_decay"] = 0.75 if method == "pre-trained weights" else 1.0

    # 3. The length of the run
    if has_frozen_start and method == "pre-trained weights":
        method = "from the frozen model's classifier"
    is_large = num_training_images >= MIN_LARGE_DATASET_SIZE
    epochs = 10.0 if method == "pre-trained weights" and is_large else 30.0
    if method in ("LoRA", "special tokens", "from the frozen model's classifier"):
        epochs = FINE_TUNING_EPOCHS
    reason = f"{method}, {num_training_images:,} images"
    lines: dict[str, str | None] = {}
    if options.epochs is None:
        changes["epochs"] = epochs
        if options.max_steps is None:
            lines["epochs"] = f"{epochs:g}: {reason}"

    # 4. The learning rate
    if options.learning_rate is None:
        changes["learning_rate"] = rate = choose_learning_rate(method, width)
        decay = changes.get("layer_decay", options.layer_decay)
        lines["rate"] = f"{rate:g}: {method}, width {width}; layer decay {decay:g}"
    return replace(options, **changes), lines


def choose_learning_rate(method: TrainingMethod, width: int) -> float:
    """Choose the default learning rate, rounded to two significant digits."""
    rate, rate_width, power, minimum, maximum = LEARNING_RATES[method]
    rate *= (rate_width / width) ** power
    return float(f"{min(max(rate, minimum), maximum):.1e}")

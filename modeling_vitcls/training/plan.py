"""What a run is, decided before any image is divided or decoded.

    frozen    no steps: the classifier is fitted to the features of the encoder, and every label trains
    steps     some images are held out, and what is saved is measured on them

a classifier cannot be fitted to frozen features      steps   (run_inputs.py)
a flag about steps is set, or a checkpoint continues  steps
`trainable='head'`                                    frozen
fewer than max(2,000, 50 x classes) images            frozen  a fifth of the labels costs more than steps gain
otherwise                                             steps, if they take less than ten minutes
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from accelerate import Accelerator

from ..data.dataset import Dataset
from ..data.splits import check_can_divide
from ..inference.speed import measure_cpu_speed
from .defaults import FINE_TUNING_EPOCHS, resolve_schedule
from .model import find_new_tokens
from .options import FinetuneOptions
from .run_inputs import RunInputs


# Flags about steps: a run in which a person sets one of them has steps
STEP_FLAGS = ("epochs", "max_steps", "learning_rate", "teacher")
# Flags without a meaning in a frozen run. They do not lead to steps, because some turn something off
UNREAD_FLAGS = (
    "crop_scale flip auto_augment augment mixup layer_decay warmup weight_decay label_smoothing compile "
    "gradient_accumulation_steps average_with_start save_every keep_checkpoints log_with"
).split()
MIN_STEP_IMAGES = 2000
MIN_STEP_CLASS_SIZE = 50
FORWARD_PASSES_OF_STEP = 3  # A backward pass takes as long as two forward passes
MAX_STEP_MINUTES = 10  # Limit of default steps on CPUs; with a flag about steps, there is none
FEW_IMAGES_PER_CLASS = 5  # With fewer, nothing is held out
# With fewer, a run that continues a model with its own images holds out none of them. With 10 per
# class, a fifth cost 5 to 11 points (model_cards/studies/finetuning.md).
MIN_MEASURED_CLASS_SIZE = 30


@dataclass(frozen=True)
class RunPlan:
    """The decision about a run: frozen or steps, why, and with which values.

    Attributes:
        kind: frozen or with steps.
        reason: one sentence why.
        options: the flags, with a value for each that this kind of run reads.
        images: before they are divided. Without steps, a validation split trains the model, too.
        averaging: part of the start weights in the saved weights; 0 for the last weights.
        new_tokens: parameters of new tokens (`find_new_tokens`).
        lines: to print about values that the plan has chosen.
    """

    kind: Literal["frozen", "steps"]
    reason: str
    options: FinetuneOptions
    images: Dataset
    averaging: float
    new_tokens: dict[str, list[bool]]
    lines: dict[str, str | None]

    @property
    def is_drawn(self) -> bool:
        """Whether images are drawn to measure the model."""
        return bool(self.options.held_out_fraction) and len(self.images.images_by_split) == 1


def plan_run(inputs: RunInputs, accelerator: Accelerator, is_resumed: bool) -> RunPlan:
    """Decide what a run is. If nothing else decides on a CPU, the speed of the model is measured."""
    options = inputs.options
    num_images = len(inputs.images.train)
    num_labels = max(map(len, inputs.images.label_space.columns.values()))
    min_images = max(MIN_STEP_IMAGES, MIN_STEP_CLASS_SIZE * num_labels)

    changed = [
        name
        for name in (*STEP_FLAGS, *UNREAD_FLAGS)
        if getattr(options, name) != getattr(FinetuneOptions, name)
    ]
    wishes = [name for name in changed if name in STEP_FLAGS]
    images_text = f"{num_images:,} images"
    # The first reason that applies decides: first what cannot be otherwise, then what the person
    # asked for, then what is better for this many images.
    reasons: list[tuple[bool, Literal["frozen", "steps"], str]] = [
        (inputs.head_search is None, "steps", inputs.missing_start_reason),
        # A checkpoint was written by steps, whatever this machine would choose.
        (is_resumed, "steps", "a checkpoint is continued"),
        (bool(wishes), "steps", f"`{next(iter(wishes), '')}` is set"),
        (options.trainable == "head", "frozen", "`trainable='head'` keeps the encoder"),
        (options.trainable != "full", "steps", "`trainable` is set"),
        (num_images < min_images, "frozen", f"{images_text}, fewer than {min_images:,}"),
    ]
    applying = [(kind, reason) for applies, kind, reason in reasons if applies]
    if applying:
        kind, reason = applying[0]
    else:
        kind, reason = choose_by_duration(inputs.model, accelerator, num_images)

    fraction = options.held_out_fraction
    if fraction is None:
        fraction = choose_held_out_fraction(kind, num_images, num_labels, inputs.num_fitted)
    check_can_divide(inputs.images, fraction)  # Before images are decoded
    options = replace(options, held_out_fraction=fraction)
    lines: dict[str, str | None] = {}
    new_tokens = find_new_tokens(inputs.initial, inputs.model)
    # After the kind is known: the rate and the number of epochs depend on where the steps start.
    if kind == "steps":
        options, lines = resolve_schedule(
            options,
            inputs.initial,
            num_images,
            inputs.head_search is not None,
        )
    else:
        # New registers that are hidden are neither trained nor seen by other tokens
        has_registers = "vitcls.embeddings.register_tokens" in new_tokens
        if has_registers and inputs.model.config.fading_tokens:
            changed.append("num_register_tokens")
        if changed:
            lines["no steps"] = f"`{'`, `'.join(changed)}`: no effect, as only steps read them"

    # The mean with random weights would only dilute what the steps have learned.
    has_heads = inputs.head_search is not None or inputs.has_trained_heads
    has_start = has_heads and not inputs.initial.has_random_weights
    return RunPlan(
        kind=kind,
        reason=reason,
        options=options,
        images=inputs.images.join_fitted() if kind == "frozen" else inputs.images,
        averaging=options.average_with_start if kind == "steps" and has_start else 0.0,
        new_tokens=new_tokens,
        lines=lines,
    )


def choose_by_duration(
    model: Any, accelerator: Accelerator, num_images: int
) -> tuple[Literal["frozen", "steps"], str]:
    """Choose steps, unless they take too long on this CPU, where they could take hours."""
    images_text = f"{num_images:,} images"
    if accelerator.device.type != "cpu":
        return "steps", images_text
    minutes = measure_step_minutes(model, accelerator, num_images)
    duration = f"about {minutes:,} min on this CPU"
    if minutes <= MAX_STEP_MINUTES:
        return "steps", f"{images_text}, {duration}"
    return "frozen", (
        f"{FINE_TUNING_EPOCHS:g} epochs would take {duration}, more than {MAX_STEP_MINUTES}"
    )


def measure_step_minutes(model: Any, accelerator: Accelerator, num_images: int) -> int:
    """Estimate the duration of the default steps from forward passes, with all processes together."""
    with accelerator.autocast():
        speed = measure_cpu_speed(model.eval())
    images_per_second = float(accelerator.reduce(torch.tensor(speed), "sum"))
    num_passes = FORWARD_PASSES_OF_STEP * FINE_TUNING_EPOCHS * num_images
    return math.ceil(num_passes / images_per_second / 60)


def choose_held_out_fraction(kind: str, num_images: int, num_labels: int, num_fitted: int) -> float:
    """Choose the fraction of the images that measure a run, if no split does.

    `num_fitted` is the number of images to which the model was fitted before the run.
    """
    # Cross-validation measures a frozen run without giving up a label.
    if kind == "frozen" or num_images < FEW_IMAGES_PER_CLASS * num_labels:
        return 0.0
    # A tenth of many images measures well enough; a tenth of few would be a handful.
    fraction = 0.1 if num_images >= MIN_STEP_IMAGES else 0.2
    # The classifier is fitted again. To fewer images, it would be worse than what it replaces.
    loses_images = num_fitted > (1 - fraction) * num_images
    is_small = num_images < MIN_MEASURED_CLASS_SIZE * num_labels
    return 0.0 if loses_images and is_small else fraction

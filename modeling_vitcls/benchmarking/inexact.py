"""What the optional inexact features gain in speed: our models with and without them, in turns.

Outputs differ by nature, so nothing is checked but that a model with the feature set to 0 answers as the plain one.
What a feature costs in accuracy is not measured here: that takes real data, in scripts/finetune.py and
scripts/evaluate.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..configuration_vitcls import ViTCLSConfig
from ..conversion.random_weights import random_fill
from ..modeling_vitcls import ViTCLSForImageClassification
from .comparison import Answer, Comparison, check_agreement, chosen, in_turns, per_second
from .forward_passes import SECONDS_PER_TURN, images_per_second, random_images
from .peers import SMALL, TOY, Size
from .training_steps import TRAINING_STEPS, Steps, random_batch


Turn = Callable[[], float]  # works for a while -> images per second

BATCH_SIZE = 4  # of inference
STEP = "bf16 autocast, batch 16"  # of training_steps.py


def forward_passes(model: Any, size: Size, seconds: float) -> Turn:
    """In float32."""
    pixel_values = random_images(BATCH_SIZE, size.image_size).to(model.device)
    return lambda: images_per_second(answer_of(model), pixel_values, seconds)


def training_steps(model: Any, size: Size, seconds: float) -> Turn:
    """Forward pass, backward pass and AdamW."""
    row = TRAINING_STEPS[STEP]
    steps = Steps(model, answer_of(model), row, random_batch(row.batch_size, size, model.device))
    return lambda: per_second(steps, row.batch_size, seconds)


@dataclass(frozen=True)
class Inexact:
    """One row of the report: a field of the configuration that is 0 in the plain model, and what is done with both."""

    field: str
    value: float
    work: Callable[[Any, Size, float], Turn]


# ViT-S/16 at 224 pixels.
INEXACT = {
    f"merged_patches_per_layer {number}, inference in fp32, batch {BATCH_SIZE}": Inexact(
        "merged_patches_per_layer", number, forward_passes
    )
    for number in (4, 8, 16)
} | {
    f"patch_drop_rate {rate}, step in {STEP}": Inexact("patch_drop_rate", rate, training_steps) for rate in (0.25, 0.5)
}


def compare_inexact(rows: tuple[str, ...], num_pairs: int, toy: bool, device: str = "cpu") -> Iterator[Comparison]:
    """The named rows of `INEXACT`, or all, against the plain model.

    Raises:
        ValueError: for an unknown row, or if outputs differ with the feature set to 0.
    """
    size = TOY if toy else SMALL
    seconds = 0.0 if toy else SECONDS_PER_TURN
    for name, row in chosen(INEXACT, rows).items():
        plain = model_of(size)
        random_fill(plain)
        plain.to(device=device)  # type: ignore[call-arg]  # transformers wraps `to` untyped
        difference = check_off(row, plain, size, name)
        inexact = variant(plain, size, **{row.field: row.value})
        ours, theirs = in_turns(row.work(inexact, size, seconds), row.work(plain, size, seconds), num_pairs)
        details = {row.field: row.value, "device": device, "size": vars(size)}
        yield Comparison("inexact", name, "the plain model", ours, theirs, difference, details)


def model_of(size: Size, **fields: Any) -> ViTCLSForImageClassification:
    """A classifier of that size with fresh weights, in evaluation."""
    config = ViTCLSConfig(**vars(size), intermediate_size=size.intermediate_size, **fields)
    return ViTCLSForImageClassification(config).eval()


def variant(plain: ViTCLSForImageClassification, size: Size, **fields: Any) -> ViTCLSForImageClassification:
    """Another model with the same weights."""
    model = model_of(size, **fields)
    model.load_state_dict(plain.state_dict())
    return model.to(device=plain.device)  # type: ignore[call-arg,return-value]  # transformers wraps `to` untyped


def answer_of(model: Any) -> Answer:
    """What it says of images, logits [B, labels]."""
    return lambda pixel_values: model(pixel_values).logits


def check_off(row: Inexact, plain: ViTCLSForImageClassification, size: Size, name: str) -> float:
    """The largest absolute difference of the logits between the plain model and one with the feature set to 0.

    Raises:
        ValueError: if it exceeds the limit, or is no number.
    """
    off = variant(plain, size, **{row.field: type(row.value)(0)})
    pixel_values = random_images(2, size.image_size).to(plain.device)
    return check_agreement(answer_of(off), answer_of(plain), pixel_values, f"{name}, set to 0")

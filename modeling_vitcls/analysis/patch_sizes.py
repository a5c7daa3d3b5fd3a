"""What other patch sizes would mean for a model: tokens, cost and, through resampled weights, answers.

    rows = patch_size_advice(model, processor, pictures, labels, [4, 8, 16])
    print(*patch_size_sentences(rows), sep="\\n")

Patches that are too large hide details, patches that are too small cost more than they tell. The model is adapted to
each size (adaptation_vitcls.py: FlexiViT's resizing of the patch projection, positions resampled), not trained at it.
"""

import copy
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from ..adaptation_vitcls import logger as adaptation_logger
from ..system import name_of_device, processor_name
from .ablation import Answers, decisions, logits_by_task, right_answers
from .model_utils import evaluating, is_classifier, plain_model


FEWEST_TURNS = 5  # in which the time is measured; more where there are more batches
COARSEST = 7  # patches along a side: ViT-B/32 at 224 pixels, the coarsest ViT of arXiv 2010.11929, has so many
MUCH_ATTENTION = 0.5  # part of the compute
GOOD_ENOUGH = 0.01  # of accuracy below the best

PatchSize = int | tuple[int, int]  # pixels; height, width where they differ


@dataclass(frozen=True)
class PatchSizeRow:
    """A model with patches of one size, without any training at it.

    Attributes:
        patch_size: in pixels, one number where height and width are equal.
        is_native: whether it is the model's own.
        grid: rows and columns of patches.
        sequence_length: special tokens and patches.
        gflops: 10^9 operations for one image, a multiplication and an addition being two.
        attention_share: part of them that is in attention maps, which grow with the square of the sequence length.
        milliseconds: for one image, in batches: the median of turns that the sizes took one after the other.
        device: on which that was measured.
        num_images: that were answered.
        accuracy: share of right answers, of those that are known; None where none are.
        agreement: share of images with the answers of the model's own size; None without a classifier.
        note: whether it may be too large or too small, for images of this size; may be empty.
    """

    patch_size: PatchSize
    is_native: bool
    grid: tuple[int, int]
    sequence_length: int
    gflops: float
    attention_share: float
    milliseconds: float
    device: str
    num_images: int
    accuracy: float | None
    agreement: float | None
    note: str


@dataclass
class Candidate:
    """The model with patches of one size, and what is collected about it."""

    model: Any
    patch_size: PatchSize
    is_native: bool
    milliseconds: list[float] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    chosen: list[torch.Tensor] = field(default_factory=list)


def patch_size_advice(
    model: Any,
    processor: Any,
    pictures: Sequence[Image.Image],
    labels: Sequence[Any] | None,
    patch_sizes: Sequence[int],
    batch_size: int = 16,
) -> list[PatchSizeRow]:
    """Compare patch sizes, the model's own among them, on pictures of one size.

    A copy of the model for each size, and the pictures' pixels, are in memory at once.

    Args:
        model: any of ours; it stays as it is, on its device.
        processor: its image processor.
        labels: the right answer to each picture: a class index, 0.0 and 1.0 per class, or {task: class index}; None
            where it is not known. None: nothing is known.
        patch_sizes: in pixels.

    Returns:
        One row per size, the smallest patches first.

    Raises:
        ValueError: if a size does not divide the images', the images differ in size, or there are none.
    """
    model = plain_model(model)
    pixels = pixels_of(processor, pictures)  # [images, C, H, W]
    height, width = pixels.shape[-2:]
    sizes = wanted_sizes(patch_sizes, (height, width), as_patch_size(model.config.patch_height_width))
    with evaluating(model):
        candidates = [candidate(model, size, (height, width)) for size in sizes]
        answer_in_turns(candidates, pixels.split(batch_size))
    right = None
    if labels is not None and is_classifier(model):
        right = torch.stack([right_answers(label, model.config) for label in labels])  # [images, A]
    native = next(one for one in candidates if one.is_native)
    return [row_of(one, native, right, pixels) for one in candidates]


def patch_size_sentences(rows: Sequence[PatchSizeRow]) -> list[str]:
    """The rows in words: the model's own size, each other one against it, which is worth its cost, and how sure that
    is."""
    native = next(row for row in rows if row.is_native)
    others = [row for row in rows if not row.is_native]
    sentences = [own_sentence(native), *(sentence(row, native) for row in others), *weighed(rows)]
    if others and native.agreement is not None:
        sentences.append(
            f"Answers to {native.num_images} images are with resampled weights, before any fine-tuning: they say how "
            "far a size is from the model's own, not how good the model can become at it (fine-tune with "
            "--patch-size to find out)."
        )
    return sentences


# Sizes ---------------------------------------------------------------------------------------------------------------


def wanted_sizes(asked: Sequence[int], image_size: tuple[int, int], native: PatchSize) -> list[PatchSize]:
    """The sizes asked for and the model's own, the smallest first.

    Raises:
        ValueError: for one that does not divide height and width of the images.
    """
    divides_both = math.gcd(*image_size)
    for size in asked:
        if size != native and (size < 1 or divides_both % size):
            fitting = [str(number) for number in range(1, divides_both + 1) if divides_both % number == 0]
            raise ValueError(
                f"patch size {size} does not divide images of {image_size[0]} x {image_size[1]} pixels: choose from "
                f"{', '.join(fitting)}"
            )
    return sorted({*asked, native}, key=lambda size: math.prod(both(size)))


def both(size: PatchSize) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def as_patch_size(size: tuple[int, int]) -> PatchSize:
    """One number where both are equal."""
    return size[0] if size[0] == size[1] else size


def candidate(model: Any, size: PatchSize, image_size: tuple[int, int]) -> Candidate:
    """The model itself, or adapted to patches of this size in images of that one."""
    if both(size) == model.config.patch_height_width:
        return Candidate(model, size, is_native=True)
    try:
        with without_notes():
            adapted = model.adapt(patch_size=list(both(size)), image_size=list(image_size))
    except ValueError as error:
        raise ValueError(f"patch size {size}: {error}") from None
    return Candidate(adapted, size, is_native=False)


@contextmanager
def without_notes() -> Iterator[None]:
    """Without the log of what becomes of each weight."""
    was_disabled, adaptation_logger.disabled = adaptation_logger.disabled, True
    try:
        yield
    finally:
        adaptation_logger.disabled = was_disabled


def pixels_of(processor: Any, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """What the model is shown of the pictures, [images, C, H, W].

    Raises:
        ValueError: if there are none, or they differ in size.
    """
    prepared = [processor(pictures[place], return_tensors="pt")["pixel_values"][0] for place in range(len(pictures))]
    shapes = {tuple(pixels.shape) for pixels in prepared}
    if not shapes:
        raise ValueError("there are no images to compare patch sizes on: give one or more")
    if len(shapes) > 1:
        raise ValueError(
            "patch sizes are compared on images of one size, and the image processor makes them of several: set an "
            "exact size, or do_center_crop"
        )
    return torch.stack(prepared)


# Measuring -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def answer_in_turns(candidates: list[Candidate], batches: Sequence[torch.Tensor]) -> None:
    """Let all sizes answer each batch [B, C, H, W], one after the other, so that other work on the machine slows all.

    Where there are few batches, they are answered again for the time alone.
    """
    device = candidates[0].model.device
    for turn in range(-1, max(len(batches), FEWEST_TURNS)):  # the turn before the first warms caches up
        batch = batches[turn % len(batches)].to(device)
        for one in candidates:
            started = finished(device)
            outputs = one.model(batch)
            seconds = finished(device) - started
            if turn >= 0:
                one.milliseconds.append(1000 * seconds / len(batch))
            if 0 <= turn < len(batches) and is_classifier(one.model):
                by_task = logits_by_task(outputs)
                one.logits.append(torch.cat(by_task, dim=-1).float().cpu())
                one.chosen.append(decisions(by_task, one.model.config).cpu())


def finished(device: torch.device) -> float:
    """The time, once the device has nothing left to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def operations(model: Any, image_size: tuple[int, int]) -> tuple[float, float]:
    """Number of operations for one image, and those of them in attention maps.

    Counted on a model of the same parts without weights or data, with eager attention, whose operations are known.
    """
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        counted = model.new_like(config).eval()
        image = torch.empty(1, config.num_channels, *image_size)
    counted.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        counted(image)
    maps = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    return float(counter.get_total_flops()), float(maps)


def row_of(one: Candidate, native: Candidate, right: torch.Tensor | None, pixels: torch.Tensor) -> PatchSizeRow:
    """What was found of one size."""
    image_size = (pixels.shape[-2], pixels.shape[-1])
    (height, width), (patch_height, patch_width) = image_size, both(one.patch_size)
    grid = (height // patch_height, width // patch_width)
    total, in_maps = operations(one.model, image_size)
    accuracy, agreement = None, None
    if one.chosen:
        answers = Answers(torch.cat(one.logits), torch.cat(one.chosen), right)
        accuracy = answers.accuracy()
        agreement = (answers.chosen == torch.cat(native.chosen)).all(dim=-1).float().mean().item()
    return PatchSizeRow(
        patch_size=one.patch_size,
        is_native=one.is_native,
        grid=grid,
        sequence_length=one.model.config.token_layout.num_prefix_tokens + math.prod(grid),
        gflops=total / 1e9,
        attention_share=in_maps / total,
        milliseconds=statistics.median(one.milliseconds),
        device=device_name(one.model.device),
        num_images=len(pixels),
        accuracy=accuracy,
        agreement=agreement,
        note=note(grid, in_maps / total),
    )


def device_name(device: torch.device) -> str:
    """The accelerator's or the processor's name, with the number of threads."""
    if device.type != "cpu":
        return name_of_device(device)
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


# Words ---------------------------------------------------------------------------------------------------------------


def note(grid: tuple[int, int], attention_share: float) -> str:
    """Whether patches may be too large, or too small, for their images."""
    notes = []
    if min(grid) < COARSEST:
        notes.append(f"a patch spans 1/{min(grid)} of the image's side: maybe too large, where details matter")
    if attention_share > MUCH_ATTENTION:
        notes.append(
            f"{attention_share:.0%} of the compute is in attention maps, which grow with the square: maybe too small"
        )
    return "; ".join(notes)


def own_sentence(row: PatchSizeRow) -> str:
    """The model's own size."""
    accuracy = "" if row.accuracy is None else f", accuracy {row.accuracy * 100:.1f} %"
    text = (
        f"{in_words(row.patch_size)} (the model's own): {row.sequence_length} tokens, {row.gflops:.3g} GFLOPs and "
        f"{row.milliseconds:.3g} ms for an image on {row.device}{accuracy}"
    )
    return f"{text} ({row.note})." if row.note else f"{text}."


def weighed(rows: Sequence[PatchSizeRow]) -> list[str]:
    """Which size costs least among those about as good as the best; nothing where there is no choice, or no accuracy
    is known."""
    known = [(row.accuracy, row) for row in rows if row.accuracy is not None]
    if len(known) < 2:
        return []
    best, of_best = max(known, key=lambda pair: (pair[0], -pair[1].gflops))
    cheapest = min((row for accuracy, row in known if accuracy >= best - GOOD_ENOUGH), key=lambda row: row.gflops)
    whose = " (the model's own)" if cheapest.is_native else ""
    text = (
        f"Worth its cost: {in_words(cheapest.patch_size)}{whose}, the cheapest within 1 point of the best accuracy on "
        f"{cheapest.num_images:,} images"
    )
    if cheapest is of_best:
        return [f"{text} ({best * 100:.1f} %, its own)."]
    saved = times(cheapest.gflops, of_best.gflops)
    return [f"{text} ({best * 100:.1f} %, with patches of {in_words(of_best.patch_size)}), at {saved} its compute."]


def sentence(row: PatchSizeRow, native: PatchSizeRow) -> str:
    """Another size against the model's own."""
    text = (
        f"{in_words(row.patch_size)}: {times(row.sequence_length, native.sequence_length)} the tokens, "
        f"{times(row.gflops, native.gflops)} the compute, {times(row.milliseconds, native.milliseconds)} the time"
    )
    if row.accuracy is not None and native.accuracy is not None:
        text += f", accuracy {native.accuracy * 100:.1f} → {row.accuracy * 100:.1f} % before any fine-tuning"
    elif row.agreement is not None:
        text += f", the same answers for {row.agreement * 100:.1f} % of the images before any fine-tuning"
    return f"{text} ({row.note})." if row.note else f"{text}."


def in_words(size: PatchSize) -> str:
    """`8`, or `8 x 4`."""
    return " x ".join(map(str, both(size))) if not isinstance(size, int) else str(size)


def times(value: float, reference: float) -> str:
    """`4 times`, `0.25 times`: how many times the reference."""
    return f"{value / reference:.2g} times"

"""Comparison of patch sizes for a model: number of tokens, compute, and predictions with resampled weights.

Large patches hide details, and small patches increase the cost. The model is adapted to each size without training
(adaptation_vitcls.py: the patch projection is resized as in FlexiViT, and position embeddings are resampled).
"""

import copy
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from ..adaptation_vitcls import logger as adaptation_logger
from ..system import format_count, format_device_name, get_processor_name, synchronize
from .model_outputs import Predictions, encode_labels, extract_outputs, join_outputs
from .model_utils import evaluation_mode, is_classifier, unwrap_model


MIN_TIMED_BATCHES = 5  # minimum number of timed batches; batches are repeated if necessary
# Limits of `describe_patch_size_problems`.
MIN_GRID_SIZE = 7  # minimum number of patches per side; 7 as in ViT-B/32 at 224 x 224 pixels (arXiv 2010.11929)
MAX_ATTENTION_SHARE = 0.5  # maximum fraction of operations for attention maps
ACCURACY_TOLERANCE = 0.01  # maximum difference between accuracies that are considered equally good

PatchSize = int | tuple[int, int]  # patch size in pixels; (height, width) if height and width differ


@dataclass(frozen=True)
class PatchSizeRow:
    """Measurements of a model with one patch size, without training at this size.

    Attributes:
        patch_size: patch size in pixels; one number if height and width are equal.
        is_native: whether the patch size is the model's own patch size.
        grid: numbers of rows and columns of patches.
        sequence_length: total number of special tokens and patches.
        gflops: 10^9 floating-point operations per image; a multiplication and an addition count as two operations.
        attention_share: fraction of these operations for attention maps, whose size grows with the square of the
            sequence length.
        milliseconds: time per image, median over batches; all sizes are measured in turn.
        device: device on which the time was measured.
        num_images: number of images.
        accuracy: fraction of correct predictions for known labels; None if no label is known.
        agreement: fraction of images with the same prediction as with the model's own patch size; None if the model is
            not a classifier.
        note: possible problems with this patch size for these images; may be empty.
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
    """The model with one patch size, and the measurements with this patch size."""

    model: Any
    patch_size: PatchSize
    is_native: bool
    milliseconds: list[float] = field(default_factory=list)  # time per image, one value per batch
    predictions: list[Predictions] = field(default_factory=list)  # one per batch; empty for an encoder


def compare_patch_sizes(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    labels: Sequence[Any] | None,
    patch_sizes: Sequence[int],
    batch_size: int = 16,
) -> list[PatchSizeRow]:
    """Compare patch sizes, including the model's own patch size, on images of equal size.

    A copy of the model per patch size and the pixels of all images are in memory at the same time.

    Args:
        model: any ViTCLS model; it is not changed and stays on its device.
        processor: the image processor of the model.
        labels: the label of each image: a class index, a list of 0.0 and 1.0 per class, or {task: class index}; None
            if unknown. `labels` may be None if all labels are unknown.
        patch_sizes: patch sizes to compare, in pixels.
        batch_size: maximum number of images per forward pass.

    Returns:
        One row per patch size, in ascending order.

    Raises:
        ValueError: if a patch size does not divide the image size, if the processed images differ in size, or if
            there are no images.
    """
    model = unwrap_model(model)
    pixels = prepare_pixel_values(processor, images)  # [images, C, H, W]
    image_size = (pixels.shape[-2], pixels.shape[-1])
    height, width = model.config.patch_height_width
    sizes = resolve_patch_sizes(patch_sizes, image_size, height if height == width else (height, width))
    with evaluation_mode(model):
        candidates = [build_candidate(model, size, image_size) for size in sizes]
        measure_candidates(candidates, pixels.split(batch_size))
    encoded_labels = encode_labels(labels, model)
    native_candidate = next(candidate for candidate in candidates if candidate.is_native)
    return [build_row(candidate, native_candidate, encoded_labels, pixels) for candidate in candidates]


def describe_patch_sizes(rows: Sequence[PatchSizeRow]) -> list[str]:
    """Return sentences about the model's own patch size, the other sizes, the recommended size, and limitations."""
    native_row = next(row for row in rows if row.is_native)
    other_rows = [row for row in rows if not row.is_native]
    sentences = []
    for row in (native_row, *other_rows):
        text = describe_row(row, native_row)
        sentences.append(f"{text} ({row.note})." if row.note else f"{text}.")
    sentences += recommend_patch_size(rows)
    if other_rows and native_row.agreement is not None:
        sentences.append(
            f"At other patch sizes, the model was evaluated with resampled weights on {native_row.num_images} images, "
            "before any fine-tuning. To measure the accuracy after fine-tuning, fine-tune with --patch-size."
        )
    return sentences


# Sizes ---------------------------------------------------------------------------------------------------------------


def resolve_patch_sizes(
    patch_sizes: Sequence[int], image_size: tuple[int, int], native_size: PatchSize
) -> list[PatchSize]:
    """Return the requested patch sizes and the model's own patch size in ascending order. Raise ValueError if a size
    does not divide the height and width of the images."""
    common_divisor = math.gcd(*image_size)
    for size in patch_sizes:
        if size != native_size and (size < 1 or common_divisor % size):
            valid_sizes = [divisor for divisor in range(1, common_divisor + 1) if common_divisor % divisor == 0]
            raise ValueError(
                f"patch size {size} does not divide the image size of {image_size[0]} x {image_size[1]} pixels. "
                f"Choose from {', '.join(map(str, valid_sizes))}."
            )
    return sorted({*patch_sizes, native_size}, key=lambda size: math.prod(to_height_width(size)))


def to_height_width(size: PatchSize) -> tuple[int, int]:
    """Return a patch size as (height, width)."""
    return (size, size) if isinstance(size, int) else size


def build_candidate(model: Any, size: PatchSize, image_size: tuple[int, int]) -> Candidate:
    """Return a candidate with the model itself, or with the model adapted to a patch size and image size."""
    if to_height_width(size) == model.config.patch_height_width:
        return Candidate(model, size, is_native=True)
    was_disabled, adaptation_logger.disabled = adaptation_logger.disabled, True  # do not log adapted weights
    try:
        adapted_model = model.adapt(patch_size=list(to_height_width(size)), image_size=list(image_size))
    except ValueError as error:
        raise ValueError(f"patch size {size}: {error}") from None
    finally:
        adaptation_logger.disabled = was_disabled
    return Candidate(adapted_model, size, is_native=False)


def prepare_pixel_values(processor: Any, images: Sequence[Image.Image]) -> torch.Tensor:
    """Return the pixel values [images, C, H, W]. Raise ValueError if there are no images or if the image sizes
    differ."""
    pixel_values = [processor(images[index], return_tensors="pt")["pixel_values"][0] for index in range(len(images))]
    shapes = {pixels.shape for pixels in pixel_values}
    if not shapes:
        raise ValueError(
            "A comparison of patch sizes requires images, but there are no images. Pass one or more images."
        )
    if len(shapes) > 1:
        raise ValueError(
            "A comparison of patch sizes requires images of one size, but the image processor returns images of "
            "several sizes. Set an exact size or do_center_crop in the image processor."
        )
    return torch.stack(pixel_values)


# Measuring -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_candidates(candidates: list[Candidate], batches: Sequence[torch.Tensor]) -> None:
    """Run all candidates on each batch [B, C, H, W] in turn, so that other load on the machine affects all candidates.
    If there are fewer than MIN_TIMED_BATCHES batches, the batches are repeated, but only for time measurements."""
    device = candidates[0].model.device
    for step in range(-1, max(len(batches), MIN_TIMED_BATCHES)):  # step -1 is a warm-up
        batch = batches[step % len(batches)].to(device)
        for candidate in candidates:
            synchronize(device)
            start_time = time.perf_counter()
            outputs = candidate.model(batch)
            synchronize(device)
            if step >= 0:
                candidate.milliseconds.append(1000 * (time.perf_counter() - start_time) / len(batch))
            if 0 <= step < len(batches) and is_classifier(candidate.model):
                candidate.predictions.append(extract_outputs(candidate.model, outputs))


def count_flops(model: Any, image_size: tuple[int, int]) -> tuple[float, float]:
    """Return the total number of floating-point operations for one image, and the number for attention maps. They are
    counted with eager attention on a copy of the model on the meta device."""
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        meta_model = model.new_like(config).eval()
        image = torch.empty(1, config.num_channels, *image_size)
    meta_model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        meta_model(image)
    attention_flops = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    return float(counter.get_total_flops()), float(attention_flops)


def build_row(
    candidate: Candidate, native_candidate: Candidate, labels: torch.Tensor | None, pixels: torch.Tensor
) -> PatchSizeRow:
    """Return the row that summarizes the measurements of one patch size."""
    grid = candidate.model.base_model.embeddings.patch_embeddings.get_grid_size(pixels)
    total_flops, attention_flops = count_flops(candidate.model, (pixels.shape[-2], pixels.shape[-1]))
    attention_share = attention_flops / total_flops
    accuracy, agreement = None, None
    if candidate.predictions:
        predictions, native_predictions = map(join_outputs, (candidate.predictions, native_candidate.predictions))
        accuracy = replace(predictions, labels=labels).compute_accuracy()
        agreement = (predictions.predicted == native_predictions.predicted).all(dim=-1).float().mean().item()
    return PatchSizeRow(
        patch_size=candidate.patch_size,
        is_native=candidate.is_native,
        grid=grid,
        sequence_length=candidate.model.config.token_layout.get_num_tokens(*grid),
        gflops=total_flops / 1e9,
        attention_share=attention_share,
        milliseconds=statistics.median(candidate.milliseconds),
        device=get_device_name(candidate.model.device),
        num_images=len(pixels),
        accuracy=accuracy,
        agreement=agreement,
        note=describe_patch_size_problems(grid, attention_share),
    )


def get_device_name(device: torch.device) -> str:
    """Return the name of the accelerator, or the name of the processor and the number of threads."""
    if device.type != "cpu":
        return format_device_name(device)
    return f"{get_processor_name()}, {format_count(torch.get_num_threads(), 'thread')}"


# Sentences -----------------------------------------------------------------------------------------------------------


def describe_patch_size_problems(grid: tuple[int, int], attention_share: float) -> str:
    """Return a note if patches may be too large or too small for the images, or an empty string otherwise."""
    notes = []
    if min(grid) < MIN_GRID_SIZE:
        notes.append(f"a patch spans 1/{min(grid)} of the image's side: patches may be too large for small details")
    if attention_share > MAX_ATTENTION_SHARE:
        notes.append(
            f"{attention_share:.0%} of the compute is for attention maps, which grow with the square of the "
            "sequence length: patches may be too small"
        )
    return "; ".join(notes)


def recommend_patch_size(rows: Sequence[PatchSizeRow]) -> list[str]:
    """Recommend the cheapest patch size whose accuracy is within ACCURACY_TOLERANCE of the best accuracy. Return an
    empty list if fewer than two accuracies are known."""
    candidates = [(row.accuracy, row) for row in rows if row.accuracy is not None]
    if len(candidates) < 2:
        return []
    best_accuracy, best_row = max(candidates, key=lambda pair: (pair[0], -pair[1].gflops))
    accurate_rows = [row for accuracy, row in candidates if accuracy >= best_accuracy - ACCURACY_TOLERANCE]
    cheapest_row = min(accurate_rows, key=lambda row: row.gflops)
    suffix = " (the model's own)" if cheapest_row.is_native else ""
    text = (
        f"Recommended: {format_patch_size(cheapest_row.patch_size)}{suffix}, the cheapest patch size whose "
        f"accuracy on {cheapest_row.num_images:,} images is within 1 percentage point of the best accuracy"
    )
    if cheapest_row is best_row:
        return [f"{text} ({best_accuracy * 100:.1f}%, at this size)."]
    cheapest_size, best_size = map(format_patch_size, (cheapest_row.patch_size, best_row.patch_size))
    return [
        f"{text} ({best_accuracy * 100:.1f}%, with patch size {best_size}). Patch size {cheapest_size} requires "
        f"{format_ratio(cheapest_row.gflops, best_row.gflops)} the compute of patch size {best_size}."
    ]


def describe_row(row: PatchSizeRow, native_row: PatchSizeRow) -> str:
    """Describe a patch size, compared with the model's own patch size."""
    if row.is_native:
        accuracy_text = "" if row.accuracy is None else f", accuracy {row.accuracy * 100:.1f}%"
        return (
            f"{format_patch_size(row.patch_size)} (the model's own): {row.sequence_length} tokens, "
            f"{row.gflops:.3g} GFLOPs and {row.milliseconds:.3g} ms per image on {row.device}{accuracy_text}"
        )
    text = (
        f"{format_patch_size(row.patch_size)}: {format_ratio(row.sequence_length, native_row.sequence_length)} the "
        f"tokens, {format_ratio(row.gflops, native_row.gflops)} the compute, "
        f"{format_ratio(row.milliseconds, native_row.milliseconds)} the time"
    )
    if row.accuracy is not None and native_row.accuracy is not None:
        text += f", accuracy {row.accuracy:.1%} instead of {native_row.accuracy:.1%} before any fine-tuning"
    elif row.agreement is not None:
        text += f", the same predictions for {row.agreement * 100:.1f}% of the images before any fine-tuning"
    return text


def format_patch_size(size: PatchSize) -> str:
    """Return a patch size as text, such as `8` or `8 x 4`."""
    return str(size) if isinstance(size, int) else " x ".join(map(str, size))


def format_ratio(value: float, reference: float) -> str:
    """Return the ratio value / reference as text, such as `4 times` or `0.25 times`."""
    return f"{value / reference:.2g} times"

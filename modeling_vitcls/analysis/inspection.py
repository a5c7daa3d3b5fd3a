"""All measurements of the report: maps of a few images, statistics over many images, and verdicts.

    inspection = inspect_model(model, processor, images)

    images -> pixels in memory -> token_statistics.py, ablation.py -> diagnosis.py
           -> image_report.py, for the images to show

The report itself is written in report.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..data.images import ImageSubset, check_channels
from ..data.labels import get_label_space
from ..errors import format_error
from ..inference.prediction_rows import group_by_shape
from .ablation import AblationEffect, Batches, collect_predictions, compute_ablation_effects, encode_label
from .diagnosis import Verdict, describe_artifacts, describe_depth, diagnose_tokens
from .image_report import ImageReport, build_image_report
from .model_utils import is_classifier, unwrap_model
from .patch_sizes import PatchSizeRow, compare_patch_sizes
from .token_statistics import Findings, TokenStatistics


MAX_ATTENTION_WEIGHTS = 2**26  # maximum number of attention weights of a batch in one layer (256 MiB in float32)

ProgressCallback = Callable[[str, int, int], None]  # (description, finished steps, total steps)
WarningCallback = Callable[[str], None]


@dataclass(frozen=True)
class Inspection:
    """Measurements of `inspect_model`.

    Attributes:
        config: configuration of the model.
        model_class: class name of the model.
        num_parameters: number of parameters of the model.
        has_head: whether the model is a classifier.
        findings: statistics over `findings.num_images` images.
        effects: effect of replacing each token by its mean; None without a classifier.
        accuracy: accuracy on the same images, 0 to 1; None if no labels are known.
        verdicts: one per special token.
        artifacts: sentences about patches with large norms.
        depth: one text per special token, on its attention over depth.
        image_reports: reports of the images to show.
        patch_sizes: comparison of patch sizes; empty unless requested.
        num_unreadable: number of images that could not be read.
    """

    config: Any
    model_class: str
    num_parameters: int
    has_head: bool
    findings: Findings
    effects: dict[str, AblationEffect] | None
    accuracy: float | None
    verdicts: list[Verdict]
    artifacts: str
    depth: list[str]
    image_reports: list[ImageReport]
    patch_sizes: list[PatchSizeRow]
    num_unreadable: int


def ignore(*args: Any) -> None:
    """Do nothing (the default callback)."""


def inspect_model(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    *,
    names: Sequence[str] | None = None,
    labels: Sequence[Any] | None = None,
    statistics_images: Sequence[Image.Image] | None = None,
    statistics_labels: Sequence[Any] | None = None,
    token_movement: Mapping[str, float] | None = None,
    patch_sizes: Sequence[int] = (),
    batch_size: int = 32,
    on_warning: WarningCallback = ignore,
    on_progress: ProgressCallback = ignore,
) -> Inspection:
    """Measure what the special tokens of a model do. The model is not changed and stays on its device.

    Args:
        model: any ViTCLS classifier or encoder, with or without special tokens; also compiled or with PEFT adapters.
        processor: the image processor of the model.
        images: images to show. Unreadable images cause a warning and are skipped.
        names: names of the images.
        labels: labels of the images: class indices, lists of 0.0 and 1.0 per class, or {task: class index}; None or
            -100 if unknown.
        statistics_images, statistics_labels: images and labels for the statistics. Default: `images` and `labels`.
        token_movement: distance that each token moved in training (`token_movement` in results.json).
        patch_sizes: patch sizes to compare, in pixels.
        batch_size: maximum number of images per forward pass.
        on_warning: called with a message for each skipped image.
        on_progress: called with a description, the number of finished steps and the total.

    Raises:
        ValueError: if no image can be read, or the hidden states of the model are not finite.
    """
    if statistics_images is None:
        statistics_images, statistics_labels = images, labels
    model = unwrap_model(model)
    config, preparer = model.config, ImagePreparer(processor, model.config.num_channels, on_warning)
    image_reports = build_image_reports(model, processor, images, names, labels, preparer, on_progress)
    pixels = preparer.prepare_all(statistics_images, on_progress)
    pixel_labels = None if statistics_labels is None else [statistics_labels[index] for index in pixels]
    batches = InspectionBatches(model, list(pixels.values()), pixel_labels, batch_size)

    findings = collect_statistics(model, batches, on_progress)
    effects, predictions = None, None
    if is_classifier(model):
        num_passes = config.token_layout.num_prefix_tokens + 1
        reported = batches.report_progress(on_progress, num_passes, "replacing tokens by their means")
        predictions = collect_predictions(model, reported)
        effects = compute_ablation_effects(model, reported, findings.mean_states, predictions)
    rows = []
    if patch_sizes:
        on_progress("comparing patch sizes", 0, 1)
        rows = compare_patch_sizes(
            model, processor, ImageSubset(statistics_images, list(pixels)), pixel_labels, patch_sizes
        )
    return Inspection(
        config=config,
        model_class=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        has_head=is_classifier(model),
        findings=findings,
        effects=effects,
        accuracy=None if predictions is None else predictions.accuracy(),
        verdicts=diagnose_tokens(config, findings, effects, token_movement, predictions),
        artifacts=describe_artifacts(config, findings),
        depth=describe_depth(config, findings),
        image_reports=image_reports,
        patch_sizes=rows,
        num_unreadable=len(preparer.problems),
    )


def build_image_reports(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    names: Sequence[str] | None,
    labels: Sequence[Any] | None,
    preparer: "ImagePreparer",
    on_progress: ProgressCallback,
) -> list[ImageReport]:
    """Build a report of each readable image."""
    image_reports, label_space = [], get_label_space(model.config)
    labels = labels if is_classifier(model) else None
    for index in range(len(images)):
        on_progress("computing maps", index, len(images))
        if preparer.prepare(images, index) is not None:
            name = f"image {index + 1}" if names is None else names[index]
            truth = None if labels is None else label_space.format_label(labels[index])
            image_reports.append(build_image_report(model, processor, images[index], name, truth))
    return image_reports


def collect_statistics(model: Any, batches: "InspectionBatches", on_progress: ProgressCallback) -> Findings:
    """Return the statistics over all images.

    Raises:
        ValueError: if hidden states are not finite.
    """
    statistics = TokenStatistics(model)
    for pixel_values, _ in batches.report_progress(on_progress, 1, "collecting statistics")():
        statistics.update(pixel_values)
    findings = statistics.compute()
    if not bool(findings.patch_norms.isfinite().all() and findings.token_norms.isfinite().all()):
        raise ValueError("The hidden states of the model are not finite. Check its weights, or load it in float32.")
    return findings


# Pixels --------------------------------------------------------------------------------------------------------------


class ImagePreparer:
    """Runs the image processor, and warns once about each image that cannot be used."""

    def __init__(self, processor: Any, num_channels: int, on_warning: WarningCallback) -> None:
        self.processor = processor
        self.num_channels = num_channels
        self.on_warning = on_warning
        self.problems: set[str] = set()  # one message per image that cannot be used

    def prepare(self, images: Sequence[Image.Image], index: int) -> torch.Tensor | None:
        """Return the pixels [C, H, W] of one image, or None if it cannot be used."""
        try:
            image = images[index]
            pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]  # [C, H, W]
            check_channels(image, pixels, self.num_channels)
        except (ValueError, OSError) as error:
            message = format_error(error)
            if message not in self.problems:
                self.problems.add(message)
                self.on_warning(f"skipped an image: {message}")
            return None
        return pixels

    def prepare_all(self, images: Sequence[Image.Image], on_progress: ProgressCallback) -> dict[int, torch.Tensor]:
        """Return the pixels of all usable images by index.

        Raises:
            ValueError: if no image can be used.
        """
        pixels_by_index = {}
        for index in range(len(images)):
            on_progress("reading images", index, len(images))
            if (pixels := self.prepare(images, index)) is not None:
                pixels_by_index[index] = pixels
        if not images:
            raise ValueError("An inspection requires at least one image, but there are no images. Pass one or more.")
        if not pixels_by_index:
            raise ValueError(
                f"None of the {len(images)} images can be read, for example: {min(self.problems)}. Check the images."
            )
        return pixels_by_index


class InspectionBatches:
    """Images in memory as batches of equal shape, with labels [B, A] (`Predictions.labels`) or None.

    Args:
        pixels: [C, H, W] each.
        labels: see `inspect_model`.
        batch_size: maximum batch size; reduced if one layer would have more than MAX_ATTENTION_WEIGHTS attention
            weights.
    """

    def __init__(self, model: Any, pixels: list[torch.Tensor], labels: list[Any] | None, batch_size: int) -> None:
        self.device = model.device
        self.pixels = pixels
        self.labels = None
        if labels is not None and is_classifier(model):
            self.labels = torch.stack([encode_label(label, model.config) for label in labels])  # [images, A]
        self.chunks = [
            indices[start : start + size]
            for indices in map(list, group_by_shape(dict(enumerate(pixels))))
            for size in [min(batch_size, get_max_batch_size(model, pixels[indices[0]].shape))]
            for start in range(0, len(indices), size)
        ]

    def __call__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yield all images once."""
        for chunk in self.chunks:
            pixel_values = torch.stack([self.pixels[index] for index in chunk]).to(self.device)  # [B, C, H, W]
            yield pixel_values, None if self.labels is None else self.labels[chunk]

    def report_progress(self, on_progress: ProgressCallback, num_passes: int, description: str) -> Batches:
        """Return a function that yields the same batches and reports progress over `num_passes` calls."""
        num_finished = 0

        def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
            nonlocal num_finished
            for batch in self():
                on_progress(description, num_finished, num_passes * len(self.chunks))
                yield batch
                num_finished += 1

        return batches


def get_max_batch_size(model: Any, shape: torch.Size) -> int:
    """Return the number of images [C, H, W] with at most MAX_ATTENTION_WEIGHTS attention weights in one layer;
    at least 1."""
    config = model.config
    (height, width), (patch_height, patch_width) = shape[-2:], config.patch_height_width
    num_tokens = config.token_layout.get_num_tokens(height // patch_height, width // patch_width)
    num_maps = config.num_attention_heads * (2 if config.attention_type == "differential" else 1)
    return max(MAX_ATTENTION_WEIGHTS // (num_maps * num_tokens**2), 1)

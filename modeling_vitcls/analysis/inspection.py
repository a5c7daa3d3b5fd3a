"""Everything that the report shows, measured: of some pictures their maps, of many the statistics, and the verdicts.

    inspection = inspect_model(model, processor, pictures)

    pictures -> pixels in memory -> token_statistics.py, ablation.py -> diagnosis.py
             -> image_report.py, of a few

What is drawn of it is in report.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..data.images import Chosen, check_channels
from ..data.labels import labels_of
from ..inference.prediction_rows import by_shape
from .ablation import Batches, Effect, ablation_effects, answers_of, right_answers
from .diagnosis import Verdict, artifact_verdict, depth_story, verdicts
from .image_report import Reading, read_picture
from .model_utils import is_classifier, plain_model
from .patch_sizes import PatchSizeRow, patch_size_advice
from .token_statistics import Findings, TokenStatistics


MOST_WEIGHTS = 2**26  # attention weights of a batch in one layer: 256 MiB

Watch = Callable[[str, int, int], None]  # what is being done, how many steps of it, of how many
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        config: of the model.
        model_class: name of its class.
        num_parameters: of the model.
        has_head: whether it is a classifier.
        findings: statistics over `findings.num_images` images.
        effects: of holding each token at its mean; None without a classifier.
        accuracy: on the same images, 0 to 1; None where no labels are known.
        verdicts: one per special token.
        artifacts: a sentence about patches of large norms.
        depth: a sentence per special token.
        readings: of the pictures shown.
        patch_sizes: what other patch sizes would mean; empty unless asked for.
        num_broken: pictures that could not be read.
    """

    config: Any
    model_class: str
    num_parameters: int
    has_head: bool
    findings: Findings
    effects: dict[str, Effect] | None
    accuracy: float | None
    verdicts: list[Verdict]
    artifacts: str
    depth: list[str]
    readings: list[Reading]
    patch_sizes: list[PatchSizeRow]
    num_broken: int


def silent(*args: Any) -> None:
    """For who does not watch."""


def inspect_model(
    model: Any,
    processor: Any,
    pictures: Sequence[Image.Image],
    *,
    names: Sequence[str] | None = None,
    labels: Sequence[Any] | None = None,
    statistics_pictures: Sequence[Image.Image] | None = None,
    statistics_labels: Sequence[Any] | None = None,
    movement: Mapping[str, float] | None = None,
    patch_sizes: Sequence[int] = (),
    batch_size: int = 32,
    warn: Warn = silent,
    watch: Watch = silent,
) -> Inspection:
    """Measure what the special tokens of a model do; it stays as it is, on its device.

    Args:
        model: any of ours: classifier, encoder, with any tokens or none; compiled, or with PEFT's additions, too.
        processor: its image processor.
        pictures: those to show. One that cannot be read is named and left out.
        names: what to call them.
        labels: their right answers: class indices, 0.0 and 1.0 per class, or {task: class index}; None or -100 where
            it is not known.
        statistics_pictures, statistics_labels: for the statistics. Default: the same.
        movement: how far training moved each token (`token_movement` in results.json).
        patch_sizes: in pixels, to compare.
        batch_size: images per forward pass, at most.
        warn, watch: told about pictures left out, and how far it is.

    Raises:
        ValueError: if there is no picture that can be read, or the model's states are not finite.
    """
    if statistics_pictures is None:
        statistics_pictures, statistics_labels = pictures, labels
    model = plain_model(model)
    config, usable = model.config, Usable(processor, model.config.num_channels, warn)
    readings = read_pictures(model, processor, pictures, names, labels, usable, watch)
    pixels = usable.pixels(statistics_pictures, watch)
    right = None if statistics_labels is None else [statistics_labels[place] for place in pixels]
    batches = PixelBatches(model, list(pixels.values()), right, batch_size)

    findings = statistics_of(model, batches, watch)
    effects, answers = None, None
    if is_classifier(model):
        num_passes = config.token_layout.num_prefix_tokens + 1
        watched = batches.watched(watch, num_passes)
        answers = answers_of(model, watched)
        effects = ablation_effects(model, watched, findings.mean_states, answers)
    rows = []
    if patch_sizes:
        watch("comparing patch sizes", 0, 1)
        rows = patch_size_advice(model, processor, Chosen(statistics_pictures, list(pixels)), right, patch_sizes)
    return Inspection(
        config=config,
        model_class=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        has_head=is_classifier(model),
        findings=findings,
        effects=effects,
        accuracy=None if answers is None else answers.accuracy(),
        verdicts=verdicts(config, findings, effects, movement, answers),
        artifacts=artifact_verdict(config, findings),
        depth=depth_story(config, findings),
        readings=readings,
        patch_sizes=rows,
        num_broken=len(usable.broken),
    )


def read_pictures(
    model: Any,
    processor: Any,
    pictures: Sequence[Image.Image],
    names: Sequence[str] | None,
    labels: Sequence[Any] | None,
    usable: "Usable",
    watch: Watch,
) -> list[Reading]:
    """A reading of each picture that can be read."""
    readings, known = [], labels_of(model.config)
    labels = labels if is_classifier(model) else None
    for place in range(len(pictures)):
        watch("looking at pictures", place, len(pictures))
        if usable.prepared(pictures, place) is not None:
            name = f"picture {place + 1}" if names is None else names[place]
            truth = None if labels is None else known.in_words(labels[place])
            readings.append(read_picture(model, processor, pictures[place], name, truth))
    return readings


def statistics_of(model: Any, batches: "PixelBatches", watch: Watch) -> Findings:
    """The statistics over all images.

    Raises:
        ValueError: for states that are not finite, of which nothing can be said.
    """
    collected = TokenStatistics(model)
    for pixel_values, _ in batches.watched(watch, 1, "collecting statistics")():
        collected.update(pixel_values)
    findings = collected.compute()
    if not bool(findings.patch_norms.isfinite().all() and findings.token_norms.isfinite().all()):
        raise ValueError("the model's hidden states are not finite: its weights are damaged, or it needs float32")
    return findings


# Pixels --------------------------------------------------------------------------------------------------------------


class Usable:
    """Prepares pictures, and names each that cannot be used, once."""

    def __init__(self, processor: Any, num_channels: int, warn: Warn) -> None:
        self.processor = processor
        self.num_channels = num_channels
        self.warn = warn
        self.broken: set[str] = set()  # what is wrong with each

    def prepared(self, pictures: Sequence[Image.Image], place: int) -> torch.Tensor | None:
        """The pixels [C, H, W] of one picture, or None if it cannot be used."""
        try:
            picture = pictures[place]
            pixels = self.processor(picture, return_tensors="pt")["pixel_values"][0]  # [C, H, W]
            check_channels(picture, pixels, self.num_channels)
        except (ValueError, OSError) as error:
            message = " ".join(str(error).split())
            if message not in self.broken:
                self.broken.add(message)
                self.warn(f"left out an image: {message}")
            return None
        return pixels

    def pixels(self, pictures: Sequence[Image.Image], watch: Watch) -> dict[int, torch.Tensor]:
        """The pixels of all pictures that can be used, by their place.

        Raises:
            ValueError: if there are none.
        """
        found = {}
        for place in range(len(pictures)):
            watch("reading pictures", place, len(pictures))
            if (pixels := self.prepared(pictures, place)) is not None:
                found[place] = pixels
        if not found:
            reason = f"none of the {len(pictures)} can be read, such as this: {min(self.broken)}" if pictures else ""
            raise ValueError(f"there are no images to look at: {reason or 'give one or more'}")
        return found


class PixelBatches:
    """Images in memory as batches of one shape, with the right answers [B, A] (`Answers.right`) or None.

    Args:
        pixels: [C, H, W] each.
        labels: as `inspect_model` takes them.
        batch_size: at most; fewer where one layer's attention weights would be more than MOST_WEIGHTS.
    """

    def __init__(self, model: Any, pixels: list[torch.Tensor], labels: list[Any] | None, batch_size: int) -> None:
        self.device = model.device
        self.pixels = pixels
        self.right = None
        if labels is not None and is_classifier(model):
            self.right = torch.stack([right_answers(label, model.config) for label in labels])  # [images, A]
        self.chunks = [
            places[start : start + size]
            for places in map(list, by_shape(dict(enumerate(pixels))))
            for size in [min(batch_size, most_at_once(model, pixels[places[0]].shape))]
            for start in range(0, len(places), size)
        ]

    def __call__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """All images once."""
        for chunk in self.chunks:
            pixel_values = torch.stack([self.pixels[place] for place in chunk]).to(self.device)  # [B, C, H, W]
            yield pixel_values, None if self.right is None else self.right[chunk]

    def watched(self, watch: Watch, num_passes: int, what: str = "holding tokens at their mean") -> Batches:
        """The same, to be called `num_passes` times, telling how far it is."""
        done = 0

        def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
            nonlocal done
            for batch in self():
                watch(what, done, num_passes * len(self.chunks))
                yield batch
                done += 1

        return batches


def most_at_once(model: Any, shape: torch.Size) -> int:
    """Images of a shape [C, H, W] whose attention weights in one layer are at most MOST_WEIGHTS, and at least one."""
    config = model.config
    (height, width), (patch_height, patch_width) = shape[-2:], config.patch_height_width
    num_tokens = config.token_layout.num_prefix_tokens + (height // patch_height) * (width // patch_width)
    maps = config.num_attention_heads * (2 if config.attention_type == "differential" else 1)
    return max(MOST_WEIGHTS // (maps * num_tokens**2), 1)

"""All measurements of the report (report.py).

They are maps of a few images, statistics over many images, and verdicts.

images -> pixels in memory -> token_statistics.py -> ablation.py -> diagnosis.py
       -> image_report.py, for the images to show

The images of `vitcls inspect` are opened in inspection_images.py.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..data.images import check_channels
from ..data.labels import get_label_space, is_multi_label
from ..inference.image_pass import ImageBatch, group_by_shape
from ..model.configuration_vitcls import ViTCLSConfig
from ..runtime.errors import format_error
from .ablation import (
    MIN_IMAGES,
    Ablations,
    Outputs,
    Predictions,
    Watch,
    collect_outputs,
    compute_ablations,
    count_images,
    encode_label,
)
from .diagnosis import Outcome, Verdict, diagnose_patches, diagnose_tokens, summarize_diagnosis
from .image_report import ImageReport, build_image_report
from .model_utils import count_tokens, evaluation_mode, is_classifier, unwrap_model
from .token_statistics import Findings, TokenStatistics
from .token_use import TokenUse


MAX_BATCH_BYTES = 2**29  # maximum memory of a batch in bytes (`get_max_batch_size`)
# Maximum number of images for effects and their null distributions, and maximum number of
# floating-point operations in a pass over these images; MIN_IMAGES images are always used
MAX_ABLATION_IMAGES = 256
MAX_ABLATION_FLOPS = 2.5e11

WarningCallback = Callable[[str], None]


@dataclass(frozen=True)
class Inspection:
    """Measurements that `inspect_model` returns.

    Attributes:
        use: the configuration of the model, and which tokens its outputs read.
        model_class: class name of the model.
        num_parameters: number of parameters of the model.
        findings: statistics over `findings.num_images` images.
        ablations: effects of each special token and each group, with null distributions
            (`compute_ablations`); empty if the effects were not measured.
        num_ablation_images: number of images for the effects and their null distributions.
        verdicts: one verdict per special token, and one per group of several special tokens. If the
            effects were not measured, only the tokens with a fault.
        patches: verdict on the patch norms.
        image_reports: reports of the images to show.
        num_unreadable: number of images that could not be read.
    """

    use: TokenUse
    model_class: str
    num_parameters: int
    findings: Findings
    ablations: Ablations
    num_ablation_images: int
    verdicts: list[Verdict]
    patches: Verdict
    image_reports: list[ImageReport]
    num_unreadable: int

    @property
    def config(self) -> Any:
        """Return the configuration of the model."""
        return self.use.config

    @property
    def summary(self) -> str:
        """Return the diagnosis in one line."""
        return summarize_diagnosis([*self.verdicts, self.patches])


def inspect_model(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    *,
    names: Sequence[str] | None = None,
    labels: Sequence[Any] | None = None,
    num_shown: int | None = None,
    has_ablations: bool = True,
    token_movement: Mapping[str, float] | None = None,
    batch_size: int = 32,
    on_warning: WarningCallback = lambda message: None,
    watch: Watch = lambda items, description: items,
) -> Inspection:
    """Measure the states, the attention and the effects of a model's special tokens.

    The model is not changed and stays on its device.

    Args:
        model: any ViTCLS classifier or encoder, with or without special tokens. The model may be
            compiled or have PEFT adapters.
        processor: the image processor of the model.
        images: images to measure and to show. Unreadable images cause a warning and are skipped.
        names: names of the images.
        labels: labels of the images: class indices, lists with 0.0 or 1.0 per class, or {task:
            class index}; None or -100 if unknown.
        num_shown: number of images to show, selected by their predictions (`select_images`).
            Default: all images.
        has_ablations: whether to measure the effect of each token, which takes up to 16 passes per
            token and image (`compute_ablations`). Without the effects, only the faults of tokens
            have a verdict.
        token_movement: distance by which training moved each token (`token_movement` in
            results.json).
        batch_size: maximum number of images per forward pass.
        on_warning: called with a message for each skipped image.
        watch: function that returns the same items and shows the progress, such as
            `rich.progress.track`.

    Raises:
        ValueError: if no image can be read, or the hidden states of the model are not finite.
    """
    model = unwrap_model(model)
    config: ViTCLSConfig = model.config
    use = TokenUse(config, is_classifier(model))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    measured_model = model if use.has_head else model.base_model

    pixels = read_pixels(processor, config.num_channels, images, on_warning, watch)
    known_labels: dict[int, Any] = {}
    if labels is not None and use.has_head:
        known_labels = {index: labels[index] for index in pixels}
    encoded_labels = {index: encode_label(label, config) for index, label in known_labels.items()}
    batches = InspectionBatches(measured_model, pixels, encoded_labels, batch_size)
    num_affordable = count_affordable_images(measured_model, num_parameters, pixels.values())

    ablations: Ablations = {}
    num_ablation_images = 0
    with evaluation_mode(model):
        findings, outputs = collect_statistics(measured_model, batches, watch)
        if has_ablations:
            num_ablated = min(max(num_affordable, MIN_IMAGES), MAX_ABLATION_IMAGES)
            sample_batches = batches.sample(num_ablated)
            ablations = compute_ablations(measured_model, use, sample_batches, watch)
            num_ablation_images = len(sample_batches.pixels)

    verdicts = diagnose_tokens(use, findings, ablations, token_movement)
    if not has_ablations:
        verdicts = [verdict for verdict in verdicts if verdict.headline is not Outcome.NOT_MEASURED]

    kinds_by_index = dict.fromkeys(pixels)
    if num_shown is not None:
        selected_images = select_images(outputs, config, num_shown)
        kinds_by_index = {
            batches.order[position]: kind for position, kind in selected_images.items()
        }

    label_space = get_label_space(config)
    image_reports = []
    for index, kind in watch(kinds_by_index.items(), "computing maps"):
        name = f"image {index + 1}" if names is None else names[index]
        truth = label_space.format_label(known_labels[index]) if known_labels else None
        image_reports.append(build_image_report(model, processor, images[index], name, truth, kind))

    return Inspection(
        use=use,
        model_class=type(model).__name__,
        num_parameters=num_parameters,
        findings=findings,
        ablations=ablations,
        num_ablation_images=num_ablation_images,
        verdicts=verdicts,
        patches=diagnose_patches(use, findings),
        image_reports=image_reports,
        num_unreadable=len(images) - len(pixels),
    )


def select_images(outputs: Outputs, config: Any, num_selected: int) -> dict[int, str | None]:
    """Return the indices of the most instructive images, with the kind of each image.

    Up to half of the selected images, or more if there are too few other images, have the most
    confident wrong predictions. About a quarter have the least confident correct or unlabeled
    predictions. The remaining images are evenly spaced. For an encoder, all selected images are
    evenly spaced and have no kind.
    """
    tasks = [
        predictions for predictions in outputs.values() if isinstance(predictions, Predictions)
    ]
    if not tasks:
        return dict.fromkeys(select_evenly_spaced(range(count_images(outputs)), num_selected))

    confidences = (
        torch.stack([compute_confidences(task.logits, config) for task in tasks])
        .amin(dim=0)
        .tolist()
    )
    sorted_indices = sorted(range(len(tasks[0])), key=lambda index: confidences[index])

    is_wrong = torch.stack(
        [((task.predicted != task.labels) & task.is_known).any(dim=1) for task in tasks]
    ).any(dim=0)
    other_indices = [index for index in sorted_indices if not is_wrong[index]]
    num_wrong = max((num_selected + 1) // 2, num_selected - len(other_indices))
    wrong_indices = [index for index in reversed(sorted_indices) if is_wrong[index]][:num_wrong]

    uncertain_indices = other_indices[: (num_selected + 3) // 4]
    num_typical = num_selected - len(wrong_indices) - len(uncertain_indices)
    typical_indices = select_evenly_spaced(
        sorted(other_indices[len(uncertain_indices) :]), num_typical
    )

    indices_by_kind = {
        "wrong": wrong_indices,
        "uncertain": uncertain_indices,
        "typical": typical_indices,
    }
    kinds = [(index, kind) for kind, indices in indices_by_kind.items() for index in indices]
    return dict(kinds[:num_selected])


def compute_confidences(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """Return the probability [images] of each prediction.

    For a multi-label model, it is the minimum over labels.
    """
    if is_multi_label(config):
        probabilities = logits.sigmoid()
        return probabilities.maximum(1 - probabilities).amin(dim=1)
    return logits.softmax(dim=1).amax(dim=1)


def select_evenly_spaced(indices: Sequence[int], num_selected: int) -> list[int]:
    """Return at most `num_selected` evenly spaced indices from `indices`."""
    num_selected = max(min(num_selected, len(indices)), 0)
    return [
        indices[(2 * number + 1) * len(indices) // (2 * num_selected)]
        for number in range(num_selected)
    ]


def collect_statistics(
    model: Any, batches: "InspectionBatches", watch: Watch
) -> tuple[Findings, Outputs]:
    """Return the statistics over all images, and the outputs of the same forward passes."""
    statistics = TokenStatistics(model)
    watched_batches = watch(batches, "collecting statistics")
    outputs = collect_outputs(model, watched_batches, statistics.update)
    findings = statistics.compute()
    if not bool(findings.patch_norms.isfinite().all() and findings.token_norms.isfinite().all()):
        raise ValueError(
            "The hidden states of the model are not finite. Check the weights, or load them in "
            "float32."
        )
    return findings, outputs


# Pixels -------------------------------------------------------------------------------------------


def read_pixels(
    processor: Any,
    num_channels: int,
    images: Sequence[Image.Image],
    on_warning: WarningCallback,
    watch: Watch,
) -> dict[int, torch.Tensor]:
    """Return the pixels [C, H, W] of each usable image by index, and warn about each other image.

    Raise ValueError if no image is usable.
    """
    pixels_by_index = {}
    error_messages = []

    for index in watch(range(len(images)), "reading images"):
        try:
            image = images[index]
            pixels = processor(image, return_tensors="pt")["pixel_values"][0]  # [C, H, W]
            check_channels(image, pixels, num_channels)
            pixels_by_index[index] = pixels
        except (ValueError, OSError) as error:
            error_messages.append(format_error(error))
            on_warning(f"skipped an image: {error_messages[-1]}")

    if not pixels_by_index:
        first_error = f" ({error_messages[0]})" if error_messages else ""
        raise ValueError(
            f"An inspection requires at least one image, but none of {len(images)} images can be "
            f"read{first_error}. Check the images."
        )
    return pixels_by_index


class InspectionBatches(Sequence):
    """Batches of equally shaped images in memory, with their labels.

    Batches are smaller than `batch_size` if full batches would require more than MAX_BATCH_BYTES of
    memory.

    Args:
        model: the model that processes the images.
        pixels: images [C, H, W] by index.
        labels: labels [A] by index (`Predictions.labels`); empty if they are unknown.
        batch_size: maximum number of images per batch.
    """

    def __init__(
        self,
        model: Any,
        pixels: dict[int, torch.Tensor],
        labels: dict[int, torch.Tensor],
        batch_size: int,
    ) -> None:
        self.model = model
        self.pixels = pixels
        self.labels = labels
        self.batch_size = batch_size

        self.index_batches: list[list[int]] = []
        for indices in map(list, group_by_shape(pixels)):
            size = min(batch_size, get_max_batch_size(model, pixels[indices[0]]))
            for start in range(0, len(indices), size):
                self.index_batches.append(indices[start : start + size])
        self.order = [index for batch_indices in self.index_batches for index in batch_indices]

    def __len__(self) -> int:
        return len(self.index_batches)

    def __getitem__(self, number: Any) -> Any:
        indices = self.index_batches[number]
        pixel_values = torch.stack([self.pixels[index] for index in indices])  # [B, C, H, W]
        labels = None
        if self.labels:
            labels = torch.stack([self.labels[index] for index in indices])  # [B, A]
        return ImageBatch(pixel_values, labels, indices)

    def sample(self, num_selected: int) -> "InspectionBatches":
        """Return the batches of a sample of at most `num_selected` evenly spaced images."""
        indices = select_evenly_spaced(self.order, num_selected)
        pixels = {index: self.pixels[index] for index in indices}
        return InspectionBatches(self.model, pixels, self.labels, self.batch_size)


def get_max_batch_size(model: Any, pixels: torch.Tensor) -> int:
    """Return the largest batch size for images [C, H, W] that fits in MAX_BATCH_BYTES, or 1.

    The estimate includes all hidden states, a few copies of the attention maps of one layer, and
    the activations of one MLP.
    """
    config = model.config
    num_tokens = count_tokens(model, pixels.unsqueeze(0))
    num_maps = config.num_attention_heads * (2 if config.attention_type == "differential" else 1)
    num_states = (config.num_hidden_layers + 8) * num_tokens * config.hidden_size
    num_activations = 2 * num_tokens * config.intermediate_size
    num_values = num_states + num_activations + 3 * num_maps * num_tokens**2
    return max(MAX_BATCH_BYTES // (4 * num_values), 1)


def count_affordable_images(model: Any, num_parameters: int, pixels: Iterable[torch.Tensor]) -> int:
    """Return the number of images that a pass of MAX_ABLATION_FLOPS operations can process."""
    flops = 2 * num_parameters * max(count_tokens(model, image.unsqueeze(0)) for image in pixels)
    return int(MAX_ABLATION_FLOPS / flops)

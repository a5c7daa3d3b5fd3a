"""All measurements of the report (report.py): maps of a few images, statistics over many images, and verdicts.

images -> pixels in memory -> token_statistics.py -> ablation.py -> diagnosis.py
       -> image_report.py, for the images to show

Images and labels of `vitcls inspect` (`open_images`), decoded on access:
    PATHS       files, folders and URLs; if a folder has the name of a class, the images in the folder have this label
    --dataset   a dataset, loaded as in `vitcls evaluate`
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.evaluated_images import load_evaluation_data
from ..data.held_out import HeldOutRecord
from ..data.images import ArrayImages, DatasetImages, check_channels
from ..data.label_matching import match_labels
from ..data.labels import get_label_space, is_multi_label
from ..data.options import DataOptions
from ..inference.image_pass import ImageBatch, group_by_shape, pass_over_images
from ..inference.inputs import build_list_input
from ..model.heads_vitcls import IGNORED_LABEL
from ..runtime.errors import format_error
from .ablation import (
    MIN_IMAGES,
    Ablations,
    Outputs,
    Predictions,
    Watch,
    compute_ablations,
    count_images,
    count_tokens,
    encode_labels,
    extract_outputs,
    join_outputs,
)
from .diagnosis import (
    Outcome,
    Verdict,
    diagnose_heads,
    diagnose_patches,
    diagnose_tasks,
    diagnose_tokens,
    summarize_diagnosis,
)
from .image_report import ImageReport, build_image_report
from .map_checks import MapCheck, check_maps
from .model_utils import is_classifier, unwrap_model
from .options import InspectOptions
from .token_statistics import Findings, TokenStatistics


MAX_BATCH_BYTES = 2**29  # maximum memory of a batch in bytes (`get_max_batch_size`)
# Maximum number of images for effects and their null distributions, and maximum number of
# floating-point operations in a pass over these images; MIN_IMAGES images are always used
MAX_ABLATION_IMAGES = 256
MAX_ABLATION_FLOPS = 2.5e11
# Minimum and maximum number of images for the checks of maps
MIN_CHECKED_IMAGES = 5
MAX_CHECKED_IMAGES = 16

WarningCallback = Callable[[str], None]


@dataclass(frozen=True)
class Inspection:
    """Measurements that `inspect_model` returns.

    Attributes:
        config: configuration of the model.
        model_class: class name of the model.
        num_parameters: number of parameters of the model.
        has_head: whether the model is a classifier.
        findings: statistics over `findings.num_images` images.
        ablations: effects of each special token and each group, with null distributions
            (`compute_ablations`); empty if the effects were not measured.
        num_ablation_images: number of images for the effects and their null distributions.
        verdicts: one verdict per special token, and one per group of several special tokens. If the
            effects were not measured, only the tokens with a fault.
        tasks: one verdict per task with known labels, over all images.
        heads: verdict on the attention heads.
        patches: verdict on the patch norms.
        image_reports: reports of the images to show.
        map_checks: checks of rollout and attribution (`check_maps`); empty unless the model is a
            small single-label classifier and there are at least MIN_CHECKED_IMAGES images.
        num_unreadable: number of images that could not be read.
    """

    config: Any
    model_class: str
    num_parameters: int
    has_head: bool
    findings: Findings
    ablations: Ablations
    num_ablation_images: int
    verdicts: list[Verdict]
    tasks: list[Verdict]
    heads: Verdict
    patches: Verdict
    image_reports: list[ImageReport]
    map_checks: dict[str, MapCheck]
    num_unreadable: int

    @property
    def summary(self) -> str:
        """Return the diagnosis in one line."""
        return summarize_diagnosis([*self.verdicts, *self.tasks, self.heads, self.patches])


def inspect_model(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    *,
    names: Sequence[str] | None = None,
    labels: Sequence[Any] | None = None,
    num_shown: int | None = None,
    has_ablations: bool = True,
    has_map_checks: bool = True,
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
        has_map_checks: whether to check rollout and attribution, which takes 40 passes per image
            (`check_maps`).
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
    config = model.config
    has_head = is_classifier(model)
    pixels_by_index = read_pixels(processor, config.num_channels, images, on_warning, watch)
    readable_indices = list(pixels_by_index)
    pixels = list(pixels_by_index.values())
    readable_labels = None if labels is None else [labels[index] for index in readable_indices]
    batches = InspectionBatches(model, pixels, encode_labels(readable_labels, model), batch_size)
    findings, outputs = collect_statistics(model, batches, watch)

    ablations: Ablations = {}
    num_ablation_images = 0
    if has_ablations:
        num_affordable = max(count_affordable_images(model, pixels), MIN_IMAGES)
        sample_batches = batches.sample(min(num_affordable, MAX_ABLATION_IMAGES))
        ablations = compute_ablations(model, sample_batches, watch)
        num_ablation_images = len(sample_batches.order)

    verdicts = diagnose_tokens(model, findings, ablations, token_movement)
    if not has_ablations:
        verdicts = [verdict for verdict in verdicts if verdict.headline is not Outcome.NOT_MEASURED]

    kinds_by_index = dict.fromkeys(readable_indices)
    if num_shown is not None:
        selected_images = select_images(outputs, config, num_shown)
        kinds_by_index = {
            readable_indices[batches.order[each]]: kind for each, kind in selected_images.items()
        }

    label_space = get_label_space(config)
    image_reports = []
    for index, kind in watch(kinds_by_index.items(), "computing maps"):
        name = f"image {index + 1}" if names is None else names[index]
        truth = label_space.format_label(labels[index]) if has_head and labels is not None else None
        image_reports.append(build_image_report(model, processor, images[index], name, truth, kind))

    return Inspection(
        config=config,
        model_class=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        has_head=has_head,
        findings=findings,
        ablations=ablations,
        num_ablation_images=num_ablation_images,
        verdicts=verdicts,
        tasks=diagnose_tasks(outputs),
        heads=diagnose_heads(findings),
        patches=diagnose_patches(config, findings, has_head),
        image_reports=image_reports,
        map_checks=check_sampled_maps(model, batches, watch) if has_map_checks else {},
        num_unreadable=len(images) - len(pixels),
    )


def check_sampled_maps(
    model: Any, batches: "InspectionBatches", watch: Watch
) -> dict[str, MapCheck]:
    """Return the checks of rollout and attribution for a few images.

    Each image requires about 40 forward passes. The dict is empty for fewer than MIN_CHECKED_IMAGES
    images, for large models, and for models other than single-label classifiers.
    """
    if len(batches.order) < MIN_CHECKED_IMAGES:
        return {}
    num_affordable = count_affordable_images(model, batches.pixels)
    if (
        not is_classifier(model)
        or model.config.tasks
        or is_multi_label(model.config)
        or num_affordable < MIN_IMAGES
    ):
        return {}
    sample_batches = batches.sample(
        min(max(num_affordable // 8, MIN_CHECKED_IMAGES), MAX_CHECKED_IMAGES)
    )
    images = [
        sample_batches.pixels[index].unsqueeze(0).to(model.device) for index in sample_batches.order
    ]
    return check_maps(model, watch(images, "checking maps"))


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
    """Return the probability [images] of each prediction; for a multi-label model, the minimum over labels."""
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
    batch_outputs = []
    watched = map(batches.build, watch(batches.index_batches, "collecting statistics"))
    for batch, outputs in pass_over_images(statistics.update, watched, model.device):
        batch_outputs.append(extract_outputs(model, outputs, batch.labels))

    findings = statistics.compute()
    if not bool(findings.patch_norms.isfinite().all() and findings.token_norms.isfinite().all()):
        raise ValueError(
            "The hidden states of the model are not finite. Check the weights, or load them in "
            "float32."
        )
    return findings, join_outputs(batch_outputs)


# Pixels -------------------------------------------------------------------------------------------


def read_pixels(
    processor: Any,
    num_channels: int,
    images: Sequence[Image.Image],
    on_warning: WarningCallback,
    watch: Watch,
) -> dict[int, torch.Tensor]:
    """Return a dict that maps indices to the pixels [C, H, W] of all usable images, and warn about each other image.

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


class InspectionBatches:
    """Batches of equally shaped images [C, H, W] in memory, with labels [B, A] (`Predictions.labels`) or None.

    Batches are smaller than `batch_size` if full batches would require more than MAX_BATCH_BYTES of
    memory.
    """

    def __init__(
        self, model: Any, pixels: list[torch.Tensor], labels: torch.Tensor | None, batch_size: int
    ) -> None:
        self.model = model
        self.pixels = pixels
        self.labels = labels
        self.batch_size = batch_size

        self.index_batches: list[list[int]] = []
        for indices in map(list, group_by_shape(dict(enumerate(pixels)))):
            size = min(batch_size, get_max_batch_size(model, pixels[indices[0]]))
            for start in range(0, len(indices), size):
                self.index_batches.append(indices[start : start + size])
        self.order = [index for batch_indices in self.index_batches for index in batch_indices]

    def __call__(self) -> Iterator[ImageBatch]:
        """Yield each batch of images and labels once."""
        yield from map(self.build, self.index_batches)

    def build(self, indices: list[int]) -> ImageBatch:
        """Return the images and labels of one batch."""
        pixel_values = torch.stack([self.pixels[index] for index in indices])  # [B, C, H, W]
        labels = None if self.labels is None else self.labels[indices]
        return ImageBatch(pixel_values, labels, indices)

    def sample(self, num_selected: int) -> "InspectionBatches":
        """Return the batches of a sample of at most `num_selected` evenly spaced images."""
        indices = [
            self.order[position]
            for position in select_evenly_spaced(range(len(self.order)), num_selected)
        ]
        pixels = [self.pixels[index] for index in indices]
        labels = None if self.labels is None else self.labels[indices]
        return InspectionBatches(self.model, pixels, labels, self.batch_size)


def get_max_batch_size(model: Any, pixels: torch.Tensor) -> int:
    """Return the largest batch size for images [C, H, W] that require at most MAX_BATCH_BYTES, or 1.

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


def count_affordable_images(model: Any, pixels: Sequence[torch.Tensor]) -> int:
    """Return the number of images that a pass of MAX_ABLATION_FLOPS floating-point operations can process."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = 2 * num_parameters * max(count_tokens(model, image.unsqueeze(0)) for image in pixels)
    return int(MAX_ABLATION_FLOPS / flops)


# Images of `vitcls inspect`
# ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InspectionImages:
    """Images with names, labels (as in `inspect_model`; None if unknown) and a description of the source."""

    images: ArrayImages | DatasetImages
    names: Sequence[str]
    labels: Sequence[Any] | None
    source: str

    def build_arguments(self, num_shown: int, num_measured: int) -> dict[str, Any]:
        """Return arguments of `inspect_model`: `num_measured` images, of which `num_shown` are shown.

        The images are drawn at random, because datasets are often sorted by class.
        """
        drawn = np.random.default_rng(0).permutation(len(self.names))[:num_measured]
        indices = np.sort(drawn).tolist()
        return {
            "images": self.images.select(indices),
            "names": [self.names[index] for index in indices],
            "labels": None if self.labels is None else [self.labels[index] for index in indices],
            "num_shown": num_shown,
        }


def open_images(
    options: InspectOptions, model: Any, record: HeldOutRecord | None = None
) -> InspectionImages:
    """Open the images of PATHS or `--dataset`.

    `record` is the held-out record of the model's training run.

    Raises:
        ValueError: if there are no images, the dataset cannot be read, or its labels do not match
            the model.
    """
    if options.dataset is not None:
        return load_from_dataset(options, options.dataset, model, record)
    list_input = build_list_input(options.paths)
    files = [str(content) for content in list_input.contents]
    for file in files:
        if "://" not in file and not Path(file).exists():
            raise ValueError(f"Image {file} does not exist. Check the path.")

    names = [name if "://" in name else Path(name).name for name in list_input.names]
    source = ", ".join(map(get_short_name, options.paths))
    return InspectionImages(
        DatasetImages.from_list(files), names, get_folder_labels(files, model), source
    )


def name_images(images: ArrayImages | DatasetImages, source: str) -> list[str]:
    """Return the path of each image within the dataset or, if it has none, the source and the number of its row."""
    if isinstance(images, ArrayImages):
        return [f"{source} {index}" for index in range(len(images))]
    return [f"{source} {name}" if name.isdigit() else name for name in images.get_names()]


def get_short_name(path: str) -> str:
    """Return the last component of a path; URLs are returned unchanged."""
    return path if "://" in path else Path(path).resolve().name


def get_folder_labels(files: Sequence[str], model: Any) -> list[int] | None:
    """Return the class index of each file from the name of its folder, or None if no folder has such a name.

    The index is that of the class with the same name, or IGNORED_LABEL if there is no such class.
    """
    config = model.config
    if (
        not is_classifier(model)
        or config.tasks
        or config.problem_type == "multi_label_classification"
    ):
        return None
    class_indices = {name: index for index, name in enumerate(get_label_space(config).names)}
    labels = [class_indices.get(Path(file).resolve().parent.name, IGNORED_LABEL) for file in files]
    return labels if any(label != IGNORED_LABEL for label in labels) else None


def load_from_dataset(
    options: InspectOptions, dataset: str, model: Any, record: HeldOutRecord | None
) -> InspectionImages:
    """Load one split, with the label indices of the model, or without labels if the model is not a classifier."""
    column_options = {
        name: getattr(options, name) for name in ("image_column", "label_column", "label_separator")
    }
    has_head = is_classifier(model)
    data_options = DataOptions(dataset, **column_options)

    data = load_evaluation_data(data_options, options.split, record, use_labels=has_head)
    labels: Sequence[Any] | None = None
    if has_head:
        labels = match_labels(data.images, data.label_space, get_label_space(model.config)).labels

    dataset_name = get_short_name(dataset)
    names = name_images(data.images.images, dataset_name)
    return InspectionImages(
        data.images.images, names, labels, f"{dataset_name}, {data.part.describe()}"
    )

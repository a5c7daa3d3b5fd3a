"""All measurements of the report (report.py): statistics over many images, effects and verdicts.

images -> batches in random order (inference/image_pass.py) -> token_statistics.py -> ablation.py
       -> diagnosis.py, and the images to show

The images of `vitcls inspect` are opened in inspection_images.py. The photos that the report shows
are measured one by one (photo.py).
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch

from ..data.aspect_ratio import has_fixed_size
from ..data.images import LabeledImages
from ..data.labels import UNLABELED, get_label_space, is_multi_label
from ..inference.image_pass import ImageBatch, prepare_batches
from ..inference.load_model import choose_batch_size
from ..model.heads_vitcls import IGNORED_LABEL
from .ablation import (
    MIN_IMAGES,
    Ablations,
    Outputs,
    Predictions,
    Watch,
    collect_outputs,
    compute_ablations,
)
from .diagnosis import Outcome, Verdict, diagnose_patches, diagnose_tokens, summarize_diagnosis
from .model_utils import count_tokens, evaluation_mode, is_classifier, unwrap_model
from .token_statistics import Findings, TokenStatistics
from .token_use import TokenUse


MAX_BATCH_SIZE = 32  # default number of images per forward pass on GPUs
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
        shown_images: index of each image to show, and why (`select_images`); None for an encoder.
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
    shown_images: dict[int, str | None]
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
    images: Sequence[Any],
    *,
    labels: Sequence[Any] | None = None,
    num_shown: int = 6,
    has_ablations: bool = True,
    token_movement: Mapping[str, float] | None = None,
    batch_size: int | None = None,
    on_warning: WarningCallback = lambda message: None,
    watch: Watch = lambda items, description: items,
) -> Inspection:
    """Measure the states, the attention and the effects of a model's special tokens.

    The model is not changed and stays on its device.

    Args:
        model: any ViTCLS classifier or encoder, with or without special tokens. The model may be
            compiled or have PEFT adapters.
        processor: the image processor of the model.
        images: images to measure. Unreadable images cause a warning and are skipped.
        labels: labels of the images, as in a dataset (data/labels.py); -100 if unknown.
        num_shown: number of images to select for the report.
        has_ablations: whether to measure the effect of each token, which takes up to 16 passes per
            token and image (`compute_ablations`). Without the effects, only the faults of tokens
            have a verdict.
        token_movement: distance by which training moved each token (`token_movement` in
            results.json).
        batch_size: number of images per forward pass. Default: chosen for the device.
        on_warning: called with a message for each skipped image.
        watch: function that returns the same items and shows the progress, such as
            `rich.progress.track`.

    Raises:
        ValueError: if no image can be read, or the hidden states of the model are not finite.
    """
    model = unwrap_model(model)
    config = model.config
    use = TokenUse(config, is_classifier(model))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    measured_model = model if use.has_head else model.base_model

    batch_size = choose_batch_size(batch_size, config, processor, model.device, MAX_BATCH_SIZE)
    batches = read_batches(
        use, processor, images, labels if use.has_head else None, batch_size, on_warning, watch
    )
    indices = [index for batch in batches for index in batch.indices]

    ablations: Ablations = {}
    ablation_batches: list[ImageBatch] = []
    with evaluation_mode(model):
        findings, outputs = collect_statistics(measured_model, batches, watch)
        if has_ablations:
            pixel_values: Any = batches[0].pixel_values
            flops = 2 * num_parameters * count_tokens(model, pixel_values)
            num_affordable = max(int(MAX_ABLATION_FLOPS / flops), MIN_IMAGES)
            ablation_batches = take_images(batches, min(num_affordable, MAX_ABLATION_IMAGES))
            ablations = compute_ablations(measured_model, use, ablation_batches, watch)

    verdicts = diagnose_tokens(use, findings, ablations, token_movement)
    if not has_ablations:
        verdicts = [verdict for verdict in verdicts if verdict.headline is not Outcome.NOT_MEASURED]

    shown_images: dict[int, str | None] = dict.fromkeys(indices[:num_shown])
    if use.has_head:
        shown_images = {
            indices[position]: kind
            for position, kind in select_images(*rate_outputs(outputs, config), num_shown).items()
        }
    return Inspection(
        use=use,
        model_class=type(model).__name__,
        num_parameters=num_parameters,
        findings=findings,
        ablations=ablations,
        num_ablation_images=sum(len(batch.indices) for batch in ablation_batches),
        verdicts=verdicts,
        patches=diagnose_patches(use, findings),
        shown_images=shown_images,
        num_unreadable=len(images) - len(indices),
    )


# Images -------------------------------------------------------------------------------------------


def read_batches(
    use: TokenUse,
    processor: Any,
    images: Sequence[Any],
    labels: Sequence[Any] | None,
    batch_size: int,
    on_warning: WarningCallback,
    watch: Watch,
) -> list[ImageBatch]:
    """Return the preprocessed images in random order, because datasets are often sorted by class.

    Raise ValueError if no image is readable.
    """
    config = use.config
    if not has_fixed_size(processor):
        batch_size = 1
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    prepared = prepare_batches(
        LabeledImages(images, [IGNORED_LABEL] * len(images) if labels is None else labels),
        parts,
        processor,
        label_space=UNLABELED if labels is None else get_label_space(config),
        num_channels=config.num_channels,
    )

    batches = []
    error_messages: list[str] = []
    for _, batch in zip(watch(parts, "reading images"), prepared, strict=True):
        error_messages += batch.error_messages.values()
        for message in batch.error_messages.values():
            on_warning(f"skipped an image: {message}")
        if labels is None:
            batch.labels = None
        elif config.tasks:
            batch.labels = torch.stack([batch.labels[task] for task in config.task_labels()], dim=1)
        if batch.indices:
            batches.append(batch)

    if not batches:
        first_error = f" ({error_messages[0]})" if error_messages else ""
        raise ValueError(
            f"An inspection requires at least one image, but none of {len(images)} images can be "
            f"read{first_error}. Check the images."
        )
    return batches


def take_images(batches: Sequence[ImageBatch], num_images: int) -> list[ImageBatch]:
    """Return the first `num_images` images of the batches."""
    taken: list[ImageBatch] = []
    for batch in batches:
        assert batch.pixel_values is not None
        count = min(num_images, len(batch.indices))
        labels = None if batch.labels is None else batch.labels[:count]
        if count:
            taken.append(ImageBatch(batch.pixel_values[:count], labels, batch.indices[:count]))
        num_images -= count
    return taken


def collect_statistics(
    model: Any, batches: Sequence[ImageBatch], watch: Watch
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


# Images to show -----------------------------------------------------------------------------------


def rate_outputs(
    outputs: Outputs, config: Any
) -> tuple[list[float], list[bool], Sequence[Hashable]]:
    """Return the arguments of `select_images` for the outputs of a classifier."""
    tasks: list[Predictions] = list(outputs.values())
    confidences = torch.stack([compute_confidences(task.logits, config) for task in tasks])
    is_wrong = torch.stack(
        [((task.predicted != task.labels) & task.is_known).any(dim=1) for task in tasks]
    ).any(dim=0)

    classes: list[int] = [0] * len(is_wrong)
    if len(tasks) == 1 and not is_multi_label(config):
        (task,) = tasks
        classes = torch.where(task.is_known, task.labels, task.predicted)[:, 0].tolist()
    return confidences.amin(dim=0).tolist(), is_wrong.tolist(), classes


def select_images(
    confidences: Sequence[float],
    is_wrong: Sequence[bool],
    classes: Sequence[Hashable],
    num_selected: int,
) -> dict[int, str | None]:
    """Return the indices of the most instructive images, with the kind of each image.

    Kinds take turns: the most confident wrong prediction, the least confident right prediction, a
    typical image, and so on. Each is of a class of which the fewest images are selected.
    """
    order = sorted(range(len(confidences)), key=confidences.__getitem__)
    right = [index for index in order if not is_wrong[index]]
    rankings = {
        "wrong": [index for index in reversed(order) if is_wrong[index]],
        "uncertain": right,
        "typical": right[::-1],
    }
    selected: dict[int, str | None] = {}
    kinds = cycle(rankings)
    while len(selected) < min(num_selected, len(order)):
        kind = next(kinds)
        num_selected_by_class = Counter(classes[index] for index in selected)
        candidates = [index for index in rankings[kind] if index not in selected]
        if candidates:
            best = min(candidates, key=lambda index: num_selected_by_class[classes[index]])
            selected[best] = kind
    return selected


def compute_confidences(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """Return the probability [images] of each prediction.

    For a multi-label model, it is the minimum over labels.
    """
    if is_multi_label(config):
        probabilities = logits.sigmoid()
        return probabilities.maximum(1 - probabilities).amin(dim=1)
    return logits.softmax(dim=1).amax(dim=1)

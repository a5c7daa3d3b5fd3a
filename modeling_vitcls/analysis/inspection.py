"""All measurements of the report (report.py): effects of the special tokens, faults, and patches.

images -> batches in random order (inference/image_pass.py) -> one pass: outputs, states, patches
       -> ablation.py, faults.py, and the images to show

The images of `vitcls inspect` are opened in inspection_images.py. The photos that the report shows
are measured one by one (photo.py).
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch

from ..data.aspect_ratio import get_output_size, has_fixed_size
from ..data.labels import get_label_space, is_multi_label
from ..inference.image_pass import ImageBatch, prepare_batches, read_pixels
from ..inference.load_model import choose_batch_size
from ..inference.token_names import SINGLE_TOKEN_NAMES, get_token_names
from ..model.heads_vitcls import IGNORED_LABEL
from .ablation import (
    MIN_IMAGES,
    Ablations,
    Effect,
    Outputs,
    Watch,
    collect_labels,
    compute_ablations,
    gather_outputs,
    get_token_keys,
    predict_labels,
)
from .faults import OUTLIER_RATIO, find_identical_tokens, find_unmoved_tokens, is_outlier
from .model_utils import evaluation_mode, is_classifier, unwrap_model
from .token_use import TokenUse


MAX_BATCH_SIZE = 32  # On GPUs, unless the person sets one
# Maximum number of images for effects and their null distributions, and maximum number of
# floating-point operations in a pass over these images; MIN_IMAGES images are always used
MAX_ABLATION_IMAGES = 256
MAX_ABLATION_FLOPS = 2.5e11


@dataclass(frozen=True)
class Inspection:
    """Measurements that `inspect_model` returns.

    Attributes:
        config: configuration of the model.
        model_class: class name of the model.
        num_parameters: number of parameters of the model.
        num_images: number of images that were measured.
        ablations: effects of each special token and each group, with null distributions
            (`compute_ablations`); empty if the effects were not measured.
        num_ablation_images: number of images for the effects and their null distributions.
        faults: one sentence per identical token, and per token that training did not move.
        outlier_share: fraction of the patches with outlier norms after `outlier_layer`, the last
            layer in which the patches are used.
        shown_images: index of each image to show, and why (`select_images`); None for an encoder.
        num_unreadable: number of images that could not be read.
    """

    config: Any
    model_class: str
    num_parameters: int
    num_images: int
    ablations: Ablations
    num_ablation_images: int
    faults: list[str]
    outlier_share: float
    outlier_layer: int
    shown_images: dict[int, str | None]
    num_unreadable: int

    @property
    def effects(self) -> list[tuple[str, str, Effect]]:
        """Rows of the table: name of the token or group, name of the output, and effect."""
        keys = get_token_keys(self.config.token_layout)
        names = dict(zip(keys, get_token_names(self.config), strict=True))
        rows = []
        for key, by_output in self.ablations.items():
            name = names.get(key) or f"all {SINGLE_TOKEN_NAMES[key]} tokens"
            rows += [(name, output, effect) for output, effect in by_output.items()]
        return rows

    @property
    def lines(self) -> list[str]:
        """One sentence per fault, and one about the patches."""
        return [
            *self.faults,
            f"{self.outlier_share:.2%} of the patches have outlier norms after layer "
            f"{self.outlier_layer} (more than {OUTLIER_RATIO:g} times the median of the image)",
        ]


@dataclass(frozen=True)
class ReadImages:
    """The preprocessed images of an inspection, in random order.

    Attributes:
        batches: batches of readable images, with their labels if there are any.
        error_messages: one message per unreadable image.
    """

    batches: list[ImageBatch]
    error_messages: list[str]

    @property
    def indices(self) -> list[int]:
        """Index of each readable image, in the order of the batches."""
        return [index for batch in self.batches for index in batch.indices]


def read_images(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    labels: Sequence[Any] | None = None,
    batch_size: int | None = None,
    watch: Watch = lambda items, description: items,
) -> ReadImages:
    """Preprocess images in random order, because datasets are often sorted by class.

    Args:
        model: the model that will be inspected.
        processor: the image processor of the model.
        images: images of any type that the image processor takes.
        labels: labels of the images for a classifier, as in a dataset (data/labels.py); None if
            unknown.
        batch_size: number of images per forward pass. Default: chosen for the device.
        watch: function that returns the same items and shows the progress, such as
            `rich.progress.track`.

    Raises:
        ValueError: if no image can be read.
    """
    model = unwrap_model(model)
    config = model.config
    image_size = get_output_size(processor, config.image_height_width)
    # Images of several sizes cannot be stacked.
    if not has_fixed_size(processor):
        batch_size = 1
    batch_size = choose_batch_size(batch_size, config, image_size, model.device, MAX_BATCH_SIZE)
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    prepare = partial(read_pixels, images, processor, config.num_channels)
    prepared = prepare_batches(prepare, parts)

    batches = []
    error_messages: list[str] = []
    for _, batch in zip(watch(parts, "reading images"), prepared, strict=True):
        error_messages += batch.error_messages.values()
        if labels is not None:
            space = get_label_space(config)
            batch.labels = space.collate([labels[index] for index in batch.indices])
        if batch.indices:
            batches.append(batch)

    if not batches:
        first_error = f" ({error_messages[0]})" if error_messages else ""
        raise ValueError(
            f"An inspection requires at least one image, but none of {len(images)} images can be "
            f"read{first_error}. Check the images."
        )
    return ReadImages(batches, error_messages)


def inspect_model(
    model: Any,
    images: ReadImages,
    *,
    num_shown: int = 6,
    has_ablations: bool = True,
    token_movement: Mapping[str, float] | None = None,
    watch: Watch = lambda items, description: items,
) -> Inspection:
    """Measure the effects of a model's special tokens, their faults, and the patch norms.

    The model is not changed and stays on its device.

    Args:
        model: any ViTCLS classifier or encoder, with or without special tokens. The model may be
            compiled or have PEFT adapters.
        images: images to measure (`read_images`).
        num_shown: number of images to select for the report.
        has_ablations: whether to measure the effect of each token, which takes up to 16 passes per
            token and image (`compute_ablations`).
        token_movement: distance by which training moved each token (`token_movement` in
            results.json).
        watch: function that returns the same items and shows the progress.

    Raises:
        ValueError: if the hidden states of the model are not finite.
    """
    model = unwrap_model(model)
    config = model.config
    use = TokenUse(config, is_classifier(model))
    # Heads of other kinds, such as a decoder of pixels, say nothing about the tokens.
    measured_model = model if use.has_head else model.base_model
    with evaluation_mode(model):
        has_several_labels = is_multi_label(config)
        ablation_batches = take_images(model, images.batches) if has_ablations else []
        outputs, states, outlier_share = measure_states(measured_model, use, images.batches, watch)
        ablations = compute_ablations(
            measured_model, use, ablation_batches, has_several_labels, watch
        )

    token_keys = get_token_keys(config.token_layout)
    labels = collect_labels(images.batches, config)
    shown_images: dict[int, str | None] = dict.fromkeys(images.indices[:num_shown])
    if use.has_head:
        rated = rate_outputs(outputs, labels, has_several_labels)
        shown_images = {
            images.indices[position]: kind
            for position, kind in select_images(*rated, num_shown).items()
        }
    unmoved = find_unmoved_tokens(token_keys, token_movement or {})
    return Inspection(
        config=config,
        model_class=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_images=len(images.indices),
        ablations=ablations,
        num_ablation_images=sum(len(batch.indices) for batch in ablation_batches),
        faults=describe_faults(use, states, unmoved),
        outlier_share=outlier_share,
        outlier_layer=use.num_layers[-1],
        shown_images=shown_images,
        num_unreadable=len(images.error_messages),
    )


def describe_faults(
    use: TokenUse, states: Mapping[int, torch.Tensor], unmoved: Sequence[int]
) -> list[str]:
    """Write one sentence per identical token, and per token that training did not move."""
    names = get_token_names(use.config)
    *used_layers, _ = use.num_layers
    # CLS tokens of tasks start as twins, and each has a classifier of its own.
    identical = {} if use.config.tasks else find_identical_tokens(states, used_layers)
    return [
        *(
            f"{names[index]}: identical to {names[other]} after layer {layer}"
            for index, (other, layer) in identical.items()
        ),
        *(f"{names[index]}: not moved by training, which moved others" for index in unmoved),
    ]


# Images -------------------------------------------------------------------------------------------


def take_images(model: Any, batches: Sequence[ImageBatch]) -> list[ImageBatch]:
    """Take the first images of the batches, as many as effects can be measured on.

    Effects take up to 16 passes per token, so a large model measures them on fewer images. The
    order of the batches is random, so the first images are a sample.
    """
    assert batches[0].pixel_values is not None, "`read_images` keeps only batches with images"
    grid_size = model.base_model.embeddings.patch_embeddings.get_grid_size(batches[0].pixel_values)
    num_tokens = model.config.token_layout.get_num_tokens(*grid_size)
    flops = 2 * sum(parameter.numel() for parameter in model.parameters()) * num_tokens
    num_affordable = max(int(MAX_ABLATION_FLOPS / flops), MIN_IMAGES)
    num_left = min(num_affordable, MAX_ABLATION_IMAGES)

    taken: list[ImageBatch] = []
    for batch in batches:
        assert batch.pixel_values is not None, "`read_images` keeps only batches with images"
        count = min(num_left, len(batch.indices))
        labels = None if batch.labels is None else batch.labels[:count]
        if count:
            taken.append(ImageBatch(batch.pixel_values[:count], labels, batch.indices[:count]))
        num_left -= count
    return taken


def measure_states(
    model: Any, use: TokenUse, batches: Sequence[ImageBatch], watch: Watch
) -> tuple[Outputs, dict[int, torch.Tensor], float]:
    """Run the model on all images once, for the outputs, the faults and the outliers.

    Returns the outputs, the states [images, S, D] of the special tokens by layer (only those layers
    after which tokens are compared), and the fraction of patches with outlier norms.

    Raise ValueError if the states are not finite.
    """
    layout = model.config.token_layout
    *used_layers, patch_layer = use.num_layers
    parts: dict[int, list[torch.Tensor]] = {layer: [] for layer in used_layers}
    outliers = []

    def run(pixel_values: torch.Tensor) -> Any:
        outputs = model(pixel_values, output_hidden_states=True)
        for layer, states in parts.items():
            special = outputs.hidden_states[layer][:, : layout.num_prefix_tokens]
            states.append(special.float().cpu())
        patches = outputs.hidden_states[patch_layer][:, layout.patches]
        if not all(state.isfinite().all() for state in outputs.hidden_states):
            raise ValueError(
                "The hidden states of the model are not finite. Check the weights, or load them in "
                "float32."
            )
        outliers.append(is_outlier(patches).flatten().cpu())
        return outputs

    outputs = gather_outputs(model, watch(batches, "measuring states"), run)
    special_states = {layer: torch.cat(states) for layer, states in parts.items()}
    return outputs, special_states, torch.cat(outliers).float().mean().item()


# Images to show -----------------------------------------------------------------------------------


def rate_outputs(
    outputs: Outputs, labels: Mapping[str, torch.Tensor], has_several_labels: bool
) -> tuple[list[float], list[bool], Sequence[Hashable]]:
    """Compute the arguments of `select_images` for the outputs of a classifier."""
    predicted = {task: predict_labels(rows, has_several_labels) for task, rows in outputs.items()}
    confidences = torch.stack(
        [compute_confidences(torch.stack(rows), has_several_labels) for rows in outputs.values()]
    )
    is_wrong = torch.zeros(confidences.shape[1], dtype=torch.bool)
    for task, known in labels.items():
        is_wrong |= ((predicted[task] != known) & (known != IGNORED_LABEL)).any(dim=1)

    classes: list[int] = [0] * len(is_wrong)
    if len(outputs) == 1 and not has_several_labels:
        (shown,) = predicted.values()
        for known in labels.values():
            shown = torch.where(known != IGNORED_LABEL, known, shown)
        classes = shown[:, 0].tolist()
    return confidences.amin(dim=0).tolist(), is_wrong.tolist(), classes


def select_images(
    confidences: Sequence[float],
    is_wrong: Sequence[bool],
    classes: Sequence[Hashable],
    num_selected: int,
) -> dict[int, str | None]:
    """Select the most instructive images: index -> kind of image.

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
            # Among classes that are shown equally often, `min` takes the first of the ranking.
            best = min(candidates, key=lambda index: num_selected_by_class[classes[index]])
            selected[best] = kind
    return selected


def compute_confidences(logits: torch.Tensor, has_several_labels: bool) -> torch.Tensor:
    """Compute the probability [images] of each prediction.

    With several labels per image, it is the minimum over labels.
    """
    if has_several_labels:
        probabilities = logits.sigmoid()
        return probabilities.maximum(1 - probabilities).amin(dim=1)
    return logits.softmax(dim=1).amax(dim=1)

"""What a page shows (report.py): effects of the special tokens, faults, patches, and photos.

images -> batches in random order (inference/image_pass.py) -> one pass: outputs, special tokens, layers
       -> effects (evaluation/token_effects.py), faults, and the images to show -> photo.py, one by one

The images of `vitcls inspect` are opened in inspect_tokens.py.

    trace_images(model, batches)              outputs, special tokens and the table of the layers
    list_faults(use, states, movement)
        find_identical_tokens(...)            tokens that do the work of another token
        find_unmoved_tokens(...)              tokens that training did not reach
    describe_layer(...)                       among others, patches that store something global (Darcet et al. 2023)

A token's output in a layer counts only if an output of the model depends on it (`TokenUse`).
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.images import LabeledImages
from ..data.labels import UNLABELED, LabelSpace
from ..evaluation.token_effects import (
    Effect,
    Effects,
    Outputs,
    collect_labels,
    gather_outputs,
    list_token_sets,
    measure_effects,
    read_batches,
)
from ..inference.image_pass import ImageBatch
from ..inference.interventions import LayerRange, find_layers
from ..inference.token_names import read_gates
from ..model.heads_vitcls import IGNORED_LABEL
from ..model.token_attention_vitcls import compute_attention_rows, record_attention
from ..model.token_layout_vitcls import TokenLayout
from .photo import measure_photo
from .sheet import ShownPhoto
from .token_use import TokenUse, find_token_use


MAX_BATCH_SIZE = 32  # On GPUs, unless the person sets one
# Maximum number of images for effects, and of floating-point operations in a pass over these images;
# the first MIN_EFFECT_IMAGES are always used
MAX_EFFECT_IMAGES = 256
MIN_EFFECT_IMAGES = 32
MAX_FLOPS = 6e11
MIN_OUTLIER_SHARE = 1e-4  # Below it, a sentence about outlier patches says nothing

ChosenPhotos = Sequence[tuple[Any, dict[str, Any]]]  # Images, and other fields of `ShownPhoto`
# (items, description) -> items, with a progress bar
Watch = Callable[[Collection[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Inspection:
    """Measurements of all images that `inspect_images` returns.

    Attributes:
        config: configuration of the model.
        model_class: class name of the model.
        num_parameters: number of parameters of the model.
        num_images: number of images that were measured.
        effects: of each special token and each group of several (`measure_effects`); empty if they were
            not measured.
        layer_rows: rows of the table of the layers: `layer` (from 1), `group` of tokens, and means over
            images of the `norm` before the final norm, the `attention_received` as a multiple of a
            uniform share, the `outlier_share` and the `similarity` to the layer before (cosine).
        gates: gate of each gated token, by its name: 0 hides the token, 1 makes it ordinary.
        faults: one sentence per identical token, and per token that training did not move.
        outlier_share: fraction of the patches with outlier norms after `outlier_layer`, the last
            layer in which the patches are used.
        error_messages: one message per image that could not be read.
    """

    config: Any
    model_class: str
    num_parameters: int
    num_images: int
    effects: Effects
    layer_rows: list[dict[str, Any]]
    gates: dict[str, float]
    faults: list[str]
    outlier_share: float
    outlier_layer: int
    error_messages: list[str]

    @property
    def effect_rows(self) -> list[tuple[str, str, str, Effect]]:
        """Rows of the table: name of the token or group, its group, name of the output, and effect."""
        return [
            (tokens.name, tokens.group, output, effect)
            for tokens in list_token_sets(self.config)
            for output, effect in self.effects.get(tokens.name, {}).items()
        ]

    @property
    def effect_records(self) -> list[dict[str, Any]]:
        """The same rows as numbers."""
        return [
            {
                "token": token,
                "group": group,
                "output": output,
                "verdict": effect.verdict,
                "gate": self.gates.get(token),
                "num_images": effect.hidden.losses.shape[1],
                "hidden": effect.hidden.build_record(),
                "content": effect.content.build_record(),
            }
            for token, group, output, effect in self.effect_rows
        ]

    @property
    def lines(self) -> list[str]:
        """One sentence per fault, and one about outlier patches, if there are any."""
        lines = list(self.faults)
        if self.outlier_share >= MIN_OUTLIER_SHARE:
            lines.append(
                f"{self.outlier_share:.2%} of the patches have outlier norms after layer "
                f"{self.outlier_layer} (more than {OUTLIER_RATIO:g} times the median of the image)"
            )
        return lines


def inspect_images(
    model: Any,
    processor: Any,
    images: LabeledImages,
    label_space: LabelSpace = UNLABELED,
    *,
    batch_size: int,
    chosen: ChosenPhotos = (),
    num_shown: int = 6,
    has_effects: bool = True,
    layers: LayerRange = None,
    token_movement: Mapping[str, float] | None = None,
    uses_bfloat16: bool = False,
    watch: Watch = lambda items, description: items,
) -> tuple[Inspection, list[ShownPhoto]]:
    """Measure what a page shows about a model: values over all images, and single photos.

    Args:
        model: any ViTCLS classifier or encoder, in evaluation mode and without wrappers of PEFT or
            torch.compile.
        processor: the image processor of the model.
        images: the images, with labels of `label_space`.
        label_space: labels of the images, in the order of the classifier; UNLABELED if unknown.
        batch_size: number of images per forward pass.
        chosen: photos to show. Default: the most instructive images.
        num_shown: number of images to show if none is chosen.
        has_effects: whether to measure the effect of each token, which takes two passes per token and
            image.
        layers: the first and the last layer in which tokens are hidden and replaced. Default: all.
        token_movement: distance by which training moved each token (`token_movement` in
            results.json).
        uses_bfloat16: whether the values over all images are computed in bfloat16.
        watch: function that returns the same items and shows the progress.

    Raises:
        ValueError: if no image can be read, the hidden states of the model are not finite, or the model
            has no such layers.
    """
    find_layers(model, layers)
    batches, error_messages = read_batches(model, processor, images, label_space, batch_size, watch)
    use = find_token_use(model)
    # Heads of other kinds, such as a decoder of pixels, say nothing about the tokens.
    measured_model = model if use.has_head else model.base_model

    with torch.autocast(model.device.type, torch.bfloat16, enabled=uses_bfloat16):
        outputs, states, layer_rows = trace_images(measured_model, batches, watch)
        labels = collect_labels(batches, use.config)
        effects: Effects = {}
        if has_effects:
            token_sets = list_token_sets(use.config)
            measured = take_batches(model, batches)
            effects = measure_effects(measured_model, token_sets, measured, layers, watch)

    indices = [index for batch in batches for index in batch.indices]
    outlier_layer = use.num_layers[-1]
    (outlier_share,) = (
        row["outlier_share"]
        for row in layer_rows
        if row["layer"] == max(outlier_layer, 1) and row["group"] == "patches"
    )
    inspection = Inspection(
        config=use.config,
        model_class=type(model).__name__,
        num_parameters=model.num_parameters(),
        num_images=len(indices),
        effects=effects,
        layer_rows=layer_rows,
        faults=list_faults(use, states, token_movement or {}),
        gates=read_gates(model.base_model),
        outlier_share=outlier_share,
        outlier_layer=outlier_layer,
        error_messages=error_messages,
    )

    shown = list(chosen)
    if not shown:
        names = images.images.get_names()
        kinds = choose_images(use, outputs, labels, indices, num_shown)
        for index, kind in kinds.items():
            texts = {
                "name": Path(names[index]).name,
                "truth": label_space.format(images.labels[index]),
                "kind": kind,
            }
            shown.append((images.images[index], texts))

    # Outside autocast: in float32, as in `vitcls look`.
    photos = [
        ShownPhoto(measurements=measure_photo(model, processor, image, use), **texts)
        for image, texts in watch(shown, "drawing photos")
    ]
    return inspection, photos


def take_batches(model: Any, batches: Sequence[ImageBatch]) -> Sequence[ImageBatch]:
    """Take as many of the batches as effects can be measured on: fewer for a large model."""
    first: Any = batches[0].pixel_values  # [B, C, H, W]
    grid_size = model.config.get_grid_size(first.shape[-2:])
    num_tokens = model.config.token_layout.get_num_tokens(*grid_size)
    num_affordable = MAX_FLOPS / (2 * model.num_parameters() * num_tokens)
    number = min(max(num_affordable, MIN_EFFECT_IMAGES), MAX_EFFECT_IMAGES)
    return batches[: math.ceil(number / len(first))]


def trace_images(
    model: Any, batches: Sequence[ImageBatch], watch: Watch
) -> tuple[Outputs, Tensor, list[dict[str, Any]]]:
    """Run the model on all images once.

    Returns:
        The outputs of all images; the special tokens [images, 1 + layers, S, D] before and after each
        layer; and the rows of `Inspection.layer_rows`.

    Raises:
        ValueError: if the states are not finite.
    """
    layout = model.config.token_layout
    layers = range(len(model.base_model.layers))
    special, values = [], []
    received: list[Tensor] = []

    # Only one layer has full maps at a time: all of them may not fit into memory.
    def record(_: int, query: Tensor, key: Tensor, mask: Any, scaling: float) -> None:
        weights = compute_attention_rows(query.float(), key.float(), mask, scaling)
        received.append(weights.mean(dim=(1, 2)) * weights.shape[-1])  # [B, N]

    def run(pixel_values: Tensor) -> Any:
        received.clear()
        with record_attention(model, layers, record):
            outputs = model(pixel_values, output_hidden_states=True)
        hidden_states = [states.float() for states in outputs.hidden_states]
        if not all(states.isfinite().all() for states in hidden_states):
            raise ValueError(
                "The hidden states of the model are not finite. Check the weights, or load them in "
                "float32."
            )
        special.append(
            torch.stack([each[:, : layout.num_prefix_tokens] for each in hidden_states], 1).cpu()
        )
        columns = [
            describe_layer(hidden_states[layer], hidden_states[layer + 1], received[layer], layout)
            for layer in layers
        ]
        values.append(torch.stack(columns, dim=1).cpu())
        return outputs

    outputs = gather_outputs(model, watch(batches, "measuring tokens"), run=run)
    means = torch.cat(values).mean(dim=0)  # [layers, groups, 4]
    groups = [group for group, _ in list_token_slices(layout)]
    names = ("norm", "attention_received", "outlier_share", "similarity")
    rows = [
        {"layer": layer + 1, "group": group} | dict(zip(names, numbers.tolist(), strict=True))
        for layer in layers
        for group, numbers in zip(groups, means[layer], strict=True)
    ]
    return outputs, torch.cat(special), rows


def describe_layer(before: Tensor, after: Tensor, received: Tensor, layout: TokenLayout) -> Tensor:
    """Average the four numbers of a layer over the tokens of each group: [B, groups, 4].

    Args:
        before, after: states [B, N, D].
        received: attention that each token receives [B, N], as a multiple of a uniform share.
    """
    norms = after.norm(dim=-1)
    limits = OUTLIER_RATIO * norms[:, layout.patches].median(dim=1, keepdim=True).values
    similarity = nn.functional.cosine_similarity(before, after, dim=-1)
    numbers = torch.stack([norms, received, (norms > limits).float(), similarity], dim=-1)
    return torch.stack(
        [numbers[:, tokens].mean(dim=1) for _, tokens in list_token_slices(layout)], 1
    )


def list_token_slices(layout: TokenLayout) -> list[tuple[str, slice]]:
    """List the groups that have tokens, with their place in the sequence; the patches come last."""
    return [
        (group, tokens)
        for group, tokens in layout.items()
        if tokens.stop is None or tokens.stop > tokens.start
    ]


# Images to show -----------------------------------------------------------------------------------


def choose_images(
    use: TokenUse,
    outputs: Outputs,
    labels: Mapping[str, Tensor],
    indices: Sequence[int],
    num_shown: int,
) -> dict[int, str | None]:
    """Choose the images to show by the outputs of a classifier: index -> kind of image.

    An image is as uncertain as its least confident task, and wrong if one of them is. For an encoder,
    they are the first images, of no kind. `indices` count the outputs.
    """
    if not use.has_head:
        return dict.fromkeys(indices[:num_shown])
    target = use.target
    logits = {task: torch.stack(rows).numpy() for task, rows in outputs.items()}
    # [images, 1], or a mask [images, labels]
    predicted = {
        task: torch.from_numpy(target.predict(values)).view(len(values), -1)
        for task, values in logits.items()
    }
    confidences = [target.compute_confidences(values) for values in logits.values()]
    is_wrong = torch.zeros(len(indices), dtype=torch.bool)
    for task, known in labels.items():
        is_wrong |= ((predicted[task] != known) & (known != IGNORED_LABEL)).any(dim=1)
    classes, *_ = predicted.values()  # Photos are chosen by the classes of the first task
    lowest = np.min(confidences, axis=0)
    selected = select_images(lowest.tolist(), is_wrong.tolist(), classes[:, 0].tolist(), num_shown)
    return {indices[position]: kind for position, kind in selected.items()}


def select_images(
    confidences: Sequence[float],
    is_wrong: Sequence[bool],
    classes: Sequence[Hashable],
    num_selected: int,
) -> dict[int, str]:
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
    selected: dict[int, str] = {}
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


# Faults of tokens ---------------------------------------------------------------------------------


# Maximum distance between identical tokens, relative to their variation over images
MAX_IDENTICAL_DISTANCE = 0.01
ROUNDING_ERROR = 1e-6  # The error of a state, as a fraction of its norm
# Minimum norm of an outlier patch, as a multiple of the median patch norm of the image. Darcet et
# al. choose an absolute norm for each model.
OUTLIER_RATIO = 3.0


def list_faults(use: TokenUse, states: Tensor, movement: Mapping[str, float]) -> list[str]:
    """Write one sentence per identical token, and per token that training did not move.

    `states` has the form in which `trace_images` returns it.
    """
    *used_layers, _ = use.num_layers
    # CLS tokens of tasks start as twins, and each has a classifier of its own.
    identical = {} if use.config.tasks else find_identical_tokens(states, used_layers)
    faults = [
        f"{use.names[index]}: identical to {use.names[other]} after layer {layer}"
        for index, (other, layer) in identical.items()
    ]
    return faults + [
        f"{use.names[index]}: not moved by training, which moved others"
        for index in find_unmoved_tokens(use.groups, movement)
    ]


def find_identical_tokens(states: Tensor, used_layers: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Find tokens with the same state as another token: token -> nearest such token, and layer.

    Two tokens are compared after the last layer in which both are used, because a head may ignore
    a difference that arises later.

    Args:
        states: [images, 1 + layers, S, D], the special tokens before and after each layer.
        used_layers: [S], last layer in which each token is used.
    """
    identical = {}
    for index, own_layer in enumerate(used_layers):
        candidates = []
        for other, other_layer in enumerate(used_layers):
            # After its last layer, a token's state has no effect.
            layer = min(own_layer, other_layer)
            # In float32, the variation of a token with a large norm would be lost to rounding.
            pair = states[:, layer, [index, other]].double()  # [images, 2, D]
            mean = pair.mean(dim=0)
            variation = (pair - mean).square().sum(dim=-1).mean(dim=0).sqrt()  # [2]
            distance = (pair[:, 0] - pair[:, 1]).square().sum(dim=-1).mean().sqrt()
            limit = MAX_IDENTICAL_DISTANCE * variation.min() + ROUNDING_ERROR * mean[0].norm()
            if other != index and distance <= limit:
                candidates.append((distance.item(), other, layer))
        if candidates:
            identical[index] = min(candidates)[1:]
    return identical


def find_unmoved_tokens(
    groups: Mapping[str, Sequence[int]], movement: Mapping[str, float]
) -> list[int]:
    """Find the tokens that training did not move although it moved others.

    Args:
        groups: sequence indices of the tokens of each group (`TokenUse.groups`).
        movement: distance by which training moved each token (`token_movement` in results.json),
            by keys such as `cls[0]`.
    """
    if not any(movement.values()):
        return []  # The run trained no token at all, but perhaps a head
    return [
        index
        for group, indices in groups.items()
        for number, index in enumerate(indices)
        if movement.get(f"{group}[{number}]") == 0
    ]

"""What a page shows (report.py): effects of the special tokens, faults, patches, and photos.

images -> batches in random order -> one pass: outputs, states
       -> effects (evaluation/token_effects.py), layers (layer_table.py), faults
       -> the images to show -> photo.py, one by one

The images of `vitcls inspect` are opened in inspect_tokens.py.

    list_faults(use, states, movement)
        find_identical_tokens(...)            tokens that do the work of another token
        find_unmoved_tokens(...)              tokens that training did not reach

A token's output in a layer counts only if an output of the model depends on it (`TokenUse`).
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..data.images import LabeledImages
from ..data.labels import UNLABELED, LabelSpace
from ..evaluation.token_effects import (
    Outputs,
    Watch,
    collect_labels,
    get_target,
    measure_effects,
    measure_states,
    read_batches,
)
from ..inference.interventions import LayerRange
from ..inference.token_names import read_gates
from ..model.heads_vitcls import IGNORED_LABEL
from .layer_table import measure_layers
from .photo import measure_photo
from .sheet import ShownPhoto
from .token_use import TokenUse, find_token_use


MAX_BATCH_SIZE = 32  # On GPUs, unless the person sets one

Layers = Mapping[int, Tensor] | Tensor  # Layer -> states [images, S, D] of the special tokens
ChosenPhotos = Sequence[tuple[Any, dict[str, Any]]]  # Images, and other fields of `ShownPhoto`


@dataclass(frozen=True)
class Inspection:
    """Measurements of all images that `inspect_images` returns.

    Attributes:
        config: configuration of the model.
        model_class: class name of the model.
        num_parameters: number of parameters of the model.
        num_images: number of images that were measured.
        effects: records of each special token and each group (`measure_effects`).
        gates: gate of each gated token, by its name: 0 hides the token, 1 makes it ordinary.
        faults: one sentence per identical token, and per token that training did not move.
        layers: a row for each layer and each group of tokens (`measure_layers`).
        error_messages: one message per image that could not be read.
    """

    config: Any
    model_class: str
    num_parameters: int
    num_images: int
    effects: list[dict[str, Any]]
    gates: dict[str, float]
    faults: list[str]
    layers: pd.DataFrame
    error_messages: list[str]


def inspect_images(
    model: Any,
    processor: Any,
    images: LabeledImages,
    label_space: LabelSpace = UNLABELED,
    *,
    batch_size: int,
    chosen: ChosenPhotos = (),
    num_shown: int = 6,
    effects: Sequence[dict[str, Any]] | None = None,
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
        effects: records of effects that were measured. Default: they are measured, which takes two
            passes per token and image (`measure_effects`).
        layers: the first and the last layer in which tokens are hidden and replaced. Default: all.
        token_movement: distance by which training moved each token (`token_movement` in
            results.json).
        uses_bfloat16: whether the values over all images are computed in bfloat16.
        watch: function that returns the same items and shows the progress.

    Raises:
        ValueError: if no image can be read, the hidden states of the model are not finite, or it has no
            such layers.
    """
    batches, error_messages = read_batches(model, processor, images, label_space, batch_size, watch)
    use = find_token_use(model)
    # Heads of other kinds, such as a decoder of pixels, say nothing about the tokens.
    measured_model = model if use.has_head else model.base_model

    with torch.autocast(model.device.type, torch.bfloat16, enabled=uses_bfloat16):
        outputs, states = measure_states(measured_model, watch(batches, "measuring tokens"))
        layer_records = measure_layers(measured_model, watch(batches, "measuring layers"))
        labels = collect_labels(batches, use.config)
        if effects is None:
            effects = measure_effects(measured_model, batches, layers, watch=watch)

    indices = [index for batch in batches for index in batch.indices]
    inspection = Inspection(
        config=use.config,
        model_class=type(model).__name__,
        num_parameters=model.num_parameters(),
        num_images=len(indices),
        effects=list(effects),
        faults=list_faults(use, states, token_movement or {}),
        gates=read_gates(model.base_model),
        layers=layer_records,
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
    target = get_target(use.config)
    logits = {task: torch.stack(rows).numpy() for task, rows in outputs.items()}
    is_wrong = np.zeros(len(indices), dtype=bool)
    for task, known in labels.items():
        answers = target.predict(logits[task])
        truth = known.numpy().reshape(answers.shape)
        is_wrong |= ~target.find_right(np.where(truth == IGNORED_LABEL, truth, answers), truth)
    lowest = np.min([target.compute_confidences(each) for each in logits.values()], axis=0)
    first_task, *_ = logits.values()  # Photos are chosen by its classes
    classes = first_task.argmax(axis=1)
    selected = select_images(lowest.tolist(), is_wrong.tolist(), classes.tolist(), num_shown)
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


def list_faults(use: TokenUse, states: Layers, movement: Mapping[str, float]) -> list[str]:
    """Write one sentence per identical token, and per token that training did not move.

    `states` has the form in which `measure_states` returns it.
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


def find_identical_tokens(states: Layers, used_layers: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Find tokens with the same state as another token: token -> nearest such token, and layer.

    Two tokens are compared after the last layer in which both are used, because a head may ignore
    a difference that arises later.

    Args:
        states: [images, S, D] of the special tokens, before the first layer and after each layer.
        used_layers: [S], last layer in which each token is used.
    """
    identical = {}
    for index, own_layer in enumerate(used_layers):
        candidates = []
        for other, other_layer in enumerate(used_layers):
            # After its last layer, a token's state has no effect.
            layer = min(own_layer, other_layer)
            # In float32, the variation of a token with a large norm would be lost to rounding.
            pair = states[layer][:, [index, other]].double()  # [images, 2, D]
            variation = pair.std(dim=0, correction=0).norm(dim=-1)  # [2]
            distance = pair.diff(dim=1).square().sum(dim=-1).mean().sqrt()
            limit = (
                MAX_IDENTICAL_DISTANCE * variation.min()
                + ROUNDING_ERROR * pair[:, 0].mean(dim=0).norm()
            )
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

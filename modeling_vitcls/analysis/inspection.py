"""What a page shows (report.py): effects of the special tokens, layers, and photos.

images -> batches in random order
       -> effects (evaluation/token_effects.py), layers (layer_table.py)
       -> outputs -> the images to show -> photo.py, one by one

The images of `vitcls inspect` are opened in inspect_tokens.py.
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
    read_batches,
)
from ..inference.interventions import LayerRange
from ..inference.token_names import read_fade_in
from ..model.heads_vitcls import IGNORED_LABEL
from .layer_table import measure_layers
from .photo import measure_photo
from .sheet import ShownPhoto
from .token_use import TokenUse, find_token_use


MAX_BATCH_SIZE = 32  # On GPUs, unless the person sets one

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
        fade_in: how far the tokens are faded in, by name: 0 hides a token; empty if all are at 1.
        layers: a row for each layer and each group of tokens (`measure_layers`).
        error_messages: one message per image that could not be read.
    """

    config: Any
    model_class: str
    num_parameters: int
    num_images: int
    effects: list[dict[str, Any]]
    fade_in: dict[str, float]
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
        layer_table, outputs = measure_layers(measured_model, watch(batches, "measuring layers"))
        labels = collect_labels(batches, use.config)
        if effects is None:
            effects, _ = measure_effects(measured_model, batches, layers, watch=watch)

    indices = [index for batch in batches for index in batch.indices]
    inspection = Inspection(
        config=use.config,
        model_class=type(model).__name__,
        num_parameters=model.num_parameters(),
        num_images=len(indices),
        effects=list(effects),
        fade_in=read_fade_in(model.base_model),
        layers=layer_table,
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

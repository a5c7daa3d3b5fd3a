"""The pictures of a model card: drawn, made small, and written beside it.

    pictures/token_layout.png               always
    pictures/confusion_matrix[_TASK].png    of measured results
    pictures/attention.png                  on samples, where the model has special tokens

The figures themselves are in analysis/figures.py. What the card says about them is not decided here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from PIL import Image

from ..configuration_vitcls import ViTCLSConfig
from ..data.labels import NOTHING, labels_of
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..inference.prediction_rows import THRESHOLD, Row, answers_to, build_answers
from .figures import as_picture, attention_figure, confusion_matrix_figure, token_layout_figure
from .maps import SeenPart, patch_maps, seen_part, token_names, upright
from .model_utils import evaluating, is_classifier, plain_model


FOLDER = "pictures"
LAYOUT, MATRIX, ATTENTION = "token_layout", "confusion_matrix", "attention"

MOST_SAMPLES, MOST_OVERLAYS = 4, 32
MOST_BYTES = 300_000  # of a file
# Dots per inch, and colours of a palette or None for all, in the order in which they are tried.
QUALITIES = ((120, None), (100, None), (80, None), (80, 256), (60, 256), (40, 256), (25, 64))

Sample = tuple[Image.Image, str | None]


def write_pictures(
    folder: Path,
    model: Any,
    processor: ViTCLSImageProcessor,
    results: Mapping[str, Any],
    samples: Sequence[Sample] = (),
) -> dict[str, str]:
    """Draw what there is to show into `folder`/pictures, as PNG files of less than 300 kB each.

    The model answers and attends on its own device, in evaluation mode and without gradients; then it is as before.
    Call this on the main process alone, with a model whose weights are all there.

    Args:
        model: A ViTCLS model of any class.
        results: Measured values, as in results.json; every confusion matrix in them is drawn.
        samples: Pictures with their labels in words, or None. The first four that the model can take are shown, fewer
            of a model with more than eight special tokens.

    Returns:
        Name of each picture that was drawn -> its path from `folder`: "token_layout"; "confusion_matrix", or one
        "confusion_matrix_TASK" per task; "attention". An older file of one that was not drawn is removed.

    Raises:
        OSError: if a file cannot be written.
    """
    paths: dict[str, str] = {}
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, figure in figures(model, processor, results, samples):
        paths[name] = f"{FOLDER}/{name}.png"
        (folder / paths[name]).write_bytes(small_png(figure))
    for file in (folder / FOLDER).glob("*.png"):
        if file.stem.startswith((MATRIX, ATTENTION)) and file.stem not in paths:
            file.unlink()
    return paths


def figures(
    model: Any, processor: ViTCLSImageProcessor, results: Mapping[str, Any], samples: Sequence[Sample]
) -> Iterator[tuple[str, Figure]]:
    """The figures of a card by name, those that there is something to show for."""
    config = plain_model(model).config
    yield LAYOUT, token_layout_figure(config)
    for name, matrix, class_names in confusion_matrices(results, config):
        yield name, confusion_matrix_figure(matrix, class_names)
    names = token_names(config)
    most = min(max(MOST_OVERLAYS // len(names), 1), MOST_SAMPLES) if names else 0
    if looks := list(islice(looks_at(model, processor, samples), most)):
        pictures, maps, titles, seen = zip(*looks, strict=True)
        yield ATTENTION, attention_figure(pictures, maps, names, titles, seen)


def confusion_matrices(
    results: Mapping[str, Any], config: ViTCLSConfig
) -> Iterator[tuple[str, list[list[int]], list[str]]]:
    """Name of the picture, matrix and class names, of each matrix in the results that counts any picture."""
    if config.tasks:
        found = [(f"{MATRIX}_{task}", f"{task}_{MATRIX}", names) for task, names in config.task_labels().items()]
    else:
        found = [(MATRIX, MATRIX, labels_of(config).names)]
    for name, key, class_names in found:
        matrix = results.get(key)
        if matrix and any(map(any, matrix)):
            yield name, matrix, class_names


# Attention -----------------------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """What the special tokens look at in one picture: maps [T, gh, gw] of the `seen` part of it."""

    picture: Image.Image
    maps: torch.Tensor
    title: str
    seen: SeenPart


def looks_at(model: Any, processor: ViTCLSImageProcessor, samples: Sequence[Sample]) -> Iterator[Look]:
    """One for each sample that the image processor and the model can take: last layer, mean of the heads."""
    model = plain_model(model)
    answers = build_answers(model, top_k=None, threshold=THRESHOLD, features=None) if is_classifier(model) else None
    for picture, label in samples:
        try:
            pixel_values = processor(picture, return_tensors="pt")["pixel_values"].to(model.device)  # [1, C, H, W]
            with evaluating(model), torch.no_grad():
                rows = model.token_attention(pixel_values, layers=[-1])[0, 0].float().mean(dim=0)  # [T, key]
                answer = answers_to(pixel_values, answers, nullcontext)[0] if answers else {}
        except ValueError:  # evaluation leaves such pictures out, too
            continue
        image_height, image_width = pixel_values.shape[-2:]
        maps = patch_maps(rows, model.config, (image_height, image_width))
        picture = upright(picture)
        seen = seen_part(processor, (picture.height, picture.width), model.config.patch_height_width)
        yield Look(picture, maps, title(label, answer), seen)


def title(label: str | None, answer: Row) -> str:
    """The label and what the model says, such as "7, predicted 7"; one of them; or nothing."""
    words = []
    for column, value in answer.items():
        if column == "label":
            words.append(value)
        elif column.endswith("_label"):
            words.append(f"{column.removesuffix('_label')} {value}")
        elif column == "labels":
            words.append(", ".join(value) or NOTHING)
    predicted = f"predicted {', '.join(words)}" if words else None
    return ", ".join(text for text in (label, predicted) if text)


# Files ---------------------------------------------------------------------------------------------------------------


def small_png(figure: Figure) -> bytes:
    """The figure as a PNG, at the first of `QUALITIES` with which it is small enough."""
    for resolution, num_colours in QUALITIES:
        picture = as_picture(figure, resolution)
        png = BytesIO()
        if num_colours is not None:
            picture = picture.quantize(palette=picture.quantize(num_colours))  # dithered
        picture.save(png, format="PNG", optimize=True)
        if png.tell() < MOST_BYTES:
            break
    return png.getvalue()

"""Images of a model card. Figures are drawn, compressed and written next to the card.

images/token_layout.png               always
images/confusion_matrix[_TASK].png    if results are given
images/attention.png                  if the model has special tokens and samples are given
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

from ..analysis.maps import count_used_layers, extract_patch_maps, to_upright_rgb
from ..analysis.model_utils import evaluation_mode, is_classifier, unwrap_model
from ..configuration_vitcls import ViTCLSConfig
from ..data.fit import VisibleRegion, get_visible_region
from ..data.labels import NO_LABELS, get_label_space
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..inference.prediction_rows import DEFAULT_THRESHOLD, Row, build_prediction_columns, predict_batch
from ..token_names import get_token_names
from .card_figures import plot_attention, plot_confusion_matrix, plot_token_layout, render_figure


IMAGES_FOLDER = "images"
MATRIX_NAME, ATTENTION_NAME = "confusion_matrix", "attention"

MAX_SAMPLES, MAX_OVERLAYS = 4, 32  # maximum number of images, and of overlays, in the attention figure
MAX_BYTES = 300_000  # maximum file size in bytes
# (dots per inch, palette size) pairs in the order in which they are tried; the palette size None keeps all colors.
QUALITIES = ((120, None), (100, None), (80, None), (80, 256), (60, 256), (40, 256), (25, 64))

Sample = tuple[Image.Image, str | None]


def write_card_images(
    folder: Path,
    model: Any,
    processor: ViTCLSImageProcessor,
    results: Mapping[str, Any],
    samples: Sequence[Sample] = (),
) -> dict[str, str]:
    """Write the images of a card to `folder`/images, as PNG files of less than 300 kB each if possible.

    The model runs on its own device, in evaluation mode and without gradients, and is not changed. Call this function
    only on the main process, with a model whose weights are not sharded. Older confusion matrices and attention
    figures that are not drawn again are deleted.

    Args:
        model: any ViTCLS model.
        results: measured values as in results.json; every confusion matrix is drawn.
        samples: (image, label name) pairs; the name is None if the label is unknown. The first four images that the
            model accepts are shown, or fewer images if the model has more than eight special tokens.

    Returns:
        Dictionary that maps the name of each image to its path relative to `folder`. Names are "token_layout",
        "confusion_matrix" (or "confusion_matrix_TASK" for each task) and "attention".

    Raises:
        OSError: if a file cannot be written.
    """
    paths: dict[str, str] = {}
    (folder / IMAGES_FOLDER).mkdir(parents=True, exist_ok=True)
    for name, figure in build_figures(model, processor, results, samples):
        paths[name] = f"{IMAGES_FOLDER}/{name}.png"
        (folder / paths[name]).write_bytes(encode_small_png(figure))
    for file in (folder / IMAGES_FOLDER).glob("*.png"):
        if file.stem.startswith((MATRIX_NAME, ATTENTION_NAME)) and file.stem not in paths:
            file.unlink()
    return paths


def build_figures(
    model: Any, processor: ViTCLSImageProcessor, results: Mapping[str, Any], samples: Sequence[Sample]
) -> Iterator[tuple[str, Figure]]:
    """Yield (name, figure) for each figure that the model, the results and the samples support."""
    config = unwrap_model(model).config
    yield "token_layout", plot_token_layout(config)
    for name, matrix, class_names in find_confusion_matrices(results, config):
        yield name, plot_confusion_matrix(matrix, class_names)
    names = get_token_names(config)
    num_samples = min(max(MAX_OVERLAYS // len(names), 1), MAX_SAMPLES) if names else 0
    if attention_samples := list(islice(build_attention_samples(model, processor, samples), num_samples)):
        images, maps, titles, visible_regions = zip(*attention_samples, strict=True)
        yield ATTENTION_NAME, plot_attention(images, maps, names, titles, visible_regions)


def find_confusion_matrices(
    results: Mapping[str, Any], config: ViTCLSConfig
) -> Iterator[tuple[str, list[list[int]], list[str]]]:
    """Yield (image name, matrix, class names) for each nonempty confusion matrix in the results."""
    if config.tasks:
        tasks = config.task_labels().items()
        candidates = [(f"{MATRIX_NAME}_{task}", f"{task}_{MATRIX_NAME}", class_names) for task, class_names in tasks]
    else:
        candidates = [(MATRIX_NAME, MATRIX_NAME, get_label_space(config).names)]
    for image_name, key, class_names in candidates:
        matrix = results.get(key)
        if matrix and any(map(any, matrix)):
            yield image_name, matrix, class_names


# Attention -----------------------------------------------------------------------------------------------------------


class AttentionSample(NamedTuple):
    """Attention maps [T, gh, gw] of the special tokens on the visible region of one image."""

    image: Image.Image
    maps: torch.Tensor
    title: str
    visible_region: VisibleRegion


def build_attention_samples(
    model: Any, processor: ViTCLSImageProcessor, samples: Sequence[Sample]
) -> Iterator[AttentionSample]:
    """Yield an AttentionSample for each sample that the model accepts. The maps show the attention of each special
    token in the last layer whose output is used, averaged over heads."""
    model = unwrap_model(model)
    *num_used_layers, _ = count_used_layers(model.config, is_classifier(model))
    layer_indices = torch.tensor(num_used_layers).sub(1).clamp(min=0)  # [T]
    predict = None
    if is_classifier(model):
        predict = build_prediction_columns(model, top_k=None, threshold=DEFAULT_THRESHOLD, features=None)
    for image, label in samples:
        try:
            pixel_values = processor(image, return_tensors="pt")["pixel_values"].to(model.device)  # [1, C, H, W]
            with evaluation_mode(model), torch.no_grad():
                rows = model.token_attention(pixel_values)[0].float().mean(dim=1)  # [L, T, key]
                rows = rows[layer_indices, torch.arange(len(layer_indices))]  # [T, key]
                prediction = predict_batch(pixel_values, predict, nullcontext)[0] if predict else {}
        except ValueError:  # evaluation also skips images that the model does not accept
            continue
        maps = extract_patch_maps(rows, model.config, (pixel_values.shape[-2], pixel_values.shape[-1]))
        image = to_upright_rgb(image)
        visible_region = get_visible_region(processor, (image.height, image.width), model.config.patch_height_width)
        yield AttentionSample(image, maps, format_title(label, prediction), visible_region)


def format_title(label: str | None, prediction: Row) -> str:
    """Return the label and the prediction as text, such as "7, predicted 7". An unknown label is omitted."""
    predicted_labels = []
    for column, value in prediction.items():
        if column == "label":
            predicted_labels.append(value)
        elif column.endswith("_label"):
            predicted_labels.append(f"{column.removesuffix('_label')} {value}")
        elif column == "labels":
            predicted_labels.append(", ".join(value) or NO_LABELS)
    prediction_text = f"predicted {', '.join(predicted_labels)}" if predicted_labels else None
    return ", ".join(filter(None, (label, prediction_text)))


# Files ---------------------------------------------------------------------------------------------------------------


def encode_small_png(figure: Figure) -> bytes:
    """Return the figure as a PNG file in the best of `QUALITIES` for which the file is smaller than MAX_BYTES, or in
    the lowest quality if every file is larger."""
    for dpi, num_colors in QUALITIES:
        image, png = render_figure(figure, dpi), BytesIO()
        if num_colors is not None:
            image = image.quantize(palette=image.quantize(num_colors))  # dithered
        image.save(png, format="PNG", optimize=True)
        if png.tell() < MAX_BYTES:
            break
    return png.getvalue()

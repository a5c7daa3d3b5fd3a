"""Images of a model card, drawn from results.json and from the measurements of the report.

images/confusion_matrix[_TASK].png    if results are given
images/attention.png                  if the model has special tokens and an inspection is given
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay

from ..analysis.figures import create_figure, shorten_text
from ..analysis.inspection import Inspection
from ..analysis.maps import overlay, resize_with_region
from ..analysis.report import iterate_overview
from ..data.labels import get_label_space
from ..hub.model_files import IMAGES_FOLDER, RESULT_IMAGE_PATTERNS
from ..model.configuration_vitcls import ViTCLSConfig


MAX_IMAGES = 4  # maximum number of images in the attention figure
TILE_WIDTH = 1.45  # width of an image, in inches
TITLE_HEIGHT = 0.35  # height of the title of an image, in inches
TILE_SIDE = 320  # longer side of an image, in pixels
MAX_CLASSES_WITH_COUNTS = 20  # maximum number of classes for which counts are shown
MAX_CLASSES_WITH_NAMES = 50  # maximum number of classes for which names are shown


def write_card_images(
    folder: Path,
    config: ViTCLSConfig,
    results: Mapping[str, Any],
    inspection: Inspection | None = None,
) -> None:
    """Write the images of a card to `folder`/images, and delete those of an earlier run.

    Args:
        config: configuration of the model.
        results: measured values as in results.json; every confusion matrix is drawn.
        inspection: measurements of the report, with the images to show.

    Raises:
        OSError: if a file cannot be written.
    """
    matrices = find_confusion_matrices(results, config)
    figures = {
        name: plot_confusion_matrix(matrix, class_names) for name, matrix, class_names in matrices
    }
    if (
        inspection is not None
        and inspection.image_reports
        and config.token_layout.num_prefix_tokens
    ):
        figures["attention"] = plot_attention(inspection)

    for pattern in RESULT_IMAGE_PATTERNS:
        for file in folder.glob(pattern):
            file.unlink()
    if figures:
        (folder / IMAGES_FOLDER).mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(
            folder / IMAGES_FOLDER / f"{name}.png", facecolor="white", pil_kwargs={"optimize": True}
        )


def find_confusion_matrices(
    results: Mapping[str, Any], config: ViTCLSConfig
) -> Iterator[tuple[str, list[list[int]], list[str]]]:
    """Yield (image name, matrix, class names) for each nonempty confusion matrix in the results."""
    tasks = {f"{task}_": names for task, names in config.task_labels().items()}
    for prefix, names in (tasks or {"": get_label_space(config).names}).items():
        matrix = results.get(f"{prefix}confusion_matrix")
        if matrix and any(map(any, matrix)):
            yield f"confusion_matrix_{prefix}".rstrip("_"), matrix, names


def plot_confusion_matrix(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Plot a confusion matrix [L, L]; rows are true classes, columns are predicted classes.

    The colors show fractions of the true class on a nonlinear scale, so that rare confusions are
    visible.
    """
    counts = np.asarray(matrix)
    num_classes = len(class_names)
    fractions = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    side = min(max(2.6 + 0.34 * num_classes, 4.0), 8.0)
    figure = create_figure(side + 0.6, side)
    axes = figure.add_subplot()
    short_names = [shorten_text(name, 18) for name in class_names]

    plot = ConfusionMatrixDisplay(fractions, display_labels=short_names).plot(
        ax=axes,
        cmap="Blues",
        include_values=num_classes <= MAX_CLASSES_WITH_COUNTS,
        xticks_rotation="horizontal" if max(map(len, short_names)) <= 3 else "vertical",
        im_kw={"norm": PowerNorm(0.5, vmin=0, vmax=1)},
    )

    if plot.text_ is not None:
        for text, count in zip(plot.text_.flat, counts.flat, strict=True):
            text.set(text=f"{count}", fontsize=9 if counts.max() < 1000 else 7)

    axes.set(xlabel="predicted", ylabel="true")
    if num_classes > MAX_CLASSES_WITH_NAMES:
        axes.set(xticks=[], yticks=[])
    axes.tick_params(labelsize=9 if num_classes <= MAX_CLASSES_WITH_COUNTS else 6)
    return figure


def plot_attention(inspection: Inspection) -> Figure:
    """Plot one row per image: the image, and the attention of each special token as an overlay.

    The row is that of the first screen of the report. Each overlay has its own scale.
    """
    rows = []
    for report, caption, maps in iterate_overview(inspection, MAX_IMAGES):
        image, region = resize_with_region(
            report.image, report.visible_region, TILE_SIDE, TILE_SIDE
        )
        rows.append(
            {caption: image}
            | {name: overlay(image, values, region) for name, values in maps.items()}
        )

    heights = []
    for row in rows:
        aspect_ratio = max(image.height / image.width for image in row.values())
        heights.append(TILE_WIDTH * min(aspect_ratio, 1))
    size = (TILE_WIDTH * len(rows[0]), sum(heights) + TITLE_HEIGHT * len(rows))
    figure = Figure(figsize=size, dpi=100, facecolor="white", layout="constrained")
    grid = figure.subplots(
        len(rows), len(rows[0]), squeeze=False, gridspec_kw={"height_ratios": heights}
    )

    tiles = [tile for row in rows for tile in row.items()]
    for axes, (title, image) in zip(grid.flat, tiles, strict=True):
        axes.axis("off")
        axes.imshow(image, interpolation="nearest")
        axes.set_title(textwrap.fill(shorten_text(title, 60), 22), fontsize=8)
    return figure

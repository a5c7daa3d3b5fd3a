"""Images of a model card, drawn from results.json and from the sheet of a photo.

images/confusion_matrix[_TASK].png    if results are given
images/attention.png                  the sheet, if it is given
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import ConfusionMatrixDisplay

from ..analysis.sheet import shorten_middle
from ..hub.model_files import IMAGES_FOLDER, RESULT_IMAGE_PATTERNS, SAMPLE_IMAGES_FILE
from ..model.configuration_vitcls import ViTCLSConfig


MAX_CLASSES_WITH_COUNTS = 20  # With more classes, the counts are too small to read
MAX_CLASSES_WITH_NAMES = 50  # Likewise, the names


def write_card_images(
    folder: Path,
    config: ViTCLSConfig,
    results: Mapping[str, Any],
    sheet: Image.Image | None = None,
) -> None:
    """Write the images of a card to `folder`/images, and delete what an earlier run wrote.

    Args:
        config: configuration of the model.
        results: measured values as in results.json; every confusion matrix is drawn.
        sheet: the sheet of a photo.

    Raises:
        OSError: if a file cannot be written.
    """
    figures = {}
    tasks = config.task_labels() or {"": list((config.id2label or {}).values())}
    for task, names in tasks.items():
        matrix = results.get(f"{task}_confusion_matrix".lstrip("_"))
        if matrix and any(map(any, matrix)):
            name = f"confusion_matrix_{task}".rstrip("_")
            figures[name] = plot_confusion_matrix(matrix, names)

    # An earlier run may have had other tasks. Its images would pass for images of this run.
    for pattern in RESULT_IMAGE_PATTERNS:
        for file in folder.glob(pattern):
            file.unlink()
    if figures or sheet is not None:
        (folder / IMAGES_FOLDER).mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(
            folder / IMAGES_FOLDER / f"{name}.png", facecolor="white", pil_kwargs={"optimize": True}
        )
    if sheet is not None:
        sheet.save(folder / SAMPLE_IMAGES_FILE, optimize=True)


def plot_confusion_matrix(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Plot a confusion matrix [L, L]; rows are true classes, columns are predicted classes.

    The colors show fractions of the true class, on a nonlinear scale that makes rare confusions
    visible.
    """
    counts = np.asarray(matrix)
    # A class without images has a row of zeros, which must not be divided by zero.
    fractions = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    side = min(max(2.6 + 0.34 * len(class_names), 4.0), 8.0)
    figure = Figure(figsize=(side + 0.6, side), dpi=100, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    short_names = [shorten_middle(name, 18) for name in class_names]

    plot = ConfusionMatrixDisplay(fractions, display_labels=short_names).plot(
        ax=axes,
        cmap="Blues",
        include_values=len(class_names) <= MAX_CLASSES_WITH_COUNTS,
        xticks_rotation="horizontal" if max(map(len, short_names)) <= 3 else "vertical",
        im_kw={"norm": PowerNorm(0.5, vmin=0, vmax=1)},
    )

    if plot.text_ is not None:
        for text, count in zip(plot.text_.flat, counts.flat, strict=True):
            text.set(text=f"{count}", fontsize=9 if counts.max() < 1000 else 7)

    axes.set(xlabel="predicted", ylabel="true")
    if len(class_names) > MAX_CLASSES_WITH_NAMES:
        axes.set(xticks=[], yticks=[])
    axes.tick_params(labelsize=9 if len(class_names) <= MAX_CLASSES_WITH_COUNTS else 6)
    return figure

"""Figures of a model card: token layout, confusion matrix, and attention over images.

Each function returns a matplotlib `Figure` with a white background. card_images.py writes figures to files.
"""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from ..analysis.figures import (
    DARK_GRAY,
    ELLIPSIS,
    GROUP_COLORS,
    GROUP_NAMES,
    create_figure,
    describe_head,
    shorten_text,
)
from ..analysis.maps import is_used_by_head, overlay, resize_with_region, to_upright_rgb
from ..configuration_vitcls import ViTCLSConfig
from ..data.fit import VisibleRegion
from ..token_names import get_token_names_by_group


# Token layout --------------------------------------------------------------------------------------------------------

# Lengths in inches. At 100 dots per inch, the figure is 800 pixels wide.
LAYOUT_WIDTH, LAYOUT_HEIGHT, MARGIN = 8.0, 2.9, 0.2
BOXES_BOTTOM, BOXES_HEIGHT = 0.95, 1.25
GRID_WIDTH, GROUP_GAP, MIN_GROUP_WIDTH = 2.0, 0.2, 1.0
CHARACTER_WIDTH = 0.078

MAX_BOXES = 12  # maximum number of boxes per group
MAX_CELLS = 64  # maximum number of cells per side of the patch grid


def plot_token_layout(config: ViTCLSConfig) -> Figure:
    """Plot the token sequence [CLS | distillation | registers | patches] as boxes in the colors of `GROUP_COLORS`.

    Arrows mark the tokens that the head uses. The figure is 8 inches wide.
    """
    figure = Figure(figsize=(LAYOUT_WIDTH, LAYOUT_HEIGHT), dpi=100, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, LAYOUT_WIDTH), ylim=(0, LAYOUT_HEIGHT))
    axes.axis("off")
    names_by_group = {group: names for group, names in get_token_names_by_group(config).items() if names}
    drawn = {group: select_drawn_tokens(names) for group, names in names_by_group.items()}
    available_width = LAYOUT_WIDTH - 2 * MARGIN - GRID_WIDTH - (GROUP_GAP + MIN_GROUP_WIDTH) * len(drawn)
    box_width = min(available_width / max(sum(map(len, drawn.values())), 1), 1.0)
    left, header_bottom = MARGIN, BOXES_BOTTOM + BOXES_HEIGHT + 0.1
    for group, tokens in drawn.items():
        group_width = max(box_width * len(tokens), MIN_GROUP_WIDTH)
        header = f"{GROUP_NAMES[group]}\n{len(names_by_group[group])}"
        draw_text(axes, left + group_width / 2, header_bottom, header, 9, DARK_GRAY, va="bottom")
        width = group_width / len(tokens)
        for position, (index, name) in enumerate(tokens.items()):
            center = left + (position + 0.5) * width
            corner = (center - width / 2, BOXES_BOTTOM)
            box = Rectangle(corner, width, BOXES_HEIGHT, facecolor=GROUP_COLORS[group], edgecolor="white")
            axes.add_patch(box)
            text, is_wide = name.replace(" (", "\n("), len(name) * CHARACTER_WIDTH < width
            rotation = 0 if is_wide or name == ELLIPSIS else 90
            draw_text(axes, center, BOXES_BOTTOM + BOXES_HEIGHT / 2, text, 8, "white", rotation=rotation)
            if name != ELLIPSIS and is_used_by_head(config, group, index):
                draw_arrow(axes, center)
        left += group_width + GROUP_GAP
    (rows, columns), (height, width) = config.grid_size, config.patch_height_width
    header = f"patches, {height} × {width} pixels each\n{rows} × {columns} = {rows * columns}"
    draw_text(axes, left + GRID_WIDTH / 2, header_bottom, header, 9, DARK_GRAY, va="bottom")
    draw_grid(axes, left, config)
    if is_used_by_head(config, "patches", 0):
        draw_arrow(axes, left + GRID_WIDTH / 2)
    corner, width = (MARGIN, 0.18), LAYOUT_WIDTH - 2 * MARGIN
    axes.add_patch(Rectangle(corner, width, 0.36, facecolor="#EFEFEF", edgecolor=DARK_GRAY, linewidth=0.8))
    draw_text(axes, LAYOUT_WIDTH / 2, 0.36, describe_head(config), 10, DARK_GRAY)
    return figure


def select_drawn_tokens(names: list[str]) -> dict[int, str]:
    """Return the names of the drawn tokens by index: all names, or the first names, `ELLIPSIS` and the last name."""
    if len(names) <= MAX_BOXES:
        return dict(enumerate(names))
    return {**dict(enumerate([*names[: MAX_BOXES - 2], ELLIPSIS])), len(names) - 1: names[-1]}


def draw_arrow(axes: Axes, center: float) -> None:
    """Draw an arrow from a token to the head."""
    arrow_style = {"arrowstyle": "-|>", "color": DARK_GRAY, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (center, 0.54), (center, BOXES_BOTTOM - 0.02), arrowprops=arrow_style)


def draw_grid(axes: Axes, left: float, config: ViTCLSConfig) -> None:
    """Draw the centered patch grid with the aspect ratio of the image."""
    (rows, columns), (image_height, image_width) = config.grid_size, config.image_height_width
    scale = min(GRID_WIDTH / image_width, BOXES_HEIGHT / image_height)
    height, width = image_height * scale, image_width * scale
    x, y = left + (GRID_WIDTH - width) / 2, BOXES_BOTTOM + (BOXES_HEIGHT - height) / 2
    axes.add_patch(Rectangle((x, y), width, height, facecolor=GROUP_COLORS["patches"]))
    if max(rows, columns) <= MAX_CELLS:
        line_width = 12 / max(rows, columns, 12)
        axes.vlines(x + width * np.arange(1, columns) / columns, y, y + height, colors="white", linewidth=line_width)
        axes.hlines(y + height * np.arange(1, rows) / rows, x, x + width, colors="white", linewidth=line_width)


# Confusion matrix ----------------------------------------------------------------------------------------------------

MAX_CLASSES_WITH_COUNTS = 20  # maximum number of classes for which counts are shown
MAX_CLASSES_WITH_NAMES = 50  # maximum number of classes for which names are shown
MAX_NAME_LENGTH = 18  # maximum length of a class name in characters


def plot_confusion_matrix(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Plot a confusion matrix: counts of predictions, colored by their fraction of the true class.

    The color scale is nonlinear, so that rare confusions are visible. Counts are shown for up to 20 classes, and names
    for up to 50 classes.

    Args:
        matrix: [L, L], rows are true classes, columns are predicted classes.
        class_names: names of the L classes.

    Raises:
        ValueError: if the matrix is not square, or the number of names does not match the matrix.
    """
    counts = np.asarray(matrix)
    num_classes = len(class_names)
    if counts.shape != (num_classes, num_classes):
        raise ValueError(
            f"The confusion matrix has shape {counts.shape}, but there are {num_classes} class names. "
            "Pass a square matrix and one name per row."
        )
    fractions = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    side = min(max(2.6 + 0.34 * num_classes, 4.0), 8.0)
    figure = create_figure(side + 0.6, side)
    axes = figure.add_subplot()
    axes_image = axes.imshow(fractions, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    ticks = [0, 0.05, 0.2, 0.5, 1]
    colorbar = figure.colorbar(axes_image, ax=axes, shrink=0.8, label="fraction of the true class", ticks=ticks)
    colorbar.ax.set_yticklabels(["0", "5%", "20%", "50%", "100%"])
    axes.set(xlabel="predicted", ylabel="true")
    draw_class_names(axes, class_names)
    if num_classes <= MAX_CLASSES_WITH_COUNTS:
        font_size = 9 if counts.max() < 1000 else 7
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if fractions[row, column] > 0.3 else DARK_GRAY if count else "#B5B5B5"
            draw_text(axes, column, row, f"{count}", font_size, color)
    return figure


def draw_class_names(axes: Axes, names: Sequence[str]) -> None:
    """Draw class names along both axes, unless there are more than MAX_CLASSES_WITH_NAMES classes."""
    if len(names) > MAX_CLASSES_WITH_NAMES:
        axes.set(xticks=[], yticks=[])
        return
    short_names = [shorten_text(name, MAX_NAME_LENGTH) for name in names]
    font_size = 9 if len(names) <= MAX_CLASSES_WITH_COUNTS else 6
    axes.set_yticks(range(len(names)), short_names, fontsize=font_size)
    rotation = 0 if max(map(len, short_names)) <= 3 else 90
    axes.set_xticks(range(len(names)), short_names, fontsize=font_size, rotation=rotation)


# Attention -----------------------------------------------------------------------------------------------------------

MAX_COLUMNS = 7  # maximum number of tiles (images and overlays) per row
TILE_WIDTH, TITLE_HEIGHT = 1.45, 0.35  # width of a tile and height of the title, in inches
TILE_SIDE = 320  # longer side of an image, in pixels


def plot_attention(
    images: Sequence[Image.Image],
    maps: Sequence[torch.Tensor],
    names: Sequence[str],
    titles: Sequence[str],
    visible_regions: Sequence[VisibleRegion | None] | None = None,
) -> Figure:
    """Plot one row per image: the image, and the attention of each token as an overlay.

    Each overlay has its own scale (`overlay`). Overlays that do not fit next to the image continue in the next row.

    Args:
        images: S images of any sizes.
        maps: attention to patches (`extract_patch_maps`), as S tensors [T, gh, gw] or one tensor [S, T, gh, gw].
        names: names of the T tokens (`get_token_names`).
        titles: titles of the S images, such as "7, predicted 7".
        visible_regions: the region of each image that the maps cover (`get_visible_region`). Default: the whole image.

    Raises:
        ValueError: if the numbers of images, maps, titles and visible regions differ, if there are no images, or if
            the number of names is not T.
    """
    visible_regions = [None] * len(images) if visible_regions is None else visible_regions
    if not len(images) == len(maps) == len(titles) == len(visible_regions) > 0:
        raise ValueError(
            "The numbers of images, maps, titles and visible regions must be equal and at least one, but they are "
            f"{len(images)}, {len(maps)}, {len(titles)} and {len(visible_regions)}. Pass one of each per image."
        )
    token_counts = list(map(len, maps))
    if any(count != len(names) for count in token_counts):
        raise ValueError(
            f"The maps have {token_counts} tokens, but the number of names is {len(names)}. Pass one name per token."
        )
    num_rows = max(math.ceil(len(names) / (MAX_COLUMNS - 1)), 1)
    num_columns = 1 + math.ceil(len(names) / num_rows)
    resized_images = [
        resize_with_region(to_upright_rgb(image), region, TILE_SIDE, TILE_SIDE)
        for image, region in zip(images, visible_regions, strict=True)
    ]
    row_heights = [TILE_WIDTH * min(image.height / image.width, 1) + TITLE_HEIGHT for image, _ in resized_images]
    heights = [height for height in row_heights for _ in range(num_rows)]
    figure = Figure(figsize=(TILE_WIDTH * num_columns, sum(heights)), dpi=100, facecolor="white", layout="constrained")
    grid = figure.subplots(len(heights), num_columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for tile in grid.flat:
        tile.axis("off")
    for index, ((image, region), image_maps, title) in enumerate(zip(resized_images, maps, titles, strict=True)):
        tiles = grid[index * num_rows : (index + 1) * num_rows]
        draw_image(tiles[0, 0], image, title)
        for tile, values, name in zip(tiles[:, 1:].flat, image_maps, names, strict=False):
            draw_image(tile, overlay(image, values, region), name)
    return figure


# Drawing ---------------------------------------------------------------------------------------------------------


def draw_text(axes: Axes, x: float, y: float, text: str, font_size: float, color: str, **options: Any) -> None:
    """Draw centered text."""
    axes.text(x, y, text, fontsize=font_size, color=color, **({"ha": "center", "va": "center"} | options))


def draw_image(axes: Axes, image: Image.Image, title: str) -> None:
    """Draw an image with a title, which is wrapped to the width of the image."""
    axes.imshow(image, interpolation="nearest")
    axes.set_title(textwrap.fill(shorten_text(title, 60), 22), fontsize=8, color=DARK_GRAY)


def render_figure(figure: Figure, dpi: float = 100) -> Image.Image:
    """Render a figure as an RGB image with a resolution of `dpi` dots per inch."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")

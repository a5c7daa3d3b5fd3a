"""Figures of tokens and predictions, for cards, notebooks and trackers.

Each plot function returns a matplotlib `Figure` with a white background. Figures are created without pyplot, so they
do not remain in global state. maps.py computes the maps, and card_images.py writes figures to files. Figures over
many images are in figures_over_depth.py and figures_of_states.py.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from PIL import Image

from ..configuration_vitcls import ViTCLSConfig
from ..token_names import get_token_names, get_token_names_by_group
from .image_report import ImageReport
from .maps import VisibleRegion, is_masked_image_model, is_used_by_head, overlay, resize_with_region, to_upright_rgb


# Color of each group of `config.token_layout` in all figures and pages. Color-blind readers can distinguish the colors
# (palette of Okabe and Ito).
GROUP_COLORS = {"cls": "#0072B2", "distillation": "#D55E00", "registers": "#009E73", "patches": "#8C8C8C"}

DARK_GRAY = "#222222"
ELLIPSIS = "…"


# Token layout --------------------------------------------------------------------------------------------------------

# Lengths in inches. At 100 dots per inch, the figure is 800 pixels wide.
LAYOUT_WIDTH, LAYOUT_HEIGHT, MARGIN = 8.0, 2.9, 0.2
BOXES_BOTTOM, BOXES_HEIGHT = 0.95, 1.25
GRID_WIDTH = 2.0
BOX_WIDTHS = np.arange(1.0, 0.05, -0.01)
GROUP_GAP = 0.2  # horizontal gap between groups
CHARACTER_WIDTH = 0.078

MAX_BOXES = 12  # maximum number of boxes per group
MAX_CELLS = 64  # maximum number of cells per side of the patch grid

GROUP_NAMES = {"cls": "CLS", "distillation": "distillation", "registers": "registers", "patches": "patches"}


@dataclass(frozen=True)
class Box:
    """Box of one special token, or of an `ELLIPSIS` that represents several tokens."""

    group: str
    index: int  # index of the token within its group
    name: str
    left: float
    width: float

    @property
    def center(self) -> float:
        """Return the x coordinate of the center."""
        return self.left + self.width / 2


def plot_token_layout(config: ViTCLSConfig) -> Figure:
    """Plot the token sequence [CLS | distillation | registers | patches] as boxes in the colors of `GROUP_COLORS`.

    Arrows mark the tokens that the head uses. The figure is 8 inches wide.
    """
    figure = Figure(figsize=(LAYOUT_WIDTH, LAYOUT_HEIGHT), dpi=100, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, LAYOUT_WIDTH), ylim=(0, LAYOUT_HEIGHT))
    axes.axis("off")
    boxes, headers, grid_left = arrange_boxes(config)
    for text, center in headers:
        draw_text(axes, center, BOXES_BOTTOM + BOXES_HEIGHT + 0.1, text, 9, DARK_GRAY, va="bottom")
    is_horizontal = all(len(box.name) * CHARACTER_WIDTH < box.width for box in boxes)
    for box in boxes:
        corner, color = (box.left, BOXES_BOTTOM), GROUP_COLORS[box.group]
        axes.add_patch(Rectangle(corner, box.width, BOXES_HEIGHT, facecolor=color, edgecolor="white", linewidth=1.5))
        font_size = 9 if box.width > 0.25 and len(box.name) <= 16 else 7
        rotation = 0 if is_horizontal or box.name == ELLIPSIS else 90
        text, middle = box.name.replace(" (", "\n("), BOXES_BOTTOM + BOXES_HEIGHT / 2
        draw_text(axes, box.center, middle, text, font_size, "white", rotation=rotation)
        if box.name != ELLIPSIS and is_used_by_head(config, box.group, box.index):
            draw_arrow(axes, box.center)
    draw_grid(axes, grid_left, config)
    if is_used_by_head(config, "patches", 0):
        draw_arrow(axes, grid_left + GRID_WIDTH / 2)
    corner, width = (MARGIN, 0.18), LAYOUT_WIDTH - 2 * MARGIN
    axes.add_patch(Rectangle(corner, width, 0.36, facecolor="#EFEFEF", edgecolor=DARK_GRAY, linewidth=0.8))
    draw_text(axes, LAYOUT_WIDTH / 2, 0.36, describe_head(config), 10, DARK_GRAY)
    return figure


def arrange_boxes(config: ViTCLSConfig) -> tuple[list[Box], list[tuple[str, float]], float]:
    """Return the boxes of the special tokens, the headers with their centers, and the left edge of the patch grid."""
    names_by_group = {group: names for group, names in get_token_names_by_group(config).items() if names}
    groups = {group: select_drawn_tokens(names) for group, names in names_by_group.items()}
    min_widths = {group: len(GROUP_NAMES[group]) * CHARACTER_WIDTH for group in groups}
    available_width = LAYOUT_WIDTH - 2 * MARGIN - GRID_WIDTH - GROUP_GAP * len(groups)
    for box_width in BOX_WIDTHS:
        widths = {group: max(box_width * len(tokens), min_widths[group]) for group, tokens in groups.items()}
        if sum(widths.values()) <= available_width:
            break
    boxes, headers = [], []
    left = MARGIN + (available_width - sum(widths.values())) / 2
    for group, tokens in groups.items():
        headers.append((f"{GROUP_NAMES[group]}\n{len(names_by_group[group])}", left + widths[group] / 2))
        start = left + (widths[group] - box_width * len(tokens)) / 2
        for position, (index, name) in enumerate(tokens.items()):
            boxes.append(Box(group, index, name, start + position * box_width, box_width))
        left += widths[group] + GROUP_GAP
    (rows, columns), (height, width) = config.grid_size, config.patch_height_width
    patch_header = f"patches, {height} × {width} pixels each\n{rows} × {columns} = {rows * columns}"
    return boxes, [*headers, (patch_header, left + GRID_WIDTH / 2)], left


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


def describe_head(config: ViTCLSConfig) -> str:
    """Describe the heads that use the tokens."""
    if is_masked_image_model(config):
        return "used by the decoder of masked patches"
    if config.tasks:
        return f"used by one head per task: {shorten_text(', '.join(config.task_labels()), 60)}"
    if config.has_distillation_head:
        return f'used by the head (pooling "{config.pooling}") and the distillation head'
    return f'used by the head (pooling "{config.pooling}")'


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


DEPTH_TILE_WIDTH = 1.1  # width of a tile in inches
DEPTH_TILE_SIDE = 160  # longer side of an image, in pixels


def plot_attention_by_layer(config: ViTCLSConfig, report: ImageReport, head: int | None = None) -> Figure:
    """Plot the attention of each special token (rows) in each layer (columns), and the rollout of each token.

    The first column shows the image and the attribution of each prediction (`compute_attribution`). The number below
    the overlay of a layer is the fraction of the token's attention that goes to patches. Each overlay has its own
    scale (`overlay`).

    Args:
        config: configuration of the model.
        report: report of the image (`build_image_report`), with L layers.
        head: index of one head. Default: the mean over heads.

    Raises:
        ValueError: if the head does not exist.
    """
    num_layers, num_heads, *_ = report.attention.shape
    if head is not None and not 0 <= head < num_heads:
        raise ValueError(f"head is {head}, but the model has {num_heads} heads. Choose from 0 to {num_heads - 1}.")
    attention = report.attention.mean(dim=1) if head is None else report.attention[:, head]  # [L, S, gh, gw]
    names = get_token_names(config)
    num_rows = max(len(names), 1 + len(report.attributions))
    image, visible_region = resize_with_region(report.image, report.visible_region, DEPTH_TILE_SIDE, DEPTH_TILE_SIDE)
    height = DEPTH_TILE_WIDTH * min(image.height / image.width, 1.5) + TITLE_HEIGHT
    num_columns = 1 + (num_layers + 1 if names else 0)
    figure = create_figure(DEPTH_TILE_WIDTH * num_columns + 0.8, height * num_rows + 0.2)
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for tile in grid.flat:
        tile.axis("off")
    draw_image(grid[0, 0], image, report.name)
    for tile, values, prediction in zip(grid[1:, 0], report.attributions, report.predictions, strict=False):
        title = " ".join(filter(None, ("for", prediction.task, prediction.top_label)))
        draw_image(tile, overlay(image, values, visible_region), title)
    for index, name in enumerate(names):
        tiles = grid[index, 1:]
        for layer, tile in enumerate(tiles[:-1]):
            values = attention[layer, index]
            draw_image(tile, overlay(image, values, visible_region), f"layer {layer + 1}" if index == 0 else "")
            percentage = f"{values.sum():.0%}"
            draw_text(tile, 0.5, -0.03, percentage, 7, DARK_GRAY, va="top", transform=tile.transAxes)
        draw_image(tiles[-1], overlay(image, report.rollout[index], visible_region), "rollout" if index == 0 else "")
        tiles[0].text(
            -0.08, 0.5, shorten_text(name, 24), transform=tiles[0].transAxes, rotation=90, ha="right", va="center"
        )
    return figure


def draw_text(axes: Axes, x: float, y: float, text: str, font_size: float, color: str, **options: Any) -> None:
    """Draw centered text."""
    axes.text(x, y, text, fontsize=font_size, color=color, **({"ha": "center", "va": "center"} | options))


def draw_image(axes: Axes, image: Image.Image, title: str) -> None:
    """Draw an image with a title, which is wrapped to the width of the image."""
    axes.imshow(image, interpolation="nearest")
    axes.set_title(textwrap.fill(shorten_text(title, 60), 22), fontsize=8, color=DARK_GRAY)


def create_figure(width: float, height: float) -> Figure:
    """Create a white figure with a constrained layout and margins; width and height are in inches."""
    margins = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06)
    return Figure(figsize=(width, height), dpi=100, facecolor="white", layout=margins)


def render_figure(figure: Figure, dpi: float = 100) -> Image.Image:
    """Render a figure as an RGB image with a resolution of `dpi` dots per inch."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


# Text ----------------------------------------------------------------------------------------------------------------


def shorten_text(text: str, max_length: int) -> str:
    """Shorten a text by replacing its middle with `ELLIPSIS`, because names often differ only at their ends."""
    if len(text) <= max_length:
        return text
    suffix_length = (max_length - 1) // 2
    prefix_length = max_length - 1 - suffix_length
    return f"{text[:prefix_length]}{ELLIPSIS}{text[len(text) - suffix_length :]}"

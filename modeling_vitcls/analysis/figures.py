"""Figures of tokens and answers, for cards, notebooks and trackers.

    token_layout_figure         the sequence as boxes, and which of its tokens the head reads
    confusion_matrix_figure     answers by true class
    attention_figure            pictures, and what each special token looks at
    depth_figure                one picture: layer by layer, what each special token looks at
    as_picture                  any figure as a picture

Each returns a matplotlib `Figure` on white, made without pyplot, so that nothing stays behind in a global state. Maps
are made in maps.py, and files of figures in card_images.py. Figures of many images are in figures_over_depth.py
and figures_of_states.py.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

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
from .image_report import Reading
from .maps import SeenPart, names_by_group, overlay, scaled, token_names, upright


# The colour of each group of `config.token_layout` in every figure and page: Okabe and Ito's palette, which the
# colour-blind can tell apart.
GROUP_COLOURS = {"cls": "#0072B2", "distillation": "#D55E00", "registers": "#009E73", "patches": "#8C8C8C"}

INK = "#222222"
FAINT = "#EFEFEF"
LEFT_OUT = "…"


# Token layout --------------------------------------------------------------------------------------------------------

# In inches; at 100 dots each the figure is 800 pixels wide.
WIDTH, HEIGHT, MARGIN = 8.0, 2.9, 0.2
BOXES_BOTTOM, BOXES_HEIGHT = 0.95, 1.25
GRID_WIDTH = 2.0
BOX_WIDTHS = np.arange(1.0, 0.05, -0.01)
GAP = 0.2  # between groups
CHARACTER = 0.078  # width of one

MOST_BOXES = 12  # of a group
MOST_CELLS = 64  # of a side of the patch grid

TERMS = {"cls": "CLS", "distillation": "distillation", "registers": "registers", "patches": "patches"}


@dataclass(frozen=True)
class Box:
    """One special token, or `LEFT_OUT` for several, where it is drawn."""

    group: str
    place: int  # within its group
    name: str
    left: float
    width: float

    @property
    def middle(self) -> float:
        """Across the figure."""
        return self.left + self.width / 2


def token_layout_figure(config: ViTCLSConfig) -> Figure:
    """The token sequence, [CLS | distillation | registers | patches], as boxes in the colours of `GROUP_COLOURS`.

    Arrows lead from the tokens that the head reads. 8 inches wide.
    """
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=100, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    boxes, headers, grid_left = arranged(config)
    for text, middle in headers:
        axes.text(middle, BOXES_BOTTOM + BOXES_HEIGHT + 0.1, text, ha="center", va="bottom", fontsize=9, color=INK)
    names_fit = all(len(box.name) * CHARACTER < box.width for box in boxes)
    for box in boxes:
        draw_box(axes, box, rotation=0 if names_fit else 90)
        if box.name != LEFT_OUT and is_read(config, box.group, box.place):
            draw_arrow(axes, box.middle)
    draw_grid(axes, grid_left, config)
    if is_read(config, "patches", 0):
        draw_arrow(axes, grid_left + GRID_WIDTH / 2)
    axes.add_patch(Rectangle((MARGIN, 0.18), WIDTH - 2 * MARGIN, 0.36, facecolor=FAINT, edgecolor=INK, linewidth=0.8))
    axes.text(WIDTH / 2, 0.36, reader(config), ha="center", va="center", fontsize=10, color=INK)
    return figure


def arranged(config: ViTCLSConfig) -> tuple[list[Box], list[tuple[str, float]], float]:
    """The special tokens' boxes, the headers and their middles, and where the patch grid begins; all centred."""
    groups = {group: drawn_places(names) for group, names in names_by_group(config).items() if names}
    room = WIDTH - 2 * MARGIN - GRID_WIDTH - GAP * len(groups)
    for box_width in BOX_WIDTHS:
        widths = {
            group: max(box_width * len(places), len(TERMS[group]) * CHARACTER) for group, places in groups.items()
        }
        if sum(widths.values()) <= room:
            break
    boxes, headers = [], []
    left = MARGIN + (room - sum(widths.values())) / 2
    for group, places in groups.items():
        headers.append((header(config, group), left + widths[group] / 2))
        start = left + (widths[group] - box_width * len(places)) / 2
        for index, (place, name) in enumerate(places.items()):
            boxes.append(Box(group, place, name, start + index * box_width, box_width))
        left += widths[group] + GAP
    return boxes, [*headers, (header(config, "patches"), left + GRID_WIDTH / 2)], left


def drawn_places(names: list[str]) -> dict[int, str]:
    """Place in the group -> name, of those that have room: of many, the first, `LEFT_OUT` and the last."""
    places = dict(enumerate(names))
    if len(names) <= MOST_BOXES:
        return places
    kept = {place: places[place] for place in range(MOST_BOXES - 2)}
    return {**kept, len(kept): LEFT_OUT, len(names) - 1: names[-1]}


def header(config: ViTCLSConfig, group: str) -> str:
    """The group's name, and how many there are."""
    if group == "patches":
        (rows, columns), (height, width) = config.grid_size, config.patch_height_width
        return f"patches, {height} × {width} pixels each\n{rows} × {columns} = {rows * columns}"
    tokens = getattr(config.token_layout, group)
    return f"{TERMS[group]}\n{tokens.stop - tokens.start}"


def draw_box(axes: Axes, box: Box, rotation: int) -> None:
    """A token with its name inside."""
    corner = (box.left, BOXES_BOTTOM)
    colour = GROUP_COLOURS[box.group]
    axes.add_patch(Rectangle(corner, box.width, BOXES_HEIGHT, facecolor=colour, edgecolor="white", linewidth=1.5))
    axes.text(
        box.middle,
        BOXES_BOTTOM + BOXES_HEIGHT / 2,
        box.name.replace(" (", "\n("),
        ha="center",
        va="center",
        rotation=0 if box.name == LEFT_OUT else rotation,
        fontsize=9 if box.width > 0.25 and len(box.name) <= 16 else 7,
        color="white",
    )


def draw_arrow(axes: Axes, middle: float) -> None:
    """From a token down to the head."""
    axes.annotate(
        "",
        xy=(middle, 0.54),
        xytext=(middle, BOXES_BOTTOM - 0.02),
        arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0},
    )


def draw_grid(axes: Axes, left: float, config: ViTCLSConfig) -> None:
    """The patches as the grid that they are, in the image's proportions, in the middle of their room."""
    (rows, columns), (image_height, image_width) = config.grid_size, config.image_height_width
    scale = min(GRID_WIDTH / image_width, BOXES_HEIGHT / image_height)
    height, width = image_height * scale, image_width * scale
    x, y = left + (GRID_WIDTH - width) / 2, BOXES_BOTTOM + (BOXES_HEIGHT - height) / 2
    axes.add_patch(Rectangle((x, y), width, height, facecolor=GROUP_COLOURS["patches"]))
    if max(rows, columns) <= MOST_CELLS:
        line_width = 12 / max(rows, columns, 12)
        axes.vlines(x + width * np.arange(1, columns) / columns, y, y + height, colors="white", linewidth=line_width)
        axes.hlines(y + height * np.arange(1, rows) / rows, x, x + width, colors="white", linewidth=line_width)


def is_read(config: ViTCLSConfig, group: str, place: int) -> bool:
    """Whether a head reads the token at this place of its group, in the last layer."""
    if is_for_masked_images(config):
        return group == "patches"
    if config.pooling == "attention" and config.attention_pool_tokens == "all":
        return True
    if group == "cls":
        pooled = config.pooled_cls_indices if config.cls_pooling != "first" else config.pooled_cls_indices[:1]
        return bool(config.tasks) or (config.pooling in ("cls", "cls_mean") and place in pooled)
    if group == "distillation":
        return config.has_distillation_head and not config.tasks
    return group == "patches" and config.pooling != "cls"


def reader(config: ViTCLSConfig) -> str:
    """Words for what reads tokens."""
    if is_for_masked_images(config):
        return "read by the decoder of masked patches"
    if config.tasks:
        return f"read by one head per task: {cut(', '.join(config.task_labels()), 60)}"
    if config.has_distillation_head:
        return f'read by two heads: pooling "{config.pooling}", and distillation'
    return f'read by the head, pooling "{config.pooling}"'


def is_for_masked_images(config: ViTCLSConfig) -> bool:
    """Whether the model is one of masked image modelling."""
    return "ViTCLSForMaskedImageModeling" in (config.architectures or ())


# Confusion matrix ----------------------------------------------------------------------------------------------------

MOST_NUMBERED_CLASSES = 20
MOST_NAMED_CLASSES = 50
MOST_CHARACTERS = 18  # of a class name


def confusion_matrix_figure(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Counts of answers by true class, coloured by their share of the true class.

    Small shares are drawn darker than in proportion, so that rare confusions show. Counts are written for up to 20
    classes, names for up to 50.

    Args:
        matrix: [L, L], rows are true classes, columns answers.
        class_names: L names.

    Raises:
        ValueError: for a matrix that is not square, or another number of names.
    """
    counts = np.asarray(matrix)
    num_classes = len(class_names)
    if counts.shape != (num_classes, num_classes):
        raise ValueError(f"the confusion matrix is {counts.shape} and there are {num_classes} class names")
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    side = min(max(2.6 + 0.34 * num_classes, 4.0), 8.0)
    figure = blank(side + 0.6, side)
    axes = figure.add_subplot()
    drawn = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8, label="share of the true class", ticks=[0, 0.05, 0.2, 0.5, 1])
    bar.ax.set_yticklabels(["0", "5 %", "20 %", "50 %", "100 %"])
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    name_classes(axes, class_names)
    if num_classes <= MOST_NUMBERED_CLASSES:
        write_counts(axes, counts, shares)
    return figure


def name_classes(axes: Axes, names: Sequence[str]) -> None:
    """Class names along both sides, upright where they are short."""
    if len(names) > MOST_NAMED_CLASSES:
        axes.set_xticks([])
        axes.set_yticks([])
        return
    shown = [cut(name, MOST_CHARACTERS) for name in names]
    size = 9 if len(names) <= MOST_NUMBERED_CLASSES else 6
    axes.set_yticks(range(len(names)), shown, fontsize=size)
    axes.set_xticks(range(len(names)), shown, fontsize=size, rotation=0 if max(map(len, shown)) <= 3 else 90)


def write_counts(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    """The numbers in their cells; zeros faint."""
    size = 9 if counts.max() < 1000 else 7
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.3 else INK if count else "#B5B5B5"
        axes.text(column, row, f"{count}", ha="center", va="center", fontsize=size, color=colour)


# Attention -----------------------------------------------------------------------------------------------------------

MOST_COLUMNS = 7  # a picture and its overlays; more overlays go on below
TILE, TITLE = 1.45, 0.35  # inches
TILE_SIDE = 320  # pixels


def attention_figure(
    pictures: Sequence[Image.Image],
    maps: Sequence[torch.Tensor],
    names: Sequence[str],
    titles: Sequence[str],
    seen: Sequence[SeenPart | None] | None = None,
) -> Figure:
    """A row for each picture: the picture, then what each token looks at, drawn over it.

    Each overlay has its own scale (`overlay`): its brightest place is where the token looks most. Tokens that have no
    room beside the picture follow on the next line.

    Args:
        pictures: S of them, of any sizes.
        maps: S tensors [T, gh, gw], or one [S, T, gh, gw], of attention to patches (`patch_maps`).
        names: T names of tokens (`token_names`).
        titles: S texts, such as "7, predicted 7".
        seen: The part of each picture that its maps cover (`seen_part`). Default: all.

    Raises:
        ValueError: for different numbers of pictures, maps, names or titles, or no picture.
    """
    seen = [None] * len(pictures) if seen is None else seen
    if not len(pictures) == len(maps) == len(titles) == len(seen) > 0:
        raise ValueError(
            f"give as many pictures, maps, titles and seen parts, at least one of each, not {len(pictures)}, "
            f"{len(maps)}, {len(titles)} and {len(seen)}"
        )
    if any(len(tokens) != len(names) for tokens in maps):
        raise ValueError(f"there are {len(names)} names of tokens and maps of {[len(tokens) for tokens in maps]}")
    lines = max(math.ceil(len(names) / (MOST_COLUMNS - 1)), 1)
    columns = 1 + math.ceil(len(names) / lines)
    small = [
        scaled(upright(picture), part, TILE_SIDE, TILE_SIDE) for picture, part in zip(pictures, seen, strict=True)
    ]
    heights = [TILE * min(picture.height / picture.width, 1) + TITLE for picture, _ in small for _ in range(lines)]
    figure = Figure(figsize=(TILE * columns, sum(heights)), dpi=100, facecolor="white", layout="constrained")
    grid = figure.subplots(len(heights), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for tile in grid.flat:
        tile.axis("off")
    for index, ((picture, part), tokens, title) in enumerate(zip(small, maps, titles, strict=True)):
        tiles = grid[index * lines : (index + 1) * lines]
        show(tiles[0, 0], picture, title)
        for tile, values, name in zip(tiles[:, 1:].flat, tokens, names, strict=False):
            show(tile, overlay(picture, values, part), name)
    return figure


DEPTH_TILE = 1.1  # inches
DEPTH_TILE_SIDE = 160  # pixels


def depth_figure(config: ViTCLSConfig, reading: Reading, head: int | None = None) -> Figure:
    """A picture, a row for each special token and a column for each layer: what it looks at there; then its rollout.

    Below the picture is what speaks for the answer (`attribution`), below an overlay the share of the token's
    attention that goes to patches at all. Each overlay has its own scale (`overlay`).

    Args:
        config: of the model.
        reading: of the picture (`read_picture`), of L layers.
        head: one alone, from 0. Default: the mean of all.

    Raises:
        ValueError: for a head that does not exist.
    """
    num_layers, num_heads, *_ = reading.attention.shape
    if head is not None and not 0 <= head < num_heads:
        raise ValueError(f"there is no head {head}: the model has {num_heads}, from 0")
    attention = reading.attention.mean(dim=1) if head is None else reading.attention[:, head]  # [L, S, gh, gw]
    names = token_names(config)
    explained = [f"for {answer.task or ''} {answer.first}".replace("  ", " ") for answer in reading.answers]
    left = list(zip(reading.attributions, explained, strict=True))
    num_lines = max(len(names), 1 + len(left))
    picture, seen = scaled(reading.picture, reading.seen, DEPTH_TILE_SIDE, DEPTH_TILE_SIDE)
    height = DEPTH_TILE * min(picture.height / picture.width, 1.5) + TITLE
    num_columns = 1 + (num_layers + 1 if names else 0)
    figure = blank(DEPTH_TILE * num_columns + 0.8, height * num_lines + 0.2)
    grid = figure.subplots(num_lines, num_columns, squeeze=False)
    for tile in grid.flat:
        tile.axis("off")
    show(grid[0, 0], picture, reading.name)
    for tile, (values, words) in zip(grid[1:, 0], left, strict=False):
        show(tile, overlay(picture, values, seen), words)
    for place, name in enumerate(names):
        line = grid[place, 1:]
        for layer, tile in enumerate(line[:-1]):
            values = attention[layer, place]
            show(tile, overlay(picture, values, seen), f"layer {layer + 1}" if place == 0 else "")
            below(tile, f"{values.sum():.0%}")
        show(line[-1], overlay(picture, reading.rollout[place], seen), "rollout" if place == 0 else "")
        line[0].text(-0.08, 0.5, cut(name, 24), transform=line[0].transAxes, rotation=90, ha="right", va="center")
    return figure


def below(axes: Axes, text: str) -> None:
    """Small text under a tile."""
    axes.text(0.5, -0.03, text, transform=axes.transAxes, ha="center", va="top", fontsize=7, color=INK)


def show(axes: Axes, picture: Image.Image, title: str) -> None:
    """One picture with a title that stays within its width."""
    axes.imshow(picture, interpolation="nearest")
    axes.set_title(textwrap.fill(cut(title, 60), 22), fontsize=8, color=INK)


def blank(width: float, height: float) -> Figure:
    """A white figure of so many inches, whose parts make room for each other, with a margin."""
    margins = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06)
    return Figure(figsize=(width, height), dpi=100, facecolor="white", layout=margins)


def as_picture(figure: Figure, resolution: float = 100) -> Image.Image:
    """A figure as an RGB picture of so many dots per inch."""
    figure.set_dpi(resolution)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


# Text ----------------------------------------------------------------------------------------------------------------


def cut(text: str, most: int) -> str:
    """The text, shortened to so many characters in its middle: names often differ at their ends alone."""
    if len(text) <= most:
        return text
    ending = (most - 1) // 2
    return f"{text[: most - 1 - ending]}{LEFT_OUT}{text[len(text) - ending :]}"

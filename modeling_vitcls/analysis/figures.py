"""Figures of tokens and predictions, for cards, reports and notebooks.

plot_token_layout, plot_confusion_matrix, plot_attention      images of a model card (card_images.py)
plot_curve, plot_attention_mass, plot_norms                   statistics over depth (`Findings`)
plot_norm_histogram, plot_map_checks                          norms of the patches, checks of the maps

Each function returns a matplotlib `Figure` with a white background, created without pyplot. `render_figure` returns a
figure as an image, and `render_svg` as text for HTML. "After layer 0" means the embeddings.
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from ..configuration_vitcls import ViTCLSConfig
from ..token_names import get_token_names, get_token_names_by_group
from .artifacts import find_second_mode
from .map_checks import FRACTIONS, MapCheck
from .maps import VisibleRegion, is_masked_image_model, is_used_by_head, overlay, resize_with_region, to_upright_rgb
from .test_time_registers import OUTLIER_RATIO
from .token_statistics import Findings


# Color of each group of `config.token_layout` in all figures and pages. Color-blind readers can distinguish the colors
# (palette of Okabe and Ito).
GROUP_COLORS = {"cls": "#0072B2", "distillation": "#D55E00", "registers": "#009E73", "patches": "#8C8C8C"}

DARK_GRAY = "#222222"
ELLIPSIS = "…"


# Token layout --------------------------------------------------------------------------------------------------------

# Lengths in inches. At 100 dots per inch, the figure is 800 pixels wide.
LAYOUT_WIDTH, LAYOUT_HEIGHT, MARGIN = 8.0, 2.9, 0.2
BOXES_BOTTOM, BOXES_HEIGHT = 0.95, 1.25
GRID_WIDTH, GROUP_GAP, MIN_GROUP_WIDTH = 2.0, 0.2, 1.0
CHARACTER_WIDTH = 0.078

MAX_BOXES = 12  # maximum number of boxes per group
MAX_CELLS = 64  # maximum number of cells per side of the patch grid

GROUP_NAMES = {"cls": "CLS", "distillation": "distillation", "registers": "registers", "patches": "patches"}


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


# Curves over depth ---------------------------------------------------------------------------------------------------

AXES_WIDTH, AXES_HEIGHT = 5.6, 2.8  # size of the axes in inches, without the legend
LEGEND_LINE_HEIGHT, LEGEND_COLUMN_WIDTH = 0.2, 1.6  # height of a line and width of a column in a legend, in inches
MAX_GRID_COLUMNS = 4  # maximum number of columns in a grid of axes
MAX_LEGEND_NAME = 24  # maximum length of a name in a legend, in characters
MIN_RATIO_FOR_LOG_SCALE = 30.0  # minimum ratio of largest to smallest norm for a logarithmic scale
PATCH_QUANTILES = (0.05, 0.5, 0.95)  # quantiles of the patch norms: lower edge of the band, line, upper edge
NUM_BINS = 48  # number of bins in a histogram
OUTLIER_COLOR = "#B3261E"  # color of the bars of the second mode
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D")
MAX_WHITE_FRACTION = 0.55  # fraction of white in the color of the last token of a group


class CurveLabels(NamedTuple):
    """Labels of a figure that shows one attribute of `Findings` over depth."""

    title: str
    y_label: str
    is_percentage: bool = False


# Attribute of `Findings` -> labels of its figure. Shapes are [L, H, S] for attention of tokens, [L, H] for attention
# of patches, and [L + 1, S] for states.
CURVES = {
    "entropy": CurveLabels("Entropy of attention", "nats"),
    "received": CurveLabels("Attention received from patches", "fraction", is_percentage=True),
    "patch_distance": CurveLabels("Attention distance of patches", "pixels"),
    "variation": CurveLabels("Variation between images", "fraction of the norm", is_percentage=True),
}


def get_uniform_values(findings: Findings, name: str) -> list[float]:
    """Return the values of uniform attention for one of CURVES, without repetitions. The list is empty for states."""
    values = {
        "received": [math.exp(-findings.uniform["entropy"])],  # 1 / N
        "patch_distance": [findings.uniform["patch_distance"]],
        "entropy": findings.uniform_entropy_by_token.tolist(),
    }
    return sorted({float(f"{value:.5g}") for value in values.get(name, [])})


@dataclass(frozen=True)
class LineStyle:
    """Line style of one token. Groups differ in color; tokens of a group differ in lightness, dashes and markers."""

    name: str
    color: tuple[float, float, float]
    index: int = 0  # index of the token within the group


PATCH_STYLE = LineStyle("patches", to_rgb(GROUP_COLORS["patches"]))


def plot_curve(config: ViTCLSConfig, findings: Findings, name: str) -> Figure:
    """Plot one of CURVES: "entropy", "received", "patch_distance" or "variation".

    Each line is the mean over heads, each band is the range over heads, and dashed lines show uniform attention.

    Args:
        config: configuration of the model.
        findings: statistics over many images (`TokenStatistics`).
        name: name of the figure.

    Raises:
        ValueError: if the figure does not exist, or requires special tokens that the model does not have.
    """
    if name not in CURVES:
        raise ValueError(f"There is no figure {name!r}. Choose one of {', '.join(CURVES)}.")
    curve = CURVES[name]
    values = getattr(findings, name)
    if values.shape[-1] == 0:
        raise ValueError(
            f"Figure {name!r} requires special tokens, but the model has no special tokens. Choose patch_distance."
        )
    is_patch_figure = name == "patch_distance"
    styles = [PATCH_STYLE] if is_patch_figure else get_token_styles(config)
    lines = values.unsqueeze(-1) if is_patch_figure else values  # [L, H, lines], or [L + 1, lines]
    first_layer = 0 if lines.ndim == 2 else 1
    baselines = get_uniform_values(findings, name)
    figure, (axes,) = create_axes(1, len(styles) + bool(baselines))
    axes.set_title(curve.title, fontsize=11, color=DARK_GRAY)
    axes.set_ylabel(curve.y_label)
    for style, line in zip(styles, lines.unbind(dim=-1), strict=True):
        head_values = line if line.ndim == 2 else line.unsqueeze(1)  # [L, H]
        draw_line(axes, style, head_values.mean(dim=1), head_values.amin(dim=1), head_values.amax(dim=1), first_layer)
    for index, value in enumerate(baselines):
        label = "uniform" if index == 0 else "_nolegend_"
        axes.axhline(value, color=DARK_GRAY, linewidth=1, linestyle=(0, (5, 3)), label=label)
    format_layer_axis(axes, len(lines), first_layer)
    axes.set_ylim(bottom=min(axes.get_ylim()[0], 0))
    if curve.is_percentage:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    draw_legend(figure, axes)
    return figure


def get_token_styles(config: ViTCLSConfig) -> list[LineStyle]:
    """Return one line style per special token, in sequence order."""
    styles = []
    for group, names in get_token_names_by_group(config).items():
        for index, name in enumerate(names):
            white = MAX_WHITE_FRACTION * index / max(len(names) - 1, 1)
            red, green, blue = (white + (1 - white) * channel for channel in to_rgb(GROUP_COLORS[group]))
            styles.append(LineStyle(shorten_text(name, MAX_LEGEND_NAME), (red, green, blue), index))
    return styles


def draw_line(
    axes: Axes, style: LineStyle, mean: torch.Tensor, low: torch.Tensor, high: torch.Tensor, first_layer: int
) -> None:
    """Draw the `mean` [L] as a line over the layers, and a band from `low` to `high` if these values differ."""
    layer_numbers = range(first_layer, first_layer + len(mean))
    if bool((high > low).any()):
        axes.fill_between(layer_numbers, low.numpy(), high.numpy(), color=style.color, alpha=0.15, linewidth=0)
    dash, marker = DASHES[style.index % len(DASHES)], MARKERS[style.index % len(MARKERS)]
    axes.plot(
        layer_numbers, mean, c=style.color, ls=dash, marker=marker, markersize=4, linewidth=1.6, label=style.name
    )


# Attention mass -----------------------------------------------------------------------------------------------------


def plot_attention_mass(config: ViTCLSConfig, findings: Findings) -> Figure:
    """Plot the fraction of each special token's attention to each group of tokens, per layer, averaged over heads.

    Raises:
        ValueError: if the model has no special tokens.
    """
    names = get_token_names(config)
    groups = [name for name, members in get_token_names_by_group(config).items() if members] + ["patches"]
    figure, grid = create_token_grid(names)
    fractions = findings.attention_fractions.mean(dim=1)  # [L, S, 4]
    layer_numbers = range(1, len(fractions) + 1)
    for index, axes in enumerate(grid):
        bottom = np.zeros(len(fractions))
        for (group, _), values in zip(config.token_layout.items(), fractions[:, index].T.numpy(), strict=True):
            if group in groups:
                axes.bar(layer_numbers, values, bottom=bottom, width=0.92, color=GROUP_COLORS[group])
                bottom += values
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        despine(axes)
    figure.supxlabel("layer", fontsize=9, color=DARK_GRAY)
    handles = [Patch(color=GROUP_COLORS[group], label=GROUP_NAMES[group]) for group in groups]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)
    return figure


# Norms ---------------------------------------------------------------------------------------------------------------


def plot_norms(config: ViTCLSConfig, findings: Findings) -> Figure:
    """Plot the norms of the special tokens, the median and central 90% range of the patch norms, and the fraction of
    outlier patches.

    Models without registers may store global information in uninformative patches, whose norms then become outliers
    (Darcet et al. 2023, arXiv 2309.16588).
    """
    styles = get_token_styles(config)
    fractions = {"patches": findings.outliers}
    if findings.outliers_without_registers is not None:
        fractions["patches, registers hidden"] = findings.outliers_without_registers
    figure, (norm_axes, outlier_axes) = create_axes(2, len(styles) + len(fractions))
    norm_axes.set_title("Norms of tokens and patches", fontsize=11, color=DARK_GRAY)
    low, median, high = findings.patch_norms.float().quantile(torch.tensor(PATCH_QUANTILES), dim=1)  # [L + 1] each
    draw_line(norm_axes, PATCH_STYLE, median, low, high, 0)
    for style, line in zip(styles, findings.token_norms.unbind(dim=-1), strict=True):
        draw_line(norm_axes, style, line, line, line, 0)
    min_value, max_value = torch.cat([low, high, findings.token_norms.flatten()]).aminmax()
    if min_value > 0 and max_value > MIN_RATIO_FOR_LOG_SCALE * min_value:
        norm_axes.set(yscale="log", ylabel="norm, logarithmic")
    else:
        norm_axes.set_ylim(bottom=0)
        norm_axes.set_ylabel("norm")
    outlier_axes.set_title(f"Patches above {OUTLIER_RATIO:g} times the median", fontsize=11, color=DARK_GRAY)
    for index, (name, fraction) in enumerate(fractions.items()):
        draw_line(outlier_axes, LineStyle(name, PATCH_STYLE.color, index), fraction, fraction, fraction, 0)
    outlier_axes.set_ylim(0, max(1.1 * max(fraction.max().item() for fraction in fractions.values()), 0.01))
    outlier_axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    for axes in (norm_axes, outlier_axes):
        format_layer_axis(axes, len(median), 0)
    draw_legend(figure, norm_axes, outlier_axes)
    return figure


def plot_norm_histogram(config: ViTCLSConfig, findings: Findings, layer: int = -1) -> Figure:
    """Plot a histogram of the patch norms after a layer, divided by the median norm of the image (logarithmic axes).

    If the norms have a second mode, the bars of this mode are red, and the dashed line is the lower limit of this
    mode. Triangles mark the mean norms of the registers.
    """
    ratios = findings.patch_ratios[layer].float().clamp(min=1e-3)
    median = findings.patch_norms[layer].median().clamp(min=1e-12)
    registers = (findings.token_norms[layer, config.token_layout.registers] / median).clamp(min=1e-3).tolist()
    low, high = min(ratios.min().item(), 0.5, *registers), max(ratios.max().item(), 2.0, *registers)
    counts = ratios.log().histc(NUM_BINS, min=math.log(low), max=math.log(high)).int().tolist()
    mode, edges = find_second_mode(findings.patch_ratios[layer]), np.geomspace(low, high, NUM_BINS + 1)
    threshold = math.inf if mode is None else mode.threshold
    figure, (axes,) = create_axes(1, bool(registers))
    axes.set_title(f"Norms of the patches, after layer {range(len(findings.patch_norms))[layer]}", fontsize=11)
    is_mode = np.sqrt(edges[1:] * edges[:-1]) >= threshold
    colors = [OUTLIER_COLOR if is_outlier else GROUP_COLORS["patches"] for is_outlier in is_mode]
    axes.bar(edges[:-1], counts, width=0.94 * np.diff(edges), align="edge", color=colors)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(0.7, 2 * max(*counts, 5)))
    axes.set(xlabel="norm / median norm of the image, logarithmic", ylabel="patches, logarithmic")
    if mode is not None:
        axes.axvline(threshold, color=DARK_GRAY, linewidth=1, linestyle=(0, (5, 3)))
    axes.plot(
        registers, [0.97] * len(registers), "v", transform=axes.get_xaxis_transform(),
        color=GROUP_COLORS["registers"], label="registers", clip_on=False,
    )  # fmt: skip
    despine(axes)
    if registers:
        figure.legend(loc="outside lower center", frameon=False, fontsize=8.5)
    return figure


def plot_map_checks(checks: Mapping[str, MapCheck]) -> Figure:
    """Plot the deletion and insertion curves of each map (`check_maps`), and of a random order of patches."""
    figure, all_axes = create_axes(2, len(checks) + 1)
    for axes, kind in zip(all_axes, ("deletion", "insertion"), strict=True):
        for index, (name, check) in enumerate(checks.items()):
            axes.plot(FRACTIONS, getattr(check, kind), MARKERS[index] + "-", label=name)
        axes.plot(FRACTIONS, getattr(check, f"random_{kind}"), "--", color=DARK_GRAY, label="random order")
        axes.set(xlabel="fraction of the patches", ylabel="probability of the class", ylim=(0, 1.02))
        axes.set_title(kind.capitalize(), fontsize=11, color=DARK_GRAY)
        despine(axes)
    draw_legend(figure, *all_axes)
    return figure


# Axes ----------------------------------------------------------------------------------------------------------------


def create_axes(num_axes: int, num_names: int) -> tuple[Figure, Sequence[Axes]]:
    """Create a figure with `num_axes` axes side by side, above the space for a legend of `num_names` names."""
    width = AXES_WIDTH if num_axes == 1 else 1.5 * AXES_WIDTH
    height = AXES_HEIGHT + LEGEND_LINE_HEIGHT * math.ceil(num_names / int(width / LEGEND_COLUMN_WIDTH))
    figure = create_figure(width, height)
    return figure, figure.subplots(1, num_axes, squeeze=False)[0]


def create_token_grid(names: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Create a grid of small axes over layers, one per token. Raise ValueError if there are no tokens."""
    if not names:
        raise ValueError(
            "The figure requires special tokens, but the model has no special tokens. Use a model with special tokens."
        )
    num_columns = min(len(names), MAX_GRID_COLUMNS)
    num_rows = math.ceil(len(names) / num_columns)
    figure = create_figure(max(2.4 * num_columns, 3.2), 1.9 * num_rows + 0.5)
    grid = list(figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes, name in zip(grid, names, strict=False):
        axes.set_title(shorten_text(name, MAX_LEGEND_NAME), fontsize=9, color=DARK_GRAY)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.tick_params(labelsize=8)
    for unused_axes in grid[len(names) :]:
        unused_axes.axis("off")
    return figure, grid[: len(names)]


def format_layer_axis(axes: Axes, num_values: int, first_layer: int) -> None:
    """Draw horizontal grid lines, and label the x axis with layer indices."""
    axes.set_xlabel("layer" if first_layer else "after layer")
    axes.set_xlim(first_layer - 0.3, first_layer + num_values - 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    despine(axes)


def despine(axes: Axes) -> None:
    """Hide the top and right lines of the frame."""
    axes.spines[["top", "right"]].set_visible(False)


def draw_legend(figure: Figure, *all_axes: Axes) -> None:
    """Draw a legend of all named lines below the axes, unless there is only one named line."""
    lines: dict[str, Line2D] = {}
    for line in (line for axes in all_axes for line in axes.get_lines()):
        lines.setdefault(str(line.get_label()), line)
    named_lines = [line for name, line in lines.items() if not name.startswith("_")]
    if len(named_lines) > 1:
        num_columns = min(len(named_lines), int(figure.get_figwidth() / LEGEND_COLUMN_WIDTH))
        figure.legend(handles=named_lines, loc="outside lower center", ncols=num_columns, frameon=False, fontsize=8.5)


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


def render_svg(figure: Figure) -> str:
    """Return a figure as SVG text that can be embedded in HTML."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vitcls"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


# Text ----------------------------------------------------------------------------------------------------------------


def shorten_text(text: str, max_length: int) -> str:
    """Shorten a text by replacing its middle with `ELLIPSIS`, because names often differ only at their ends."""
    if len(text) <= max_length:
        return text
    suffix_length = (max_length - 1) // 2
    prefix_length = max_length - 1 - suffix_length
    return f"{text[:prefix_length]}{ELLIPSIS}{text[len(text) - suffix_length :]}"

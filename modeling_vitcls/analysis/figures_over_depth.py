"""Figures over depth: statistics of tokens and patches per layer, over many images (`Findings`).

Each plot function returns a matplotlib `Figure` with a white background and the colors of figures.py. pyplot is not
used. "After layer 0" means the embeddings. Similarities and histograms are in figures_of_states.py. The HTML report
contains all figures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..configuration_vitcls import ViTCLSConfig
from ..token_names import get_token_names, get_token_names_by_group
from .figures import DARK_GRAY, GROUP_COLORS, GROUP_NAMES, create_figure, shorten_text
from .test_time_registers import OUTLIER_RATIO
from .token_statistics import Findings


AXES_WIDTH, AXES_HEIGHT = 6.4, 3.2  # size of the axes in inches, without the legend
LEGEND_LINE_HEIGHT, LEGEND_COLUMN_WIDTH = 0.2, 1.6  # height of a line and width of a column in a legend, in inches
MIN_WIDTH = 3.2  # minimum width of a figure in inches
MAX_COLUMNS = 4  # maximum number of columns in a grid of axes
MAX_NAME_LENGTH = 24  # maximum length of a name in a legend, in characters
MIN_RATIO_FOR_LOG_SCALE = 30.0  # minimum ratio of largest to smallest norm for a logarithmic scale
PATCH_QUANTILES = (0.05, 0.5, 0.95)  # quantiles of the patch norms: lower edge of the band, line, upper edge

DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D")
MAX_WHITE_FRACTION = 0.55  # fraction of white in the color of the last token of a group


# Curves --------------------------------------------------------------------------------------------------------------


class CurveLabels(NamedTuple):
    """Labels of a figure that shows one attribute of `Findings` over depth."""

    title: str
    y_label: str
    is_percentage: bool = False


# Attribute of `Findings` -> labels of its figure. Shapes are [L, H, S] for attention of tokens, [L, H] for attention
# of patches, and [L + 1, S] for states.
CURVES = {
    "entropy": CurveLabels("Entropy of attention", "nats"),
    "spread": CurveLabels("Spread of attention over the image", "pixels"),
    "received": CurveLabels("Attention received from patches", "fraction", is_percentage=True),
    "patch_distance": CurveLabels("Attention distance of patches", "pixels"),
    "variation": CurveLabels("Variation between images", "fraction of the norm", is_percentage=True),
    "to_patches": CurveLabels("Similarity to the mean patch", "cosine"),
}


def get_uniform_values(findings: Findings, name: str) -> list[float]:
    """Return the values of uniform attention for one of CURVES: one value for all tokens, or one value per special
    token if the value depends on the region that the token attends to. The list is empty for states."""
    if name == "received":
        return [math.exp(-findings.uniform["entropy"])]  # 1 / N
    if name == "patch_distance":
        return [findings.uniform[name]]
    return findings.uniform_by_token[name].tolist() if name in findings.uniform_by_token else []


@dataclass(frozen=True)
class LineStyle:
    """Line style of one token. Groups differ in color; tokens of a group differ in lightness, dashes and markers."""

    name: str
    color: tuple[float, float, float]
    index: int = 0  # index of the token within the group


PATCH_STYLE = LineStyle("patches", to_rgb(GROUP_COLORS["patches"]))


def plot_curve(config: ViTCLSConfig, findings: Findings, name: str) -> Figure:
    """Plot one of CURVES: "entropy", "spread", "received", "patch_distance", "variation" or "to_patches".

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
    baselines = sorted({float(f"{value:.5g}") for value in get_uniform_values(findings, name)})
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
            styles.append(LineStyle(shorten_text(name, MAX_NAME_LENGTH), (red, green, blue), index))
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
    figure, grid = create_token_grid(names, width=2.4, height=1.9, extra_height=0.5)
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


# Axes ----------------------------------------------------------------------------------------------------------------


def create_axes(num_axes: int, num_names: int) -> tuple[Figure, Sequence[Axes]]:
    """Create a figure with `num_axes` axes side by side, above the space for a legend of `num_names` names."""
    width = AXES_WIDTH if num_axes == 1 else 1.5 * AXES_WIDTH
    height = AXES_HEIGHT + LEGEND_LINE_HEIGHT * math.ceil(num_names / int(width / LEGEND_COLUMN_WIDTH))
    figure = create_figure(width, height)
    return figure, figure.subplots(1, num_axes, squeeze=False)[0]


def create_token_grid(
    names: Sequence[str], width: float, height: float, extra_width: float = 0, extra_height: float = 0
) -> tuple[Figure, list[Axes]]:
    """Create a figure with a grid of small axes over layers, one per token. The size of each cell of the grid
    is `width` x `height` inches; legends and labels add `extra_width` and `extra_height` inches to the figure. Raise
    ValueError if there are no tokens."""
    if not names:
        raise ValueError(
            "The figure requires special tokens, but the model has no special tokens. Use a model with special tokens."
        )
    num_columns = min(len(names), MAX_COLUMNS)
    num_rows = math.ceil(len(names) / num_columns)
    figure = create_figure(max(width * num_columns + extra_width, MIN_WIDTH), height * num_rows + extra_height)
    grid = list(figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes, name in zip(grid, names, strict=False):
        axes.set_title(shorten_text(name, MAX_NAME_LENGTH), fontsize=9, color=DARK_GRAY)
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

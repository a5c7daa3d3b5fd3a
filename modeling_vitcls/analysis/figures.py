"""Figures of statistics over depth and of the patch norms, for reports and notebooks.

plot_curve, plot_norms       statistics over depth (`Findings`)
plot_norm_histogram          norms of the patches after one layer

Each function returns a matplotlib `Figure` with a white background, created without pyplot.
`render_svg` returns a figure as text for HTML. "After layer 0" means the embeddings.
publishing/card_images.py draws the figures of cards.
"""

import io
import math

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)

from ..inference.token_names import get_token_names_by_group
from ..model.configuration_vitcls import ViTCLSConfig
from .diagnosis import find_second_mode
from .token_statistics import Findings


# Color of each group of `config.token_layout` in all figures and pages. Color-blind readers can
# distinguish the colors (palette of Okabe and Ito).
GROUP_COLORS = {
    "cls": "#0072B2",
    "distillation": "#D55E00",
    "registers": "#009E73",
    "patches": "#8C8C8C",
}

DARK_GRAY = "#222222"


# Curves over depth --------------------------------------------------------------------------------

FIGURE_SIZE = 7.0, 3.0  # width and height in inches
MAX_LEGEND_NAME = 24  # maximum length of a name in a legend, in characters
MIN_RATIO_FOR_LOG_SCALE = 30.0  # minimum ratio of largest to smallest norm for a logarithmic scale
# quantiles of the patch norms: lower edge of the band, line, upper edge
PATCH_QUANTILES = (0.05, 0.5, 0.95)
NUM_BINS = 48  # number of bins in a histogram
OUTLIER_COLOR = "#B3261E"  # color of the bars of the second mode
DASHES = ("o-", "s--", "^:", "D-.")  # markers and dashes of the tokens of a group
MAX_WHITE_FRACTION = 0.55  # fraction of white in the color of the last token of a group

# Attribute of `Findings` -> title, label of the y axis, and whether values are percentages. Shapes
# are [L, H, S] for attention and [L + 1, S] for states.
CURVES = {
    "entropy": ("Entropy of attention", "nats", False),
    "variation": ("Variation between images", "fraction of the norm", True),
}

# Name, color and matplotlib format of a line. Groups differ in color, tokens of a group in
# lightness, dash and marker.
LineStyle = tuple[str, tuple[float, ...], str]
PATCH_STYLE: LineStyle = ("patches", to_rgb(GROUP_COLORS["patches"]), DASHES[0])


def plot_curve(config: ViTCLSConfig, findings: Findings, name: str) -> Figure:
    """Plot one of CURVES: "entropy" or "variation".

    Each line is the mean over heads, each band is the range over heads, and dashed lines show the
    entropy of uniform attention.

    Args:
        config: configuration of the model.
        findings: statistics over many images (`TokenStatistics`).
        name: name of the figure.
    """
    title, y_label, is_percentage = CURVES[name]
    styles = get_token_styles(config)
    lines = getattr(findings, name)  # [L, H, S] or [L + 1, S]
    first_layer = 0 if lines.ndim == 2 else 1
    uniform_values = findings.uniform_entropy_by_token.tolist() if name == "entropy" else []
    baselines = sorted({float(f"{value:.5g}") for value in uniform_values})

    figure, axes = create_titled_figure(title, y_label)
    for style, line in zip(styles, lines.unbind(dim=-1), strict=True):
        head_values = line if line.ndim == 2 else line.unsqueeze(1)  # [L, H]
        draw_line(
            axes,
            style,
            mean=head_values.mean(dim=1),
            low=head_values.amin(dim=1),
            high=head_values.amax(dim=1),
            first_layer=first_layer,
        )

    for index, value in enumerate(baselines):
        axes.axhline(
            value, color=DARK_GRAY, linewidth=1, linestyle="--", label="_" * (index > 0) + "uniform"
        )

    axes.set_ylim(bottom=min(axes.get_ylim()[0], 0))
    if is_percentage:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    format_layer_axis(figure, axes, len(lines), first_layer)
    return figure


def get_token_styles(config: ViTCLSConfig) -> list[LineStyle]:
    """Return one line style per special token, in sequence order."""
    styles = []
    for group, names in get_token_names_by_group(config).items():
        for index, name in enumerate(names):
            white = MAX_WHITE_FRACTION * index / max(len(names) - 1, 1)
            color = tuple(white + (1 - white) * channel for channel in to_rgb(GROUP_COLORS[group]))
            styles.append((shorten_text(name, MAX_LEGEND_NAME), color, DASHES[index % len(DASHES)]))
    return styles


def draw_line(
    axes: Axes,
    style: LineStyle,
    mean: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    first_layer: int,
) -> None:
    """Draw the `mean` [L] as a line over the layers, and `low` to `high` as a band."""
    name, color, line_format = style
    layer_numbers = range(first_layer, first_layer + len(mean))
    if bool((high > low).any()):
        axes.fill_between(
            layer_numbers, low.numpy(), high.numpy(), color=color, alpha=0.15, linewidth=0
        )
    axes.plot(
        layer_numbers, mean, line_format, color=color, markersize=4, linewidth=1.6, label=name
    )


# Norms --------------------------------------------------------------------------------------------


def plot_norms(config: ViTCLSConfig, findings: Findings) -> Figure:
    """Plot the norms of the special tokens, and the median and 90% range of the patch norms.

    Models without registers may store global information in uninformative patches, whose norms then
    become outliers (Darcet et al. 2023, arXiv 2309.16588).
    """
    styles = get_token_styles(config)
    figure, axes = create_titled_figure("Norms of tokens and patches", "norm")

    # [L + 1] each
    low, median, high = findings.patch_norms.float().quantile(torch.tensor(PATCH_QUANTILES), dim=1)
    draw_line(axes, PATCH_STYLE, mean=median, low=low, high=high, first_layer=0)
    for style, line in zip(styles, findings.token_norms.unbind(dim=-1), strict=True):
        draw_line(axes, style, mean=line, low=line, high=line, first_layer=0)

    min_value, max_value = torch.cat([low, high, findings.token_norms.flatten()]).aminmax()
    if min_value > 0 and max_value > MIN_RATIO_FOR_LOG_SCALE * min_value:
        axes.set(yscale="log", ylabel="norm, logarithmic")
        use_plain_numbers(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)

    format_layer_axis(figure, axes, len(median), 0)
    return figure


def plot_norm_histogram(config: ViTCLSConfig, findings: Findings, layer: int = -1) -> Figure:
    """Plot a histogram of the patch norms after a layer.

    The norms are divided by the median norm of the image, and the axes are logarithmic. If the
    norms have a second mode, the bars of this mode are red, and the dashed line is the lower limit
    of this mode. Triangles mark the mean norms of the registers.
    """
    ratios = findings.patch_ratios[layer].float().clamp(min=1e-3)
    median = findings.patch_norms[layer].median().clamp(min=1e-12)
    registers = (
        (findings.token_norms[layer, config.token_layout.registers] / median)
        .clamp(min=1e-3)
        .tolist()
    )
    low = min(ratios.min().item(), 0.5, *registers)
    high = max(ratios.max().item(), 2.0, *registers)

    mode = find_second_mode(findings.patch_ratios[layer])
    edges = np.geomspace(low, high, NUM_BINS + 1)

    title = "Norms of the patches"
    if mode is not None:
        title += f", after layer {range(len(findings.patch_norms))[layer]}"
    figure, axes = create_titled_figure(title, "patches, logarithmic")

    is_outlier = np.sqrt(edges[1:] * edges[:-1]) >= (math.inf if mode is None else mode.threshold)
    colors = [OUTLIER_COLOR if each else GROUP_COLORS["patches"] for each in is_outlier]
    counts, _ = np.histogram(ratios.numpy(), edges)
    axes.bar(edges[:-1], counts, width=0.94 * np.diff(edges), align="edge", color=colors)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(0.7, None))
    for axis in (axes.xaxis, axes.yaxis):
        use_plain_numbers(axis)
    axes.set_xlabel("norm / median norm of the image, logarithmic")

    if mode is not None:
        axes.axvline(mode.threshold, color=DARK_GRAY, linewidth=1, linestyle="--")

    transform = axes.get_xaxis_transform()
    color = GROUP_COLORS["registers"]
    axes.plot(
        registers,
        [0.97] * len(registers),
        "v",
        transform=transform,
        color=color,
        label="registers",
        clip_on=False,
    )
    if registers:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
    return figure


# Axes ---------------------------------------------------------------------------------------------


def create_titled_figure(title: str, y_label: str) -> tuple[Figure, Axes]:
    """Create a figure with a title."""
    figure = create_figure(*FIGURE_SIZE)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11, color=DARK_GRAY)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def use_plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis with numbers such as 0.5, 1, 2 and 1,000, not with powers of 10."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5g}"))
    axis.set_minor_formatter(NullFormatter())


def format_layer_axis(figure: Figure, axes: Axes, num_values: int, first_layer: int) -> None:
    """Label the x axis with layer indices, and draw a grid and a legend of several names."""
    axes.set_xlabel("layer" if first_layer else "after layer")
    axes.set_xlim(first_layer - 0.3, first_layer + num_values - 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    lines, _ = axes.get_legend_handles_labels()
    if len(lines) > 1:
        figure.legend(handles=lines, loc="outside right upper", frameon=False, fontsize=8.5)


def create_figure(width: float, height: float) -> Figure:
    """Create a white figure with a constrained layout; width and height are in inches."""
    return Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")


def render_svg(figure: Figure) -> str:
    """Return a figure as SVG text that can be embedded in HTML."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vitcls"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


# Text ---------------------------------------------------------------------------------------------


def shorten_text(text: str, max_length: int) -> str:
    """Replace the middle of a long text with "…", because names often differ at their ends."""
    if len(text) <= max_length:
        return text
    suffix_length = (max_length - 1) // 2
    prefix_length = max_length - 1 - suffix_length
    return f"{text[:prefix_length]}…{text[len(text) - suffix_length :]}"

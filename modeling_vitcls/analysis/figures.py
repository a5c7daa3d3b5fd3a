"""The two figures of the report, for notebooks too.

plot_entropy                 entropy of the attention of each special token, by layer
plot_norm_histogram          norms of the patches after one layer

Each function returns a matplotlib `Figure` with a white background, created without pyplot.
`render_svg` returns a figure as text for HTML. "After layer 0" means the embeddings.
publishing/card_images.py draws the confusion matrix of cards.
"""

import io
import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
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


FIGURE_SIZE = 7.0, 3.0  # width and height in inches
MAX_LEGEND_NAME = 24  # maximum length of a name in a legend, in characters
NUM_BINS = 48  # number of bins in a histogram
OUTLIER_COLOR = "#B3261E"  # color of the bars of the second mode
DASHES = ("o-", "s--", "^:", "D-.")  # markers and dashes of the tokens of a group
MAX_WHITE_FRACTION = 0.55  # fraction of white in the color of the last token of a group


def plot_entropy(config: ViTCLSConfig, findings: Findings) -> Figure:
    """Plot the entropy of the attention of each special token over the layers.

    Each line is the mean over heads, each band is the range over heads, and dashed lines show the
    entropy of uniform attention.

    Args:
        config: configuration of the model.
        findings: statistics over many images (`TokenStatistics`).
    """
    figure, axes = create_titled_figure("Entropy of attention", "nats")
    layers = range(1, len(findings.entropy) + 1)
    token = 0
    for group, names in get_token_names_by_group(config).items():
        for index, name in enumerate(names):
            white = MAX_WHITE_FRACTION * index / max(len(names) - 1, 1)
            color = tuple(white + (1 - white) * channel for channel in to_rgb(GROUP_COLORS[group]))
            values = findings.entropy[:, :, token]  # [L, H]
            low, high = values.amin(dim=1).numpy(), values.amax(dim=1).numpy()
            axes.fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(
                layers,
                values.mean(dim=1),
                DASHES[index % len(DASHES)],
                color=color,
                markersize=4,
                linewidth=1.6,
                label=shorten_text(name, MAX_LEGEND_NAME),
            )
            token += 1

    uniform = {float(f"{value:.5g}") for value in findings.uniform_entropy_by_token.tolist()}
    for index, value in enumerate(sorted(uniform)):
        label = "_" * (index > 0) + "uniform"
        axes.axhline(value, color=DARK_GRAY, linewidth=1, linestyle="--", label=label)

    axes.set_xlabel("layer")
    axes.set_xlim(0.7, len(layers) + 0.3)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
    return figure


def plot_norm_histogram(config: ViTCLSConfig, findings: Findings, layer: int = -1) -> Figure:
    """Plot a histogram of the patch norms after a layer.

    The norms are divided by the median norm of the image, and the axes are logarithmic. If the
    norms have a second mode, the bars of this mode are red, and the dashed line is the lower limit
    of this mode. Triangles mark the mean norms of the registers.
    """
    ratios = findings.patch_ratios[layer].float().clamp(min=1e-3)
    median = findings.patch_norms[layer].clamp(min=1e-12)
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

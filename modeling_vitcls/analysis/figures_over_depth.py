"""Figures over depth: what tokens and patches do, layer by layer, over many images (`Findings`).

    curve_figure(config, findings, "entropy")     any of CURVES: a line per token, the range of its heads, the baseline
    mass_figure(config, findings)                 on which tokens the attention of each token goes
    norms_figure(config, findings)                norms of tokens and patches, and how many patches stand out

Each returns a matplotlib `Figure` on white, in the colours of figures.py and without pyplot. "After layer 0" are the
embeddings. States that are compared, and histograms, are in figures_of_states.py; the page has all of them, too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..configuration_vitcls import ViTCLSConfig
from .diagnosis import MANY_OUTLIERS
from .figures import GROUP_COLOURS, INK, TERMS, blank, cut
from .maps import names_by_group, token_names
from .test_time_registers import OUTLIER_RATIO
from .token_statistics import Findings


WIDTH, HEIGHT = 6.4, 3.2  # inches of one pair of axes, without the legend
LINE_OF_LEGEND = 0.2  # inches
LEAST_WIDTH = 3.2  # inches of a figure
MOST_COLUMNS = 4
MOST_CHARACTERS = 24  # of a name in a legend
LOGARITHMIC_FROM = 30.0  # largest over least norm from which norms are drawn so
PATCH_RANGE = (0.05, 0.5, 0.95)  # quantiles of the patches' norms: the band's edges, and the line

PATCHES = GROUP_COLOURS["patches"]
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D")
FADE = 0.55  # towards white, of the last token of a group


# Curves --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A figure over depth.

    Attributes:
        title, axis: in words.
        values: of the findings, for each layer: [L, H, S] in heads, [L, H] in heads of the patches together, or
            [L + 1, S] of states.
        uniform: the baseline, where attention would be alike everywhere; several, where CLS tokens see parts of the
            image; none of states.
        in_percent: how values are written.
    """

    title: str
    axis: str
    values: Callable[[Findings], torch.Tensor]
    uniform: Callable[[Findings], list[float]] = lambda found: []
    in_percent: bool = False


CURVES = {
    "entropy": Curve(
        "Entropy of attention",
        "nats",
        lambda found: found.entropy,
        lambda found: found.uniform_by_token["entropy"].tolist(),
    ),
    "spread": Curve(
        "Spread of attention over the image",
        "pixels",
        lambda found: found.spread,
        lambda found: found.uniform_by_token["spread"].tolist(),
    ),
    "received": Curve(
        "Attention received from patches",
        "share",
        lambda found: found.received,
        lambda found: [math.exp(-found.uniform["entropy"])],  # 1 / N
        in_percent=True,
    ),
    "patch_distance": Curve(
        "Attention distance of patches",
        "pixels",
        lambda found: found.patch_distance,
        lambda found: [found.uniform["patch_distance"]],
    ),
    "variation": Curve("Variation between images", "part of the norm", lambda found: found.variation, in_percent=True),
    "to_patches": Curve("Similarity to the mean patch", "cosine", lambda found: found.to_patches),
}


@dataclass(frozen=True)
class LineStyle:
    """How one token is drawn: groups differ in colour, tokens of a group in lightness, dashes and markers."""

    name: str
    colour: tuple[float, float, float]
    place: int = 0  # within the group

    def line(self) -> dict[str, Any]:
        """What matplotlib calls it."""
        return {
            "color": self.colour,
            "linestyle": DASHES[self.place % len(DASHES)],
            "marker": MARKERS[self.place % len(MARKERS)],
            "markersize": 4,
            "linewidth": 1.6,
        }


def curve_figure(config: ViTCLSConfig, findings: Findings, name: str) -> Figure:
    """One of CURVES: "entropy", "spread", "received", "patch_distance", "variation" or "to_patches".

    A line is the mean of the heads, its band reaches from the lowest to the highest head, and the dashed line is where
    attention would be alike everywhere.

    Args:
        config: of the model.
        findings: of many images (`TokenStatistics`).
        name: of the figure.

    Raises:
        ValueError: for another name, or a figure of special tokens that the model does not have.
    """
    if name not in CURVES:
        raise ValueError(f"there is no figure {name!r}: choose one of {', '.join(CURVES)}")
    curve = CURVES[name]
    values = curve.values(findings)
    if values.shape[-1] == 0:
        raise ValueError(f"the model has no special tokens, of which the figure {name!r} is: choose patch_distance")
    of_patches = name == "patch_distance"
    styles = [patch_style()] if of_patches else token_styles(config)
    lines = values.unsqueeze(-1) if of_patches else values  # [L, H, lines], or [L + 1, lines]
    first_layer = 0 if lines.ndim == 2 else 1
    baselines = sorted({float(f"{value:.5g}") for value in curve.uniform(findings)})
    figure, (axes,) = empty(1, len(styles) + bool(baselines))
    axes.set_title(curve.title, fontsize=11, color=INK)
    axes.set_ylabel(curve.axis)
    for style, line in zip(styles, lines.unbind(dim=-1), strict=True):
        heads = line if line.ndim == 2 else line.unsqueeze(1)  # [L, H]
        draw_line(axes, style, heads.mean(dim=1), heads.amin(dim=1), heads.amax(dim=1), first_layer)
    for place, value in enumerate(baselines):
        name = "uniform" if place == 0 else "_again"
        axes.axhline(value, color=INK, linewidth=1, linestyle=(0, (5, 3)), label=name)
    layers_below(axes, len(lines), first_layer)
    if axes.get_ylim()[0] > 0:
        axes.set_ylim(bottom=0)
    if curve.in_percent:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    legend(figure, axes)
    return figure


def token_styles(config: ViTCLSConfig) -> list[LineStyle]:
    """One per special token, in the order of the sequence."""
    return [
        LineStyle(
            cut(name, MOST_CHARACTERS), faded(GROUP_COLOURS[group], FADE * place / max(len(names) - 1, 1)), place
        )
        for group, names in names_by_group(config).items()
        for place, name in enumerate(names)
    ]


def patch_style() -> LineStyle:
    """Of all patches together."""
    return LineStyle("patches", to_rgb(PATCHES))


def faded(colour: str, part: float) -> tuple[float, float, float]:
    """The colour, mixed with such a part of white."""
    red, green, blue = (part + (1 - part) * channel for channel in to_rgb(colour))
    return red, green, blue


def draw_line(
    axes: Axes, style: LineStyle, mean: torch.Tensor, low: torch.Tensor, high: torch.Tensor, first_layer: int
) -> None:
    """A line over the layers [L], and the band around it where there is any."""
    layers = range(first_layer, first_layer + len(mean))
    if bool((high > low).any()):
        axes.fill_between(layers, low.numpy(), high.numpy(), color=style.colour, alpha=0.15, linewidth=0)
    axes.plot(layers, mean.numpy(), label=style.name, **style.line())


# Where attention goes ------------------------------------------------------------------------------------------------


def mass_figure(config: ViTCLSConfig, findings: Findings) -> Figure:
    """Bars for each special token: the share of its attention on each group of tokens, by layer, mean of the heads.

    Raises:
        ValueError: for a model without special tokens.
    """
    names = token_names(config)
    if not names:
        raise ValueError("the model has no special tokens whose attention could be shown")
    groups = [name for name, members in names_by_group(config).items() if members] + ["patches"]
    figure, grid = grid_of_tokens(names, width=2.4, height=1.9, more_height=0.5)
    shares = findings.mass.mean(dim=1)  # [L, S, 4]
    order = [name for name, _ in config.token_layout.items()]
    layers = np.arange(1, len(shares) + 1)
    for place, axes in enumerate(grid):
        below = np.zeros(len(shares))
        for group in groups:
            values = shares[:, place, order.index(group)].numpy()
            axes.bar(layers, values, bottom=below, width=0.92, color=GROUP_COLOURS[group])
            below += values
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        tidy(axes)
    figure.supxlabel("layer", fontsize=9, color=INK)
    squares = [Patch(color=GROUP_COLOURS[group], label=TERMS[group]) for group in groups]
    figure.legend(handles=squares, loc="outside upper center", ncols=len(squares), frameon=False, fontsize=9)
    return figure


# Norms ---------------------------------------------------------------------------------------------------------------


def norms_figure(config: ViTCLSConfig, findings: Findings) -> Figure:
    """Norms of the special tokens against those of 90 % of the patches, and the share of patches that stand out.

    Models without registers may write global information into patches of little content, whose norms then stand out
    (Darcet et al. 2023, arXiv 2309.16588).
    """
    styles = token_styles(config)
    shares = {"patches": findings.outliers}
    if findings.outliers_without_registers is not None:
        shares["patches, registers shut off"] = findings.outliers_without_registers
    figure, (norms, outliers) = empty(2, len(styles) + len(shares))
    norms.set_title("Norms of tokens and patches", fontsize=11, color=INK)
    low, median, high = findings.patch_norms.float().quantile(torch.tensor(PATCH_RANGE), dim=1)  # [L + 1] each
    draw_line(norms, patch_style(), median, low, high, 0)
    for style, line in zip(styles, findings.token_norms.unbind(dim=-1), strict=True):
        draw_line(norms, style, line, line, line, 0)
    drawn = torch.cat([low, high, findings.token_norms.flatten()])
    if drawn.min() > 0 and drawn.max() > LOGARITHMIC_FROM * drawn.min():
        norms.set_yscale("log")
    else:
        norms.set_ylim(bottom=0)
    outliers.set_title(f"Patches beyond {OUTLIER_RATIO:g} times the median", fontsize=11, color=INK)
    for place, (name, share) in enumerate(shares.items()):
        draw_line(outliers, LineStyle(name, to_rgb(PATCHES), place), share, share, share, 0)
    outliers.axhline(MANY_OUTLIERS, color=INK, linewidth=1, linestyle=(0, (5, 3)))
    outliers.annotate("many", (0, MANY_OUTLIERS), xytext=(0, 3), textcoords="offset points", fontsize=8, color=INK)
    outliers.set_ylim(0, max(1.1 * max(share.max().item() for share in shares.values()), 2 * MANY_OUTLIERS))
    outliers.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    for axes in (norms, outliers):
        layers_below(axes, len(median), 0)
    legend(figure, norms, outliers)
    return figure


# Axes ----------------------------------------------------------------------------------------------------------------


def empty(num_axes: int, num_names: int) -> tuple[Figure, Sequence[Axes]]:
    """A figure with axes side by side, and room for so many names below."""
    width = WIDTH if num_axes == 1 else 1.5 * WIDTH
    height = HEIGHT + LINE_OF_LEGEND * math.ceil(num_names / columns_of_legend(width))
    figure = blank(width, height)
    return figure, figure.subplots(1, num_axes, squeeze=False)[0]


def grid_of_tokens(
    names: Sequence[str], width: float, height: float, more_width: float = 0, more_height: float = 0
) -> tuple[Figure, list[Axes]]:
    """A figure with small axes for each token, over layers, in rows.

    Args:
        names: of the tokens.
        width, height: of each, in inches.
        more_width, more_height: for what is beside them all.
    """
    columns = min(len(names), MOST_COLUMNS)
    rows = math.ceil(len(names) / columns)
    figure = blank(max(width * columns + more_width, LEAST_WIDTH), height * rows + more_height)
    grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes, name in zip(grid, names, strict=False):
        axes.set_title(cut(name, MOST_CHARACTERS), fontsize=9, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.tick_params(labelsize=8)
    for unused in grid[len(names) :]:
        unused.axis("off")
    return figure, grid[: len(names)]


def columns_of_legend(width: float) -> int:
    """Names that stand side by side in so many inches."""
    return int(width / 1.6)


def layers_below(axes: Axes, count: int, first_layer: int) -> None:
    """The x axis: whole layers, and a line where there is one layer alone."""
    axes.set_xlabel("layer" if first_layer else "after layer")
    axes.set_xlim(first_layer - 0.3, first_layer + count - 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    tidy(axes)


def tidy(axes: Axes) -> None:
    """Without the frame's upper and right side."""
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure, *all_axes: Axes) -> None:
    """The lines' names below all axes, each once, where there are several."""
    lines: dict[str, Line2D] = {}
    for line in (line for axes in all_axes for line in axes.get_lines()):
        lines.setdefault(str(line.get_label()), line)
    named = [line for name, line in lines.items() if not name.startswith("_")]
    if len(named) > 1:
        columns = min(len(named), columns_of_legend(figure.get_figwidth()))
        figure.legend(handles=named, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)

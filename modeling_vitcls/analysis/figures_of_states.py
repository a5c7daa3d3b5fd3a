"""Figures of what tokens and patches hold, and what tokens are worth to the answer.

    norm_histogram_figure(config, findings, layer)      how many patches have which norm, and which stand out
    token_similarity_figure(config, findings, layer)    cosines between the special tokens
    layer_similarity_figure(config, findings)           cosines between the states of each token, layer against layer
    effects_figure(config, effects)                     how answers change when a token says nothing of the image

Each returns a matplotlib `Figure` on white, in the colours of figures.py and without pyplot. "After layer 0" are the
embeddings. Curves are in figures_over_depth.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..configuration_vitcls import ViTCLSConfig
from .ablation import Effect, token_keys
from .figures import GROUP_COLOURS, INK, blank, cut
from .figures_over_depth import MOST_CHARACTERS, grid_of_tokens, tidy
from .maps import token_names
from .test_time_registers import OUTLIER_RATIO
from .token_statistics import Findings


BINS = 48  # of a histogram
BEYOND = "#B3261E"  # bars of patches that stand out
OPPOSITE, ALIKE = "#B14A00", "#0B5A94"  # cosines of -1 and 1; 0 is white
COSINES = LinearSegmentedColormap.from_list("cosines", [OPPOSITE, "#FFFFFF", ALIKE])
MOST_NUMBERED_TOKENS = 12


# Norms ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormHistogram:
    """Norms of the patches after one layer.

    Attributes:
        counts: [BINS], patches of which norm, from 0 to `end`.
        end: of the last bin, beyond which there is nothing to show.
        limit: the norm beyond which patches stand out, OUTLIER_RATIO times the median.
        registers: their mean norms.
    """

    counts: list[int]
    end: float
    limit: float
    registers: list[float]


def norm_histogram(config: ViTCLSConfig, findings: Findings, layer: int) -> NormHistogram:
    """Of the state after a layer; 0 are the embeddings."""
    norms = findings.patch_norms[layer].float()
    registers = findings.token_norms[layer, config.token_layout.registers].tolist()
    limit = OUTLIER_RATIO * norms.median().item()
    end = max(norms.max().item(), 1.05 * limit, *registers)
    return NormHistogram(norms.histc(BINS, min=0, max=end).int().tolist(), end, limit, registers)


def norm_histogram_figure(config: ViTCLSConfig, findings: Findings, layer: int = -1) -> Figure:
    """How many patches have which norm after a layer, on a logarithmic scale.

    The dashed line is OUTLIER_RATIO times the median of all patches; triangles are the registers.

    Args:
        config: of the model.
        findings: of many images (`TokenStatistics`).
        layer: after which; 0 are the embeddings, -1 the last layer.

    Raises:
        ValueError: for a layer that does not exist.
    """
    layer = checked(layer, findings)
    found = norm_histogram(config, findings, layer)
    figure, axes = single(6.4, 3.4, f"Norms of the patches, {after(layer)}")
    edges = np.linspace(0, found.end, BINS + 1)
    middles, step = (edges[:-1] + edges[1:]) / 2, edges[1]
    colours = [BEYOND if middle > found.limit else GROUP_COLOURS["patches"] for middle in middles]
    axes.bar(middles, found.counts, width=0.94 * step, color=colours)
    axes.set_yscale("log")
    axes.set_ylim(0.7, 2 * max(*found.counts, 5))
    axes.set_xlim(0, found.end)
    axes.axvline(found.limit, color=INK, linewidth=1, linestyle=(0, (5, 3)))
    axes.annotate(
        f"{OUTLIER_RATIO:g} × median",
        (found.limit, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="top",
        fontsize=8,
        color=INK,
    )
    top = axes.get_xaxis_transform()
    axes.plot(
        found.registers, [0.97] * len(found.registers), "v", color=GROUP_COLOURS["registers"], transform=top, clip_on=0
    )
    if found.registers:
        axes.plot([], [], "v", color=GROUP_COLOURS["registers"], label="registers")
        figure.legend(loc="outside lower center", frameon=False, fontsize=8.5)
    axes.set_xlabel("norm")
    axes.set_ylabel("patches")
    tidy(axes)
    return figure


# Similarities --------------------------------------------------------------------------------------------------------


def token_similarity_figure(config: ViTCLSConfig, findings: Findings, layer: int = -1) -> Figure:
    """Cosines between the special tokens' states after a layer: two tokens at 1 point in one direction.

    Args:
        config: of the model.
        findings: of many images (`TokenStatistics`).
        layer: after which; 0 are the embeddings, -1 the last layer.

    Raises:
        ValueError: for a layer that does not exist, or a model with fewer than two special tokens.
    """
    layer = checked(layer, findings)
    names = [cut(name, MOST_CHARACTERS) for name in token_names(config)]
    if len(names) < 2:
        raise ValueError(f"the model has {len(names)} special tokens: there is nothing to compare")
    side = min(max(0.45 * len(names) + 2.2, 3.6), 9.0)
    figure, axes = single(side + 0.5, side, f"Similarity of the tokens, {after(layer)}")
    matrix = findings.between_tokens[layer]
    drawn = draw_cosines(axes, matrix)
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=0 if max(map(len, names)) <= 3 else 90)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    if len(names) <= MOST_NUMBERED_TOKENS:
        for (row, column), value in np.ndenumerate(matrix.numpy()):
            colour = "white" if abs(value) > 0.55 else INK
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="cosine")
    return figure


def layer_similarity_figure(config: ViTCLSConfig, findings: Findings) -> Figure:
    """For each special token the cosines between its states after one layer and another; blocks change little.

    Raises:
        ValueError: for a model without special tokens.
    """
    names = token_names(config)
    if not names:
        raise ValueError("the model has no special tokens whose states could be compared")
    figure, grid = grid_of_tokens(names, width=2.2, height=2.3, more_width=1, more_height=0.3)
    for axes, matrix in zip(grid, findings.across_layers, strict=True):
        drawn = draw_cosines(axes, matrix)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    figure.supxlabel("after layer", fontsize=9, color=INK)
    figure.supylabel("after layer", fontsize=9, color=INK)
    figure.colorbar(drawn, ax=figure.axes, shrink=0.8, label="cosine")
    return figure


def draw_cosines(axes: Axes, matrix: torch.Tensor) -> AxesImage:
    """A square matrix [n, n] of cosines."""
    return axes.imshow(matrix.numpy(), cmap=COSINES, vmin=-1, vmax=1, interpolation="nearest")


# Effects -------------------------------------------------------------------------------------------------------------


def effects_figure(config: ViTCLSConfig, effects: Mapping[str, Effect]) -> Figure:
    """Bars for each special token: what changes while it is held at its mean over images (`ablation_effects`).

    The share of answers that change, the change of the logits as a part of their variation and, where right answers
    are known, the accuracy's.

    Raises:
        ValueError: for a model without special tokens, or effects of other ones.
    """
    keys = token_keys(config.token_layout)
    if not keys or list(effects) != keys:
        raise ValueError(f"there are effects of {', '.join(effects) or 'no tokens'}: give those of {', '.join(keys)}")
    found = list(effects.values())
    measured: dict[str, Sequence[float]] = {
        "answers that change": [effect.changed_answers for effect in found],
        "change of the logits,\nof their variation": [effect.logit_change for effect in found],
    }
    accuracies = [effect.accuracy_change for effect in found if effect.accuracy_change is not None]
    if len(accuracies) == len(found):
        measured["change of the accuracy"] = accuracies
    names = [cut(name, MOST_CHARACTERS) for name in token_names(config)]
    figure = blank(2.7 * len(measured) + 0.8, 0.32 * len(names) + 1.3)
    for axes, (title, values) in zip(figure.subplots(1, len(measured), sharey=True), measured.items(), strict=True):
        bars = axes.barh(names, values, color=[GROUP_COLOURS[key.partition("[")[0]] for key in keys], height=0.7)
        axes.bar_label(bars, [f"{100 * value:.3g} %" for value in values], padding=3, fontsize=8, color=INK)
        axes.set_title(title, fontsize=9, color=INK)
        axes.axvline(0, color=INK, linewidth=0.8)
        least, most = min(*values, 0, -1e-3 * (min(values) < 0)), max(*values, 0, 1e-3)
        room = 0.35 * (most - least)  # for the numbers
        axes.set_xlim(least - room * (least < 0), most + room)
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.tick_params(labelsize=8)
        tidy(axes)
    axes.invert_yaxis()
    return figure


# Axes ----------------------------------------------------------------------------------------------------------------


def checked(layer: int, findings: Findings) -> int:
    """The layer's number, counted from the embeddings.

    Raises:
        ValueError: for a layer that does not exist.
    """
    num_states = len(findings.patch_norms)
    if not -num_states <= layer < num_states:
        raise ValueError(f"there is no layer {layer}: the model has {num_states - 1}, and 0 are the embeddings")
    return layer % num_states


def after(layer: int) -> str:
    """In words."""
    return f"after layer {layer}" if layer else "embeddings"


def single(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure = blank(width, height)
    axes = figure.subplots()
    axes.set_title(title, fontsize=11, color=INK)
    return figure, axes

"""Figures of the states of tokens and patches, and of the effects of tokens on predictions.

Each plot function returns a matplotlib `Figure` with a white background and the colors of figures.py. pyplot is not
used. "After layer 0" means the embeddings. Curves are in figures_over_depth.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..configuration_vitcls import ViTCLSConfig
from ..token_names import get_token_names
from .ablation import get_token_keys
from .artifacts import SecondMode, find_second_mode
from .effects import AblationEffect
from .figures import DARK_GRAY, GROUP_COLORS, create_figure, draw_text, shorten_text
from .figures_over_depth import MAX_NAME_LENGTH, create_token_grid, despine
from .token_statistics import Findings


NUM_BINS = 48  # number of bins in a histogram
MIN_NORM_RATIO = 1e-3  # minimum norm in a figure, as a multiple of the median; smaller norms are drawn at this value
OUTLIER_COLOR = "#B3261E"  # color of the bars of the second mode
# Colors of the cosines -1, 0 and 1.
COSINE_COLORMAP = LinearSegmentedColormap.from_list("cosines", ["#B14A00", "#FFFFFF", "#0B5A94"])
MAX_TOKENS_WITH_COSINES = 12  # maximum number of tokens for which the cosine is written in each cell


# Norms ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormHistogram:
    """Histogram of the patch norms after one layer, as multiples of the median norm of the image."""

    counts: list[int]  # [NUM_BINS], number of patches per bin; bins have equal width on a logarithmic scale
    low: float  # lower edge of the first bin
    high: float  # upper edge of the last bin
    mode: SecondMode | None  # second mode of the norms (`find_second_mode`); None if the norms have one mode
    registers: list[float]  # mean norms of the registers, as multiples of the median norm of all patches


def compute_norm_histogram(config: ViTCLSConfig, findings: Findings, layer: int) -> NormHistogram:
    """Return the histogram of the patch norms after a layer; layer 0 means the embeddings."""
    ratios = findings.patch_ratios[layer].float().clamp(min=MIN_NORM_RATIO)
    median = findings.patch_norms[layer].median().clamp(min=1e-12)
    register_norms = findings.token_norms[layer, config.token_layout.registers]
    registers = (register_norms / median).clamp(min=MIN_NORM_RATIO).tolist()
    low, high = min(ratios.min().item(), 0.5, *registers), max(ratios.max().item(), 2.0, *registers)
    counts = ratios.log().histc(NUM_BINS, min=math.log(low), max=math.log(high)).int().tolist()
    return NormHistogram(counts, low, high, find_second_mode(findings.patch_ratios[layer]), registers)


def plot_norm_histogram(config: ViTCLSConfig, findings: Findings, layer: int = -1) -> Figure:
    """Plot a histogram of the patch norms after a layer, divided by the median norm of the image (logarithmic axes).

    If the norms have a second mode, the bars of this mode are red, and the dashed line is the lower limit of this
    mode. Triangles mark the mean norms of the registers.

    Args:
        config: configuration of the model.
        findings: statistics over many images (`TokenStatistics`).
        layer: layer index; 0 means the embeddings, -1 means the last layer.

    Raises:
        ValueError: if the layer does not exist.
    """
    layer = normalize_layer_index(layer, findings)
    histogram = compute_norm_histogram(config, findings, layer)
    figure = create_figure(6.4, 3.4)
    axes = figure.subplots()
    axes.set_title(f"Norms of the patches, {format_layer(layer)}", fontsize=11, color=DARK_GRAY)
    edges = np.geomspace(histogram.low, histogram.high, NUM_BINS + 1)
    threshold = math.inf if histogram.mode is None else histogram.mode.threshold
    centers = np.sqrt(edges[1:] * edges[:-1])
    colors = [OUTLIER_COLOR if center >= threshold else GROUP_COLORS["patches"] for center in centers]
    axes.bar(edges[:-1], histogram.counts, width=0.94 * np.diff(edges), align="edge", color=colors)
    axes.set(xscale="log", yscale="log")
    axes.set(xlim=(histogram.low, histogram.high), ylim=(0.7, 2 * max(*histogram.counts, 5)))
    axes.set(xlabel="norm / median norm of the image, logarithmic", ylabel="patches, logarithmic")
    if histogram.mode is not None:
        axes.axvline(threshold, color=DARK_GRAY, linewidth=1, linestyle=(0, (5, 3)))
        text = f"second mode: {histogram.mode.fraction:.2%} of the patches, at {histogram.mode.ratio:.1f} × median"
        text_options: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        text_options |= {"rotation": 90, "ha": "right", "va": "top"}
        axes.annotate(text, (threshold, 0.97), (-4, 0), **text_options, fontsize=8, color=DARK_GRAY)
    if histogram.registers:
        heights = [0.97] * len(histogram.registers)
        marker_options: dict[str, Any] = {"color": GROUP_COLORS["registers"], "label": "registers", "clip_on": False}
        axes.plot(histogram.registers, heights, "v", transform=axes.get_xaxis_transform(), **marker_options)
        figure.legend(loc="outside lower center", frameon=False, fontsize=8.5)
    despine(axes)
    return figure


# Similarities --------------------------------------------------------------------------------------------------------


def plot_token_similarity(config: ViTCLSConfig, findings: Findings, layer: int = -1) -> Figure:
    """Plot the cosine similarity between the states of special tokens after a layer; 1 means the same direction.

    Args:
        config: configuration of the model.
        findings: statistics over many images (`TokenStatistics`).
        layer: layer index; 0 means the embeddings, -1 means the last layer.

    Raises:
        ValueError: if the layer does not exist, or the model has fewer than two special tokens.
    """
    layer = normalize_layer_index(layer, findings)
    names = [shorten_text(name, MAX_NAME_LENGTH) for name in get_token_names(config)]
    if len(names) < 2:
        raise ValueError(
            f"The figure requires two or more special tokens, but the model has {len(names)}. Use a model with "
            "more special tokens."
        )
    side = min(max(0.45 * len(names) + 2.2, 3.6), 9.0)
    figure = create_figure(side + 0.5, side)
    axes = figure.subplots()
    axes.set_title(f"Similarity of the tokens, {format_layer(layer)}", fontsize=11, color=DARK_GRAY)
    matrix = findings.between_tokens[layer]
    axes_image = draw_cosine_matrix(axes, matrix)
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=0 if max(map(len, names)) <= 3 else 90)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    if len(names) <= MAX_TOKENS_WITH_COSINES:
        for (row, column), value in np.ndenumerate(matrix.numpy()):
            draw_text(axes, column, row, f"{value:.2f}", 8, "white" if abs(value) > 0.55 else DARK_GRAY)
    figure.colorbar(axes_image, ax=axes, shrink=0.8, label="cosine")
    return figure


def plot_layer_similarity(config: ViTCLSConfig, findings: Findings) -> Figure:
    """Plot the cosine similarity between the states of each special token after any two layers.

    Blocks of high similarity are consecutive layers that hardly change the token.

    Raises:
        ValueError: if the model has no special tokens.
    """
    names = get_token_names(config)
    figure, grid = create_token_grid(names, width=2.2, height=2.3, extra_width=1, extra_height=0.3)
    for axes, matrix in zip(grid, findings.across_layers, strict=True):
        axes_image = draw_cosine_matrix(axes, matrix)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    figure.supxlabel("after layer", fontsize=9, color=DARK_GRAY)
    figure.supylabel("after layer", fontsize=9, color=DARK_GRAY)
    figure.colorbar(axes_image, ax=figure.axes, shrink=0.8, label="cosine")
    return figure


def draw_cosine_matrix(axes: Axes, matrix: torch.Tensor) -> AxesImage:
    """Draw a square matrix [n, n] of cosines."""
    return axes.imshow(matrix.numpy(), cmap=COSINE_COLORMAP, vmin=-1, vmax=1, interpolation="nearest")


# Effects -------------------------------------------------------------------------------------------------------------


def plot_ablation_effects(config: ViTCLSConfig, effects: Mapping[str, AblationEffect]) -> Figure:
    """Plot the effect of replacing each special token with its mean over images (`compute_ablation_effects`).

    Bars show the fraction of changed predictions, the logit change relative to the standard deviation and, if labels
    are known, the change in accuracy.

    Raises:
        ValueError: if the model has no special tokens, or the keys of `effects` are not the keys of these tokens.
    """
    keys = get_token_keys(config.token_layout)
    if not keys or list(effects) != keys:
        raise ValueError(
            f"The figure requires effects of {', '.join(keys) or 'special tokens'}, but `effects` contains "
            f"{', '.join(effects) or 'no tokens'}. Pass the output of compute_ablation_effects for this model."
        )
    measurements: dict[str, Sequence[float]] = {
        "changed predictions": [effect.changed_answers for effect in effects.values()],
        "logit change relative\nto standard deviation": [effect.logit_change for effect in effects.values()],
    }
    accuracy_changes = [effect.accuracy_change for effect in effects.values() if effect.accuracy_change is not None]
    if len(accuracy_changes) == len(effects):
        measurements["change in accuracy"] = accuracy_changes
    names = [shorten_text(name, MAX_NAME_LENGTH) for name in get_token_names(config)]
    figure = create_figure(2.7 * len(measurements) + 0.8, 0.32 * len(names) + 1.3)
    grid = figure.subplots(1, len(measurements), sharey=True)
    for axes, (title, values) in zip(grid, measurements.items(), strict=True):
        bars = axes.barh(names, values, color=[GROUP_COLORS[key.partition("[")[0]] for key in keys], height=0.7)
        axes.bar_label(bars, [f"{100 * value:.3g}%" for value in values], padding=3, fontsize=8, color=DARK_GRAY)
        axes.set_title(title, fontsize=9, color=DARK_GRAY)
        axes.axvline(0, color=DARK_GRAY, linewidth=0.8)
        low, high = min(*values, 0, -1e-3 * (min(values) < 0)), max(*values, 0, 1e-3)
        margin = 0.35 * (high - low)  # space for the bar labels
        axes.set_xlim(low - margin * (low < 0), high + margin)
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.tick_params(labelsize=8)
        despine(axes)
    axes.invert_yaxis()
    return figure


# Axes ----------------------------------------------------------------------------------------------------------------


def normalize_layer_index(layer: int, findings: Findings) -> int:
    """Return a nonnegative layer index; 0 means the embeddings. Raise ValueError if the layer does not exist."""
    num_states, last_layer = len(findings.patch_norms), len(findings.patch_norms) - 1
    if not -num_states <= layer < num_states:
        raise ValueError(
            f"layer is {layer}, but the model has {last_layer} layers. Choose from 0 (the embeddings) to {last_layer}."
        )
    return layer % num_states


def format_layer(layer: int) -> str:
    """Return a layer as text for a title, such as "after layer 3"."""
    return f"after layer {layer}" if layer else "embeddings"

"""The figure of how cost grows: time and memory by image size, patch size, tokens and batch, ours and the peers'.

    growth_figure(comparisons, "what it was measured on")    each as `Comparison.as_dict()`, or from --output's file

It returns a matplotlib `Figure` on white, made without pyplot, like those of analysis/figures.py.
"""

import statistics
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from ..analysis.figures import INK, create_figure
from ..analysis.figures_over_depth import hide_frame


Found = dict[str, Any]  # one comparison
Costs = dict[str, dict[int, float]]  # who -> value on the x axis -> cost

WIDTH, HEIGHT = 12.0, 6.6  # inches
CHARACTERS = 12.5  # of the caption, in an inch
OURS = "modeling_vitcls"
# Okabe and Ito's colours, and markers.
STYLES = {OURS: ("#0072B2", "o"), "timm": ("#009E73", "^"), "transformers": ("#D55E00", "s")}
PAGE = 2**12  # bytes; logarithmic axes have no 0, which is what a tiny model may need beyond what was there
PLACES = {"cpu": "the CPU", "cuda": "the GPU"}


@dataclass(frozen=True)
class Panel:
    """How one axis of growth.py is drawn."""

    title: str
    label: str
    value: str  # the field along it
    logarithmic: bool = True
    falling: bool = False  # the cost grows to the left


PANELS = {
    "image_size": Panel("Image size", "pixels (tokens)", "image_size"),
    "patch_size": Panel("Patch size", "pixels (tokens)", "patch_size", falling=True),
    "num_registers": Panel("Tokens", "tokens (of them registers)", "num_tokens", logarithmic=False),
    "batch_size": Panel("Batch", "images", "batch_size"),
}


def growth_figure(comparisons: list[Found], measured_on: str) -> Figure:
    """Above the time per image, below the memory of the batch; a column for each axis that was measured.

    Args:
        comparisons: as they are in the JSON file; those of other work are left out.
        measured_on: machine and versions, for the caption.

    Raises:
        ValueError: if there is none of growth.
    """
    comparisons = [found for found in comparisons if "axis" in found]
    columns = [axis for axis in PANELS if any(found["axis"] == axis for found in comparisons)]
    if not columns:
        raise ValueError("there is no growth to draw: measure --work growth, and more than its base point")
    figure = create_figure(max(WIDTH * len(columns) / len(PANELS), WIDTH / 2), HEIGHT)
    grid = figure.subplots(2, len(columns), squeeze=False, sharey="row", sharex="col")
    for (time, memory), axis in zip(grid.T, columns, strict=True):
        of_axis = [found for found in comparisons if found["axis"] in (None, axis)]
        draw(time, PANELS[axis], times(of_axis, PANELS[axis]))
        draw(memory, PANELS[axis], memories(of_axis, PANELS[axis]))
        time.set_title(PANELS[axis].title, fontsize=12, color=INK)
        memory.set_xlabel(PANELS[axis].label, fontsize=11)
        name_ticks(memory, axis, of_axis)
    grid[0, 0].set_ylabel("time per image, ms", fontsize=11)
    grid[1, 0].set_ylabel("peak memory of a batch\nbeyond the weights, MiB", fontsize=11)
    lines = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    drawn = [name for name in STYLES if name in lines]
    named = [lines[name] for name in drawn]
    figure.legend(named, drawn, loc="outside upper center", ncols=len(drawn), frameon=False, fontsize=12)
    text = textwrap.fill(caption(comparisons, measured_on), int(CHARACTERS * figure.get_figwidth()))
    figure.supxlabel(text, fontsize=9, color=INK)
    return figure


# Costs ---------------------------------------------------------------------------------------------------------------


def times(comparisons: list[Found], panel: Panel) -> Costs:
    """Milliseconds per image: ours, and ours times the median of the paired ratios for every peer.

    So the lines are as far apart as the ratios say, however busy the machine was with other things in between.
    """
    return costs(
        comparisons,
        panel,
        lambda found: 1000 / found["ours_images_per_second"],
        lambda found, ours: ours * found["ratio"],
    )


def memories(comparisons: list[Found], panel: Panel) -> Costs:
    """MiB, a page at least."""
    return costs(
        comparisons,
        panel,
        lambda found: max(found["ours_peak_bytes"], PAGE) / 2**20,
        lambda found, ours: max(found["theirs_peak_bytes"], PAGE) / 2**20,
    )


def costs(
    comparisons: list[Found], panel: Panel, ours: Callable[[Found], float], theirs: Callable[[Found, float], float]
) -> Costs:
    """Ours, the median where it was measured beside several, and that of each peer, given ours."""
    found: Costs = {OURS: {}}
    for value in sorted({each[panel.value] for each in comparisons}):
        here = [each for each in comparisons if each[panel.value] == value]
        found[OURS][value] = statistics.median(ours(each) for each in here)
        for each in here:
            found.setdefault(each["against"], {})[value] = theirs(each, found[OURS][value])
    return found


# Axes ----------------------------------------------------------------------------------------------------------------


def draw(axes: Axes, panel: Panel, found: Costs) -> None:
    """One line each."""
    for name, by_value in found.items():
        colour, marker = STYLES[name]
        axes.plot(
            list(by_value), list(by_value.values()), color=colour, marker=marker, markersize=6, linewidth=2, label=name
        )
    axes.set_xscale("log" if panel.logarithmic else "linear", **({"base": 2} if panel.logarithmic else {}))
    axes.xaxis.set_inverted(panel.falling)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10)
    hide_frame(axes)


def name_ticks(axes: Axes, axis: str, comparisons: list[Found]) -> None:
    """A tick for each value, with the number of tokens, or of registers, below."""
    panel = PANELS[axis]
    below = {"image_size": "num_tokens", "patch_size": "num_tokens", "num_registers": "num_registers"}
    names = {
        found[panel.value]: f"{found[panel.value]}" + (f"\n({found[below[axis]]})" if axis in below else "")
        for found in comparisons
    }
    axes.set_xticks(list(names), list(names.values()))
    axes.xaxis.set_minor_locator(NullLocator())


def caption(comparisons: list[Found], measured_on: str) -> str:
    """What was measured, how and on what."""
    first = comparisons[0]
    size = first["size"]
    model = f"width {size['hidden_size']}, {size['num_hidden_layers']} layers"
    base = next((found for found in comparisons if found["axis"] is None), None)
    where = (
        f"; {base['image_size']} pixels, patch {base['patch_size']}, batch {base['batch_size']} but for what varies"
        if base is not None
        else ""
    )
    pairs = min(found["pairs"] for found in comparisons)
    parts = (
        f"Inference in {first['precision']} on {PLACES[first['device']]}: ViT, {model}{where}; equal outputs.",
        f"Medians of {pairs} pairs of turns.",
        "transformers' ViT has no registers." if has_registers_without_transformers(comparisons) else "",
        f"{measured_on}.",
    )
    return " ".join(part for part in parts if part)


def has_registers_without_transformers(comparisons: list[Found]) -> bool:
    """Whether a line of transformers' is missing where others have registers."""
    names = {found["against"] for found in comparisons}
    return "transformers" in names and any(found["axis"] == "num_registers" for found in comparisons)

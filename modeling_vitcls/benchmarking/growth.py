"""Time and memory of forward passes by image size, patch size, number of tokens and batch size, with a figure.

    python -m modeling_vitcls.benchmarking.growth "image size 448" timm [--theirs] [--precision bf16]    peak bytes
    plot_growth(comparisons, "processor, versions")    comparisons from `Comparison.to_dict` or the --output file

All axes share one base point, which is measured once. Each axis varies one value of the base point. The token axis
adds register tokens; its only peer is timm, because the ViT of transformers has no registers.
"""

import statistics
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from ..analysis.figures import DARK_GRAY, create_figure
from ..analysis.figures_over_depth import despine
from .comparison import (
    BenchmarkSettings,
    Comparison,
    compare_peak_memory,
    measure_gpu_memory_growth,
    measure_memory_growth,
    parse_memory_flags,
)
from .peers import (
    PEERS,
    PEERS_WITH_REGISTERS,
    TOY_SIZE,
    Peer,
    build_random_images,
    compare_predictions,
    get_model_size,
)


@dataclass(frozen=True)
class GrowthPoint:
    """Settings of a forward pass in one row of the benchmark report."""

    image_size: int
    patch_size: int
    batch_size: int
    num_registers: int = 0

    @property
    def num_tokens(self) -> int:
        """Return the sequence length, including one CLS token."""
        return (self.image_size // self.patch_size) ** 2 + 1 + self.num_registers


@dataclass(frozen=True)
class GrowthAxis:
    """One varied field of `GrowthPoint`, shown as a column of the figure."""

    row_name: str  # template of a row name, with {} for the value of the field
    title: str  # title of the column in the figure
    label: str  # label of the x axis
    x_key: str  # JSON key of the x values
    tick_key: str | None = None  # JSON key of the values in parentheses in the tick labels
    is_logarithmic: bool = True  # whether the x axis is logarithmic
    is_cost_decreasing: bool = False  # whether larger values cost less; the x axis is then inverted


GROWTH_AXES = {
    "image_size": GrowthAxis("image size {}", "Image size", "pixels (tokens)", "image_size", "num_tokens"),
    "patch_size": GrowthAxis(
        "patch size {}", "Patch size", "pixels (tokens)", "patch_size", "num_tokens", is_cost_decreasing=True
    ),
    "num_registers": GrowthAxis(
        "{} registers", "Tokens", "tokens (registers)", "num_tokens", "num_registers", is_logarithmic=False
    ),
    "batch_size": GrowthAxis("batch {}", "Batch", "images", "batch_size"),
}


def build_points(base_point: GrowthPoint, **values: tuple[int, ...]) -> dict[str, GrowthPoint]:
    """Return a dict that maps row names to points: the base point, and one point per value of each axis."""
    name = f"image size {base_point.image_size}, patch size {base_point.patch_size}, batch {base_point.batch_size}"
    return {name: base_point} | {
        GROWTH_AXES[field].row_name.format(value): replace(base_point, **{field: value})
        for field, axis_values in values.items()
        for value in axis_values
    }


# Points for ViT-S.
BASE_POINT = GrowthPoint(image_size=224, patch_size=16, batch_size=4)
GROWTH_POINTS = build_points(
    BASE_POINT,
    image_size=(112, 160, 320, 448),
    patch_size=(32, 8),
    num_registers=(64, 128, 256),
    batch_size=(1, 8, 32),
)
TOY_BASE_POINT = GrowthPoint(image_size=32, patch_size=8, batch_size=2)
TOY_GROWTH_POINTS = build_points(
    TOY_BASE_POINT, image_size=(16, 48), patch_size=(16,), num_registers=(4,), batch_size=(1,)
)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compare_growth(rows: dict[str, GrowthPoint], settings: BenchmarkSettings) -> Iterator[Comparison]:
    """Compare this package with each peer, for each row that the peer supports."""
    rows_and_peers = [
        (name, peer_name)
        for name, point in rows.items()
        for peer_name in settings.against
        if point.num_registers == 0 or peer_name in PEERS_WITH_REGISTERS
    ]
    if not rows_and_peers:
        peer_names = " ".join(PEERS_WITH_REGISTERS)
        raise ValueError(f"--rows {', '.join(rows)} requires a peer with registers. Set --against {peer_names}.")
    for name, peer_name in rows_and_peers:
        yield compare_point(name, rows[name], build_peer(rows[name], peer_name, settings.is_toy), settings)


def build_peer(point: GrowthPoint, peer_name: str, is_toy: bool) -> Peer:
    """Build the peer's model and this package's model for a point."""
    size = replace(get_model_size(is_toy), image_size=point.image_size, patch_size=point.patch_size)
    if point.num_registers:
        return PEERS_WITH_REGISTERS[peer_name](size, point.num_registers)
    return PEERS[peer_name](size)


def compare_point(name: str, point: GrowthPoint, peer: Peer, settings: BenchmarkSettings) -> Comparison:
    """Compare the time and memory of this package and of one peer, for one row."""
    precision, device = settings.precision, settings.device
    peer = peer.to(PRECISIONS[precision], device)
    pixel_values = build_random_images(point.batch_size, point.image_size).to(device, PRECISIONS[precision])
    throughputs, difference = compare_predictions(peer, pixel_values, name, settings)
    if device == "cpu":
        peaks = compare_peak_memory(__name__, name, peer.name, "--precision", precision, *settings.toy_flags)
    else:  # `compare_predictions` has already warmed up both models
        with torch.inference_mode():
            peaks = {
                "ours_peak_bytes": measure_gpu_memory_growth(partial(peer.ours, pixel_values)),
                "theirs_peak_bytes": measure_gpu_memory_growth(partial(peer.theirs, pixel_values)),
            }
    details = {
        **vars(point),
        "num_tokens": point.num_tokens,
        "axis": get_varied_field(point, TOY_BASE_POINT if settings.is_toy else BASE_POINT),
        "precision": precision,
        "device": device,
        "size": vars(peer.size),
        **peaks,
    }
    return Comparison(f"growth in {precision}", name, peer.name, *throughputs, difference, details)


def get_varied_field(point: GrowthPoint, base_point: GrowthPoint) -> str | None:
    """Return the field in which a point differs from the base point; None for the base point."""
    return next((field for field in GROWTH_AXES if getattr(point, field) != getattr(base_point, field)), None)


# Memory --------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Print the peak memory of a forward pass in bytes, for this package or, with --theirs, for the peer.

    The warm-up is a forward pass of a toy model, which triggers the one-time allocations of a process. A warm-up
    with the same model would leave freed memory in the process for the measured forward pass to reuse.
    """
    flags = parse_memory_flags(GROWTH_POINTS | TOY_GROWTH_POINTS, PEERS)
    point = (TOY_GROWTH_POINTS if flags.toy else GROWTH_POINTS)[flags.row]
    dtype = PRECISIONS[flags.precision]
    peer, toy_peer = build_peer(point, flags.peer, flags.toy).to(dtype), PEERS[flags.peer](TOY_SIZE).to(dtype)
    model, toy_model = (peer.theirs, toy_peer.theirs) if flags.theirs else (peer.ours, toy_peer.ours)
    pixel_values = build_random_images(point.batch_size, point.image_size).to(dtype)
    toy_images = build_random_images(2, TOY_SIZE.image_size).to(dtype)
    with torch.inference_mode():
        print(measure_memory_growth(partial(toy_model, toy_images), partial(model, pixel_values)))


# Figure --------------------------------------------------------------------------------------------------------------


ComparisonDict = dict[str, Any]  # value returned by `Comparison.to_dict`
Costs = dict[str, dict[int, float]]  # project -> value on the x axis -> time or memory

FIGURE_WIDTH, FIGURE_HEIGHT = 12.0, 6.6  # size of a figure with all columns, in inches
CHARACTERS_PER_INCH = 12.5  # maximum number of caption characters per inch of figure width
PACKAGE_NAME = "modeling_vitcls"
# Project -> color (Okabe-Ito palette) and marker.
LINE_STYLES = {PACKAGE_NAME: ("#0072B2", "o"), "timm": ("#009E73", "^"), "transformers": ("#D55E00", "s")}
MIN_PLOTTED_BYTES = 2**12  # minimum memory in the figure (one page), because log axes have no 0


def plot_growth(comparisons: list[ComparisonDict], machine_description: str) -> Figure:
    """Plot the time per image (upper row) and the peak memory of a batch (lower row), with one column per axis.

    Args:
        comparisons: Dicts returned by `Comparison.to_dict`, or read from the --output file. Comparisons of other
            workloads are skipped.
        machine_description: Hardware and library versions, for the caption.

    Raises:
        ValueError: If no axis was measured.
    """
    comparisons = [comparison for comparison in comparisons if "axis" in comparison]
    fields = [field for field in GROWTH_AXES if any(comparison["axis"] == field for comparison in comparisons)]
    if not fields:
        raise ValueError("--plot requires growth rows of at least one axis. Set --work growth, and omit --rows.")
    figure = create_figure(max(FIGURE_WIDTH * len(fields) / len(GROWTH_AXES), FIGURE_WIDTH / 2), FIGURE_HEIGHT)
    axes_grid = figure.subplots(2, len(fields), squeeze=False, sharey="row", sharex="col")
    for (time_axes, memory_axes), field in zip(axes_grid.T, fields, strict=True):
        growth_axis = GROWTH_AXES[field]
        axis_comparisons = [comparison for comparison in comparisons if comparison["axis"] in (None, field)]
        times, peaks = compute_costs(axis_comparisons, growth_axis)
        draw_lines(time_axes, growth_axis, times)
        draw_lines(memory_axes, growth_axis, peaks)
        time_axes.set_title(growth_axis.title, fontsize=12, color=DARK_GRAY)
        memory_axes.set_xlabel(growth_axis.label, fontsize=11)
        draw_ticks(memory_axes, growth_axis, axis_comparisons)
    axes_grid[0, 0].set_ylabel("time per image (ms)", fontsize=11)
    axes_grid[1, 0].set_ylabel("peak memory per batch,\nexcluding parameters (MiB)", fontsize=11)
    lines_by_project = {line.get_label(): line for axes in axes_grid.flat for line in axes.get_lines()}
    projects = [name for name in LINE_STYLES if name in lines_by_project]
    handles = [lines_by_project[name] for name in projects]
    figure.legend(handles, projects, loc="outside upper center", ncols=len(projects), frameon=False, fontsize=12)
    caption = format_caption(comparisons, machine_description)
    caption = textwrap.fill(caption, int(CHARACTERS_PER_INCH * figure.get_figwidth()))
    figure.supxlabel(caption, fontsize=9, color=DARK_GRAY)
    return figure


def compute_costs(comparisons: list[ComparisonDict], growth_axis: GrowthAxis) -> tuple[Costs, Costs]:
    """Return the time per image in milliseconds and the peak memory in MiB, for this package and each peer.

    The costs of this package are medians over the comparisons with all peers. The time of a peer is the time of this
    package multiplied by the median ratio of the pairs. In a time plot, the distance between two lines therefore shows
    the ratio of paired measurements, even if the load of the machine changed between rows.
    """
    times: Costs = {PACKAGE_NAME: {}}
    peaks: Costs = {PACKAGE_NAME: {}}
    for value in sorted({comparison[growth_axis.x_key] for comparison in comparisons}):
        group = [comparison for comparison in comparisons if comparison[growth_axis.x_key] == value]
        package_time = statistics.median(1000 / comparison["ours_images_per_second"] for comparison in group)
        times[PACKAGE_NAME][value] = package_time
        peaks[PACKAGE_NAME][value] = statistics.median(to_mebibytes(entry["ours_peak_bytes"]) for entry in group)
        for comparison in group:
            times.setdefault(comparison["against"], {})[value] = package_time * comparison["ratio"]
            peaks.setdefault(comparison["against"], {})[value] = to_mebibytes(comparison["theirs_peak_bytes"])
    return times, peaks


def to_mebibytes(num_bytes: int) -> float:
    """Convert bytes to MiB. Values below `MIN_PLOTTED_BYTES` are raised to `MIN_PLOTTED_BYTES`."""
    return max(num_bytes, MIN_PLOTTED_BYTES) / 2**20


def draw_lines(axes: Axes, growth_axis: GrowthAxis, costs: Costs) -> None:
    """Draw one line per project, and format the axes."""
    for name, cost_by_value in costs.items():
        color, marker = LINE_STYLES[name]
        values, value_costs = list(cost_by_value), list(cost_by_value.values())
        axes.plot(values, value_costs, color=color, marker=marker, markersize=6, linewidth=2, label=name)
    if growth_axis.is_logarithmic:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_inverted(growth_axis.is_cost_decreasing)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, index: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10)
    despine(axes)


def draw_ticks(axes: Axes, growth_axis: GrowthAxis, comparisons: list[ComparisonDict]) -> None:
    """Draw a tick for each value, with the number of tokens or registers in parentheses below the value."""
    labels = {
        comparison[growth_axis.x_key]: f"{comparison[growth_axis.x_key]}"
        + (f"\n({comparison[growth_axis.tick_key]})" if growth_axis.tick_key else "")
        for comparison in comparisons
    }
    axes.set_xticks(list(labels), list(labels.values()))
    axes.xaxis.set_minor_locator(NullLocator())


def format_caption(comparisons: list[ComparisonDict], machine_description: str) -> str:
    """Return the caption of the figure: the measured models, the method and the machine."""
    size, device = comparisons[0]["size"], "the GPU" if comparisons[0]["device"] == "cuda" else "the CPU"
    model_text = f"width {size['hidden_size']}, {size['num_hidden_layers']} layers"
    caption = f"Inference in {comparisons[0]['precision']} on {device}: ViT, {model_text}; "
    base = next((comparison for comparison in comparisons if comparison["axis"] is None), None)
    if base is not None:
        caption += "{image_size} pixels, patch {patch_size}, batch {batch_size} unless varied; ".format(**base)
    min_pairs = min(comparison["pairs"] for comparison in comparisons)
    caption += f"equal outputs. Medians of {min_pairs} pairs of measurements. "
    peers = {comparison["against"] for comparison in comparisons}
    fields = {comparison["axis"] for comparison in comparisons}
    if "transformers" in peers and "num_registers" in fields:
        caption += "The ViT of transformers has no registers. "
    return f"{caption}{machine_description}."


if __name__ == "__main__":
    main()

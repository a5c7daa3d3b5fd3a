"""Reports of comparisons: tables in the terminal, Markdown and JSON files, and the figure of growth.py."""

import os
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..files import write_json
from ..system import get_processor_name, get_versions
from .comparison import Comparison, compute_quartiles
from .growth import plot_growth


MARKDOWN_HEADER = ("work", "images/s", "times as fast (quartiles)", "peak memory, vitcls / baseline")


def get_machine_properties() -> dict[str, Any]:
    """Return the processor, logical core count, load and GPU of this machine, and PyTorch's thread count."""
    return {
        "processor": get_processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def describe_machine(comparisons: list[Comparison]) -> str:
    """Return one line with the hardware and library versions. The GPU is included if a comparison ran on the GPU."""
    machine = get_machine_properties()
    description = f"{machine['processor']}, {machine['threads']} threads on {machine['cores']} cores"
    description = f"{description}, load {machine['load']:.1f}"
    if any(comparison.details.get("device") == "cuda" for comparison in comparisons):
        description = f"{machine['accelerator']}; {description}"
    return f"{description}; {', '.join(f'{name} {version}' for name, version in get_versions('timm').items())}"


def compute_lowest_ratios(comparisons: list[Comparison]) -> dict[tuple[str, str], float]:
    """Return the median speed ratio to the fastest peer for each row (workload, name) with several peers."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for comparison in comparisons:
        _, ratio, _ = compute_quartiles(comparison.ratios)
        ratios.setdefault((comparison.workload, comparison.name), []).append(ratio)
    return {row: min(row_ratios) for row, row_ratios in ratios.items() if len(row_ratios) > 1}


# Terminal ------------------------------------------------------------------------------------------------------------


def print_comparison(comparison: Comparison) -> Comparison:
    """Print one line about a comparison, and return the comparison."""
    lower, ratio, upper = compute_quartiles(comparison.ratios)
    name = f"{comparison.workload}: {comparison.name}, against {comparison.against}"
    print(f"{name}: {ratio:.2f} times as fast ({lower:.2f} to {upper:.2f})", flush=True)
    return comparison


def print_tables(comparisons: list[Comparison]) -> None:
    """Print tables of speed, of ratios to the fastest peer and of memory, and a line about the machine."""
    speed_table = Table("work", "against", "ours", "theirs", "ratio", "quartiles", title="images per second")
    memory_title = "peak memory in MiB, excluding memory in use before the measurement"
    memory_table = Table("work", "against", "ours", "theirs", title=memory_title)
    ratio_table = Table("work", "ratio", title="ratio to the fastest peer")
    for result in (comparison.to_dict() for comparison in comparisons):
        row = (f"{result['work']}: {result['name']}", result["against"])
        throughputs = (f"{result[f'{prefix}_images_per_second']:.1f}" for prefix in ("ours", "theirs"))
        lower, upper = result["quartiles"]
        speed_table.add_row(*row, *throughputs, f"{result['ratio']:.2f}", f"{lower:.2f} to {upper:.2f}")
        if "ours_peak_bytes" in result:
            peaks = (f"{result[f'{prefix}_peak_bytes'] / 2**20:.0f}" for prefix in ("ours", "theirs"))
            memory_table.add_row(*row, *peaks)
    for (workload, name), ratio in compute_lowest_ratios(comparisons).items():
        ratio_table.add_row(f"{workload}: {name}", f"{ratio:.2f}")
    console = Console(highlight=False)
    for table in (speed_table, ratio_table, memory_table):
        if table.row_count:
            console.print(table)
    console.print(describe_machine(comparisons))


# Files ---------------------------------------------------------------------------------------------------------------


def format_markdown(comparisons: list[Comparison]) -> str:
    """Return a Markdown table with one row per (workload, name), and a caption. Empty columns are omitted."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for comparison in comparisons:
        rows.setdefault((comparison.workload, comparison.name), []).append(comparison.to_dict())
    table = [MARKDOWN_HEADER, *(format_cells(workload, name, results) for (workload, name), results in rows.items())]
    column_indices = [index for index in range(len(MARKDOWN_HEADER)) if any(row[index] for row in table[1:])]
    lines = [f"| {' | '.join(row[index] for index in column_indices)} |" for row in table]
    pair_counts = sorted({len(comparison.ratios) for comparison in comparisons})
    pair_counts_text = " to ".join(str(count) for count in sorted({pair_counts[0], pair_counts[-1]}))
    caption = f"Medians of {pair_counts_text} pairs of measurements. {describe_machine(comparisons)}."
    return "\n".join([lines[0], f"|{'---|' * len(column_indices)}", *lines[1:], "", caption, ""])


def format_cells(workload: str, name: str, results: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return the cells of a Markdown table row, including the ratios to all baselines."""
    speed = statistics.median(result["ours_images_per_second"] for result in results)
    ratio_texts = (
        "{} {:.2f} ({:.2f} to {:.2f})".format(result["against"], result["ratio"], *result["quartiles"])
        for result in results
    )
    memory_texts = (
        f"{result['against']} {result['ours_peak_bytes'] / result['theirs_peak_bytes']:.2f}"
        for result in results
        if result.get("theirs_peak_bytes")
    )
    return f"{workload}: {name}", f"{speed:.1f}", ", ".join(ratio_texts), ", ".join(memory_texts)


def write_reports(
    comparisons: list[Comparison], output_file: Path | None, markdown_file: Path | None, plot_file: Path | None
) -> None:
    """Write the results to the given files: a JSON file, a Markdown file and a figure (PNG or SVG). Raise ValueError
    if `plot_file` is given, but no axis of --work growth was measured."""
    for file in (output_file, markdown_file, plot_file):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    results = [comparison.to_dict() for comparison in comparisons]
    if output_file is not None:
        lowest_ratios = compute_lowest_ratios(comparisons).items()
        report = {
            "machine": get_machine_properties(),
            "versions": get_versions("timm"),
            "comparisons": results,
            "over_the_better": [
                {"work": workload, "name": name, "ratio": ratio} for (workload, name), ratio in lowest_ratios
            ],
        }
        write_json(output_file, report)
    if markdown_file is not None:
        markdown_file.write_text(format_markdown(comparisons), encoding="utf-8")
    if plot_file is not None:
        plot_growth(results, describe_machine(comparisons)).savefig(plot_file, dpi=150)

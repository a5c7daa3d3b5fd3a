"""What is said about comparisons: a table for people, a JSON file for programs, and the machine behind both.

The figure of growth is made in growth_figure.py.
"""

import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..system import get_versions, processor_name
from .comparison import Comparison, quartiles
from .growth_figure import growth_figure


def machine() -> dict[str, Any]:
    """The processor, how much of it is used, and how busy it is with other things."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def table_of(comparisons: list[Comparison]) -> Table:
    """One row per comparison."""
    table = Table("work", "against", "ours", "theirs", "ratio", "quartiles", title="images per second")
    for found in (comparison.as_dict() for comparison in comparisons):
        lower, upper = found["quartiles"]
        table.add_row(
            f"{found['work']}: {found['name']}",
            found["against"],
            f"{found['ours_images_per_second']:.1f}",
            f"{found['theirs_images_per_second']:.1f}",
            f"{found['ratio']:.2f}",
            f"{lower:.2f} to {upper:.2f}",
        )
    return table


def memory_table_of(comparisons: list[Comparison]) -> Table | None:
    """One row per comparison of memory; None where there are none."""
    table = Table("work", "against", "ours", "theirs", title="MiB at most, beyond what is there before")
    for found in (comparison.as_dict() for comparison in comparisons):
        if "ours_peak_bytes" in found:
            sizes = (f"{found[f'{side}_peak_bytes'] / 2**20:.0f}" for side in ("ours", "theirs"))
            table.add_row(f"{found['work']}: {found['name']}", found["against"], *sizes)
    return table if table.row_count else None


def better_peers(comparisons: list[Comparison]) -> dict[tuple[str, str], float]:
    """Work that was compared with several -> how many times as fast ours was as the better of them (median)."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for comparison in comparisons:
        ratios.setdefault((comparison.work, comparison.name), []).append(quartiles(comparison.ratios)[1])
    return {row: min(of_row) for row, of_row in ratios.items() if len(of_row) > 1}


def better_table_of(comparisons: list[Comparison]) -> Table | None:
    """One row for all work that was compared with several; None where there is none."""
    table = Table("work", "ratio", title="over the better of those compared with")
    for (work, name), ratio in better_peers(comparisons).items():
        table.add_row(f"{work}: {name}", f"{ratio:.2f}")
    return table if table.row_count else None


HEADERS = ("work", "images/s", "times as fast (quartiles)", "peak memory, part of theirs")


def markdown(comparisons: list[Comparison]) -> str:
    """The comparisons as a table for a README, one line for each work, with what they were measured on under it.

    Columns in which nothing stands are left out.
    """
    of_work: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for comparison in comparisons:
        of_work.setdefault((comparison.work, comparison.name), []).append(comparison.as_dict())
    table = [HEADERS, *(cells(work, name, found) for (work, name), found in of_work.items())]
    kept = [place for place in range(len(HEADERS)) if any(row[place] for row in table[1:])]
    lines = [f"| {' | '.join(row[place] for place in kept)} |" for row in table]
    rule = f"|{'---|' * len(kept)}"
    pairs = sorted({len(comparison.ratios) for comparison in comparisons})
    taken = " to ".join(str(number) for number in sorted({pairs[0], pairs[-1]}))
    below = f"Medians of {taken} pairs of neighbouring turns. {measured_on(comparisons)}."
    return "\n".join([lines[0], rule, *lines[1:], "", below, ""])


def cells(work: str, name: str, found: list[dict[str, Any]]) -> tuple[str, ...]:
    """One work, beside all that it was compared with."""
    speed = statistics.median(each["ours_images_per_second"] for each in found)
    ratios = (
        "{} {:.2f} ({:.2f} to {:.2f})".format(each["against"], each["ratio"], *each["quartiles"]) for each in found
    )
    memory = (
        f"{each['against']} {each['ours_peak_bytes'] / each['theirs_peak_bytes']:.2f}"
        for each in found
        if each.get("theirs_peak_bytes")
    )
    return f"{work}: {name}", f"{speed:.1f}", ", ".join(ratios), ", ".join(memory)


def measured_on(comparisons: list[Comparison]) -> str:
    """Machine and versions, in one line; the accelerator too, if any of it was measured there."""
    here = machine()
    place = f"{here['processor']}, {here['threads']} threads on {here['cores']} cores, load {here['load']:.1f}"
    if any(comparison.details.get("device") == "cuda" for comparison in comparisons):
        place = f"{here['accelerator']}; {place}"
    return f"{place}; {', '.join(f'{name} {number}' for name, number in get_versions('timm').items())}"


def said(comparison: Comparison) -> Comparison:
    """The comparison, once one line about it is printed: the next one may take minutes."""
    lower, ratio, upper = quartiles(comparison.ratios)
    name = f"{comparison.work}: {comparison.name}, against {comparison.against}"
    print(f"{name}: {ratio:.2f} times as fast ({lower:.2f} to {upper:.2f})", flush=True)
    return comparison


def show(comparisons: list[Comparison]) -> None:
    """Print the table and where it was measured."""
    console = Console(highlight=False)
    for table in (table_of(comparisons), better_table_of(comparisons), memory_table_of(comparisons)):
        if table is not None:
            console.print(table)
    console.print(measured_on(comparisons))


def write_markdown(comparisons: list[Comparison], file: Path) -> None:
    """The table for a README."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(markdown(comparisons), encoding="utf-8")


def write_plot(comparisons: list[Comparison], file: Path) -> None:
    """The figure of growth, as PNG or SVG.

    Raises:
        ValueError: if too little of growth was measured.
    """
    figure = growth_figure([comparison.as_dict() for comparison in comparisons], measured_on(comparisons))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def write(comparisons: list[Comparison], file: Path) -> None:
    """Everything that was measured."""
    better = better_peers(comparisons)
    found = {
        "machine": machine(),
        "versions": get_versions("timm"),
        "comparisons": [comparison.as_dict() for comparison in comparisons],
        "over_the_better": [{"work": work, "name": name, "ratio": ratio} for (work, name), ratio in better.items()],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

"""What is said about comparisons: a table for people, a JSON file for programs, and the machine behind both."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import is_timm_available

from ..training.environment import versions
from .comparison import Comparison, quartiles


def machine() -> dict[str, Any]:
    """The processor, how much of it is used, and how busy it is with other things."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor_name() -> str:
    """As Linux has it; elsewhere what Python knows."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def all_versions() -> dict[str, str]:
    """Ours, and those of what we are compared with."""
    return versions() | ({"timm": version("timm")} if is_timm_available() else {})


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


def said(comparison: Comparison) -> Comparison:
    """The comparison, once one line about it is printed: the next one may take minutes."""
    lower, ratio, upper = quartiles(comparison.ratios)
    name = f"{comparison.work}: {comparison.name}, against {comparison.against}"
    print(f"{name}: {ratio:.2f} times as fast ({lower:.2f} to {upper:.2f})", flush=True)
    return comparison


def show(comparisons: list[Comparison]) -> None:
    """Print the table and where it was measured."""
    here = machine()
    console = Console(highlight=False)
    console.print(table_of(comparisons))
    console.print(f"{here['processor']}, {here['threads']} of {here['cores']} cores, load {here['load']:.1f}")
    console.print(", ".join(f"{name} {number}" for name, number in all_versions().items()))


def write(comparisons: list[Comparison], file: Path) -> None:
    """Everything that was measured."""
    found = {
        "machine": machine(),
        "versions": all_versions(),
        "comparisons": [comparison.as_dict() for comparison in comparisons],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

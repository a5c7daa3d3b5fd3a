"""`vitcls benchmark`: compare speed and memory with those of other projects on the same workloads.

    vitcls benchmark --work inference step pixels prediction probe --markdown speed.md --output speed.json
    vitcls benchmark --work inference --rows "fp32, batch 8" --against timm
    vitcls benchmark --work growth --plot cost.png
    vitcls benchmark --work training

Each pair of measurements runs this package and the other project, one after the other. The result is the median speed
ratio of all pairs, because the load of the machine affects both measurements of a pair. Speed is measured only if the
outputs agree. The benchmarks are implemented in modeling_vitcls/benchmarking/.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .parsing import exit_with_message


PLOT_SUFFIXES = (".png", ".svg")


@dataclass(frozen=True)
class BenchmarkOptions:
    """Compare speed and memory with those of other projects on the same workloads."""

    work: tuple[
        Literal["inference", "growth", "step", "inexact", "pixels", "prediction", "probe", "training", "attention"],
        ...,
    ]
    """Workloads. inference: forward passes. growth: time and memory of a forward pass by image size, patch size,
    number of tokens and batch size. step: time and memory of training steps without data loading. inexact: merged and
    dropped patches, compared with the plain model. pixels: from a JPEG file to pixel_values. prediction: from a JPEG
    file to a label. probe: a linear probe with and without cached features. training: `vitcls finetune`, compared with
    transformers' Trainer. attention: time and memory of computing token attention, rollout, attribution and token
    statistics, compared with those of a plain forward pass."""
    against: tuple[Literal["transformers", "timm", "plain"], ...] = ("transformers", "timm")
    """Peers for --work inference, growth and step: the ViT of another project, or `plain`, a vitcls model without CPU
    kernels."""
    rows: tuple[str, ...] = ()
    """Names of the table rows to measure. Default: all rows of --work."""
    pairs: int = 9
    """Number of pairs of measurements. Each pair measures this package and the peer once."""
    output: Path | None = None
    """JSON file for the results."""
    markdown: Path | None = None
    """Markdown file for a table of the results."""
    plot: Path | None = None
    """PNG or SVG file for the figure of --work growth."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision for --work growth. The rows of all other workloads have a fixed precision."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device for --work inference, growth, step and inexact. All other workloads run on the CPU."""
    toy: bool = False
    """Use tiny models and one call per measurement, to test the benchmark. The measured values are meaningless."""


OPTIONS_CLASS = BenchmarkOptions


def check_options(options: BenchmarkOptions) -> None:
    """Exit with status 2 if a flag has an invalid value or if flags contradict each other."""
    if options.pairs < 1:
        exit_with_message(f"error: --pairs is {options.pairs}: set --pairs to 1 or more")
    if not options.work or not options.against:
        exit_with_message("error: --work and --against require at least one value. For a list of values, use --help")
    if options.plot is not None and "growth" not in options.work:
        exit_with_message("error: --plot requires --work growth. Add growth to --work, or omit --plot")
    if options.plot is not None and options.plot.suffix not in PLOT_SUFFIXES:
        exit_with_message(f"error: --plot {options.plot}: set a file name that ends in {' or '.join(PLOT_SUFFIXES)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # prevents downloads; must be set before importing huggingface_hub


def run(options: BenchmarkOptions) -> None:
    """Run the benchmarks, write the files and print the tables."""
    from ..benchmarking.comparison import BenchmarkSettings
    from ..benchmarking.tables import print_comparison, print_tables, write_reports
    from ..benchmarking.work import run_benchmarks

    settings = BenchmarkSettings(options.against, options.pairs, options.toy, options.precision, options.device)
    comparisons = [print_comparison(comparison) for comparison in run_benchmarks(options.work, options.rows, settings)]
    write_reports(comparisons, options.output, options.markdown, options.plot)
    print_tables(comparisons)

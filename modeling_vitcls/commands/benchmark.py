"""`vitcls benchmark`: speed and memory compared with other projects on the same work.

    python scripts/benchmark.py --work inference step pixels prediction probe --markdown speed.md --output speed.json
    python scripts/benchmark.py --work inference --rows "fp32, batch 8" --against timm
    python scripts/benchmark.py --work growth --plot cost.png
    python scripts/benchmark.py --work training

Both sides take turns. The result is the median of the ratios of neighboring turns, because other programs on the
machine slow both sides. If the outputs differ, nothing is measured. The benchmarks are implemented in
modeling_vitcls/benchmarking/.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .parsing import errors_in_one_line, stop


PLOTS = (".png", ".svg")


@dataclass(frozen=True)
class BenchmarkOptions:
    """Compare the speed of ours and others' on the same work."""

    work: tuple[
        Literal["inference", "growth", "step", "inexact", "pixels", "prediction", "probe", "training", "attention"],
        ...,
    ]
    """Forward passes; how their time and memory grow with image size, patch size, tokens and batch; bare training
    steps, with their memory; merged and dropped patches against the plain model; from a JPEG file to pixel_values, and
    to a label; a linear probe with cached features against one without; vitcls finetune against transformers'
    Trainer; reading attention, with its memory, against a plain forward pass."""
    against: tuple[Literal["transformers", "timm"], ...] = ("transformers", "timm")
    """Whom forward passes, their growth and training steps are compared with."""
    rows: tuple[str, ...] = ()
    """Names of the rows to measure, of any of the work. Default: all."""
    pairs: int = 9
    """Turns of each side."""
    output: Path | None = None
    """JSON file for the results."""
    markdown: Path | None = None
    """Markdown file for a table of them."""
    plot: Path | None = None
    """PNG or SVG file for a figure of growth."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of growth."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where forward passes, their growth, training steps and what is inexact are measured."""
    toy: bool = False
    """Tiny models: tries the script, and measures nothing worth knowing."""


OPTIONS = BenchmarkOptions


def check(options: BenchmarkOptions) -> None:
    """Exit with status 2 if flags do not go together."""
    if options.pairs < 1:
        stop(f"--pairs is {options.pairs}: set a value 1 or more")
    if not options.work or not options.against:
        stop("--work and --against need a value: see --help")
    if options.plot is not None and "growth" not in options.work:
        stop("--plot draws growth: add it to --work")
    if options.plot is not None and options.plot.suffix not in PLOTS:
        stop(f"--plot {options.plot}: choose a name that ends in {' or '.join(PLOTS)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported: nothing is downloaded


def run(options: BenchmarkOptions) -> None:
    """Measure, print the tables and write the files."""
    from ..benchmarking.tables import said, show, write, write_markdown, write_plot
    from ..benchmarking.work import Plan, compare

    plan = Plan(options.against, options.pairs, options.toy, options.precision, options.device)
    with errors_in_one_line():
        comparisons = [said(comparison) for comparison in compare(options.work, options.rows, plan)]
        if options.output is not None:
            write(comparisons, options.output)
        if options.markdown is not None:
            write_markdown(comparisons, options.markdown)
        if options.plot is not None:
            write_plot(comparisons, options.plot)
    show(comparisons)

"""`vitcls benchmark`: measure the speed of a model on this machine, by backend and precision.

    vitcls benchmark --model runs/mine
    vitcls benchmark --work inference step --backends torch compiled --peers timm transformers --markdown speed.md

All rows are measured in turn, several times. The ratios are medians of the ratios in each round. Speed is compared
only if the outputs agree. The benchmark is implemented in modeling_vitcls/benchmark.py.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from .parsing import exit_with_message


@dataclass(frozen=True)
class BenchmarkOptions:
    """Measure the speed of a model on this machine, by backend and precision, next to timm and transformers."""

    model: str = "vitcls-small"
    """A model folder, the id of a model on the Hub, or a preset (random weights)."""
    work: tuple[Literal["inference", "step"], ...] = ("inference",)
    """inference: forward passes. step: training steps (forward, backward, AdamW) without data loading."""
    backends: tuple[Literal["torch", "compiled", "onnx", "openvino"], ...] | None = None
    """Backends. Default: torch, compiled and, on the CPU, the installed ones of onnx and openvino."""
    peers: tuple[Literal["timm", "transformers"], ...] | None = None
    """Other packages, with the plain ViT of the same size. Default: the installed ones."""
    precisions: tuple[Literal["fp32", "bf16", "int8"], ...] = ("fp32", "bf16", "int8")
    """Precisions. int8 is OpenVINO's."""
    batch_sizes: tuple[int, ...] = (1, 16)
    """Numbers of images per call."""
    rounds: int = 7
    """Number of rounds. Each round measures each row once."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device. Exported files are measured on the CPU only."""
    markdown: Path | None = None
    """Markdown file for the table. The table is also printed."""


OPTIONS_CLASS = BenchmarkOptions


def check_options(options: BenchmarkOptions) -> None:
    """Exit with status 2 if a flag has an invalid value."""
    if min(options.rounds, *options.batch_sizes) < 1:
        exit_with_message("error: --rounds and --batch-sizes must be 1 or more")


def run(options: BenchmarkOptions) -> None:
    """Measure, print the table, and write the file."""
    from ..benchmark import PACKAGES, BenchmarkSettings, format_markdown, run_benchmarks
    from .export import silence_exporters

    silence_exporters()
    backends: tuple[str, ...] | None = options.backends
    peers: tuple[str, ...] | None = options.peers
    if backends is None:
        is_cpu = options.device == "cpu"
        exported = [name for name, packages in PACKAGES.items() if is_cpu and all(map(find_spec, packages))]
        backends = ("torch", "compiled", *exported)
    if peers is None:
        peers = ("timm", "transformers") if find_spec("timm") else ("transformers",)
    settings = BenchmarkSettings(
        options.model,
        options.work,
        backends,
        peers,
        options.precisions,
        options.batch_sizes,
        options.rounds,
        options.device,
    )
    text = format_markdown(run_benchmarks(settings), settings)
    print(f"\n{text}")
    if options.markdown is not None:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text, encoding="utf-8")

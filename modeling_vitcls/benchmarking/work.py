"""The kinds of work that `vitcls benchmark --work` supports."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .comparison import BenchmarkSettings, Comparison
from .growth import GROWTH_POINTS, TOY_GROWTH_POINTS, compare_growth
from .image_files import PIXEL_ROWS, PREDICTION_ROWS, compare_pixels, compare_prediction
from .own_features import (
    ATTENTION_ROWS,
    INEXACT_ROWS,
    PROBE_ROWS,
    compare_attention,
    compare_inexact_features,
    compare_probes,
)
from .peers import FORWARD_PASSES, TRAINING_STEPS, compare_forward_pass, compare_step, compare_with_peers
from .training_runs import TOY_RUNS, TRAINING_RUNS, compare_training


@dataclass(frozen=True)
class WorkKind:
    """A kind of work: a table of rows, the function that compares rows, and an optional table for toy models."""

    rows: dict[str, Any]
    compare: Callable[[dict[str, Any], BenchmarkSettings], Iterator[Comparison]]
    toy_rows: dict[str, Any] | None = None
    supports_gpu: bool = False


WORK_KINDS = {
    "inference": WorkKind(FORWARD_PASSES, partial(compare_with_peers, compare_forward_pass), supports_gpu=True),
    "growth": WorkKind(GROWTH_POINTS, compare_growth, TOY_GROWTH_POINTS, supports_gpu=True),
    "step": WorkKind(TRAINING_STEPS, partial(compare_with_peers, compare_step), supports_gpu=True),
    "inexact": WorkKind(INEXACT_ROWS, compare_inexact_features, supports_gpu=True),
    "pixels": WorkKind(PIXEL_ROWS, compare_pixels),
    "prediction": WorkKind(PREDICTION_ROWS, compare_prediction),
    "probe": WorkKind(PROBE_ROWS, compare_probes),
    "training": WorkKind(TRAINING_RUNS, compare_training, TOY_RUNS),
    "attention": WorkKind(ATTENTION_ROWS, compare_attention),
}


def run_benchmarks(
    work_names: tuple[str, ...], row_names: tuple[str, ...], settings: BenchmarkSettings
) -> Iterator[Comparison]:
    """Compare the rows of the given kinds of work. If `row_names` is not empty, compare only these rows.

    Raises:
        ValueError: If a row does not exist, if the device is not available, if the outputs, gradients or trained
            weights differ, or if a measurement fails.
    """
    if settings.device != "cpu":
        if not torch.cuda.is_available():
            raise ValueError(
                "--device cuda requires a GPU, but PyTorch finds no GPU. Omit --device to measure on the CPU."
            )
        if cpu_only_work := [name for name in work_names if not WORK_KINDS[name].supports_gpu]:
            supported_work = ", ".join(name for name, kind in WORK_KINDS.items() if kind.supports_gpu)
            raise ValueError(
                f"--work {' '.join(cpu_only_work)} does not support --device cuda. Only these kinds of work support "
                f"--device cuda: {supported_work}."
            )
    tables = {name: (settings.is_toy and WORK_KINDS[name].toy_rows) or WORK_KINDS[name].rows for name in work_names}
    known_names = [row_name for table in tables.values() for row_name in table]
    for row_name in row_names:
        if row_name not in known_names:
            raise ValueError(f"--rows: there is no row {row_name!r}. Choose from {', '.join(map(repr, known_names))}")
    for name, table in tables.items():
        if selected_rows := {key: row for key, row in table.items() if not row_names or key in row_names}:
            yield from WORK_KINDS[name].compare(selected_rows, settings)

"""The workloads that `vitcls benchmark --work` supports."""

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
class Workload:
    """A workload: a table of rows, the function that measures them, and an optional table for toy models."""

    rows: dict[str, Any]
    compare: Callable[[dict[str, Any], BenchmarkSettings], Iterator[Comparison]]
    toy_rows: dict[str, Any] | None = None
    supports_gpu: bool = False


WORKLOADS = {
    "inference": Workload(FORWARD_PASSES, partial(compare_with_peers, compare_forward_pass), supports_gpu=True),
    "growth": Workload(GROWTH_POINTS, compare_growth, TOY_GROWTH_POINTS, supports_gpu=True),
    "step": Workload(TRAINING_STEPS, partial(compare_with_peers, compare_step), supports_gpu=True),
    "inexact": Workload(INEXACT_ROWS, compare_inexact_features, supports_gpu=True),
    "pixels": Workload(PIXEL_ROWS, compare_pixels),
    "prediction": Workload(PREDICTION_ROWS, compare_prediction),
    "probe": Workload(PROBE_ROWS, compare_probes),
    "training": Workload(TRAINING_RUNS, compare_training, TOY_RUNS),
    "attention": Workload(ATTENTION_ROWS, compare_attention),
}


def run_benchmarks(
    work_names: tuple[str, ...], row_names: tuple[str, ...], settings: BenchmarkSettings
) -> Iterator[Comparison]:
    """Run the comparisons for all rows of the given workloads, or only for the rows `row_names` if any are given.
    Raise ValueError if a row does not exist, the device is not available or not supported, the results of this package
    and the baseline differ by more than a limit, or a measurement fails."""
    if settings.device != "cpu":
        if not torch.cuda.is_available():
            raise ValueError(
                "--device cuda requires a GPU, but PyTorch finds no GPU. Omit --device to measure on the CPU."
            )
        if cpu_only_work := [name for name in work_names if not WORKLOADS[name].supports_gpu]:
            supported_work = ", ".join(name for name, workload in WORKLOADS.items() if workload.supports_gpu)
            raise ValueError(
                f"--work {' '.join(cpu_only_work)} does not support --device cuda. Only these workloads support "
                f"--device cuda: {supported_work}."
            )
    tables = {name: (settings.is_toy and WORKLOADS[name].toy_rows) or WORKLOADS[name].rows for name in work_names}
    known_names = [row_name for table in tables.values() for row_name in table]
    for row_name in row_names:
        if row_name not in known_names:
            raise ValueError(f"--rows: there is no row {row_name!r}. Choose from {', '.join(map(repr, known_names))}")
    for name, table in tables.items():
        if selected_rows := {key: row for key, row in table.items() if not row_names or key in row_names}:
            yield from WORKLOADS[name].compare(selected_rows, settings)

"""Throughput and peak memory of the two sides of a comparison, measured in pairs."""

import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import raises_one_line

from modeling_vitcls.benchmarking import comparison
from modeling_vitcls.benchmarking.comparison import (
    BenchmarkSettings,
    Comparison,
    compare_peak_memory,
    compare_throughput,
    compute_quartiles,
    measure_throughput,
)


@pytest.mark.skipif(sys.platform != "linux", reason="requires /proc")
def test_memory_is_the_peak_during_the_function() -> None:
    """Memory that is freed before the end counts (64 MiB), memory of the warm-up does not (128 MiB)."""

    def allocate_and_free(num_bytes: int) -> None:
        memory = mmap.mmap(-1, num_bytes)  # not from the free memory of this process
        np.frombuffer(memory, dtype=np.uint8)[:] = 1

    growth = comparison.measure_memory_growth(lambda: allocate_and_free(2**27), lambda: allocate_and_free(2**26))
    assert 63 * 2**20 < growth < 80 * 2**20


@pytest.mark.parametrize(("is_toy", "seconds"), [(True, 0.0), (False, 0.5)])
def test_pairs_are_measured_alternately(is_toy: bool, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[object, int, float]] = []

    def measure(function: Any, num_images: int, min_seconds: float) -> float:
        measured.append((function(), num_images, min_seconds))
        return float(len(measured))

    monkeypatch.setattr(comparison, "measure_throughput", measure)
    throughputs = compare_throughput(lambda: "ours", lambda: "theirs", 7, BenchmarkSettings((), 3, is_toy=is_toy))
    assert throughputs == ([1.0, 4.0, 5.0], [2.0, 3.0, 6.0])
    order = ("ours", "theirs", "theirs", "ours", "ours", "theirs")
    assert measured == [(side, 7, seconds) for side in order]


def test_memory_used_before_a_measurement_on_a_gpu_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 bytes are allocated and 900 were allocated before; the measured function needs 30 more bytes."""
    current, peak = [100], [1000]

    def reset() -> None:
        peak[0] = current[0]

    def allocate_and_free() -> None:
        peak[0] = max(peak[0], current[0] + 30)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    assert comparison.measure_gpu_memory_growth(allocate_and_free) == 30


def test_memory_is_read_from_the_last_line_of_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, sys\nprint('log', os.environ['MALLOC_MMAP_THRESHOLD_'])\nprint(7 if sys.argv[2:] else 5)"
    (tmp_path / "measured_module.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert compare_peak_memory("measured_module", "row") == {"ours_peak_bytes": 5, "theirs_peak_bytes": 7}
    with raises_one_line("cannot measure the memory of row --toy", "No module named no_module"):
        compare_peak_memory("no_module", "row", "--toy")


def test_the_throughput_counts_the_images_of_all_calls_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []

    def process_batch() -> None:
        calls.append(None)
        clock[0] += 8.0 if len(calls) == 1 else 0.5

    monkeypatch.setattr(comparison.time, "perf_counter", lambda: clock[0])
    assert measure_throughput(process_batch, num_images=4, min_seconds=1.5) == 8.0  # images per second
    assert len(calls) == 4


def test_ratios_are_of_pairs() -> None:
    found = Comparison("work", "row", "them", [2.0, 9.0, 8.0], [1.0, 3.0, 2.0], 0.0, {}).to_dict()
    assert found["ratios"] == [2.0, 3.0, 4.0] and found["ratio"] == 3.0 and found["quartiles"] == [2.5, 3.5]
    assert compute_quartiles([7.0]) == (7.0, 7.0, 7.0)

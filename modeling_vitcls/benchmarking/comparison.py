"""Output comparisons, peak memory measurements, and paired speed measurements of this package and a baseline.

The baseline is code from another project, or a model from this package without a feature. This package and the
baseline are measured alternately, because the machine load and clock rates vary. Each measurement of this package is
compared with the neighboring measurement of the baseline. Nothing is measured if the outputs differ by more than
a limit.

CPU memory is the peak growth in the memory of a process, read from /proc (Linux only). GPU memory is the peak growth
in the memory allocated by PyTorch.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch


SECONDS_PER_MEASUREMENT = 0.5
# Environment variables that make glibc return freed blocks of 64 KiB or more to the system, instead of keeping them
# for later allocations.
MALLOC_VARIABLES = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
# dtype -> maximum difference between logits, divided by the largest absolute logit.
LOGIT_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05}

Model = Callable[[torch.Tensor], Any]  # images [B, C, H, W] -> logits [B, labels], or an output with logits
Throughputs = tuple[list[float], list[float]]  # images per second of this package and the baseline, per pair


@dataclass(frozen=True)
class BenchmarkSettings:
    """Values of the `vitcls benchmark` flags that affect the measurements."""

    against: tuple[str, ...]  # names of peers (keys of `peers.PEERS`)
    num_pairs: int  # number of paired measurements of this package and the baseline
    is_toy: bool = False  # whether to use tiny models and data, and one call per measurement
    precision: str = "fp32"  # precision of the growth rows, "fp32" or "bf16"; other rows have a fixed precision
    device: str = "cpu"  # type of the device, "cpu" or "cuda"

    @property
    def toy_flags(self) -> tuple[str, ...]:
        """Return the flags that pass `is_toy` to measurement processes: `--toy`, or no flags."""
        return ("--toy",) if self.is_toy else ()


@dataclass(frozen=True)
class Comparison:
    """Result of the comparison in one row of the benchmark report."""

    workload: str  # name of the workload in the reports
    name: str  # name of the row
    against: str  # name of the baseline
    ours: list[float]  # images per second of this package in each pair
    theirs: list[float]  # images per second of the baseline in each pair
    difference: float  # largest difference between the outputs, gradients or trained weights
    details: dict[str, Any]  # additional keys and values for the JSON file

    @property
    def ratios(self) -> list[float]:
        """Return the speed of this package divided by the speed of the baseline, for each pair."""
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as a dict for the --output file."""
        lower, ratio, upper = compute_quartiles(self.ratios)
        return {
            "work": self.workload,
            "name": self.name,
            "against": self.against,
            "ratio": ratio,
            "quartiles": [lower, upper],
            "pairs": len(self.ratios),
            "ours_images_per_second": statistics.median(self.ours),
            "theirs_images_per_second": statistics.median(self.theirs),
            "ratios": self.ratios,
            "largest_difference_of_outputs": self.difference,
            **self.details,
        }


def compute_quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, median and upper quartile. A single value is returned three times."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


# Speed ---------------------------------------------------------------------------------------------------------------


def measure_alternately(ours: Callable[[], float], theirs: Callable[[], float], num_pairs: int) -> Throughputs:
    """Call both functions `num_pairs` times in alternating order, and return the results of each function."""
    throughputs: Throughputs = ([], [])
    for pair_index in range(num_pairs):
        for index in (0, 1) if pair_index % 2 == 0 else (1, 0):
            throughputs[index].append((ours, theirs)[index]())
    return throughputs


def measure_throughput(
    function: Callable[[], object], num_images: int, min_seconds: float = SECONDS_PER_MEASUREMENT
) -> float:
    """Return the throughput of repeated calls in images per second, after a warm-up call. Each call processes
    `num_images` images."""
    function()
    synchronize_gpu()
    num_calls, start_time = 0, time.perf_counter()
    while num_calls == 0 or time.perf_counter() - start_time < min_seconds:
        function()
        synchronize_gpu()
        num_calls += 1
    return num_calls * num_images / (time.perf_counter() - start_time)


def synchronize_gpu() -> None:
    """Wait until the GPU has finished all work, if this process uses a GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def compare_throughput(
    ours: Callable[[], object], theirs: Callable[[], object], num_images: int, settings: BenchmarkSettings
) -> Throughputs:
    """Return the throughputs of two functions in images per second, measured alternately."""
    seconds = 0.0 if settings.is_toy else SECONDS_PER_MEASUREMENT
    return measure_alternately(
        lambda: measure_throughput(ours, num_images, seconds),
        lambda: measure_throughput(theirs, num_images, seconds),
        settings.num_pairs,
    )


# Processes -----------------------------------------------------------------------------------------------------------


class LoggedProcess:
    """Context manager that runs a command, logs stderr, and kills the process and its workers on exit."""

    def __init__(self, command: list[str], stdout: int = subprocess.DEVNULL) -> None:
        self.command = command
        self.stdout = stdout
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by __exit__

    def __enter__(self) -> Self:
        """Start the process."""
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=self.stdout, stderr=self.log, text=True, start_new_session=True
        )
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Kill the process and its workers."""
        if self.process.poll() is None:
            self.send_signal(signal.SIGKILL)
        self.process.communicate()
        self.log.close()

    def send_signal(self, signum: signal.Signals) -> None:
        """Send a signal to the process and its workers."""
        os.killpg(self.process.pid, signum)

    def build_error(self) -> ValueError:
        """Return an error that contains the last line of the log."""
        self.log.seek(0)
        last_line = get_last_line(self.log.read().decode(errors="replace"))
        return ValueError(f"{' '.join(self.command[2:4])} failed: {last_line}")


def get_last_line(output: str) -> str:
    """Return the last line of a process's output, or a note if the output is empty."""
    return (output.strip().splitlines() or ["the process printed nothing"])[-1]


# Equal outputs -------------------------------------------------------------------------------------------------------


def check_difference(difference: float, limit: float, name: str, compared_values: str) -> float:
    """Return `difference`. Raise ValueError if the difference exceeds `limit` or is NaN."""
    if not difference <= limit:
        raise ValueError(
            f"{name}: {compared_values} differ by {difference:.2g}, more than {limit:.2g}. "
            "Speed is compared only if the results agree."
        )
    return difference


def check_tensors(
    actual: torch.Tensor, expected: torch.Tensor, limit: float, name: str, compared_values: str
) -> float:
    """Return the largest absolute difference. Raise ValueError if the difference exceeds `limit` times the largest
    absolute value in `expected`."""
    largest_value = expected.abs().max().item()
    return check_difference((actual - expected).abs().max().item(), limit * largest_value, name, compared_values)


def get_logits(model: Model, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the logits [B, labels] of a model from this package, transformers or timm."""
    output = model(pixel_values)
    return output if isinstance(output, torch.Tensor) else output.logits


@torch.inference_mode()
def check_logits(ours: Model, theirs: Model, pixel_values: torch.Tensor, name: str) -> float:
    """Return the largest absolute difference between the logits. Raise ValueError if the shapes differ, or if the
    difference exceeds the limit in `LOGIT_LIMITS`."""
    logits, expected = get_logits(ours, pixel_values).float(), get_logits(theirs, pixel_values).float()
    if logits.shape != expected.shape:
        raise ValueError(f"{name}: the outputs have different shapes, {list(logits.shape)} and {list(expected.shape)}")
    return check_tensors(logits, expected, LOGIT_LIMITS[pixel_values.dtype], name, "the outputs")


# Memory --------------------------------------------------------------------------------------------------------------


def parse_memory_flags(rows: Iterable[str], peers: Iterable[str] = ()) -> argparse.Namespace:
    """Parse the command line of a process started by `compare_peak_memory`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("row", choices=tuple(rows))
    if peers:
        parser.add_argument("peer", choices=tuple(peers))
    parser.add_argument("--theirs", action="store_true")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--toy", action="store_true")
    return parser.parse_args()


def compare_peak_memory(module_name: str, *arguments: str) -> dict[str, int]:
    """Return a dict for `Comparison.details` with the peak memory of this package and of the baseline, in bytes. The
    process that measures the baseline receives the flag --theirs."""
    return {
        "ours_peak_bytes": measure_peak_memory_in_process(module_name, *arguments),
        "theirs_peak_bytes": measure_peak_memory_in_process(module_name, *arguments, "--theirs"),
    }


def measure_peak_memory_in_process(module_name: str, *arguments: str) -> int:
    """Run a module in a new process and return the peak memory in bytes, which the process prints last. Raise
    ValueError if the process fails."""
    command = [sys.executable, "-m", module_name, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | MALLOC_VARIABLES)
    if process.returncode:
        raise ValueError(f"cannot measure the memory of {' '.join(arguments)}: {get_last_line(process.stderr)}")
    return int(process.stdout.strip().splitlines()[-1])


def measure_memory_growth(warm_up: Callable[[], object], function: Callable[[], object]) -> int:
    """Call `warm_up` and `function`, and return the peak growth of the process's memory in bytes during `function`."""
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak resident set size, VmHWM
    initial_bytes = read_memory_status("VmRSS")
    function()
    return max(read_memory_status("VmHWM") - initial_bytes, 0)


def measure_gpu_memory_growth(function: Callable[[], object]) -> int:
    """Return the peak growth of allocated GPU memory in bytes during a call of `function`. The caller must first call
    `function` once as a warm-up."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    initial_bytes = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - initial_bytes


def read_memory_status(name: str) -> int:
    """Return the value of a field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024

"""The machine: versions of libraries, names of devices and processors, memory, energy, peak matrix throughput.

Energy is an estimate: the assumed or known power of the devices times the duration. Nothing is measured for it.

    GPU     the power limit of the board, as its driver reports it
    CPU     `WATTS_PER_CPU_THREAD` for each thread
    others  no estimate

Peak throughput is measured with large matrix products on the machine as it is, with its number of threads, its clock
and whatever else runs on it:

    measure_gemm_peak(torch.device("cuda"), torch.bfloat16)      # FLOP/s, a multiply-add counts as two
"""

import ctypes
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from .version import __version__


SHARDED = {DistributedType.FSDP: "weights in parts by FSDP", DistributedType.DEEPSPEED: "in parts by DeepSpeed"}
LIBRARIES = ("torch", "torchvision", "transformers", "accelerate")

# Parameters of mallopt in glibc's <malloc.h>.
M_TRIM_THRESHOLD = -1  # free bytes at the end of the heap above which memory is returned to the system; -1 disables it
M_MMAP_MAX = -4  # blocks that are taken from the system one by one; 0 for none


def keep_freed_memory() -> None:
    """Let this process keep what its tensors free, and PyTorch ask for large pages if it has no tensors yet.

    What the user has set by variables of the environment stays, and so does another C library as it is.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    is_set = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and not is_set:
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)


WATTS_PER_CPU_THREAD = 10.0  # server processors: 100 to 300 W over 16 to 64 cores, with memory and power supply
JOULES_PER_KILOWATT_HOUR = 3.6e6
NVIDIA_SMI_SECONDS = 10.0  # to answer


def estimate_energy(seconds: float, num_processes: int, device: torch.device) -> dict[str, Any] | None:
    """Kilowatt-hours of all processes, and what that number rests on; None where nothing is known of the device.

    Args:
        seconds: that the run took.
        num_processes: each on a device like this one.
        device: of this process.

    Returns:
        "kilowatt_hours", "watts_per_process", and "assumption" in words, without which no number should be shown.
    """
    if device.type == "cuda":
        watts, assumption = get_power_limit(device), "each GPU drew the power limit of its board"
    elif device.type == "cpu":
        threads = torch.get_num_threads()
        watts = threads * WATTS_PER_CPU_THREAD
        assumption = f"{threads} thread(s) per process drew {WATTS_PER_CPU_THREAD:.0f} W each"
    else:
        return None
    if watts is None:
        return None
    return {
        "kilowatt_hours": float(f"{watts * num_processes * seconds / JOULES_PER_KILOWATT_HOUR:.3g}"),
        "watts_per_process": watts,
        "assumption": f"{assumption} all the time; the rest of the machine is not counted",
    }


def get_power_limit(device: torch.device) -> float | None:
    """Watts that a GPU may draw, as `nvidia-smi` says; None where it is not there or does not say."""
    board = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--id={board}", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True)
        return float(ran.stdout.strip())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


GEMM_SECONDS = 0.25  # of measuring, for each way to multiply
MIN_GEMM_TURNS = 3

# Side of the square matrices: large enough to keep the device busy, small enough for several turns.
MATRIX_SIDES = {"cpu": 1024, "cuda": 8192}
DEFAULT_MATRIX_SIDE = 4096


@torch.no_grad()
def measure_gemm_peak(device: torch.device | str, dtype: torch.dtype) -> float:
    """Return the FLOP/s of large matrix products: the fastest of many repetitions, in the fastest implementation.

    The measurement takes about half a second. On CPUs oneDNN is tried in addition to PyTorch's own choice, which may
    be half as fast. The result is a lower bound: other programs that run at the same time can only lower it.
    """
    device = torch.device(device)
    side = MATRIX_SIDES.get(device.type, DEFAULT_MATRIX_SIDE)
    generator = torch.Generator(device)  # training continues with the random numbers that it would have had
    first, second = (torch.randn(side, side, device=device, dtype=dtype, generator=generator) for _ in range(2))
    ways: list[Callable[[], torch.Tensor]] = [lambda: nn.functional.linear(first, second)]
    if device.type == "cpu" and torch.backends.mkldnn.is_available() and dtype in (torch.float32, torch.bfloat16):
        packed_first, packed_second = first.to_mkldnn(), second.to_mkldnn()
        ways.append(lambda: nn.functional.linear(packed_first, packed_second))
    return 2 * side**3 / min(measure_fastest_call(multiply, device) for multiply in ways)


def measure_fastest_call(work: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Return the seconds of the fastest call, after a first call that does not count."""
    work()
    turns: list[float] = []
    synchronize(device)
    started = time.perf_counter()
    while len(turns) < MIN_GEMM_TURNS or time.perf_counter() - started < GEMM_SECONDS:
        before = time.perf_counter()
        work()
        synchronize(device)
        turns.append(time.perf_counter() - before)
    return min(turns)


def synchronize(device: torch.device) -> None:
    """Until everything that was asked of it is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def get_peak_memory(device: torch.device) -> int:
    """The most memory used so far, in bytes: of this device, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> None:
    """Let `get_peak_memory` begin anew, with what is in use now. A process on the CPU cannot: its peak is for ever."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def describe_device(accelerator: Accelerator) -> str:
    """The device as a person would call it, and what divides the model among the processes, if anything does."""
    name = format_device_name(accelerator.device) + (" per process" if accelerator.device.type == "cpu" else "")
    return ", ".join(filter(None, [name, SHARDED.get(accelerator.distributed_type)]))


def format_device_name(device: torch.device) -> str:
    """A device as a person would call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else device.type


def get_versions(*libraries: str) -> dict[str, str]:
    """Return the versions of this package, of Python, of `LIBRARIES` and of other `libraries` that are installed."""
    versions = {"modeling_vitcls": __version__, "python": platform.python_version()}
    for name in (*LIBRARIES, *libraries):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions | {"torch": str(torch.__version__)}  # with its build, such as +cu132


def get_processor_name() -> str:
    """As Linux has it; elsewhere what Python knows."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

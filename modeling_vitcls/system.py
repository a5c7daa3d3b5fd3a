"""Library versions, device names, memory, energy estimates, and the peak throughput of matrix products.

Energy consumption is estimated as the duration times the assumed power draw:

    GPU             power limit of the GPU, from nvidia-smi
    CPU             `WATTS_PER_CPU_THREAD` per thread
    other devices   no estimate
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


SHARDING_DESCRIPTIONS = {
    DistributedType.FSDP: "weights sharded by FSDP",
    DistributedType.DEEPSPEED: "sharded by DeepSpeed",
}
CORE_LIBRARIES = ("torch", "torchvision", "transformers", "accelerate")

# Parameter ids of mallopt, from glibc's <malloc.h>. The comments describe the parameters.
M_TRIM_THRESHOLD = -1  # size in bytes above which free memory at the end of the heap is returned to the system
M_MMAP_MAX = -4  # maximum number of blocks that are allocated with mmap and, when freed, returned to the system


def keep_freed_memory() -> None:
    """Keep freed memory in this process for reuse, and enable large pages in PyTorch if no tensor exists yet.

    Environment variables that the user sets take precedence. Freed memory is kept only with glibc.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    is_malloc_configured = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and not is_malloc_configured:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # -1: never return memory to the system


# Assumed power draw per CPU thread in watts, including memory and power supply. The value is an upper estimate,
# because servers with 16 to 64 cores draw about 100 to 300 W (5 to 6 W per core).
WATTS_PER_CPU_THREAD = 10.0
JOULES_PER_KILOWATT_HOUR = 3.6e6


def estimate_energy(seconds: float, num_processes: int, device: torch.device) -> dict[str, Any] | None:
    """Return the estimated energy consumption of a run, or None if the power draw of the device is unknown.

    `seconds` is the duration of the run. Each of the `num_processes` processes uses a device of the same type. The
    dict contains "kilowatt_hours", "watts_per_process" and "assumption" (a description of the assumed power draw).
    """
    if device.type == "cuda":
        watts, assumption = get_power_limit(device), "each GPU ran at its power limit"
    elif device.type == "cpu":
        num_threads = torch.get_num_threads()
        watts = num_threads * WATTS_PER_CPU_THREAD
        assumption = f"{format_count(num_threads, 'thread')} per process drew {WATTS_PER_CPU_THREAD:.0f} W each"
    else:
        return None
    if watts is None:
        return None
    return {
        "kilowatt_hours": float(f"{watts * num_processes * seconds / JOULES_PER_KILOWATT_HOUR:.3g}"),
        "watts_per_process": watts,
        "assumption": f"{assumption} throughout the run; the rest of the machine is not counted",
    }


def get_power_limit(device: torch.device) -> float | None:
    """Return the power limit of a GPU in watts, or None if `nvidia-smi` is missing or fails."""
    gpu_id = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--id={gpu_id}", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return float(process.stdout.strip())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


MIN_GEMM_SECONDS = 0.25  # minimum duration of each measurement, in seconds
MIN_GEMM_CALLS = 3

# Device type -> number of rows and columns of the matrices. Matrices of this size keep the device busy.
MATRIX_SIZES = {"cpu": 1024, "cuda": 8192}  # 4096 for other devices


@torch.no_grad()
def measure_gemm_peak(device: torch.device | str, dtype: torch.dtype) -> float:
    """Measure the peak throughput of large matrix products in FLOP/s. A multiply-add counts as two operations.

    The fastest call determines the throughput. On CPUs, oneDNN is also measured, because PyTorch's default
    implementation may be half as fast. Programs that run at the same time reduce the measured throughput.
    """
    device = torch.device(device)
    size = MATRIX_SIZES.get(device.type, 4096)
    generator = torch.Generator(device)  # leaves the global random state unchanged
    x, weight = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    implementations: list[Callable[[], torch.Tensor]] = [lambda: nn.functional.linear(x, weight)]
    if device.type == "cpu" and torch.backends.mkldnn.is_available() and dtype in (torch.float32, torch.bfloat16):
        packed_x, packed_weight = x.to_mkldnn(), weight.to_mkldnn()
        implementations.append(lambda: nn.functional.linear(packed_x, packed_weight))
    return 2 * size**3 / min(measure_fastest_call(function, device) for function in implementations)


def measure_fastest_call(function: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Return the duration of the fastest call in seconds, after a warm-up call."""
    function()
    durations: list[float] = []
    synchronize(device)
    start_time = time.perf_counter()
    while len(durations) < MIN_GEMM_CALLS or time.perf_counter() - start_time < MIN_GEMM_SECONDS:
        call_start = time.perf_counter()
        function()
        synchronize(device)
        durations.append(time.perf_counter() - call_start)
    return min(durations)


def synchronize(device: torch.device) -> None:
    """Wait until all work on a device is complete."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def get_peak_memory(device: torch.device) -> int:
    """Return the peak allocated memory of a GPU, or the peak memory of this process on other devices, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak memory statistics of a GPU. On other devices, the peak memory cannot be reset."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def describe_device(accelerator: Accelerator) -> str:
    """Return the name of the device and, if the model is sharded, the sharding method."""
    name = format_device_name(accelerator.device) + (" per process" if accelerator.device.type == "cpu" else "")
    return ", ".join(filter(None, [name, SHARDING_DESCRIPTIONS.get(accelerator.distributed_type)]))


def format_device_name(device: torch.device) -> str:
    """Return the name of a GPU, the number of CPU threads, or the type of another device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {format_count(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else device.type


def format_count(count: int, noun: str) -> str:
    """Format a count with its noun, such as "1 layer" or "2 layers"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def get_versions(*libraries: str) -> dict[str, str]:
    """Return the versions of this package, Python, and the installed libraries in `CORE_LIBRARIES` and `libraries`."""
    versions = {"modeling_vitcls": __version__, "python": platform.python_version()}
    for name in (*CORE_LIBRARIES, *libraries):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions | {"torch": str(torch.__version__)}  # includes the build, such as +cu132


def get_processor_name() -> str:
    """Return the model name of the CPU from /proc/cpuinfo, or from Python if the file does not exist."""
    cpuinfo_file = Path("/proc/cpuinfo")
    if cpuinfo_file.is_file():
        for line in cpuinfo_file.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

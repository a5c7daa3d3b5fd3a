"""Library versions and device names."""

import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState

from ..speed.cpu_kernels import HAS_AMX, HAS_AVX512_BFLOAT16
from ..version import __version__


CORE_LIBRARIES = ("torch", "torchvision", "transformers", "accelerate")


def has_bfloat16(device: torch.device) -> bool:
    """Check whether a device has instructions for bfloat16.

    They are in CUDA devices from Ampere on, and in CPUs with avx512_bf16 or AMX.
    """
    if device.type == "cuda":
        # Older GPUs emulate bfloat16, which saves neither time nor rounding errors.
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (HAS_AMX or HAS_AVX512_BFLOAT16)


def describe_device() -> str:
    """Name the device and, if the model is sharded, the sharding method."""
    state = AcceleratorState()
    is_sharded = state.distributed_type is DistributedType.FSDP
    return format_device_name(state.device) + (", weights sharded by FSDP" if is_sharded else "")


def format_device_name(device: torch.device) -> str:
    """Name a GPU, the number of CPU threads, or the type of another device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    return device.type


def get_versions(*libraries: str) -> dict[str, str]:
    """List the versions of this package, Python and the installed libraries.

    The libraries are those in `CORE_LIBRARIES` and in `libraries`.
    """
    versions = {"modeling_vitcls": __version__, "python": platform.python_version()}
    for name in (*CORE_LIBRARIES, *libraries):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    # The version in the metadata of the package may lack the build, such as +cu132.
    return versions | {"torch": str(torch.__version__)}


def get_processor_name() -> str:
    """Look up the model name of the CPU.

    It is read from /proc/cpuinfo or, if the file does not exist, from Python.
    """
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    found = re.search(r"model name\s*: (.*)", text)
    return found[1] if found else platform.processor() or platform.machine()

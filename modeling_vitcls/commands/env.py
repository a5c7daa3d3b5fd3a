"""`vitcls env`: print versions, devices and CPU kernels, for bug reports.

vitcls env --help
"""

import os
import platform
from dataclasses import dataclass
from pathlib import Path


# Libraries that only some features require.
OPTIONAL_LIBRARIES = "huggingface_hub datasets timm peft onnxruntime openvino nncf gradio tyro".split()
# Environment variables that affect results, speed or file locations. Access tokens are never printed.
ENVIRONMENT_VARIABLES = (
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "VITCLS_CPU_KERNELS",
    "HF_HOME",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
)


# Instructions that make bf16 and int8 fast, as in /proc/cpuinfo
INSTRUCTIONS = "amx_bf16 amx_int8 avx512_bf16 avx512_vnni avx_vnni".split()


@dataclass(frozen=True)
class EnvOptions:
    """Print versions, devices and CPU kernels, for bug reports."""


OPTIONS_CLASS = EnvOptions


def run(options: EnvOptions) -> None:
    """Print the environment."""
    print(format_environment())


def format_environment() -> str:
    """Format the versions, devices and settings for a bug report, one per line."""
    import torch

    from ..system import get_processor_name, get_versions

    num_threads, cpuinfo = torch.get_num_threads(), Path("/proc/cpuinfo")
    cpu_flags = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.is_file() else set()
    instructions = [name for name in INSTRUCTIONS if name in cpu_flags]
    environment = {
        **get_versions(),
        **dict.fromkeys(OPTIONAL_LIBRARIES, "not installed"),
        **get_versions(*OPTIONAL_LIBRARIES),
        "platform": platform.platform(),
        "processor": f"{get_processor_name()}, {os.cpu_count()} logical cores, {num_threads} threads in PyTorch",
        "instructions": ", ".join([torch.backends.cpu.get_cpu_capability(), *instructions]),
        "devices": describe_devices(),
        "CPU kernels": describe_cpu_kernels(),
    }
    environment |= {name: os.environ[name] for name in ENVIRONMENT_VARIABLES if name in os.environ}
    width = max(map(len, environment))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in environment.items())


def describe_devices() -> str:
    """Return the names of all CUDA GPUs and the CUDA version. Without CUDA, return the name of another accelerator or
    of the CPU."""
    import torch

    from ..system import format_device_name

    if torch.cuda.is_available():
        names = [format_device_name(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
        return f"{', '.join(names)}; CUDA {torch.version.cuda}"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return format_device_name(accelerator or torch.device("cpu"))


def describe_cpu_kernels() -> str:
    """Describe whether the CPU kernels and oneDNN are enabled and, if not, why."""
    import torch

    from .. import cpu_kernels_vitcls as kernels

    if os.environ.get("VITCLS_CPU_KERNELS") == "0":
        return "off: VITCLS_CPU_KERNELS is 0"
    if not kernels.HAS_PRIVATE_NAMES:
        return f"off: PyTorch {torch.__version__} lacks a private API that the kernels require"
    if not torch.backends.mkldnn.enabled:
        return "off: torch.backends.mkldnn is disabled"
    dtype_names = sorted({str(dtype).removeprefix("torch.") for dtype, _ in kernels.MIN_MULTIPLICATIONS})
    if dtype_names:
        return f"on, oneDNN for {', '.join(dtype_names)}"
    reason = "this CPU has no AVX-512" if kernels.HAS_ONEDNN else "this PyTorch build has no oneDNN"
    return f"on, without oneDNN: {reason}"

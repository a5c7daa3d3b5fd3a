"""`vitcls env`: print versions, the device and CPU kernels, for bug reports.

vitcls env --help
"""

from dataclasses import dataclass

from ..runtime.flags import Options


LIBRARIES = "huggingface_hub datasets timm peft onnxruntime gradio tyro".split()
# Instructions that make bf16 and int8 fast, as in /proc/cpuinfo
INSTRUCTIONS = {"amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx_vnni"}


@dataclass(frozen=True, kw_only=True)
class EnvOptions(Options):
    """Print versions, the device and CPU kernels, for bug reports."""


OPTIONS_CLASS = EnvOptions


def run(options: EnvOptions) -> None:
    """Print versions, the processor and its instructions, the device and the CPU kernels."""
    import platform
    from pathlib import Path

    import torch

    from ..runtime.system import format_device_name, get_processor_name, get_versions
    from ..speed import cpu_kernels as kernels

    cpuinfo = Path("/proc/cpuinfo")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    cpu_flags = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.is_file() else set()
    environment = get_versions(*LIBRARIES) | {
        "platform": platform.platform(),
        "processor": get_processor_name(),
        "instructions": ", ".join(
            [torch.backends.cpu.get_cpu_capability(), *sorted(INSTRUCTIONS & cpu_flags)]
        ),
        "device": format_device_name(accelerator or torch.device("cpu")),
        "CPU kernels": "on" if kernels.can_use_cpu_kernels() else "off",
    }
    for name, value in environment.items():
        print(f"{name:<16}  {value}")

"""Where a run takes place: processes, device, versions."""

import platform
from importlib.metadata import version

import torch
from accelerate import Accelerator

from ..version import __version__


LIBRARIES = ("torch", "torchvision", "transformers", "accelerate")


def build_accelerator(gradient_accumulation_steps: int = 1) -> Accelerator:
    """What `accelerate launch` asked for.

    Without any accelerator device Accelerate has to be told so: started as several processes it would otherwise run
    each of them as if it were alone.
    """
    return Accelerator(
        cpu=not torch.accelerator.is_available(), gradient_accumulation_steps=gradient_accumulation_steps
    )


def device_name(accelerator: Accelerator) -> str:
    """The device as a person would call it."""
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device)
    if accelerator.device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} thread(s) per process"
    return accelerator.device.type


def versions() -> dict[str, str]:
    """What the run is made with."""
    installed = {name: version(name) for name in LIBRARIES}
    return {"modeling_vitcls": __version__, "python": platform.python_version(), **installed}

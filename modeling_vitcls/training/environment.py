"""Where a run takes place: processes, device, versions."""

import importlib.util
import platform
import resource
import sys
import warnings
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import PartialState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
)
from torch import nn

from ..blocks_vitcls import EncoderLayer
from ..version import __version__
from . import zero
from .memory import keep_memory


LONGEST_WAIT = timedelta(hours=12)  # of the processes for the main one, which downloads, reads streams and pushes
LIBRARIES = ("torch", "torchvision", "transformers", "accelerate")


def build_accelerator(
    gradient_accumulation_steps: int = 1,
    mixed_precision: str | None = None,
    trackers: tuple[str, ...] = (),
    tracker_folder: Path | None = None,
) -> Accelerator:
    """What `accelerate launch` asked for, with `mixed_precision` ("no", "bf16", "fp16") in place of its own if given.

    On CPUs the process keeps memory from now on (memory.py).
    Without any accelerator device Accelerate has to be told so: started as several processes it would otherwise run
    each of them as if it were alone. Under DeepSpeed it is the backend that says so: `cpu` would turn DeepSpeed off.

    Raises:
        ValueError: for a precision that this machine or DeepSpeed does not have; for FSDP 1, or a stage of DeepSpeed's
            ZeRO that is not supported; for a tracker that is not installed.
    """
    on_cpu = not torch.accelerator.is_available()
    if on_cpu:
        keep_memory()
    with_deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    accelerator = Accelerator(
        cpu=on_cpu and not with_deepspeed,
        mixed_precision=mixed_precision,
        log_with=check_installed(trackers) or None,
        kwargs_handlers=[
            InitProcessGroupKwargs(backend="gloo" if on_cpu and with_deepspeed else None, timeout=LONGEST_WAIT)
        ],
        project_config=ProjectConfiguration(logging_dir=str(tracker_folder)) if tracker_folder else None,
    )
    # Said here rather than above, where a variable of the launcher's would win over it.
    accelerator.gradient_accumulation_steps = gradient_accumulation_steps
    if accelerator.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        shard_on_cpu(accelerator)
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP 1 is not supported: set fsdp_version: 2 in accelerate's configuration")
    if zero.is_used(accelerator):
        zero.settle_model(accelerator)
    return accelerator


def shard_on_cpu(accelerator: Accelerator) -> None:
    """Turn on the FSDP2 that `accelerate launch` was asked for: Accelerate itself would do so on GPUs alone, and run
    DDP on CPUs without a word."""
    plugin = FullyShardedDataParallelPlugin()  # reads what the launcher was told
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def shard_by_layer(accelerator: Accelerator, model: nn.Module) -> None:
    """Under FSDP, let each layer of the model gather its weights by itself, unless the launcher was told otherwise.

    Accelerate would look for the layers of all kinds that the model could have, and fail.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        layers = {type(module).__name__ for module in model.modules() if isinstance(module, EncoderLayer)}
        plugin.transformer_cls_names_to_wrap = sorted(layers)
    # The patches are a view, which would only matter if anything worked on them in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPViTCLSPatchEmbeddings\)")


def check_installed(trackers: tuple[str, ...]) -> list[str]:
    """The trackers, if all are installed; Accelerate would leave out the others without a word."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--log-with {name} needs the package {name}: pip install {name}")
    return list(trackers)


def peak_memory(device: torch.device) -> int:
    """The most memory used so far, in bytes: of this device, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` begin anew, with what is in use now. A process on the CPU cannot: its peak is for ever."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


SHARDED = {DistributedType.FSDP: "weights in parts by FSDP", DistributedType.DEEPSPEED: "in parts by DeepSpeed"}


def device_name(accelerator: Accelerator) -> str:
    """The device as a person would call it, and what divides the model among the processes, if anything does."""
    name = name_of_device(accelerator.device) + (" per process" if accelerator.device.type == "cpu" else "")
    return ", ".join(filter(None, [name, SHARDED.get(accelerator.distributed_type)]))


def name_of_device(device: torch.device) -> str:
    """A device as a person would call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else device.type


def versions() -> dict[str, str]:
    """What the run is made with."""
    installed = {name: version(name) for name in LIBRARIES}
    return {"modeling_vitcls": __version__, "python": platform.python_version(), **installed}

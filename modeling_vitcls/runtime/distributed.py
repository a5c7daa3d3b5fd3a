"""Build the Accelerator, configure FSDP2, and run functions on the main process.

The shards of FSDP2 are gathered in training/distributed_state.py.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    parse_flag_from_env,
)
from torch import nn

from ..model.blocks_vitcls import ViTCLSLayer
from ..model.configuration_vitcls import ViTCLSConfig
from .errors import mark_errors_of_all_processes
from .system import has_bfloat16


# Maximum time that processes wait for each other, for example for a download or push by the main
# process.
PROCESS_GROUP_TIMEOUT = timedelta(hours=12)
# Minimum width of a model for which `mixed_precision='auto'` selects bf16 on a CPU: ViT-Ti's.
# Narrower models are also faster in bf16, but they take little time, and float32 is more exact.
MIN_BFLOAT16_WIDTH = 192
# Values of `mixed_precision`, and their dtype under autocast
PRECISIONS = {"auto": None, "no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_accelerator(
    gradient_accumulation_steps: int = 1,
    mixed_precision: str = "auto",
    trackers: tuple[str, ...] = (),
    tracker_folder: Path | None = None,
) -> Accelerator:
    """Build the Accelerator for the configuration of `accelerate launch`.

    Args:
        gradient_accumulation_steps: number of forward and backward passes per optimizer step.
        mixed_precision: "no", "bf16", "fp16", or "auto" for the setting of `accelerate launch`,
            which `set_mixed_precision` may then change. Default: "auto".
        trackers: names of experiment trackers, such as "wandb".
        tracker_folder: folder for the files of the trackers.

    Raises:
        ValueError: if this machine does not support the precision, if FSDP 1 or DeepSpeed is
            configured, or if a tracker is not installed.
    """
    for name in trackers:
        # Accelerate would leave out the tracker, and the run would not be recorded.
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"`log_with={name!r}` requires the package {name}. Run pip install {name}"
            )

    # This check comes first: to build the accelerator, Accelerate would require DeepSpeed to be
    # installed.
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "DeepSpeed is not supported. Use FSDP2 (scripts/accelerate/fsdp2.yaml) instead"
        )

    if (
        AcceleratorState._shared_state
        and AcceleratorState().distributed_type is not DistributedType.FSDP
    ):
        # An earlier accelerator of this process may have another precision
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        # Otherwise, several processes on CPUs would run independently
        cpu=not torch.accelerator.is_available(),
        mixed_precision=None if mixed_precision == "auto" else mixed_precision,
        log_with=list(trackers) or None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_GROUP_TIMEOUT)],
        project_dir=tracker_folder,
    )

    # Set here, because an environment variable of the launcher overrides the constructor argument.
    accelerator.gradient_accumulation_steps = gradient_accumulation_steps
    if accelerator.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env(
        "ACCELERATE_USE_FSDP"
    ):
        enable_fsdp_on_cpu(accelerator)

    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "FSDP 1 is not supported. Set fsdp_version: 2 in accelerate's configuration"
        )
    return accelerator


def set_mixed_precision(
    accelerator: Accelerator, setting: str, config: ViTCLSConfig, recorded: str | None = None
) -> str:
    """Set the precision of an accelerator if `setting` is "auto", and describe the precision.

    Args:
        accelerator: accelerator that `build_accelerator(mixed_precision=setting)` returned. It has
            not prepared a model yet.
        setting: the value of `--mixed-precision`. "auto" does not change the setting of `accelerate
            launch`.
        config: configuration of the model.
        recorded: the precision of the run that is resumed, which is kept.
    """
    if setting != "auto" or "ACCELERATE_MIXED_PRECISION" in os.environ or recorded == "fp16":
        return accelerator.mixed_precision
    device = accelerator.device
    precision = recorded or choose_precision(device, config)
    # Accelerate has no setter. The precision depends on the device, which is known only after the
    # accelerator was built, and no model has been prepared with the earlier precision yet.
    accelerator.state._mixed_precision = precision
    accelerator.native_amp = precision == "bf16"

    if recorded is not None:
        return f"{recorded}, as in the checkpoint"
    if precision == "bf16":
        return (
            "bf16, because this device has instructions for it. `mixed_precision='no'` turns it off"
        )
    return precision


def choose_precision(device: torch.device, config: ViTCLSConfig) -> str:
    """Choose "bf16" if the device has it and the model is large enough to gain much, else "no"."""
    is_large_enough = device.type != "cpu" or config.hidden_size >= MIN_BFLOAT16_WIDTH
    return "bf16" if has_bfloat16(device) and is_large_enough else "no"


def resolve_precision(setting: str, device: torch.device, config: ViTCLSConfig) -> str:
    """Resolve "auto" without an accelerator: what `accelerate launch` sets, or else the fastest."""
    if setting != "auto":
        return setting
    return os.environ.get("ACCELERATE_MIXED_PRECISION", choose_precision(device, config))


def build_autocast(
    setting: str, device: torch.device, config: ViTCLSConfig
) -> Callable[[], torch.autocast]:
    """Build a function that returns a context for passes in a precision ("auto": the fastest).

    Raises:
        ValueError: if the precision is unknown.
    """
    if setting not in PRECISIONS:
        raise ValueError(f"mixed_precision is {setting!r}: set one of {', '.join(PRECISIONS)}")
    dtype = PRECISIONS.get(resolve_precision(setting, device, config))
    return partial(torch.autocast, device.type, dtype, enabled=dtype is not None)


def enable_fsdp_on_cpu(accelerator: Accelerator) -> None:
    """Enable the FSDP2 configuration of `accelerate launch` on CPUs.

    Accelerate would otherwise silently use DDP.
    """
    # The plugin reads the settings of the launcher from the environment, as it would on a GPU.
    plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    # Shared state
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def configure_layer_sharding(model: nn.Module) -> None:
    """Configure FSDP to wrap each encoder layer, unless the launcher sets the classes to wrap.

    By default, Accelerate raises an error if the model does not contain all layer classes in
    `_no_split_modules`.
    """
    plugin = getattr(AcceleratorState(), "fsdp_plugin", None)
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        layer_class_names = {
            type(module).__name__ for module in model.modules() if isinstance(module, ViTCLSLayer)
        }
        plugin.transformer_cls_names_to_wrap = sorted(layer_class_names)
    # FSDP2 warns that the patch embeddings are a view. This is harmless, because no operation
    # modifies them in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPViTCLSPatchEmbeddings\)")


def run_on_main(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function on the main process.

    On all processes, return its result or raise its ValueError or OSError.
    """
    # If the main process raised its error at once, the others would wait for it at their next
    # collective operation, up to the time limit. Errors of other types are bugs: they end the
    # process with a traceback, and the launcher ends the other processes.
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = function(*arguments)
        except (ValueError, OSError) as error:
            outcome[1] = error

    broadcast_object_list(outcome)
    result, main_error = outcome
    if main_error is not None:
        with mark_errors_of_all_processes():
            raise main_error
    return result

"""Processes and devices: build the Accelerator, configure FSDP2 and DeepSpeed ZeRO, act on the main process.

ZeRO-2 shards gradients and optimizer state across the processes, ZeRO-3 the weights as well. The optimizer step is in
training/optimizer.py, gathering of shards in training/distributed_state.py.
"""

import importlib.util
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import PartialState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    parse_flag_from_env,
)
from torch import nn
from transformers.integrations import unset_hf_deepspeed_config

from .blocks_vitcls import EncoderLayer
from .errors import on_all_processes
from .options import RunOptions, TrainingOptions
from .system import keep_memory


LONGEST_WAIT = timedelta(hours=12)  # of the processes for the main one, which downloads, reads streams and pushes


def build_accelerator(
    gradient_accumulation_steps: int = 1,
    mixed_precision: str | None = None,
    trackers: tuple[str, ...] = (),
    tracker_folder: Path | None = None,
) -> Accelerator:
    """What `accelerate launch` asked for, with `mixed_precision` ("no", "bf16", "fp16") in place of its own if given.

    On CPUs the process keeps memory from now on (system.py).
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
    if uses_deepspeed(accelerator):
        configure_deepspeed(accelerator)
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


ZERO_STAGES = (2, 3)


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Whether the launched configuration is one of DeepSpeed's."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def get_zero_stage(accelerator: Accelerator) -> int | None:
    """What is divided among the processes, by ZeRO's number for it; None without DeepSpeed."""
    return accelerator.deepspeed_plugin.zero_stage if uses_deepspeed(accelerator) else None


def configure_deepspeed(accelerator: Accelerator) -> None:
    """Keep weights in float32 and whole until the optimiser is there, as in all other runs.

    DeepSpeed's own bf16 would train, measure and save bf16 weights: it gets autocast in place of that. And
    Transformers would load models in shards from here on, the teacher too.

    Raises:
        ValueError: for fp16, or a stage of ZeRO that is not supported.
    """
    unset_hf_deepspeed_config()
    stage = get_zero_stage(accelerator)
    if stage not in ZERO_STAGES:
        raise ValueError(f"zero_stage {stage} is not supported: set 2 or 3 in accelerate's configuration")
    if accelerator.mixed_precision == "fp16":
        raise ValueError("fp16 is not supported under DeepSpeed: choose --mixed-precision bf16 or no")
    config = accelerator.deepspeed_plugin.deepspeed_config
    in_bf16 = config["bf16"]["enabled"]
    config["bf16"]["enabled"] = False
    # Without modules named, what processes send each other is float32, too.
    config["torch_autocast"] = {"enabled": in_bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def get_precision(accelerator: Accelerator) -> str:
    """In which the model computes: "no", "bf16" or "fp16"."""
    if uses_deepspeed(accelerator) and accelerator.deepspeed_plugin.deepspeed_config["torch_autocast"]["enabled"]:
        return "bf16"
    return accelerator.mixed_precision


def check_deepspeed_flags(accelerator: Accelerator, training: TrainingOptions, run: RunOptions) -> None:
    """Raise ValueError for flags that DeepSpeed does not go with."""
    stage = get_zero_stage(accelerator)
    refused = {
        "--resume": bool(stage) and run.resume,
        "--compile": bool(stage) and training.compile,
        "--ema-decay": stage == 3 and training.ema_decay is not None,
    }
    for flag, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"{flag} is not supported under DeepSpeed ZeRO-{stage}: leave it out, or use FSDP2")


def set_deepspeed_batch_size(accelerator: Accelerator, training: TrainingOptions) -> None:
    """Give DeepSpeed, where it is used, what it would otherwise take from a DataLoader or from its own file."""
    if uses_deepspeed(accelerator):
        accelerator.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=training.batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            train_batch_size=training.batch_size * training.gradient_accumulation_steps * accelerator.num_processes,
            gradient_clipping=training.max_gradient_norm,
        )


def on_main(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """What `action` returns on the main process, on all; its ValueError or OSError is raised on all as well."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [action(), None]
        except (ValueError, OSError) as error:
            outcome = [None, error]
    broadcast_object_list(outcome)
    result, raised = outcome
    if raised is not None:
        with on_all_processes():
            raise raised
    return result

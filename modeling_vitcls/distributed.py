"""Build the Accelerator, configure FSDP2 and DeepSpeed ZeRO, and run functions on the main process.

ZeRO-2 shards gradients and optimizer state across the processes; ZeRO-3 also shards the weights. The optimizer step
is implemented in training/optimizer.py. The shards are gathered in training/distributed_state.py.
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
from .errors import mark_errors_of_all_processes
from .options import RunOptions, TrainingOptions
from .system import keep_freed_memory


# Maximum time that processes wait for each other, for example for a download or push by the main process.
PROCESS_GROUP_TIMEOUT = timedelta(hours=12)


def build_accelerator(
    gradient_accumulation_steps: int = 1,
    mixed_precision: str | None = None,
    trackers: tuple[str, ...] = (),
    tracker_folder: Path | None = None,
) -> Accelerator:
    """Build the Accelerator for the configuration of `accelerate launch`. On CPUs, the process also keeps freed memory
    for reuse (`keep_freed_memory`).

    Args:
        gradient_accumulation_steps: number of forward and backward passes per optimizer step.
        mixed_precision: "no", "bf16" or "fp16". Default: the setting of `accelerate launch`.
        trackers: names of experiment trackers, such as "wandb".
        tracker_folder: folder for the files of the trackers.

    Raises:
        ValueError: if this machine or DeepSpeed does not support the precision, if FSDP 1 or an unsupported ZeRO stage
            is configured, or if a tracker is not installed.
    """
    for name in trackers:
        if importlib.util.find_spec(name) is None:  # Accelerate would ignore the tracker
            raise ValueError(
                f"--log-with {name} requires the package {name}, which is not installed. Run pip install {name}"
            )
    use_cpu = not torch.accelerator.is_available()
    if use_cpu:
        keep_freed_memory()
    use_deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    # Without `cpu=True` or the gloo backend, processes on CPUs would run independently. `cpu=True` disables DeepSpeed.
    accelerator = Accelerator(
        cpu=use_cpu and not use_deepspeed,
        mixed_precision=mixed_precision,
        log_with=list(trackers) or None,
        kwargs_handlers=[
            InitProcessGroupKwargs(
                backend="gloo" if use_cpu and use_deepspeed else None, timeout=PROCESS_GROUP_TIMEOUT
            )
        ],
        project_config=ProjectConfiguration(logging_dir=str(tracker_folder)) if tracker_folder else None,
    )
    # Set here, because an environment variable of the launcher overrides the constructor argument.
    accelerator.gradient_accumulation_steps = gradient_accumulation_steps
    if accelerator.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        enable_fsdp_on_cpu(accelerator)
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP 1 is not supported. Set fsdp_version: 2 in accelerate's configuration")
    if is_deepspeed_enabled(accelerator):
        configure_deepspeed(accelerator)
    return accelerator


def enable_fsdp_on_cpu(accelerator: Accelerator) -> None:
    """Enable the FSDP2 configuration of `accelerate launch` on CPUs, where Accelerate would otherwise silently use
    DDP."""
    plugin = FullyShardedDataParallelPlugin()  # reads the environment variables of the launcher
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def configure_layer_sharding(accelerator: Accelerator, model: nn.Module) -> None:
    """Configure FSDP to wrap each encoder layer, unless `accelerate launch` sets the module classes to wrap.

    By default, Accelerate raises an error if the model does not contain all layer classes in `_no_split_modules`.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        layer_class_names = {type(module).__name__ for module in model.modules() if isinstance(module, EncoderLayer)}
        plugin.transformer_cls_names_to_wrap = sorted(layer_class_names)
    # FSDP2 warns that the patch embeddings are a view. This is harmless, because no operation modifies them in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPViTCLSPatchEmbeddings\)")


def is_deepspeed_enabled(accelerator: Accelerator) -> bool:
    """Return whether DeepSpeed is used."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def get_zero_stage(accelerator: Accelerator) -> int | None:
    """Return the ZeRO stage, or None if DeepSpeed is not used."""
    return accelerator.deepspeed_plugin.zero_stage if is_deepspeed_enabled(accelerator) else None


def configure_deepspeed(accelerator: Accelerator) -> None:
    """Configure DeepSpeed to keep the weights in float32 and to leave them unsharded until the optimizer is built.

    The bf16 mode of DeepSpeed trains and saves bf16 weights, so autocast is used instead. The DeepSpeed configuration
    of Transformers is unset, because Transformers would otherwise shard all models on loading, including the teacher.

    Raises:
        ValueError: for fp16 or an unsupported ZeRO stage.
    """
    unset_hf_deepspeed_config()
    stage = get_zero_stage(accelerator)
    if stage not in (2, 3):
        raise ValueError(f"zero_stage {stage} is not supported. Set zero_stage: 2 or 3 in accelerate's configuration")
    if accelerator.mixed_precision == "fp16":
        raise ValueError("fp16 is not supported with DeepSpeed. Set --mixed-precision bf16 or no")
    config = accelerator.deepspeed_plugin.deepspeed_config
    use_bf16 = config["bf16"]["enabled"]
    config["bf16"]["enabled"] = False
    # An empty list of modules selects float32 for communication between processes.
    config["torch_autocast"] = {"enabled": use_bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def get_precision(accelerator: Accelerator) -> str:
    """Return the mixed precision of the forward pass: "no", "bf16" or "fp16"."""
    if is_deepspeed_enabled(accelerator):
        use_bf16 = accelerator.deepspeed_plugin.deepspeed_config["torch_autocast"]["enabled"]
        return "bf16" if use_bf16 else accelerator.mixed_precision
    return accelerator.mixed_precision


def check_deepspeed_flags(
    accelerator: Accelerator, training_options: TrainingOptions, run_options: RunOptions
) -> None:
    """Raise ValueError if a flag is set that DeepSpeed does not support."""
    stage = get_zero_stage(accelerator)
    unsupported_flags = {
        "--resume": bool(stage) and run_options.resume,
        "--compile": bool(stage) and training_options.compile,
        "--ema-decay": stage == 3 and training_options.ema_decay is not None,
    }
    for flag, is_unsupported in unsupported_flags.items():
        if is_unsupported:
            raise ValueError(f"{flag} is not supported with DeepSpeed ZeRO-{stage}. Remove {flag}, or use FSDP2")


def set_deepspeed_training_options(accelerator: Accelerator, training_options: TrainingOptions) -> None:
    """Override the batch size, gradient accumulation and gradient clipping in the DeepSpeed configuration."""
    if is_deepspeed_enabled(accelerator):
        batch_size = training_options.batch_size
        assert batch_size is not None
        accelerator.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=batch_size,
            gradient_accumulation_steps=training_options.gradient_accumulation_steps,
            train_batch_size=batch_size * training_options.gradient_accumulation_steps * accelerator.num_processes,
            gradient_clipping=training_options.max_gradient_norm,
        )


def run_on_main(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """Run a function on the main process. On all processes, return its result or raise its ValueError or OSError."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [function(), None]
        except (ValueError, OSError) as error:
            outcome = [None, error]
    broadcast_object_list(outcome)
    result, main_error = outcome
    if main_error is not None:
        with mark_errors_of_all_processes():
            raise main_error
    return result

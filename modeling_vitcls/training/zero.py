"""DeepSpeed's ZeRO: what it has to be told before it takes a model, and what a run cannot have under it.

ZeRO-2 divides gradients and the optimiser's state among the processes, ZeRO-3 the weights as well. How a step is made
with it is in updates.py; how its shards become whole tensors, in states.py.
"""

from accelerate import Accelerator, DistributedType
from transformers.integrations import unset_hf_deepspeed_config

from .options import RunOptions, TrainingOptions


STAGES = (2, 3)


def is_used(accelerator: Accelerator) -> bool:
    """Whether the launched configuration is one of DeepSpeed's."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def stage_of(accelerator: Accelerator) -> int | None:
    """What is divided among the processes, by ZeRO's number for it; None without DeepSpeed."""
    return accelerator.deepspeed_plugin.zero_stage if is_used(accelerator) else None


def settle_model(accelerator: Accelerator) -> None:
    """Keep weights in float32 and whole until the optimiser is there, as in all other runs.

    DeepSpeed's own bf16 would train, measure and save bf16 weights: it gets autocast in place of that. And
    Transformers would load models in shards from here on, the teacher too.

    Raises:
        ValueError: for fp16, or a stage of ZeRO that is not supported.
    """
    unset_hf_deepspeed_config()
    stage = stage_of(accelerator)
    if stage not in STAGES:
        raise ValueError(f"zero_stage {stage} is not supported: set 2 or 3 in accelerate's configuration")
    if accelerator.mixed_precision == "fp16":
        raise ValueError("fp16 is not supported under DeepSpeed: choose --mixed-precision bf16 or no")
    config = accelerator.deepspeed_plugin.deepspeed_config
    in_bf16 = config["bf16"]["enabled"]
    config["bf16"]["enabled"] = False
    # Without modules named, what processes send each other is float32, too.
    config["torch_autocast"] = {"enabled": in_bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def precision(accelerator: Accelerator) -> str:
    """In which the model computes: "no", "bf16" or "fp16"."""
    if is_used(accelerator) and accelerator.deepspeed_plugin.deepspeed_config["torch_autocast"]["enabled"]:
        return "bf16"
    return accelerator.mixed_precision


def check_flags(accelerator: Accelerator, training: TrainingOptions, run: RunOptions) -> None:
    """Raise ValueError for flags that DeepSpeed does not go with."""
    stage = stage_of(accelerator)
    refused = {
        "--resume": bool(stage) and run.resume,
        "--compile": bool(stage) and training.compile,
        "--ema-decay": stage == 3 and training.ema_decay is not None,
    }
    for flag, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"{flag} is not supported under DeepSpeed ZeRO-{stage}: leave it out, or use FSDP2")


def tell_flags(accelerator: Accelerator, training: TrainingOptions) -> None:
    """Give DeepSpeed, where it is used, what it would otherwise take from a DataLoader or from its own file."""
    if is_used(accelerator):
        accelerator.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=training.batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            train_batch_size=training.batch_size * training.gradient_accumulation_steps * accelerator.num_processes,
            gradient_clipping=training.max_gradient_norm,
        )

"""Facts about a run for its summary and results.json."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers.utils import logging

from ..configuration_vitcls import ViTCLSConfig
from ..data.batches import BatchPlan
from ..distributed import get_precision
from ..system import device_name, energy_estimate, get_versions
from .distributed_state import get_num_elements


def describe_model(source: str, model: nn.Module, config: ViTCLSConfig) -> dict[str, str]:
    """Return the summary lines about the model."""
    counts = {name: count for name, count in count_tokens(config).items() if count}
    tokens = " | ".join(f"{count} {name}" for name, count in counts.items())
    height, width = config.image_height_width
    trained = count_parameters(model, trained_only=True)
    return {
        "model": f"{source}: {count_parameters(model):,} parameters, {trained:,} trained, {config.num_hidden_layers} "
        f"layers of width {config.hidden_size}, pooling {config.pooling}",
        "tokens": f"[ {tokens} ] = {sum(counts.values())} for {height} x {width} pixels",
    }


def describe_batches(plan: BatchPlan, accelerator: Accelerator) -> dict[str, str]:
    """Return the summary lines about batches and device."""
    batch = f"{plan.batch_size} x {plan.accumulation_steps} accumulated x {plan.num_processes} process(es)"
    epochs = f" = {plan.epochs_after(plan.num_steps):.1f} epochs" if plan.num_pictures else ""
    return {
        "batches": f"{plan.pictures_per_step} images per step = {batch}; {plan.num_steps:,} steps{epochs}",
        "device": f"{device_name(accelerator)}, mixed precision: {get_precision(accelerator)}",
    }


def describe_run(
    plan: BatchPlan, model: nn.Module, config: ViTCLSConfig, accelerator: Accelerator, seconds: float
) -> dict[str, Any]:
    """Return the facts about steps, model, speed and device for results.json."""
    counts = count_tokens(config)
    return {
        "steps": plan.num_steps,
        "epochs": round(plan.epochs_after(plan.num_steps), 4) if plan.num_pictures else None,
        "seconds": round(seconds, 2),
        "images_per_second": round(plan.num_steps * plan.pictures_per_step / seconds, 1),
        "num_parameters": count_parameters(model),
        "token_layout": counts,
        "sequence_length": sum(counts.values()),
        "device": device_name(accelerator),
        "mixed_precision": get_precision(accelerator),
        "num_processes": accelerator.num_processes,
        "energy": energy_estimate(seconds, accelerator.num_processes, accelerator.device),
        "versions": get_versions(),
    }


def count_tokens(config: ViTCLSConfig) -> dict[str, int]:
    """Return the number of tokens in each group, for images of the configured size."""
    num_patches = math.prod(config.grid_size)
    sequence = range(config.token_layout.num_prefix_tokens + num_patches)
    return {name: len(sequence[group]) for name, group in config.token_layout.items()}


def count_parameters(model: nn.Module, trained_only: bool = False) -> int:
    """Return the number of parameters, optionally only of trained parameters."""
    return sum(
        get_num_elements(parameter) for parameter in model.parameters() if parameter.requires_grad or not trained_only
    )


@contextmanager
def disable_progress_bars() -> Iterator[None]:
    """Disable the progress bars of Transformers inside this block."""
    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()

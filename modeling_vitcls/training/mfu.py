"""FLOPs of a training step, and model FLOPs utilization.

    utilization = FLOP/s of training / FLOP/s of large matrix products, each summed over all processes

This ratio is the model FLOPs utilization (MFU; PaLM, Chowdhery et al. 2022, arXiv 2204.02311, appendix B). The FLOPs
include the forward pass and the gradients that training requires. In the last layer, only the tokens that the heads
use are counted. The FLOPs exclude gradients of frozen weights, recomputation (gradient checkpointing, fused
attention), the teacher, evaluations, and linear probing on cached features.

The peak is the FLOP/s of large matrix products, measured before and during training on all processes at the same time.
If processes share a CPU, each process reaches a fraction of the CPU's peak, and the sum over all processes is the
CPU's peak. Other running programs can only lower a measurement, so the largest measurement is used. If the utilization
exceeds 100%, other programs have lowered every measurement so far, and the utilization is reported as unknown.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..data.sampling import BatchPlan
from ..distributed import get_precision
from ..modeling_vitcls import ViTCLSPreTrainedModel
from ..system import SHARDING_DESCRIPTIONS, measure_gemm_peak, reset_peak_memory
from .costs import (
    count_attention_flops,
    count_forward_flops,
    count_layer_flops,
    count_linear_flops,
    estimate_memory,
    get_classifiers,
    get_first_trainable_layer,
    get_layers_with_token_counts,
    get_linear_layers,
    get_num_patches_and_tokens,
    get_num_training_tokens,
    has_trainable_parameters,
)


# Mixed precision -> dtype of matrix products
MATMUL_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Minimum FLOPs per process in a run; the utilization of shorter runs is not measured. One core executes this number of
# FLOPs in a few seconds, and a measurement takes about half a second.
MIN_FLOPS = 1e11

# First interval between two measurements of the peak, in seconds of training at the peak rate. The n-th interval is n
# times as long as the first, so that measurements take a negligible fraction of a long run.
MEASUREMENT_INTERVAL_SECONDS = 10.0


# Utilization of a run ------------------------------------------------------------------------------------------------


@dataclass
class Utilization:
    """Model FLOPs utilization of a run so far, including the time before --resume."""

    flops_per_image: float = 0.0  # FLOPs of the forward and backward passes of one image
    peak: float | None = None  # largest measured total FLOP/s of all processes; None if not measured
    dtype: str = ""  # dtype of the matrices in the measurement of the peak
    # Function that measures the peak on all processes at the same time.
    measure: Callable[[], float] | None = field(default=None, repr=False)
    executed_flops: float = 0.0  # FLOPs of all training steps
    available_flops_before_resume: float = 0.0  # FLOPs that the machine could have executed before --resume
    seconds: float = 0.0  # total duration of the steps since the start or the last --resume, in seconds
    num_measurements: int = field(default=1, repr=False)
    flops_since_measurement: float = field(default=0.0, repr=False)

    @property
    def available_flops(self) -> float:
        """Return the FLOPs that the machine could have executed during the training steps."""
        return self.available_flops_before_resume + self.seconds * (self.peak or 0.0)

    def update(self, num_images: int, seconds: float) -> dict[str, float | None]:
        """Add the steps since the last record, and return the utilization of these steps. Return an empty dictionary
        if the peak has not been measured. `num_images` is the number of images on all processes. This method must be
        called on all processes, because the peak may be measured again."""
        if self.peak is None:
            return {}
        flops = num_images * self.flops_per_image
        self.executed_flops += flops
        self.seconds += seconds
        self.flops_since_measurement += flops
        interval = MEASUREMENT_INTERVAL_SECONDS * self.num_measurements
        if self.measure and self.flops_since_measurement >= interval * self.peak:
            self.peak = max(self.peak, self.measure())
            self.num_measurements += 1
            self.flops_since_measurement = 0.0
        return {"utilisation": compute_utilization(flops, seconds * self.peak)}

    def get_state(self) -> dict[str, float]:
        return {"done": self.executed_flops, "possible": self.available_flops}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Load a state returned by `get_state`, or an empty dictionary if the checkpoint contains no state."""
        self.executed_flops = state.get("done", 0.0)
        self.available_flops_before_resume = state.get("possible", 0.0)

    def get_results(self) -> dict[str, Any] | None:
        """Return the utilization of all training steps, the FLOPs per image and the peak, for results.json."""
        if self.peak is None or not self.available_flops:
            return None
        return {
            "of_training_steps": compute_utilization(self.executed_flops, self.available_flops),
            "training_flops_per_image": round(self.flops_per_image),
            "gemm_peak_flops_per_second": float(f"{self.peak:.4g}"),
            "gemm_dtype": self.dtype,
        }


def compute_utilization(executed_flops: float, available_flops: float) -> float | None:
    """Return `executed_flops / available_flops`, or None if the ratio is above 1 (the measured peak is too low)."""
    return round(executed_flops / available_flops, 4) if executed_flops <= available_flops else None


def build_utilization(
    model: nn.Module, plan: BatchPlan, accelerator: Accelerator, print_line: Callable[[str, str], None]
) -> Utilization:
    """Print the FLOPs and memory of a step, measure the peak if the run is long enough, and build a `Utilization`.

    Nothing is printed or measured for heads on cached features, whose FLOPs are negligible. This function must be
    called on all processes, before `Accelerator.prepare`.
    """
    dtype = MATMUL_DTYPES.get(get_precision(accelerator))
    if not isinstance(model, ViTCLSPreTrainedModel) or dtype is None:
        return Utilization()
    flops = plan.accumulation_steps * count_training_flops(model, plan.batch_size)  # FLOPs per step in this process
    process_note = " per process" if plan.num_processes > 1 else ""
    memory_mib = estimate_memory_without_weights(model, plan, accelerator) / 2**20
    print_line(
        "costs",
        f"{format_si(flops * plan.num_processes)}FLOP per step, and about {memory_mib:,.0f} MiB{process_note} in "
        "addition to the weights (estimated)",
    )
    utilization = Utilization(flops * plan.num_processes / plan.images_per_step)
    if flops * plan.num_steps >= MIN_FLOPS:
        utilization.dtype = str(dtype).removeprefix("torch.")
        utilization.measure = partial(measure_peak, accelerator, dtype)
        utilization.peak = utilization.measure()
        print_line("peak", f"{format_si(utilization.peak)}FLOP/s in {utilization.dtype} matrix products (measured)")
    return utilization


def measure_peak(accelerator: Accelerator, dtype: torch.dtype) -> float:
    """Return the total FLOP/s of large matrix products on the devices of all processes, measured at the same time. A
    device without enough memory for the matrices counts as 0 FLOP/s."""
    accelerator.wait_for_everyone()
    try:
        peak = measure_gemm_peak(accelerator.device, dtype)
    except torch.OutOfMemoryError:
        peak = 0.0
    reset_peak_memory(accelerator.device)  # exclude these matrices from the peak memory of training
    return float(accelerator.reduce(torch.tensor(peak, device=accelerator.device), "sum"))


def estimate_memory_without_weights(model: ViTCLSPreTrainedModel, plan: BatchPlan, accelerator: Accelerator) -> int:
    """Return the estimated memory per process in bytes: activations, one shard of the gradients, and one shard of
    AdamW's moments. The weights are not included."""
    precision = get_precision(accelerator)
    autocast = None if precision == "no" else MATMUL_DTYPES[precision]
    estimate = estimate_memory(model, batch_size=plan.batch_size, autocast=autocast, device=accelerator.device)
    num_shards = plan.num_processes if accelerator.distributed_type in SHARDING_DESCRIPTIONS else 1
    return estimate.activations + (estimate.gradients + estimate.optimizer) // num_shards


def format_si(value: float) -> str:
    """Format a number with three significant digits and an SI prefix: 1.2e12 becomes "1.2 T"."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.5:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} E"


# FLOPs of a batch ----------------------------------------------------------------------------------------------------


def count_training_flops(model: ViTCLSPreTrainedModel, batch_size: int = 1) -> int:
    """Return the FLOPs of the forward and backward passes for a batch of images of the model's image size. A
    multiply-add counts as two FLOPs.

    Each matrix product of the forward pass requires two products in the backward pass, one for the gradient of each
    factor. Gradients with respect to pixels and frozen weights, and gradients below the first trainable layer, are not
    computed. Patch dropout reduces the number of tokens, unless the embeddings and the first layer are frozen
    (model.py).

    Every value of `--trainable` trains the modules after the encoder. If the encoder is frozen, the gradient of the
    heads' input is not computed. If the pooler has weights, the count still includes this gradient (1% of the FLOPs of
    a ViT-S).
    """
    encoder: Any = model.base_model
    num_patches, num_tokens = get_num_patches_and_tokens(model.config, None)
    projection = encoder.embeddings.patch_embeddings.projection.weight
    patch_flops = 2 * projection.numel() * num_patches
    encoder_flops = patch_flops + sum(
        count_layer_flops(*layer) for layer in get_layers_with_token_counts(model, num_tokens)
    )
    head_flops = count_forward_flops(model, batch_size=batch_size) - batch_size * encoder_flops

    layers = get_layers_with_token_counts(model, get_num_training_tokens(model, num_patches, num_tokens))
    first_trainable_layer = get_first_trainable_layer(encoder)
    forward_flops = patch_flops + sum(count_layer_flops(*layer) for layer in layers)
    backward_flops = sum(count_layer_backward_flops(*layer) for layer in layers[first_trainable_layer:])
    if projection.requires_grad:
        backward_flops += patch_flops
    is_encoder_trainable = first_trainable_layer < len(layers) or has_trainable_parameters(encoder.layernorm)
    if not is_encoder_trainable and not (encoder.pooler is not None and get_linear_layers([encoder.pooler])):
        backward_flops -= sum(count_linear_flops(get_linear_layers([head])[0]) for head in get_classifiers(model))
    return batch_size * (forward_flops + backward_flops) + 3 * head_flops


def count_layer_backward_flops(layer: Any, num_queries: int, num_tokens: int) -> int:
    """Return the FLOPs of the backward pass of one layer for one image. The backward pass computes gradients of the
    inputs and trainable weights of all linear layers, and of both factors of the attention products."""
    attention = layer.attention
    input_flops = count_layer_flops(layer, num_queries, num_tokens)
    weight_flops = num_queries * count_trainable_linear_flops(attention.q_proj, attention.o_proj, layer.mlp)
    weight_flops += num_tokens * count_trainable_linear_flops(attention.k_proj, attention.v_proj)
    return input_flops + weight_flops + count_attention_flops(attention, num_queries, num_tokens)


def count_trainable_linear_flops(*modules: nn.Module) -> int:
    """Return the FLOPs of the trainable linear layers in `modules`, for one input vector per layer."""
    return count_linear_flops(*(linear for linear in get_linear_layers(modules) if linear.weight.requires_grad))

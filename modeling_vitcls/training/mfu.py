"""What a training step costs, and how much of the machine's speed training makes use of.

    utilisation = FLOPs of the images trained in a second / FLOP/s of large matrix products on all processes

This is model FLOPs utilisation (MFU; PaLM, Chowdhery et al. 2022, arXiv 2204.02311, appendix B). Counted is what the
loss and its gradients need, as the model computes it: its last layer for the tokens that are read, and no gradients
of what is frozen. Not counted is what is computed a second time (gradient checkpointing, fused attention), and what
is not the model's training: a teacher, evaluations, linear probing on cached features. Training images have the
model's own size, so all cost the same. Nothing is known of models that merge patches: how many are left of an image
for each layer is not counted anywhere.

The peak is measured when training begins and again during training, by all processes at the same time: if the
processes share a CPU, each reaches its part of the peak, and the sum is the peak of the machine. Other programs can
only lower a measurement, so the largest one is kept. A utilization above 100 % means that every measurement so far was
disturbed: it is reported as unknown.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from ..data.batches import BatchPlan
from ..distributed import get_precision
from ..modeling_vitcls import ViTCLSPreTrainedModel
from ..system import SHARDED, forget_peak_memory, gemm_peak
from .costs import (
    estimate_memory,
    first_trained_layer,
    forward_flops,
    heads_of,
    layer_flops,
    learns,
    linear_flops,
    linears_in,
    mixing_flops,
    queries_per_layer,
    sequence_lengths,
    tokens_in_training,
)


DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # that matrices are multiplied in

# On each process, in a run whose utilisation is measured: seconds of training on one core. Measuring takes half a one.
FEWEST_FLOPS = 1e11

# Training between two measurements of the peak, in seconds at the peak rate. The n-th interval is n times as long, so
# that a long run spends next to no time on measuring.
MEASURING_INTERVAL = 10.0

PREFIXES = ("", "k", "M", "G", "T", "P", "E")


class Layer(NamedTuple):
    """An encoder layer, and how many tokens it computes out of how many that it reads."""

    layer: Any
    num_queries: int
    num_tokens: int


# Of a run ------------------------------------------------------------------------------------------------------------


@dataclass
class Utilisation:
    """Model FLOPs utilization of a run so far, including the time before --resume.

    Attributes:
        flops_per_image: FLOPs of the forward and backward pass of one image.
        peak: largest FLOP/s of all processes that was measured; None if the peak is not measured.
        dtype: dtype of the matrices that were multiplied to measure the peak.
        measure: measures the peak again; all processes call it together.
        done: FLOPs of the images that were trained on.
        possible_before: FLOPs that the machine could have done in the steps before --resume.
        seconds: duration of the steps of this process.
    """

    flops_per_image: float = 0.0
    peak: float | None = None
    dtype: str = ""
    measure: Callable[[], float] | None = field(default=None, repr=False)
    done: float = 0.0
    possible_before: float = 0.0
    seconds: float = 0.0
    num_measurements: int = field(default=1, repr=False)
    done_since_measurement: float = field(default=0.0, repr=False)

    @property
    def possible(self) -> float:
        """FLOPs that the machine could have done in the time of the training steps."""
        return self.possible_before + self.seconds * (self.peak or 0.0)

    def note(self, num_images: int, seconds: float) -> dict[str, float | None]:
        """Return the utilization of a number of steps for their record; empty if the peak is not measured.

        All processes call this together: the peak is measured again if enough FLOPs were done since the last time.

        Args:
            num_images: images of these steps on all processes.
            seconds: duration of these steps.
        """
        if self.peak is None:
            return {}
        done = num_images * self.flops_per_image
        self.done += done
        self.seconds += seconds
        self.done_since_measurement += done
        if self.measure and self.done_since_measurement >= MEASURING_INTERVAL * self.num_measurements * self.peak:
            self.peak = max(self.peak, self.measure())
            self.num_measurements += 1
            self.done_since_measurement = 0.0
        return {"utilisation": as_fraction(done, seconds * self.peak)}

    def facts(self) -> dict[str, float]:
        """Return the values that a checkpoint keeps."""
        return {"done": self.done, "possible": self.possible}

    def go_on_from(self, facts: Mapping[str, float]) -> None:
        """Restore the values of a checkpoint; a checkpoint of an earlier version has none."""
        self.done = facts.get("done", 0.0)
        self.possible_before = facts.get("possible", 0.0)

    def results(self) -> dict[str, Any] | None:
        """Return the utilization of all training steps and the values that it is computed from, for results.json."""
        if self.peak is None or not self.possible:
            return None
        return {
            "of_training_steps": as_fraction(self.done, self.possible),
            "training_flops_per_image": round(self.flops_per_image),
            "gemm_peak_flops_per_second": float(f"{self.peak:.4g}"),
            "gemm_dtype": self.dtype,
        }


def as_fraction(done: float, possible: float) -> float | None:
    """Return `done / possible`, or None if the quotient is above 1: the measured peak is then too low."""
    return round(done / possible, 4) if done <= possible else None


def start_utilisation(
    model: nn.Module, plan: BatchPlan, accelerator: Accelerator, say: Callable[[str, str], None]
) -> Utilisation:
    """Say what a step costs and, in a run that is long enough, measure what the machine can do. All processes call it
    together.

    Args:
        model: before `Accelerator.prepare`. The heads alone, on cached features, cost next to nothing, and of a model
            that merges patches the costs are not known: nothing is said or measured.
        say: takes name and text of a line of the summary.
    """
    dtype = DTYPES.get(get_precision(accelerator))
    if not isinstance(model, ViTCLSPreTrainedModel) or model.config.merged_patches_per_layer or dtype is None:
        return Utilisation()
    flops = plan.accumulation_steps * training_flops(model, plan.batch_size)  # of a step, on this process
    per_process = " per process" if plan.num_processes > 1 else ""
    say(
        "costs",
        f"{in_units(flops * plan.num_processes)}FLOP a step, and about "
        f"{memory_beyond_weights(model, plan, accelerator) / 2**20:,.0f} MiB{per_process} beyond the weights "
        "(estimated)",
    )
    utilisation = Utilisation(flops * plan.num_processes / plan.pictures_per_step)
    if flops * plan.num_steps >= FEWEST_FLOPS:
        utilisation.dtype = str(dtype).removeprefix("torch.")
        utilisation.measure = partial(measure_peak, accelerator, dtype)
        utilisation.peak = utilisation.measure()
        say("peak", f"{in_units(utilisation.peak)}FLOP/s in {utilisation.dtype} matrix products, measured now")
    return utilisation


def measure_peak(accelerator: Accelerator, dtype: torch.dtype) -> float:
    """Return the FLOP/s of large matrix products on all processes at the same time, each on its device.

    A device without memory for the matrices counts as 0 FLOP/s.
    """
    accelerator.wait_for_everyone()
    try:
        reached = gemm_peak(accelerator.device, dtype)
    except torch.OutOfMemoryError:
        reached = 0.0
    forget_peak_memory(accelerator.device)  # these matrices do not belong to the training
    return float(accelerator.reduce(torch.tensor(reached, device=accelerator.device), "sum"))


def memory_beyond_weights(model: ViTCLSPreTrainedModel, plan: BatchPlan, accelerator: Accelerator) -> int:
    """Bytes of a process, estimated: activations, and its part of gradients and AdamW's moments."""
    name = get_precision(accelerator)
    estimate = estimate_memory(
        model, batch_size=plan.batch_size, autocast=None if name == "no" else DTYPES[name], device=accelerator.device
    )
    parts = plan.num_processes if accelerator.distributed_type in SHARDED else 1
    return estimate.activations + (estimate.gradients + estimate.optimizer) // parts


def in_units(value: float) -> str:
    """A number of three digits, with the prefix of its unit: 1.2e12 -> "1.2 T"."""
    prefixes = iter(PREFIXES)
    prefix = next(prefixes)
    while value >= 999.5 and prefix != PREFIXES[-1]:
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g} {prefix}"


# Of a batch ----------------------------------------------------------------------------------------------------------


def training_flops(model: ViTCLSPreTrainedModel, batch_size: int = 1) -> int:
    """Floating-point operations of a batch of images of the model's size, forward and backward; a multiply-add counts
    as two.

    Each product of the forward pass has two in the backward pass, one for the gradient of either factor: twice as many
    operations, but for gradients that nobody needs, of pixels, frozen weights, and what is below the lowest trained
    one. Patch dropout leaves fewer tokens to the layers, unless the first of them are frozen (trainable.py).

    What stands behind the encoder is taken as trained, as under any `--trainable`. On a frozen encoder, heads compute
    no gradient of what they read; for a pooler with weights it is counted nevertheless (1 % of a ViT-S).
    """
    encoder: Any = model.base_model
    num_patches, num_tokens = sequence_lengths(model.config, None)
    projection = encoder.embeddings.patch_embeddings.projection.weight
    patches = 2 * projection.numel() * num_patches
    behind = forward_flops(model, batch_size=batch_size) - batch_size * (
        patches + forward_of(layers_of(model, num_tokens))
    )

    layers = layers_of(model, tokens_in_training(model, num_patches, num_tokens))
    first = first_trained_layer(encoder)
    forward = patches + forward_of(layers)
    backward = sum(layer_backward_flops(*layer) for layer in layers[first:])
    if projection.requires_grad:
        backward += patches
    encoder_learns = first < len(layers) or learns(encoder.layernorm)
    if not encoder_learns and not (encoder.pooler is not None and linears_in([encoder.pooler])):
        backward -= sum(linear_flops(linears_in([head])[0]) for head in single_heads(model))
    return batch_size * (forward + backward) + 3 * behind


def layers_of(model: ViTCLSPreTrainedModel, num_tokens: int) -> list[Layer]:
    """The layers with what each computes of a sequence."""
    encoder: Any = model.base_model
    queries = queries_per_layer(model, num_tokens)
    return [Layer(layer, number, num_tokens) for layer, number in zip(encoder.layers, queries, strict=True)]


def forward_of(layers: list[Layer]) -> int:
    """Of the forward pass of one image through these layers."""
    return sum(layer_flops(*layer) for layer in layers)


def layer_backward_flops(layer: Any, num_queries: int, num_tokens: int) -> int:
    """Of one layer and image: for the inputs of all products, for the weights of those that are trained, and for both
    factors where queries meet keys and weights meet values."""
    attention = layer.attention
    of_inputs = layer_flops(layer, num_queries, num_tokens)
    of_weights = num_queries * trained_flops(attention.q_proj, attention.o_proj, layer.mlp)
    of_weights += num_tokens * trained_flops(attention.k_proj, attention.v_proj)
    return of_inputs + of_weights + mixing_flops(attention, num_queries, num_tokens)


def trained_flops(*modules: nn.Module) -> int:
    """Of the linear layers in these modules whose weights are trained, for one vector each."""
    return linear_flops(*(linear for linear in linears_in(modules) if linear.weight.requires_grad))


def single_heads(model: ViTCLSPreTrainedModel) -> list[nn.Module]:
    """The classifiers, each by itself: several tasks have theirs in a dict."""
    return [
        head for heads in heads_of(model) for head in (heads.values() if isinstance(heads, nn.ModuleDict) else [heads])
    ]

"""What a training step costs, and how much of the machine's speed training makes use of.

    utilisation = FLOPs of the images trained in a second / FLOP/s of large matrix products on all processes

This is model FLOPs utilisation (MFU; PaLM, Chowdhery et al. 2022, arXiv 2204.02311, appendix B). Counted is what the
loss and its gradients need, as the model computes it: its last layer for the tokens that are read, and no gradients
of what is frozen. Not counted is what is computed a second time (gradient checkpointing, fused attention), and what
is not the model's training: a teacher, evaluations, linear probing on cached features. Training images have the
model's own size, so all cost the same. Nothing is known of models that merge patches: how many are left of an image
for each layer is not counted anywhere.

The peak is measured when training begins, again after --resume, by all processes at the same time: where they share a
CPU, each reaches its part of it, and their sum is what the machine has. Something else that runs then, and not later,
makes it too low.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from ..benchmarking.gemm import gemm_peak
from ..modeling_vitcls import ViTCLSPreTrainedModel
from .batches import BatchPlan
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
from .environment import SHARDED, forget_peak_memory
from .zero import precision


DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # that matrices are multiplied in

# On each process, in a run whose utilisation is measured: seconds of training on one core. Measuring takes half a one.
FEWEST_FLOPS = 1e11

PREFIXES = ("", "k", "M", "G", "T", "P", "E")


class Layer(NamedTuple):
    """An encoder layer, and how many tokens it computes out of how many that it reads."""

    layer: Any
    num_queries: int
    num_tokens: int


# Of a run ------------------------------------------------------------------------------------------------------------


@dataclass
class Utilisation:
    """What a run has made of the machine so far, before --resume too.

    Attributes:
        flops_per_image: forward and backward.
        peak: FLOP/s of all processes; None where it was not measured, and so utilisation is not known.
        dtype: of the matrices that were multiplied for it.
        done: FLOPs of the images that were trained.
        possible: FLOPs that the machine could have done in the time of their steps.
    """

    flops_per_image: float = 0.0
    peak: float | None = None
    dtype: str = ""
    done: float = 0.0
    possible: float = 0.0

    def note(self, num_images: int, seconds: float) -> dict[str, float]:
        """The utilisation by steps that were made in so many seconds, for their record; empty if it is not known.

        Args:
            num_images: of all processes.
        """
        if self.peak is None:
            return {}
        done, possible = num_images * self.flops_per_image, seconds * self.peak
        self.done += done
        self.possible += possible
        return {"utilisation": round(done / possible, 4)}

    def facts(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"done": self.done, "possible": self.possible}

    def go_on_from(self, facts: Mapping[str, float]) -> None:
        """Put back what a checkpoint kept; one of an earlier version kept nothing."""
        self.done = facts.get("done", 0.0)
        self.possible = facts.get("possible", 0.0)

    def results(self) -> dict[str, Any] | None:
        """What results.json says: the utilisation by all training steps, and what it rests on."""
        if self.peak is None or not self.possible:
            return None
        return {
            "of_training_steps": round(self.done / self.possible, 4),
            "training_flops_per_image": round(self.flops_per_image),
            "gemm_peak_flops_per_second": float(f"{self.peak:.4g}"),
            "gemm_dtype": self.dtype,
        }


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
    dtype = DTYPES.get(precision(accelerator))
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
        utilisation.peak = measured_peak(accelerator, dtype)
        say("peak", f"{in_units(utilisation.peak)}FLOP/s in {utilisation.dtype} matrix products, measured now")
    return utilisation


def measured_peak(accelerator: Accelerator, dtype: torch.dtype) -> float:
    """FLOP/s of large matrix products on all processes at the same time, each on its device."""
    accelerator.wait_for_everyone()
    peak = torch.tensor(gemm_peak(accelerator.device, dtype), device=accelerator.device)
    forget_peak_memory(accelerator.device)  # these matrices are not the training's
    return float(accelerator.reduce(peak, "sum"))


def memory_beyond_weights(model: ViTCLSPreTrainedModel, plan: BatchPlan, accelerator: Accelerator) -> int:
    """Bytes of a process, estimated: activations, and its part of gradients and AdamW's moments."""
    name = precision(accelerator)
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
    behind = forward_flops(model, batch_size=batch_size) - batch_size * (patches + forward_of(layers_of(model, num_tokens)))

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

"""Forward passes and training steps, compared with those of other projects' ViTs.

    python -m modeling_vitcls.benchmarking.peers "fp32, batch 16" timm [--theirs]    peak memory of a step in bytes

This package's model and the peer's model have the same random weights. A training step consists of a forward pass, a
backward pass and an AdamW update. training_runs.py measures complete training runs, including data loading.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..configuration_vitcls import ViTCLSConfig
from ..conversion.from_timm import convert_from_timm
from ..conversion.from_transformers import convert_from_transformers
from ..conversion.random_weights import randomize_weights
from ..cpu_kernels_vitcls import uninstall_cpu_kernels
from ..modeling_vitcls import ViTCLSForImageClassification
from .comparison import (
    BenchmarkSettings,
    Comparison,
    Throughputs,
    check_difference,
    check_logits,
    compare_peak_memory,
    compare_throughput,
    get_logits,
    measure_gpu_memory_growth,
    measure_memory_growth,
    parse_memory_flags,
)


@dataclass(frozen=True)
class ModelSize:
    """The config fields that determine the computational cost of a plain ViT."""

    image_size: int
    patch_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_labels: int = 1000

    @property
    def intermediate_size(self) -> int:
        """Return the width of the MLP."""
        return 4 * self.hidden_size


SMALL_SIZE = ModelSize(image_size=224, patch_size=16, hidden_size=384, num_hidden_layers=12, num_attention_heads=6)
TOY_SIZE = ModelSize(
    image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=5
)


def get_model_size(is_toy: bool) -> ModelSize:
    """Return the size of ViT-S/16 at 224 pixels, or of the toy model."""
    return TOY_SIZE if is_toy else SMALL_SIZE


def build_model(size: ModelSize, **fields: Any) -> ViTCLSForImageClassification:
    """Build a vitcls classifier with random weights, in evaluation mode."""
    config = ViTCLSConfig(**vars(size), intermediate_size=size.intermediate_size, **fields)
    model = ViTCLSForImageClassification(config)
    randomize_weights(model)
    return model


@dataclass(frozen=True)
class Peer:
    """A baseline, such as a model from another project, and a model from this package with the same weights."""

    name: str
    size: ModelSize
    theirs: nn.Module
    ours: ViTCLSForImageClassification

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Peer":
        """Convert both models to `dtype`, and move both models to `device`."""
        self.theirs.to(device, dtype)
        nn.Module.to(self.ours, device, dtype)
        return self


def build_transformers_vit(size: ModelSize, **labels: Any) -> Any:
    """Build the randomly initialized ViT of transformers. `labels` may contain `id2label` and `label2id`."""
    from transformers import ViTConfig, ViTForImageClassification

    fields = {name: value for name, value in vars(size).items() if not labels or name != "num_labels"}
    return ViTForImageClassification(ViTConfig(**fields, **labels, intermediate_size=size.intermediate_size))


def build_transformers_peer(size: ModelSize) -> Peer:
    """Build the ViT of transformers and a vitcls model with the same weights."""
    theirs = build_transformers_vit(size)
    randomize_weights(theirs)
    ours: Any = convert_from_transformers(theirs)
    return Peer("transformers", size, theirs, ours)


def build_timm_peer(size: ModelSize, num_registers: int = 0) -> Peer:
    """Build the ViT of timm and a vitcls model with the same weights."""
    from timm.models import VisionTransformer

    theirs = VisionTransformer(
        img_size=size.image_size,
        patch_size=size.patch_size,
        embed_dim=size.hidden_size,
        depth=size.num_hidden_layers,
        num_heads=size.num_attention_heads,
        num_classes=size.num_labels,
        reg_tokens=num_registers,
    )
    randomize_weights(theirs)
    ours: Any = convert_from_timm(theirs)
    return Peer("timm", size, theirs, ours)


def build_plain_peer(size: ModelSize) -> Peer:
    """Build a vitcls model without CPU kernels, and the same model with CPU kernels."""
    ours = build_model(size)
    theirs = copy.deepcopy(ours)
    uninstall_cpu_kernels(theirs)
    return Peer("plain", size, theirs, ours)


PEERS: dict[str, Callable[[ModelSize], Peer]] = {
    "transformers": build_transformers_peer,
    "timm": build_timm_peer,
    "plain": build_plain_peer,
}
# Peers that support registers; the ViT of transformers has no registers.
PEERS_WITH_REGISTERS: dict[str, Callable[[ModelSize, int], Peer]] = {"timm": build_timm_peer}


def build_random_images(num_images: int, image_size: int) -> torch.Tensor:
    """Return fixed random images [B, 3, H, W]."""
    return torch.randn(num_images, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


def compare_with_peers(
    compare_row: Callable[[str, Any, Peer, BenchmarkSettings], Comparison],
    rows: dict[str, Any],
    settings: BenchmarkSettings,
) -> Iterator[Comparison]:
    """Compare this package with each peer, for each row."""
    for name, row in rows.items():
        for peer_name in settings.against:
            yield compare_row(name, row, PEERS[peer_name](get_model_size(settings.is_toy)), settings)


# Forward passes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ForwardPass:
    """Settings of a forward pass, in one row of the benchmark report."""

    dtype: torch.dtype
    batch_size: int
    use_compile: bool = False  # whether to compile both models with torch.compile


# Rows for ViT-S/16 at 224 pixels.
FORWARD_PASSES = {
    "fp32, batch 8": ForwardPass(torch.float32, 8),
    "fp32, batch 1": ForwardPass(torch.float32, 1),
    "bf16, batch 16": ForwardPass(torch.bfloat16, 16),
    "bf16, batch 1": ForwardPass(torch.bfloat16, 1),
    "bf16, batch 16, compiled": ForwardPass(torch.bfloat16, 16, use_compile=True),
}


def compare_forward_pass(name: str, row: ForwardPass, peer: Peer, settings: BenchmarkSettings) -> Comparison:
    """Compare the forward passes of this package and of one peer, for one row."""
    peer = peer.to(row.dtype, settings.device)
    if row.use_compile:
        torch.compiler.reset()  # discard the compiled graphs of earlier rows
        peer.ours.compile()
        peer.theirs.compile()
    pixel_values = build_random_images(row.batch_size, peer.size.image_size).to(settings.device, row.dtype)
    throughputs, difference = compare_predictions(peer, pixel_values, name, settings)
    details = {"device": settings.device, "size": vars(peer.size)}
    return Comparison("inference", name, peer.name, *throughputs, difference, details)


@torch.inference_mode()
def compare_predictions(
    peer: Peer, pixel_values: torch.Tensor, name: str, settings: BenchmarkSettings
) -> tuple[Throughputs, float]:
    """Return the throughputs of the two models of a peer for a batch, and the largest logit difference."""
    difference = check_logits(peer.ours, peer.theirs, pixel_values, f"{name} against {peer.name}")
    ours, theirs = partial(peer.ours, pixel_values), partial(peer.theirs, pixel_values)
    return compare_throughput(ours, theirs, len(pixel_values), settings), difference


# Training steps ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingStep:
    """Settings of a training step with float32 weights, in one row of the benchmark report."""

    autocast: torch.dtype | None
    batch_size: int
    gradient_limit: float  # maximum relative difference between gradients


# Rows for ViT-S/16 at 224 pixels.
TRAINING_STEPS = {
    "bf16 autocast, batch 16": TrainingStep(torch.bfloat16, 16, 0.1),
    "fp32, batch 16": TrainingStep(None, 16, 1e-3),
}


class StepRunner:
    """A model in training mode, its optimizer, and one batch of images and labels."""

    def __init__(self, model: nn.Module, row: TrainingStep, size: ModelSize, device: str) -> None:
        self.model = model.train()
        self.row = row
        self.pixel_values = build_random_images(row.batch_size, size.image_size).to(device)
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(size.num_labels, (row.batch_size,), generator=generator).to(device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def compute_gradients(self, num_images: int) -> None:
        """Discard earlier gradients, and compute the gradients of the loss on the first `num_images` images."""
        self.optimizer.zero_grad()
        with torch.autocast(self.labels.device.type, self.row.autocast, enabled=self.row.autocast is not None):
            logits = get_logits(self.model, self.pixel_values[:num_images])
            loss = nn.functional.cross_entropy(logits, self.labels[:num_images])
        loss.backward()

    def compute_patch_gradient(self, num_images: int) -> torch.Tensor:
        """Return the gradient of the patch projection [D, C, p, p], which depends on every layer."""
        self.compute_gradients(num_images)
        (kernel,) = [parameter for parameter in self.model.parameters() if parameter.ndim == 4]
        assert kernel.grad is not None
        return kernel.grad.clone()

    def __call__(self, num_images: int | None = None) -> None:
        """Take one training step with the first `num_images` images (default: all images)."""
        self.compute_gradients(num_images or len(self.labels))
        self.optimizer.step()

    def measure_gpu_peak_memory(self) -> int:
        """Return the peak GPU memory of a step in bytes, excluding parameters and optimizer state.

        Take at least one step before the measurement, because the first step allocates the optimizer state.
        """
        self.optimizer.zero_grad()
        peak = measure_gpu_memory_growth(self)
        self.optimizer.zero_grad()
        return peak


def compare_step(name: str, row: TrainingStep, peer: Peer, settings: BenchmarkSettings) -> Comparison:
    """Compare the time and memory of a training step of this package and of one peer, for one row."""
    ours, theirs = build_step_runners(row, peer, settings.device)
    difference = check_gradients(ours, theirs, f"{name} against {peer.name}")
    throughputs = compare_throughput(ours, theirs, row.batch_size, settings)
    if settings.device == "cpu":
        peaks = compare_peak_memory(__name__, name, peer.name, *settings.toy_flags)
    else:
        peaks = {
            "ours_peak_bytes": ours.measure_gpu_peak_memory(),
            "theirs_peak_bytes": theirs.measure_gpu_peak_memory(),
        }
    details = {"device": settings.device, "size": vars(peer.size), **peaks}
    return Comparison("training step", name, peer.name, *throughputs, difference, details)


def build_step_runners(row: TrainingStep, peer: Peer, device: str = "cpu") -> tuple[StepRunner, StepRunner]:
    """Build a runner for each model of a peer, with the same images."""
    peer = peer.to(torch.float32, device)
    ours = StepRunner(peer.ours, row, peer.size, device)
    return ours, StepRunner(peer.theirs, row, peer.size, device)


def check_gradients(ours: StepRunner, theirs: StepRunner, name: str) -> float:
    """Return the relative difference between the patch projection gradients of the two models, for two images."""
    gradient, expected = (runner.compute_patch_gradient(num_images=2) for runner in (ours, theirs))
    difference = ((gradient - expected).norm() / expected.norm()).item()
    return check_difference(difference, ours.row.gradient_limit, name, "the gradients, relative to their norm,")


def main() -> None:
    """Print the peak memory of a training step in bytes, excluding parameters and optimizer state."""
    flags = parse_memory_flags(TRAINING_STEPS, PEERS)
    runners = build_step_runners(TRAINING_STEPS[flags.row], PEERS[flags.peer](get_model_size(flags.toy)))
    runner = runners[flags.theirs]

    def warm_up() -> None:
        runner(num_images=1)
        runner.optimizer.zero_grad()

    print(measure_memory_growth(warm_up, runner))


if __name__ == "__main__":
    main()

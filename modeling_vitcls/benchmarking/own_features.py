"""Comparisons within this package: models with and without a feature, or two implementations of a computation.

    inexact     dropped patches, compared with the plain model
    attention   time and memory of computing attention maps, compared with those of a plain forward pass
    probe       a linear probe with cached features, compared with a probe that encodes the images in every epoch

    python -m modeling_vitcls.benchmarking.own_features "token_attention, batch 16" [--theirs]    peak memory in bytes

Merging or dropping patches changes the outputs, so the outputs are compared only while the feature is off (set to 0).
The effect on accuracy depends on the data. To measure the accuracy, use `vitcls finetune` and `vitcls evaluate`.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..analysis.attribution import compute_attention_rollout, compute_attribution
from ..analysis.token_statistics import TokenStatistics
from ..modeling_vitcls import ViTCLSForImageClassification
from ..training.linear_probe import build_classifier_heads, compute_features
from .comparison import (
    BenchmarkSettings,
    Comparison,
    check_difference,
    check_logits,
    check_tensors,
    compare_peak_memory,
    compare_throughput,
    get_logits,
    measure_memory_growth,
    parse_memory_flags,
)
from .peers import (
    TRAINING_STEPS,
    ModelSize,
    StepRunner,
    build_model,
    build_random_images,
    get_model_size,
)


# Merged and dropped patches ------------------------------------------------------------------------------------------


FORWARD_BATCH_SIZE = 4  # number of images per forward pass
INEXACT_STEP = "bf16 autocast, batch 16"  # name of a row of TRAINING_STEPS

Computation = Callable[[], object]


def build_forward_pass(model: nn.Module, size: ModelSize, device: str) -> tuple[Computation, int]:
    """Return a function that runs a forward pass in float32, and the number of images per call."""
    pixel_values = build_random_images(FORWARD_BATCH_SIZE, size.image_size).to(device)
    return torch.inference_mode()(lambda: model(pixel_values)), FORWARD_BATCH_SIZE


def build_training_step(model: nn.Module, size: ModelSize, device: str) -> tuple[Computation, int]:
    """Return a function that performs one training step, and the number of images per call."""
    row = TRAINING_STEPS[INEXACT_STEP]
    return StepRunner(model, row, size, device), row.batch_size


@dataclass(frozen=True)
class InexactRow:
    """Settings of a feature that changes the outputs, in one row of the benchmark report."""

    field: str  # config field
    value: float  # value of the field; 0 in the plain model
    build_computation: Callable[[nn.Module, ModelSize, str], tuple[Computation, int]]


# Rows for ViT-S/16 at 224 pixels.
INEXACT_ROWS = {
    f"patch_drop_rate {rate}, step in {INEXACT_STEP}": InexactRow("patch_drop_rate", rate, build_training_step)
    for rate in (0.25, 0.5)
}


def compare_inexact_features(rows: dict[str, InexactRow], settings: BenchmarkSettings) -> Iterator[Comparison]:
    """Compare models with and without the feature of each row."""
    size = get_model_size(settings.is_toy)
    for name, row in rows.items():
        plain_model = build_model(size)
        nn.Module.to(plain_model, settings.device)
        difference = check_disabled_feature(row, plain_model, size, name)
        inexact_model = copy_model(plain_model, size, **{row.field: row.value})
        feature_computation, num_images = row.build_computation(inexact_model, size, settings.device)
        baseline, _ = row.build_computation(plain_model, size, settings.device)
        throughputs = compare_throughput(feature_computation, baseline, num_images, settings)
        details = {row.field: row.value, "device": settings.device, "size": vars(size)}
        yield Comparison("inexact", name, "the plain model", *throughputs, difference, details)


def copy_model(
    plain_model: ViTCLSForImageClassification, size: ModelSize, **fields: Any
) -> ViTCLSForImageClassification:
    """Build a model with the weights of `plain_model` and the given config field values."""
    model = build_model(size, **fields)
    model.load_state_dict(plain_model.state_dict())
    nn.Module.to(model, plain_model.device)
    return model


def check_disabled_feature(
    row: InexactRow, plain_model: ViTCLSForImageClassification, size: ModelSize, name: str
) -> float:
    """Return the largest logit difference between the plain model and a model with the feature set to 0."""
    disabled_model = copy_model(plain_model, size, **{row.field: type(row.value)(0)})
    pixel_values = build_random_images(2, size.image_size).to(plain_model.device)
    return check_logits(disabled_model, plain_model, pixel_values, f"{name}, set to 0")


# Attention -----------------------------------------------------------------------------------------------------------


# model, images [B, C, H, W] -> tensor of any shape
AttentionFunction = Callable[[ViTCLSForImageClassification, torch.Tensor], torch.Tensor]
ATTENTION_LIMIT = 1e-5  # maximum of |output - reference| / max(1, largest |reference|)
NUM_REGISTERS = 4


def compute_entropy(model: ViTCLSForImageClassification, pixel_values: torch.Tensor) -> torch.Tensor:
    """Compute the token statistics shown in the HTML report, and return the attention entropy."""
    statistics = TokenStatistics(model)
    statistics.update(pixel_values)
    return statistics.compute().entropy


def compute_eager_maps(model: ViTCLSForImageClassification, pixel_values: torch.Tensor) -> torch.Tensor:
    """Compute complete attention maps with eager attention, and return the rows of the special tokens."""
    attn_implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    attention_maps = model(pixel_values, output_attentions=True).attentions
    model.set_attn_implementation(attn_implementation)
    return torch.stack(attention_maps, dim=1)[..., : model.config.token_layout.num_prefix_tokens, :]


@dataclass(frozen=True)
class AttentionRow:
    """Settings of a computation with attention maps, in one row of the benchmark report."""

    compute: AttentionFunction
    batch_size: int
    # function that computes the expected outputs; default: `compute` with eager attention
    reference: AttentionFunction | None = None


# Rows for ViT-S/16 at 224 pixels with four registers, in float32.
ATTENTION_ROWS = {
    "token_attention, batch 16": AttentionRow(ViTCLSForImageClassification.token_attention, 16, compute_eager_maps),
    "token_attention, batch 1": AttentionRow(ViTCLSForImageClassification.token_attention, 1, compute_eager_maps),
    "eager attention maps, batch 16": AttentionRow(
        compute_eager_maps, 16, ViTCLSForImageClassification.token_attention
    ),
    "attention rollout, batch 16": AttentionRow(compute_attention_rollout, 16),
    "attribution, batch 16": AttentionRow(compute_attribution, 16),
    "statistics, batch 16": AttentionRow(compute_entropy, 16),
}


@torch.no_grad()
def compare_attention(rows: dict[str, AttentionRow], settings: BenchmarkSettings) -> Iterator[Comparison]:
    """Compare the computation of each row with a plain forward pass on the same images."""
    for name, row in rows.items():
        model, pixel_values = build_model_and_images(row.batch_size, settings.is_toy)
        difference = check_attention(row, model, pixel_values, name)
        with_attention, baseline = partial(row.compute, model, pixel_values), partial(model, pixel_values)
        throughputs = compare_throughput(with_attention, baseline, row.batch_size, settings)
        peaks = compare_peak_memory(__name__, name, *settings.toy_flags)
        details = {"batch_size": row.batch_size, "size": vars(get_model_size(settings.is_toy)), **peaks}
        yield Comparison("attention", name, "a plain forward pass", *throughputs, difference, details)


def build_model_and_images(batch_size: int, is_toy: bool) -> tuple[ViTCLSForImageClassification, torch.Tensor]:
    """Build a model with registers, and images [B, 3, H, W]."""
    size = get_model_size(is_toy)
    model = build_model(size, num_register_tokens=NUM_REGISTERS)
    return model, build_random_images(batch_size, size.image_size)


@torch.no_grad()
def check_attention(
    row: AttentionRow, model: ViTCLSForImageClassification, pixel_values: torch.Tensor, name: str
) -> float:
    """Return the largest difference from the reference for one image. Raise ValueError if the difference exceeds the
    limit (see `ATTENTION_LIMIT`)."""
    image = pixel_values[:1]
    actual = row.compute(model, image)
    if row.reference is None:
        model.set_attn_implementation("eager")
    expected = (row.reference or row.compute)(model, image)
    model.set_attn_implementation("sdpa")
    limit = ATTENTION_LIMIT * max(1.0, expected.abs().max().item())
    return check_difference((actual - expected).abs().max().item(), limit, name, "the outputs")


# Linear probe --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeRow:
    """Settings of linear probe training, in one row of the benchmark report."""

    num_epochs: int
    num_images: int
    batch_size: int


# Rows for ViT-S/16 at 224 pixels, in float32.
PROBE_ROWS = {"10 epochs, batch 16": ProbeRow(num_epochs=10, num_images=32, batch_size=16)}
PROBE_LIMIT = 1e-4  # maximum difference between trained weights, divided by the largest absolute weight


def compare_probes(rows: dict[str, ProbeRow], settings: BenchmarkSettings) -> Iterator[Comparison]:
    """Compare the training of linear probes with and without cached features."""
    size = get_model_size(settings.is_toy)
    for name, row in rows.items():
        model = build_model(size)
        pixel_values = build_random_images(row.num_images, size.image_size)
        labels = torch.randint(size.num_labels, (row.num_images,), generator=torch.Generator().manual_seed(0))
        train_cached, train_uncached = (
            partial(train_probe, model, pixel_values, labels, row, use_cache) for use_cache in (True, False)
        )
        difference = check_tensors(train_cached(), train_uncached(), PROBE_LIMIT, name, "the trained weights")
        # is_toy=True limits each measurement to one training run.
        num_images = row.num_epochs * row.num_images
        throughputs = compare_throughput(train_cached, train_uncached, num_images, replace(settings, is_toy=True))
        details = {"size": vars(size), **vars(row)}
        yield Comparison("linear probe", name, "recomputing the features", *throughputs, difference, details)


def train_probe(
    model: ViTCLSForImageClassification,
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    row: ProbeRow,
    use_cache: bool,
) -> torch.Tensor:
    """Train a copy of the model's head on frozen features, which are computed once (`use_cache`) or in every epoch.
    Return the weights of the classifier [labels, P]."""
    encode = torch.no_grad()(partial(compute_features, model))
    batches: Any = pixel_values.split(row.batch_size)
    if use_cache:
        batches = [encode(images) for images in batches]
    head: Any = copy.deepcopy(build_classifier_heads(model))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, fused=True)
    for _ in range(row.num_epochs):
        for batch, batch_labels in zip(batches, labels.split(row.batch_size), strict=True):
            features = batch if use_cache else encode(batch)
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(features).logits, batch_labels).backward()
            optimizer.step()
    weight: torch.Tensor = head.classifier.weight.detach()
    return weight


def main() -> None:
    """Print the peak memory of computing attention maps or, with --theirs, of a plain forward pass, in bytes."""
    flags = parse_memory_flags(ATTENTION_ROWS)
    row = ATTENTION_ROWS[flags.row]
    model, pixel_values = build_model_and_images(row.batch_size, flags.toy)
    compute = partial(get_logits if flags.theirs else row.compute, model)
    with torch.no_grad():  # the warm-up uses one image
        print(measure_memory_growth(partial(compute, pixel_values[:1]), partial(compute, pixel_values)))


if __name__ == "__main__":
    main()

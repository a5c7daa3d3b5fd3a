"""What it costs to look at attention, beside a plain forward pass: time in turns, memory in processes of their own.

    python -m modeling_vitcls.benchmarking.attention_reads "token_attention, batch 16"      bytes of one side

Memory is what the process grows by at most: see memory.py.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..analysis.attribution import compute_attention_rollout, compute_attribution
from ..analysis.token_statistics import TokenStatistics
from ..configuration_vitcls import ViTCLSConfig
from ..conversion.random_weights import random_fill
from ..modeling_vitcls import ViTCLSForImageClassification
from .comparison import Comparison, chosen, in_turns, per_second
from .forward_passes import SECONDS_PER_TURN
from .memory import growth, peak_in_a_process
from .peers import SMALL, TOY


Look = Callable[[Any, torch.Tensor], Any]  # model, images [B, C, H, W]

LIMIT = 1e-5  # of differences between attention under SDPA and eager attention, as a part of the largest number
NUM_REGISTERS = 4
PLAIN = "a plain forward pass"


def token_attention(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """The special tokens' rows of all layers."""
    return model.token_attention(pixel_values)


def plain(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """The answers alone."""
    return model(pixel_values).logits


def statistics_of(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the report collects of a batch; of it, the entropies."""
    collected = TokenStatistics(model)
    collected.update(pixel_values)
    return collected.compute().entropy


def whole_maps(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """The special tokens' rows of whole maps: what there was before `token_attention`."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    maps = model(pixel_values, output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    return torch.stack(maps, dim=1)[..., : model.config.token_layout.num_prefix_tokens, :]


@dataclass(frozen=True)
class AttentionRead:
    """One row of the report; `same` gives the same numbers in another way, where there is one."""

    look: Look
    batch_size: int
    same: Look | None = None


# ViT-S/16 at 224 pixels with four registers, float32.
ATTENTION_READS = {
    "token_attention, batch 16": AttentionRead(token_attention, 16, whole_maps),
    "token_attention, batch 1": AttentionRead(token_attention, 1, whole_maps),
    "whole maps of eager attention, batch 16": AttentionRead(whole_maps, 16, token_attention),
    "attention rollout, batch 16": AttentionRead(compute_attention_rollout, 16),
    "attribution, batch 16": AttentionRead(compute_attribution, 16),
    "statistics, batch 16": AttentionRead(statistics_of, 16),
}


def compare_attention(rows: tuple[str, ...], num_pairs: int, toy: bool) -> Iterator[Comparison]:
    """The named rows of `ATTENTION_READS`, or all, against a plain forward pass of the same images.

    Raises:
        ValueError: for an unknown row, if numbers differ, or if memory cannot be measured here.
    """
    for name, row in chosen(ATTENTION_READS, rows).items():
        yield compare_read(name, row, num_pairs, toy)


def compare_read(name: str, row: AttentionRead, num_pairs: int, toy: bool) -> Comparison:
    """One row, its time and memory.

    Raises:
        ValueError: if numbers differ, or if memory cannot be measured here.
    """
    model, pixel_values = work(row.batch_size, toy)
    difference = check_same(row, model, pixel_values, name)
    seconds = 0.0 if toy else SECONDS_PER_TURN
    ours, theirs = in_turns(
        lambda: images_per_second(row.look, model, pixel_values, seconds),
        lambda: images_per_second(plain, model, pixel_values, seconds),
        num_pairs,
    )
    arguments = (name, *(["--toy"] if toy else []))
    details = {
        "batch_size": row.batch_size,
        "size": vars(TOY if toy else SMALL),
        "ours_peak_bytes": peak_in_a_process(__name__, *arguments),
        "theirs_peak_bytes": peak_in_a_process(__name__, *arguments, "--plain"),
    }
    return Comparison("attention", name, PLAIN, ours, theirs, difference, details)


def work(batch_size: int, toy: bool) -> tuple[ViTCLSForImageClassification, torch.Tensor]:
    """A model in evaluation mode, and images [B, 3, H, W]."""
    size = TOY if toy else SMALL
    config = ViTCLSConfig(**vars(size), intermediate_size=size.intermediate_size, num_register_tokens=NUM_REGISTERS)
    model = ViTCLSForImageClassification(config)
    random_fill(model)
    generator = torch.Generator().manual_seed(0)
    return model, torch.randn(batch_size, 3, size.image_size, size.image_size, generator=generator)


@torch.no_grad()
def check_same(row: AttentionRead, model: Any, pixel_values: torch.Tensor, name: str) -> float:
    """The largest difference from what another way, or the same one with eager attention, gives for one image.

    Raises:
        ValueError: if it exceeds the limit, or is no number.
    """
    image = pixel_values[:1]
    found = row.look(model, image)
    if row.same is None:
        model.set_attn_implementation("eager")
    wanted = (row.same or row.look)(model, image)
    model.set_attn_implementation("sdpa")
    difference = (found - wanted).abs().max().item()
    limit = LIMIT * max(1.0, wanted.abs().max().item())
    if not difference <= limit:
        raise ValueError(
            f"{name}: the numbers differ by {difference:.2g}, more than {limit:.2g}: nothing is measured of wrong ones"
        )
    return difference


@torch.no_grad()
def images_per_second(look: Look, model: Any, pixel_values: torch.Tensor, seconds: float) -> float:
    """Do it, once or more, for that long."""
    return per_second(lambda: look(model, pixel_values), len(pixel_values), seconds)


def main() -> None:
    """Measure one side of one row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("row", choices=ATTENTION_READS)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args()
    row = ATTENTION_READS[arguments.row]
    model, pixel_values = work(row.batch_size, arguments.toy)
    look = plain if arguments.plain else row.look
    with torch.no_grad():  # one image first, so that what stays loaded does not count
        print(growth(lambda: look(model, pixel_values[:1]), lambda: look(model, pixel_values)))


if __name__ == "__main__":
    main()

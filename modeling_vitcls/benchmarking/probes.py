"""A linear probe with cached features against one that runs the frozen backbone again for every batch.

Both are ours, with the same images in memory and the same order of batches: they end with the same classifier.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..training.linear_probe import build_head_only, compute_features
from .comparison import Comparison, chosen, in_turns, per_second
from .peers import SMALL, TOY, Size, against_transformers


@dataclass(frozen=True)
class LinearProbe:
    """One row of the report."""

    num_epochs: int
    num_images: int
    batch_size: int


# ViT-S/16 at 224 pixels, float32.
PROBES = {"10 epochs, batch 16": LinearProbe(num_epochs=10, num_images=32, batch_size=16)}

LIMIT = 1e-4  # of differences between the trained weights, as a part of the largest


def compare_probes(rows: tuple[str, ...], num_pairs: int, toy: bool) -> Iterator[Comparison]:
    """The named rows of `PROBES`, or all.

    Raises:
        ValueError: for an unknown row, or if the trained weights differ.
    """
    for name, row in chosen(PROBES, rows).items():
        yield compare_probe(name, row, num_pairs, TOY if toy else SMALL)


def compare_probe(name: str, row: LinearProbe, num_pairs: int, size: Size) -> Comparison:
    """One row.

    Raises:
        ValueError: if the trained weights differ.
    """
    model: Any = against_transformers(size).ours.eval()
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(row.num_images, 3, size.image_size, size.image_size, generator=generator)
    labels = torch.randint(size.num_labels, (row.num_images,), generator=generator)
    work = (model, pixel_values, labels, row)
    difference = check_weights(with_cache(*work), without_cache(*work), name)
    num_images = row.num_epochs * row.num_images
    measured = in_turns(
        lambda: per_second(lambda: with_cache(*work), num_images, 0.0),
        lambda: per_second(lambda: without_cache(*work), num_images, 0.0),
        num_pairs,
    )
    details = {"size": vars(size), **vars(row)}
    return Comparison("linear probe", name, "recomputing the backbone", *measured, difference, details)


def with_cache(model: Any, pixel_values: torch.Tensor, labels: torch.Tensor, row: LinearProbe) -> torch.Tensor:
    """The classifier's weights [labels, P] after training on features of images that were encoded once."""
    with torch.no_grad():
        features = torch.cat(
            [compute_features(model, images) for images in pixel_values.split(row.batch_size)]
        )  # [N, P]
    return trained(model, lambda places: features[places], labels, row)


@torch.no_grad()
def encoded(model: Any, pixel_values: torch.Tensor, places: slice) -> torch.Tensor:
    """Features [B, P] of some of the images."""
    return compute_features(model, pixel_values[places])


def without_cache(model: Any, pixel_values: torch.Tensor, labels: torch.Tensor, row: LinearProbe) -> torch.Tensor:
    """The same weights, with the images of every batch encoded in every epoch."""
    return trained(model, partial(encoded, model, pixel_values), labels, row)


def trained(
    model: Any, features: Callable[[slice], torch.Tensor], labels: torch.Tensor, row: LinearProbe
) -> torch.Tensor:
    """The weights of a copy of the model's head after all epochs."""
    head: Any = copy.deepcopy(build_head_only(model))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, fused=True)
    for _ in range(row.num_epochs):
        for start in range(0, row.num_images, row.batch_size):
            places = slice(start, start + row.batch_size)
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(features(places)).logits, labels[places]).backward()
            optimizer.step()
    return head.classifier.weight.detach()


def check_weights(found: torch.Tensor, wanted: torch.Tensor, name: str) -> float:
    """The largest difference.

    Raises:
        ValueError: if it exceeds the limit, or is no number.
    """
    difference = (found - wanted).abs().max().item()
    if not difference <= LIMIT * wanted.abs().max().item():
        raise ValueError(f"{name}: the trained weights differ by {difference:.2g}: this is not the same work")
    return difference

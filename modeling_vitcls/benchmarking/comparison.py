"""Paired measurements and what is said about them.

Machines are shared and clocks vary, so the two sides take turns, and each turn is compared with its neighbour alone.

Nothing is measured unless both sides give the same outputs, so that no speed is bought with wrong numbers.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch


Row = TypeVar("Row")


@dataclass(frozen=True)
class Comparison:
    """One piece of work done by two sides in turns.

    Attributes:
        work, name: kind of work and row of its table.
        against: the other side.
        ours, theirs: images per second of each turn, pair by pair.
        difference: largest absolute difference of the outputs.
        details: what was done, for the report.
    """

    work: str
    name: str
    against: str
    ours: list[float]
    theirs: list[float]
    difference: float
    details: dict[str, Any]

    @property
    def ratios(self) -> list[float]:
        """How many times as fast ours was, in each pair."""
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """What the JSON file holds of it."""
        lower, ratio, upper = quartiles(self.ratios)
        return {
            "work": self.work,
            "name": self.name,
            "against": self.against,
            "ratio": ratio,
            "quartiles": [lower, upper],
            "pairs": len(self.ratios),
            "ours_images_per_second": statistics.median(self.ours),
            "theirs_images_per_second": statistics.median(self.theirs),
            "ratios": self.ratios,
            "largest_difference_of_outputs": self.difference,
            **self.details,
        }


def in_turns(
    ours: Callable[[], float], theirs: Callable[[], float], num_pairs: int
) -> tuple[list[float], list[float]]:
    """Measure both sides `num_pairs` times; who begins changes from pair to pair."""
    measured: tuple[list[float], list[float]] = ([], [])
    for pair in range(num_pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            measured[side].append((ours, theirs)[side]())
    return measured


def per_second(work: Callable[[], object], num_images: int, seconds: float) -> float:
    """Do it, once or more, for that long; the first time, which warms caches up, does not count."""
    work()
    wait_for_gpu()
    calls, started = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - started < seconds:
        work()
        wait_for_gpu()
        calls += 1
    return calls * num_images / (time.perf_counter() - started)


def wait_for_gpu() -> None:
    """Until it has done all that it was given, if one is used at all."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def chosen(table: dict[str, Row], names: tuple[str, ...]) -> dict[str, Row]:
    """The named rows of a table of work; all for no names.

    Raises:
        ValueError: for a row that does not exist.
    """
    for name in names:
        if name not in table:
            raise ValueError(f"--rows: there is no {name!r}: choose from {', '.join(map(repr, table))}")
    return {name: table[name] for name in names or table}


def last_words(output: str) -> str:
    """The last line that a process printed."""
    lines = output.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; the value itself if there is one only."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


Answer = Callable[[torch.Tensor], torch.Tensor]  # images [B, C, H, W] -> logits [B, labels]

# Largest difference of logits, as a part of the largest logit.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@torch.inference_mode()
def check_agreement(ours: Answer, theirs: Answer, pixel_values: torch.Tensor, name: str) -> float:
    """The largest absolute difference of the logits.

    Raises:
        ValueError: if it exceeds the limit, or is no number.
    """
    found, wanted = ours(pixel_values).float(), theirs(pixel_values).float()
    if found.shape != wanted.shape:
        raise ValueError(f"{name}: outputs are {list(found.shape)} and {list(wanted.shape)}: they cannot be compared")
    difference = (found - wanted).abs().max().item()
    limit = LIMITS[pixel_values.dtype] * wanted.abs().max().item()
    if not difference <= limit:
        raise ValueError(
            f"{name}: the outputs differ by {difference:.2g}, more than {limit:.2g}: these models do not do the same "
            "work, so their speed is not compared"
        )
    return difference

"""Forward passes of a classifier, ours and a peer's in turns."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .agreement import Answer, check_agreement
from .comparison import Comparison, chosen, in_turns
from .peers import PEERS, SMALL, TOY, Peer


@dataclass(frozen=True)
class ForwardPass:
    """One row of the report."""

    dtype: torch.dtype
    batch_size: int


# ViT-S/16 at 224 pixels.
FORWARD_PASSES = {
    "fp32, batch 8": ForwardPass(torch.float32, 8),
    "fp32, batch 1": ForwardPass(torch.float32, 1),
    "bf16, batch 16": ForwardPass(torch.bfloat16, 16),
    "bf16, batch 1": ForwardPass(torch.bfloat16, 1),
}

SECONDS_PER_TURN = 0.5


def compare_inference(
    rows: tuple[str, ...], against: tuple[str, ...], num_pairs: int, toy: bool
) -> Iterator[Comparison]:
    """The named rows of `FORWARD_PASSES`, or all, against every peer.

    Raises:
        ValueError: for an unknown row, or if outputs differ.
    """
    for peer in against:
        for name, row in chosen(FORWARD_PASSES, rows).items():
            yield compare_forward_pass(name, row, PEERS[peer](TOY if toy else SMALL), num_pairs, toy)


def compare_forward_pass(name: str, row: ForwardPass, peer: Peer, num_pairs: int, toy: bool) -> Comparison:
    """One row against one peer.

    Raises:
        ValueError: if outputs differ.
    """
    peer = peer.to(row.dtype)
    side = peer.size.image_size
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(row.batch_size, 3, side, side, generator=generator).to(row.dtype)
    difference = check_agreement(peer.our_answer, peer.their_answer, pixel_values, f"{name} against {peer.name}")
    seconds = 0.0 if toy else SECONDS_PER_TURN
    ours, theirs = in_turns(
        lambda: images_per_second(peer.our_answer, pixel_values, seconds),
        lambda: images_per_second(peer.their_answer, pixel_values, seconds),
        num_pairs,
    )
    return Comparison("inference", name, peer.name, ours, theirs, difference, {"size": vars(peer.size)})


@torch.inference_mode()
def images_per_second(answer: Answer, pixel_values: torch.Tensor, seconds: float) -> float:
    """Call it, once or more, for that long; the first call, which warms caches up, does not count."""
    answer(pixel_values)
    calls, started = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - started < seconds:
        answer(pixel_values)
        calls += 1
    return calls * len(pixel_values) / (time.perf_counter() - started)

"""Forward passes of a classifier, ours and a peer's in turns."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .comparison import Answer, Comparison, check_agreement, chosen, in_turns, per_second
from .peers import PEERS, SMALL, TOY, Peer


@dataclass(frozen=True)
class ForwardPass:
    """One row of the report."""

    dtype: torch.dtype
    batch_size: int
    compiled: bool = False  # both sides, by torch.compile


# ViT-S/16 at 224 pixels.
FORWARD_PASSES = {
    "fp32, batch 8": ForwardPass(torch.float32, 8),
    "fp32, batch 1": ForwardPass(torch.float32, 1),
    "bf16, batch 16": ForwardPass(torch.bfloat16, 16),
    "bf16, batch 1": ForwardPass(torch.bfloat16, 1),
    "bf16, batch 16, compiled": ForwardPass(torch.bfloat16, 16, compiled=True),
}

SECONDS_PER_TURN = 0.5


def compare_inference(
    rows: tuple[str, ...], against: tuple[str, ...], num_pairs: int, toy: bool, device: str = "cpu"
) -> Iterator[Comparison]:
    """The named rows of `FORWARD_PASSES`, or all, against every peer.

    Raises:
        ValueError: for an unknown row, or if outputs differ.
    """
    for name, row in chosen(FORWARD_PASSES, rows).items():
        for peer in against:
            yield compare_forward_pass(name, row, PEERS[peer](TOY if toy else SMALL), num_pairs, toy, device)


def compare_forward_pass(
    name: str, row: ForwardPass, peer: Peer, num_pairs: int, toy: bool, device: str = "cpu"
) -> Comparison:
    """One row against one peer.

    Raises:
        ValueError: if outputs differ.
    """
    peer = peer.to(row.dtype, device)
    if row.compiled:
        torch.compiler.reset()  # of other rows
        peer.ours.compile()
        peer.theirs.compile()
    pixel_values = random_images(row.batch_size, peer.size.image_size).to(device, row.dtype)
    difference = check_agreement(peer.our_answer, peer.their_answer, pixel_values, f"{name} against {peer.name}")
    seconds = 0.0 if toy else SECONDS_PER_TURN
    ours, theirs = in_turns(
        lambda: images_per_second(peer.our_answer, pixel_values, seconds),
        lambda: images_per_second(peer.their_answer, pixel_values, seconds),
        num_pairs,
    )
    details = {"device": device, "size": vars(peer.size)}
    return Comparison("inference", name, peer.name, ours, theirs, difference, details)


def random_images(num_images: int, image_size: int) -> torch.Tensor:
    """[B, 3, H, W], always the same ones."""
    return torch.randn(num_images, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def images_per_second(answer: Answer, pixel_values: torch.Tensor, seconds: float) -> float:
    """Call it, once or more, for that long."""
    return per_second(lambda: answer(pixel_values), len(pixel_values), seconds)

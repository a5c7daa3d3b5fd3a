"""Bare training steps, ours and a peer's in turns: forward pass, backward pass and AdamW; and the memory of one.

    python -m modeling_vitcls.benchmarking.training_steps "bf16 autocast, batch 16" timm [--theirs]     bytes

Nothing of the data path is in it: that is in training_runs.py, where whole training runs take turns.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .comparison import Answer, Comparison, chosen, in_turns, per_second
from .forward_passes import SECONDS_PER_TURN, random_images
from .memory import growth, growth_on_gpu, peak_in_a_process
from .peers import PEERS, SMALL, TOY, Peer, Size


@dataclass(frozen=True)
class TrainingStep:
    """One row of the report: float32 weights, and what autocast makes of it."""

    autocast: torch.dtype | None
    batch_size: int
    limit: float  # largest relative difference of the gradients


# ViT-S/16 at 224 pixels.
TRAINING_STEPS = {
    "bf16 autocast, batch 16": TrainingStep(torch.bfloat16, 16, 0.1),
    "fp32, batch 16": TrainingStep(None, 16, 1e-3),
}


class Steps:
    """One side: a model in training, its optimiser, and the images and labels of one batch."""

    def __init__(self, model: nn.Module, answer: Answer, row: TrainingStep, batch: tuple[torch.Tensor, ...]) -> None:
        self.model = model.train()
        self.answer = answer
        self.row = row
        self.pixel_values, self.labels = batch
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def gradients(self, num_images: int) -> None:
        """Of the loss of the first images, in place of those that were there."""
        self.optimizer.zero_grad()
        with torch.autocast(self.labels.device.type, self.row.autocast, enabled=self.row.autocast is not None):
            logits = self.answer(self.pixel_values[:num_images])
            loss = nn.functional.cross_entropy(logits, self.labels[:num_images])
        loss.backward()

    def __call__(self, num_images: int | None = None) -> None:
        """One step on the first images, or on all."""
        self.gradients(num_images or len(self.labels))
        self.optimizer.step()


def compare_steps(
    rows: tuple[str, ...], against: tuple[str, ...], num_pairs: int, toy: bool, device: str = "cpu"
) -> Iterator[Comparison]:
    """The named rows of `TRAINING_STEPS`, or all, against every peer.

    Raises:
        ValueError: for an unknown row, if gradients differ, or if memory cannot be measured here.
    """
    for name, row in chosen(TRAINING_STEPS, rows).items():
        for peer in against:
            yield compare_step(name, row, PEERS[peer](TOY if toy else SMALL), num_pairs, toy, device)


def compare_step(
    name: str, row: TrainingStep, peer: Peer, num_pairs: int, toy: bool, device: str = "cpu"
) -> Comparison:
    """One row against one peer, its time and memory.

    Raises:
        ValueError: if gradients differ, or if memory cannot be measured here.
    """
    our_steps, their_steps = sides(row, peer, device)
    difference = check_gradients(our_steps, their_steps, f"{name} against {peer.name}")
    seconds = 0.0 if toy else SECONDS_PER_TURN
    ours, theirs = in_turns(
        lambda: per_second(our_steps, row.batch_size, seconds),
        lambda: per_second(their_steps, row.batch_size, seconds),
        num_pairs,
    )
    if device == "cpu":
        arguments = (name, peer.name, *(["--toy"] if toy else []))
        our_peak = peak_in_a_process(__name__, *arguments)
        their_peak = peak_in_a_process(__name__, *arguments, "--theirs")
    else:
        our_peak, their_peak = peak_on_gpu(our_steps), peak_on_gpu(their_steps)
    details = {
        "device": device,
        "size": vars(peer.size),
        "ours_peak_bytes": our_peak,
        "theirs_peak_bytes": their_peak,
    }
    return Comparison("training step", name, peer.name, ours, theirs, difference, details)


def sides(row: TrainingStep, peer: Peer, device: str = "cpu") -> tuple[Steps, Steps]:
    """Ours and theirs, with the same images."""
    peer = peer.to(torch.float32, device)
    batch = random_batch(row.batch_size, peer.size, device)
    return Steps(peer.ours, peer.our_answer, row, batch), Steps(peer.theirs, peer.their_answer, row, batch)


def random_batch(batch_size: int, size: Size, device: str | torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [B, 3, H, W] and labels [B], always the same ones."""
    labels = torch.randint(size.num_labels, (batch_size,), generator=torch.Generator().manual_seed(0))
    return random_images(batch_size, size.image_size).to(device), labels.to(device)


def check_gradients(ours: Steps, theirs: Steps, name: str, num_images: int = 2) -> float:
    """Relative difference of the gradients of the patch projection, which have come through every layer.

    Raises:
        ValueError: if it exceeds the limit, or is no number.
    """
    found, wanted = patch_gradient(ours, num_images), patch_gradient(theirs, num_images)
    difference = ((found - wanted).norm() / wanted.norm()).item()
    if not difference <= ours.row.limit:
        raise ValueError(
            f"{name}: the gradients differ by {difference:.2g} of their length, more than {ours.row.limit:.2g}: these "
            "models do not do the same work, so their speed is not compared"
        )
    return difference


def patch_gradient(steps: Steps, num_images: int) -> torch.Tensor:
    """Of the one convolution that a ViT has, [D, C, p, p]."""
    steps.gradients(num_images)
    (kernel,) = [parameter for parameter in steps.model.parameters() if parameter.ndim == 4]
    gradient: Any = kernel.grad
    return gradient.clone()


def peak_on_gpu(steps: Steps) -> int:
    """Bytes that a step needs beyond weights and moments, on a GPU where the optimiser has made its moments."""
    steps.optimizer.zero_grad()
    peak = growth_on_gpu(steps)
    steps.optimizer.zero_grad()
    return peak


def main() -> None:
    """Measure the memory of one side of one row: what a step needs beyond weights and the optimiser's moments."""
    parser = argparse.ArgumentParser()
    parser.add_argument("row", choices=TRAINING_STEPS)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--theirs", action="store_true")
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args()
    ours, theirs = sides(TRAINING_STEPS[arguments.row], PEERS[arguments.peer](TOY if arguments.toy else SMALL))
    steps = theirs if arguments.theirs else ours

    def warm_up() -> None:
        steps(num_images=1)
        steps.optimizer.zero_grad()

    print(growth(warm_up, steps))


if __name__ == "__main__":
    main()

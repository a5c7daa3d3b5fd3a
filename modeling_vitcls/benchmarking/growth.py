"""How the cost of a forward pass grows with image size, patch size, tokens and batch: time in turns, and memory.

    python -m modeling_vitcls.benchmarking.growth "image size 448" timm [--theirs] [--precision bf16]   memory, bytes

Each axis leads away from one base point, which all of them share and which is measured once. What is drawn of it is in
growth_figure.py.

Tokens are added as registers. transformers' ViT has none (its DINOv2 with registers is another model, with more work
in every layer), so on that axis timm alone is beside us.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from .comparison import Answer, Comparison, check_agreement, chosen, in_turns
from .forward_passes import SECONDS_PER_TURN, images_per_second, random_images
from .memory import growth, growth_on_gpu, peak_in_a_process
from .peers import PEERS, SMALL, TOY, WITH_REGISTERS, Peer


@dataclass(frozen=True)
class Point:
    """One row of the report."""

    image_size: int
    patch_size: int
    batch_size: int
    num_registers: int = 0

    @property
    def num_tokens(self) -> int:
        """With the CLS token."""
        return (self.image_size // self.patch_size) ** 2 + 1 + self.num_registers


# Field of a `Point` -> name of its rows.
AXES = {
    "image_size": "image size {}",
    "patch_size": "patch size {}",
    "num_registers": "{} registers",
    "batch_size": "batch {}",
}


def points(base: Point, **values: tuple[int, ...]) -> dict[str, Point]:
    """The base point, and those that differ from it in the value of one axis, by name."""
    name = f"image size {base.image_size}, patch size {base.patch_size}, batch {base.batch_size}"
    return {name: base} | {
        AXES[field].format(value): replace(base, **{field: value})
        for field, taken in values.items()
        for value in taken
    }


# ViT-S/16.
BASE = Point(image_size=224, patch_size=16, batch_size=4)
POINTS = points(
    BASE,
    image_size=(112, 160, 320, 448),
    patch_size=(32, 8),
    num_registers=(64, 128, 256),
    batch_size=(1, 8, 32),
)
TOY_BASE = Point(image_size=32, patch_size=8, batch_size=2)
TOY_POINTS = points(TOY_BASE, image_size=(16, 48), patch_size=(16,), num_registers=(4,), batch_size=(1,))

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compare_growth(
    rows: tuple[str, ...],
    against: tuple[str, ...],
    num_pairs: int,
    toy: bool,
    precision: str = "fp32",
    device: str = "cpu",
) -> Iterator[Comparison]:
    """The named rows of `POINTS`, or all, against every peer that can do that work.

    Raises:
        ValueError: for an unknown row, if no peer can do the work, if outputs differ, or if memory cannot be measured
            here.
    """
    table = chosen(TOY_POINTS if toy else POINTS, rows)
    pairs = [
        (name, peer)
        for name, point in table.items()
        for peer in against
        if point.num_registers == 0 or peer in WITH_REGISTERS
    ]
    if not pairs:
        raise ValueError(f"--against: {' and '.join(WITH_REGISTERS)} alone can be compared with at {', '.join(table)}")
    for name, peer in pairs:
        point = table[name]
        yield compare_point(name, point, model_at(point, peer, toy), num_pairs, toy, precision, device)


def model_at(point: Point, against: str, toy: bool) -> Peer:
    """The peer's model for that point, and ours."""
    size = replace(TOY if toy else SMALL, image_size=point.image_size, patch_size=point.patch_size)
    if point.num_registers:
        return WITH_REGISTERS[against](size, point.num_registers)
    return PEERS[against](size)


def compare_point(
    name: str, point: Point, peer: Peer, num_pairs: int, toy: bool, precision: str, device: str
) -> Comparison:
    """One row against one peer, its time and memory.

    Raises:
        ValueError: if outputs differ, or if memory cannot be measured here.
    """
    dtype = PRECISIONS[precision]
    peer = peer.to(dtype, device)
    pixel_values = random_images(point.batch_size, point.image_size).to(device, dtype)
    difference = check_agreement(peer.our_answer, peer.their_answer, pixel_values, f"{name} against {peer.name}")
    seconds = 0.0 if toy else SECONDS_PER_TURN
    ours, theirs = in_turns(
        lambda: images_per_second(peer.our_answer, pixel_values, seconds),
        lambda: images_per_second(peer.their_answer, pixel_values, seconds),
        num_pairs,
    )
    if device == "cpu":
        arguments = (name, peer.name, "--precision", precision, *(["--toy"] if toy else []))
        our_peak = peak_in_a_process(__name__, *arguments)
        their_peak = peak_in_a_process(__name__, *arguments, "--theirs")
    else:
        our_peak = peak_on_gpu(peer.our_answer, pixel_values)
        their_peak = peak_on_gpu(peer.their_answer, pixel_values)
    details = {
        **vars(point),
        "num_tokens": point.num_tokens,
        "axis": axis_of(point, TOY_BASE if toy else BASE),
        "precision": precision,
        "device": device,
        "size": vars(peer.size),
        "ours_peak_bytes": our_peak,
        "theirs_peak_bytes": their_peak,
    }
    return Comparison(f"growth in {precision}", name, peer.name, ours, theirs, difference, details)


def axis_of(point: Point, base: Point) -> str | None:
    """The one field in which it differs from the base point; None for the base point itself."""
    return next((field for field in AXES if getattr(point, field) != getattr(base, field)), None)


# Memory --------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def peak(answer: Answer, pixel_values: torch.Tensor, toy: Answer, toy_images: torch.Tensor) -> int:
    """Bytes that one forward pass needs beyond the weights.

    A tiny model warms up what happens once in a process: an earlier pass of the same model would leave memory behind
    that this one could use unseen.
    """
    return growth(lambda: toy(toy_images), lambda: answer(pixel_values))


@torch.inference_mode()
def peak_on_gpu(answer: Answer, pixel_values: torch.Tensor) -> int:
    """The same on a GPU that has run it before."""
    return growth_on_gpu(lambda: answer(pixel_values))


def main() -> None:
    """Measure the memory of one side of one row, in this process."""
    known: dict[str, Any] = POINTS | TOY_POINTS
    parser = argparse.ArgumentParser()
    parser.add_argument("row", choices=known)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--theirs", action="store_true")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args()
    point = (TOY_POINTS if arguments.toy else POINTS)[arguments.row]
    dtype = PRECISIONS[arguments.precision]
    peers = model_at(point, arguments.peer, arguments.toy), PEERS[arguments.peer](TOY)
    answer, toy = (each.to(dtype).their_answer if arguments.theirs else each.to(dtype).our_answer for each in peers)
    images = random_images(point.batch_size, point.image_size).to(dtype)
    print(peak(answer, images, toy, random_images(2, TOY.image_size).to(dtype)))


if __name__ == "__main__":
    main()

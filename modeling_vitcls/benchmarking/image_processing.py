"""From JPEG files to `pixel_values`, against AutoImageProcessor.

The pictures are real photographs of the usual size, saved in several ways; each side reads them anew in each turn.

Real photographs as JPEG files: parts of scikit-learn's two, of the usual size, saved as cameras and sites do.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from ..image_processing_vitcls import ViTCLSImageProcessor
from .comparison import Comparison, chosen, in_turns, per_second
from .forward_passes import SECONDS_PER_TURN
from .peers import SMALL, TOY, Size


FILES_PER_PHOTOGRAPH = {False: 32, True: 2}  # by `toy`


@dataclass(frozen=True)
class PixelRow:
    """One row of the report: how many files a call gets, and how the other side gets them."""

    num_files: int
    opened: Callable[[str], Any]


PIXEL_ROWS = {
    "one file": PixelRow(1, Image.open),
    "lists of 16 files": PixelRow(16, Image.open),
    "one file, as a path for both": PixelRow(1, str),
    "lists of 16 files, as paths for both": PixelRow(16, str),
}


def compare_pixels(rows: tuple[str, ...], num_pairs: int, toy: bool) -> Iterator[Comparison]:
    """The named rows of `PIXEL_ROWS`, or all, against what AutoImageProcessor gives for transformers' ViT.

    Raises:
        ValueError: for an unknown row, or if a single value differs.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = photographs(Path(folder), toy)
        ours, theirs = image_processors(TOY if toy else SMALL, Path(folder))
        for name, row in chosen(PIXEL_ROWS, rows).items():
            yield compare_files(name, row, files, ours, theirs, num_pairs, 0.0 if toy else SECONDS_PER_TURN)


def compare_files(
    name: str, row: PixelRow, files: list[str], ours: Any, theirs: Any, num_pairs: int, seconds: float
) -> Comparison:
    """One row.

    Raises:
        ValueError: if a single value differs.
    """
    lists = [files[start : start + row.num_files] for start in range(0, len(files), row.num_files)]

    def our_values() -> list[torch.Tensor]:
        return [ours(part, return_tensors="pt")["pixel_values"] for part in lists]

    def their_values() -> list[torch.Tensor]:
        return [theirs([row.opened(file) for file in part], return_tensors="pt")["pixel_values"] for part in lists]

    for _ in range(2):  # the first call with settings, and further ones
        if not all(map(torch.equal, our_values(), their_values())):
            raise ValueError(f"{name}: the pixel values differ: this is not the same work, so it is not compared")
    measured = in_turns(
        lambda: per_second(our_values, len(files), seconds),
        lambda: per_second(their_values, len(files), seconds),
        num_pairs,
    )
    return Comparison("file to pixel_values", name, "AutoImageProcessor", *measured, 0.0, {"num_files": len(files)})


def image_processors(size: Size, folder: Path) -> tuple[ViTCLSImageProcessor, Any]:
    """Ours, and that of transformers' ViT in the usual way, with the same settings."""
    from transformers import AutoImageProcessor, ViTImageProcessor

    sides = {"height": size.image_size, "width": size.image_size}
    ViTImageProcessor(size=sides).save_pretrained(folder / "processor")
    ours = ViTCLSImageProcessor(size=sides, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return ours, AutoImageProcessor.from_pretrained(folder / "processor")


def photographs(folder: Path, toy: bool) -> list[str]:
    """JPEG files."""
    write_photographs(folder / "photographs", per_class=FILES_PER_PHOTOGRAPH[toy])
    return sorted(map(str, folder.rglob("*.jpg")))


VARIANTS: list[dict[str, Any]] = [
    {"quality": 90},
    {"quality": 75, "optimize": True},
    {"quality": 95, "subsampling": "4:4:4"},
    {"quality": 85, "progressive": True},
]


def write_photographs(folder: Path, per_class: int = 64, height_width: tuple[int, int] = (375, 500)) -> Path:
    """A folder per photograph, with different parts of it, in turn in each of the `VARIANTS`."""
    height, width = height_width
    generator = torch.Generator().manual_seed(0)
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        rows, columns, _ = photograph.shape  # 427 x 640
        for index in range(per_class):
            y = int(torch.randint(rows - height + 1, (), generator=generator))
            x = int(torch.randint(columns - width + 1, (), generator=generator))
            part = Image.fromarray(photograph[y : y + height, x : x + width])
            part.save(folder / name / f"{index:03}.jpg", **VARIANTS[index % len(VARIANTS)])
    return folder

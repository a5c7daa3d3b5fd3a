"""Noise, image folders with one sub-folder per class, and images that count how often they are read."""

import unicodedata
import zlib
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import default_rng
from PIL import Image
from sklearn.datasets import load_digits


class CountedImages(list):
    """Images that count how often they are loaded."""

    num_reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.num_reads += 1
        return super().__getitem__(index)


def encode_image(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    """Encode an image as the bytes of a file."""
    file = BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def draw_pixels(*shape: int, seed: Any = 0) -> np.ndarray:
    """Draw noise of 8 bits."""
    return default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def draw_noise(*shapes: tuple[int, int], seed: int = 0) -> list[Image.Image]:
    """Draw a color image of noise for each shape (height, width)."""
    generator = default_rng(seed)
    return [
        Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes
    ]


def get_unicode_forms(name: str) -> tuple[str, str]:
    """Return a name with composed characters, and with decomposed ones, as macOS writes it."""
    return unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)


def write_photos(root: Path, numbers: range, *names: str) -> Path:
    """Write one noise image per class (default: cat and dog) and number, and return the folder.

    Images with the same number differ between classes.
    """
    for name in names or ("cat", "dog"):
        for number in numbers:
            (root / name).mkdir(parents=True, exist_ok=True)
            noise = draw_pixels(8, 8, 3, seed=[zlib.crc32(name.encode()), number])
            Image.fromarray(noise).save(root / name / f"{number}.png")
    return root


def write_digits(folder: Path, digit: int, choice: slice) -> None:
    """Write some of scikit-learn's images of a digit, in 64 x 64 pixels."""
    digits = load_digits()
    folder.mkdir(parents=True)
    for index, pixels in enumerate(digits.images[digits.target == digit][choice]):
        image = Image.fromarray((pixels * 15).astype(np.uint8)).convert("RGB").resize((64, 64))
        image.save(folder / f"{index}.png")


def write_two_colors(root: Path, number: int) -> Path:
    """Write dark and bright images, one class each, in different sizes and modes."""
    for name, red, green, blue in (("dusk", 20, 20, 90), ("noon", 250, 240, 120)):
        (root / name).mkdir(parents=True)
        for index in range(number):
            color = (red, green, blue + 5 * index)
            image = Image.new("RGB", (20 + index, 40 - index), color)
            image.convert("RGBA" if index % 2 else "RGB").save(root / name / f"{index}.png")
    return root


def write_files(root: Path, *names: str, content: bytes = b"") -> None:
    """Write files with the same content, with their folders."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def get_file_names(folder: Path) -> set[str]:
    """Return the names of the files and folders in a folder."""
    return {file.name for file in folder.iterdir()}


def write_unequal_photos(root: Path) -> Path:
    """Write 15 dark and 9 brighter photos of 40 x 24 pixels, and return the folder."""
    noise = default_rng(0)
    for name, brightest, number in (("ants", 100, 15), ("bees", 255, 9)):
        (root / name).mkdir(parents=True)
        for index in range(number):
            pixels = noise.integers(0, brightest, (24, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def write_bursts(
    root: Path, objects: Iterable[int] = range(16), shots: Iterable[int] = range(5)
) -> None:
    """Write nearly equal photos of each of some objects, half of them in each class."""
    for number in objects:
        write_shots(root / ("cups", "pens")[number % 2], number, shots)


def write_shots(folder: Path, scene: int, shots: Iterable[int] = range(5)) -> None:
    """Write nearly equal photos of a scene; up to number 15, it is one of `write_bursts`."""
    photo = Image.fromarray(draw_pixels(5, 7, 3, seed=[2, scene])).resize((140, 100))
    folder.mkdir(parents=True, exist_ok=True)
    for shot in shots:
        photo.crop((shot, 0, shot + 134, 94 + shot)).save(folder / f"IMG_{scene}{shot}.png")

"""Sequences of images that are decoded on access, and a counter of unreadable images.

    ArrayImages    images of the same size in memory (digits, MNIST)
    FileImages     files or URLs
    ColumnImages   a column of a dataset of the `datasets` library
    EncodedImages  encoded images in memory (from streamed datasets)
    ImageSubset    a subset of another sequence

Each sequence returns PIL images and raises `UnreadableImage` for unreadable images. Three methods do not decode
images:

    get_names()    the path of each image within the dataset, or a checksum; "" if an image has neither
    read_bytes()   the bytes of one image; None if the image cannot be read or is remote
    compute_keys() a checksum of the bytes or path of each image, which selects the held-out images (held_out.py)
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import format_error
from ..image_processing_vitcls import read_image, shorten_text
from .held_out import compute_image_key, get_relative_path


# Pillow warns about harmless properties of files, once per image and worker.
warnings.filterwarnings("ignore", module=r"PIL\.")

ROWS_PER_READ = 64  # number of dataset rows that are read from disk at once
MISSING_IMAGE = {"path": None, "bytes": None}  # encoded image of a row without an image
NOT_REPLACED = -1  # value of `replaced` in a batch for an image that does not replace an unreadable image


class UnreadableImage(ValueError):
    """Raised for an unreadable image. The message is a single line: the name of the image and the reason."""


@dataclass(frozen=True)
class LabeledImages:
    """Images and one label per image: a class index, a list with 0.0 or 1.0 per class, or {task: class index}."""

    images: Any  # one of the classes below, or any other sequence of PIL images
    labels: Sequence[Any]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Iterable[int]) -> "LabeledImages":
        """Return the images and labels at `indices`, in the given order."""
        indices = list(indices)
        return LabeledImages(ImageSubset(self.images, indices), [self.labels[index] for index in indices])


def get_image_ids(images: LabeledImages) -> list[str]:
    """Return the name of each image within its split: its path or checksum, or its index if it has neither."""
    return [name or str(index) for index, name in enumerate(images.images.get_names())]


@dataclass(frozen=True)
class ImageSubset(Sequence):
    """A subset of another sequence of images."""

    source_images: Any  # sequence that contains the subset
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.source_images[self.indices[index]]

    def get_names(self) -> list[str]:
        names = self.source_images.get_names()
        return [names[index] for index in self.indices]

    def read_bytes(self, index: int) -> bytes | None:
        return self.source_images.read_bytes(self.indices[index])

    def compute_keys(self) -> list[int]:
        keys = self.source_images.compute_keys()
        return [keys[index] for index in self.indices]


@dataclass(frozen=True, eq=False)
class ArrayImages(Sequence):
    """Grayscale images of the same size: [images, H, W] `uint8`."""

    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Any) -> Any:
        return Image.fromarray(self.pixels[index])

    def get_names(self) -> list[str]:
        return [f"{key:x}" for key in self.compute_keys()]

    def read_bytes(self, index: int) -> bytes:
        return self.pixels[index].tobytes()

    def compute_keys(self) -> list[int]:
        return [compute_image_key(array.tobytes()) for array in self.pixels]


class EncodedSequence(Sequence):
    """Base class of images that are decoded on access. `get_encoded_image` returns an input of `decode_image`."""

    get_encoded_image: Callable[[int], dict[str, Any]]
    folder: Path  # folder of the dataset
    fallback_prefix = "row"  # text before the index in the name of an image without a path

    def __getitem__(self, index: Any) -> Any:
        return decode_image(self.get_encoded_image(index), f"{self.fallback_prefix} {index}")

    def get_paths(self) -> list[str | None]:
        """Return the path of each image, or None for an image without a path."""
        return [self.get_encoded_image(index)["path"] for index in range(len(self))]

    def get_names(self) -> list[str]:
        return [get_relative_path(path, self.folder) if path else "" for path in self.get_paths()]

    def read_bytes(self, index: int) -> bytes | None:
        encoded_image = self.get_encoded_image(index)
        if encoded_image["bytes"] is not None:
            return encoded_image["bytes"]
        try:
            file = Path(encoded_image["path"] or "")
            return file.read_bytes() if file.is_file() else None  # reading a pipe would block
        except (OSError, ValueError):
            return None

    def compute_keys(self) -> list[int]:
        return [compute_encoded_image_key(self.get_encoded_image(index), self.folder) for index in range(len(self))]


@dataclass(frozen=True)
class FileImages(EncodedSequence):
    """Images in files or at URLs."""

    paths: list[str]
    folder: Path = Path()

    def __len__(self) -> int:
        return len(self.paths)

    def get_encoded_image(self, index: int) -> dict[str, Any]:
        return {"path": self.paths[index], "bytes": None}


@dataclass(frozen=True)
class EncodedImages(EncodedSequence):
    """Encoded images in memory."""

    encoded_images: list[dict[str, Any]]
    folder: Path = Path()
    fallback_prefix = "example"

    def __len__(self) -> int:
        return len(self.encoded_images)

    def get_encoded_image(self, index: int) -> dict[str, Any]:
        return self.encoded_images[index]


@dataclass(frozen=True)
class ColumnImages(EncodedSequence):
    """Images in a column of a dataset. The type of the column is `datasets.Image(decode=False)`."""

    dataset: Any
    column: str
    folder: Path = Path()

    def __len__(self) -> int:
        return len(self.dataset)

    def get_encoded_image(self, index: int) -> dict[str, Any]:
        return self.dataset[index][self.column] or MISSING_IMAGE

    def get_paths(self) -> list[str | None]:
        """Return the path of each image without reading the images."""
        import pyarrow.compute

        values = self.dataset.with_format("arrow")[:][self.column]  # not copied
        return pyarrow.compute.struct_field(values, "path").to_pylist()

    def compute_keys(self) -> list[int]:
        paths = self.get_paths()
        if all(paths) and len(set(paths)) == len(paths):  # no image is read
            return [compute_image_key(name.encode()) for name in self.get_names()]
        starts = range(0, len(self), ROWS_PER_READ)
        rows = (row for start in starts for row in self.dataset[start : start + ROWS_PER_READ][self.column])
        return [compute_encoded_image_key(row or MISSING_IMAGE, self.folder) for row in rows]


def compute_encoded_image_key(encoded_image: dict[str, Any], folder: Path) -> int:
    """Return the key of an encoded image: a checksum of its bytes or, if it has none, of its path within `folder`."""
    if encoded_image["bytes"] is not None:
        return compute_image_key(encoded_image["bytes"])
    return compute_image_key(get_relative_path(encoded_image["path"] or "", folder).encode())


def check_channels(image: Image.Image, pixels: torch.Tensor, num_channels: int | None) -> None:
    """Raise UnreadableImage if the pixels [C, H, W] of an image do not have `num_channels` channels. Do nothing if
    `num_channels` is None. The image processor converts images to three channels only if `do_convert_rgb` is set."""
    if num_channels is not None and len(pixels) != num_channels:
        path = getattr(image, "filename", "")
        image_name = f"the image {shorten_text(path)}" if path else f"an image of mode {image.mode}"
        count_text = "1 channel" if len(pixels) == 1 else f"{len(pixels)} channels"
        raise UnreadableImage(f"{image_name} has {count_text}, but the model requires {num_channels}")


def to_encoded_image(value: Any, folder: Path) -> dict[str, Any]:
    """Convert an encoded image or a path to {"path": ..., "bytes": ...}. Relative paths are joined to `folder`."""
    if isinstance(value, dict):
        return {"path": value["path"], "bytes": value["bytes"]}
    if isinstance(value, bytes):
        return {"path": None, "bytes": value}
    return {"path": resolve_path(folder, value), "bytes": None}


def resolve_path(folder: Path, path: str | None) -> str:
    """Join a path to a folder. URLs and absolute paths are left unchanged. Return "" for a missing path."""
    if not path or "://" in path:
        return path or ""
    return str(folder / path)


def decode_image(encoded_image: dict[str, Any], fallback_name: str) -> Image.Image:
    """Decode an image {"path": ..., "bytes": ...}, where one of the values may be None. Return the image in its stored
    mode and in upright orientation. Raise UnreadableImage if the image is missing or cannot be decoded.

    The `filename` attribute of the image is the path (as in Pillow) or, if there is no path, `fallback_name`. Error
    messages contain this name.
    """
    content, path = encoded_image["bytes"], encoded_image["path"]
    if content is None and not path:
        raise UnreadableImage(f"{fallback_name} has no image")
    try:
        if content is None and (path.startswith("hf://") or "::" in path):  # a file in a Hub repository or an archive
            import datasets

            image = datasets.Image().decode_example({"path": path, "bytes": None})
        else:
            image = read_image(path if content is None else content)
    except Exception as error:  # Pillow's decoders raise many types of errors on damaged data
        message = format_error(error)
        if content is not None:
            message = f"cannot read the image {shorten_text(path) if path else fallback_name}: {message}"
        elif not isinstance(error, ValueError):  # the messages of `read_image` contain the path
            message = f"{shorten_text(path)}: {message}"
        raise UnreadableImage(message) from error
    image.filename = path or fallback_name  # type: ignore[union-attr]
    return image


@dataclass
class UnreadableImageCounter:
    """Counter of the unreadable images of one run.

    Every process calls `add` with the unreadable images of all processes, so that all processes stop at the same step.
    """

    describe: Callable[[int], str]  # function that returns the one-line error message for an image index
    warn: Callable[[str], None]  # function that prints a one-line warning
    limit: int  # maximum number of unreadable images (`--max-unreadable-images`); a larger number stops the run
    indices: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.indices)

    def add(self, indices: Iterable[int]) -> None:
        """Count the unreadable images at `indices` except `NOT_REPLACED`, and print a warning for each image that
        was not counted before. Raise ValueError if the number of unreadable images exceeds the limit."""
        for index in indices:
            if index == NOT_REPLACED or index in self.indices:
                continue
            self.indices.add(index)
            description = self.describe(index)
            self.warn(f"skipped an image: {description}")
            if len(self) > self.limit:
                raise ValueError(
                    f"more than {self.limit} images cannot be read; the last unreadable image: {description}. "
                    "Repair or remove these images, or set a larger --max-unreadable-images"
                )

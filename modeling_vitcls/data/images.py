"""Sequences of images that are decoded on access, and the handling of unreadable images.

    Arrays     in memory, all of the same size (digits, MNIST)
    Files      files or URLs
    Encoded    a column of a dataset of the `datasets` library
    Examples   encoded images in memory (from streamed datasets)
    Chosen     a subset of another sequence

Each sequence returns PIL images, and raises `BrokenPicture` for an unreadable image. It also has three methods that
decode no images:
    names()    the path of each image within the dataset, or a checksum; "" if there is neither
    content()  the bytes of one image; None if they cannot be read or are remote
    keys()     a checksum of the bytes or the path of each image, which decides if it is held out (held_out.py)

`BrokenPictures` counts unreadable images, logs each of them once, and stops the run if there are too many.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..image_processing_vitcls import get_first_line, read_image, shorten
from .held_out import compute_key, get_relative_path


ROWS_AT_ONCE = 64  # number of encoded images that are read from disk at once


class BrokenPicture(ValueError):
    """An unreadable image. The message is one line with its name and the reason."""


@dataclass(frozen=True)
class LabelledPictures:
    """Images, and the label of each: a class index, a list of 0.0 and 1.0 per class, or {task: class index}."""

    pictures: Any  # one of the classes below, or any other sequence of PIL images
    labels: Sequence[Any]

    def __len__(self) -> int:
        return len(self.labels)

    def chosen(self, indices: Iterable[int]) -> "LabelledPictures":
        """Return the images and labels at these indices, in this order."""
        indices = list(indices)
        return LabelledPictures(Chosen(self.pictures, indices), [self.labels[index] for index in indices])


@dataclass(frozen=True)
class Chosen(Sequence):
    """A subset of another sequence."""

    elements: Any
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.elements[self.indices[index]]

    def names(self) -> list[str]:
        """Return the names of the chosen elements."""
        names = self.elements.names()
        return [names[index] for index in self.indices]

    def content(self, index: int) -> bytes | None:
        """Return the bytes of one of the chosen elements."""
        return self.elements.content(self.indices[index])

    def keys(self) -> list[int]:
        """Return the keys of the chosen elements."""
        keys = self.elements.keys()
        return [keys[index] for index in self.indices]


@dataclass(frozen=True, eq=False)
class Arrays(Sequence):
    """Grayscale images of the same size: [images, H, W] `uint8`."""

    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        return Image.fromarray(self.values[index])

    def names(self) -> list[str]:
        """Return checksums of the pixels."""
        return [f"{key:x}" for key in self.keys()]

    def content(self, index: int) -> bytes:
        """Return the pixels of one image."""
        return self.values[index].tobytes()

    def keys(self) -> list[int]:
        """Return checksums of the pixels."""
        return [compute_key(values.tobytes()) for values in self.values]


@dataclass(frozen=True)
class Files(Sequence):
    """Images in files or at URLs. `folder` is the folder of the dataset."""

    paths: list[str]
    folder: Path = Path()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        return decoded({"path": self.paths[index], "bytes": None}, f"row {index}")

    def names(self) -> list[str]:
        """Return paths within the data set."""
        return [get_relative_path(path, self.folder) for path in self.paths]

    def content(self, index: int) -> bytes | None:
        """Return the bytes of one file."""
        return read_content({"path": self.paths[index], "bytes": None})

    def keys(self) -> list[int]:
        """Return checksums of the paths."""
        return [compute_key(name.encode()) for name in self.names()]


@dataclass(frozen=True)
class Encoded(Sequence):
    """Images in a column of a dataset, of type `datasets.Image(decode=False)` or bytes."""

    part: Any
    column: str
    folder: Path = Path()

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: Any) -> Any:
        return decoded(self.part[index][self.column], f"row {index}")

    def names(self) -> list[str]:
        """Return paths within the data set, "" for images without one. The bytes of images are not read."""
        import pyarrow.compute

        values = self.part.with_format("arrow")[:][self.column]  # not copied
        paths = pyarrow.compute.struct_field(values, "path").to_pylist()
        return [get_relative_path(path, self.folder) if path else "" for path in paths]

    def content(self, index: int) -> bytes | None:
        """Return the bytes of one image."""
        return read_content(self.part[index][self.column])

    def keys(self) -> list[int]:
        """Return checksums of the bytes, or of the paths of images that are not in the data set itself."""
        keys: list[int] = []
        for start in range(0, len(self), ROWS_AT_ONCE):
            rows = self.part[start : start + ROWS_AT_ONCE][self.column]
            keys += [compute_example_key(row, self.folder) for row in rows]
        return keys


@dataclass(frozen=True)
class Examples(Sequence):
    """Encoded images, in the format of `decoded`."""

    encoded: list[dict[str, Any]]
    folder: Path = Path()

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: Any) -> Any:
        return decoded(self.encoded[index], f"example {index}")

    def names(self) -> list[str]:
        """Return paths within the data set, "" for images without one."""
        paths = [example["path"] for example in self.encoded]
        return [get_relative_path(path, self.folder) if path else "" for path in paths]

    def content(self, index: int) -> bytes | None:
        """Return the bytes of one image."""
        return read_content(self.encoded[index])

    def keys(self) -> list[int]:
        """Return checksums of the bytes, or of the paths of images without bytes."""
        return [compute_example_key(example, self.folder) for example in self.encoded]


def compute_example_key(example: dict[str, Any] | None, folder: Path) -> int:
    """Return the key of an encoded image: a checksum of its bytes, or of its path within `folder`."""
    if example and example["bytes"] is not None:
        return compute_key(example["bytes"])
    return compute_key(get_relative_path((example and example["path"]) or "", folder).encode())


def read_content(example: dict[str, Any] | None) -> bytes | None:
    """Return the bytes of an encoded image, which may be in a file; None if it cannot be read or is remote."""
    if not example or example["bytes"] is not None:
        return example["bytes"] if example else None
    if not example["path"] or "://" in example["path"]:
        return None
    try:
        file = Path(example["path"])
        return file.read_bytes() if file.is_file() else None  # reading a pipe would block
    except (OSError, ValueError):
        return None


def check_channels(picture: Image.Image, pixels: torch.Tensor, num_channels: int | None) -> None:
    """Check that the pixels [C, H, W] of an image have the model's number of channels; None skips the check.

    The image processor converts images to three channels only if `do_convert_rgb` is set.

    Raises:
        BrokenPicture: if the number of channels differs.
    """
    if num_channels is not None and len(pixels) != num_channels:
        name = getattr(picture, "filename", "")
        which = f"the image {shorten(name)}" if name else f"an image of mode {picture.mode}"
        raise BrokenPicture(f"{which} has {len(pixels)} channels, the model takes {num_channels}")


def as_encoded(value: Any, folder: Path) -> dict[str, Any]:
    """Return a value of an image or path column as {"path", "bytes"}. Relative paths start at `folder`."""
    if isinstance(value, dict):
        return {"path": value["path"], "bytes": value["bytes"]}
    if isinstance(value, bytes):
        return {"path": None, "bytes": value}
    return {"path": path_in(folder, value), "bytes": None}


def path_in(folder: Path, path: str | None) -> str:
    """Return a path joined to a folder. URLs and absolute paths are unchanged, and a missing path is empty."""
    if not path or "://" in path:
        return path or ""
    return str(folder / path)


def decoded(encoded: dict[str, Any] | None, place: str) -> Image.Image:
    """Decode an image from its bytes or its path, rotated upright, in the mode in which it is stored.

    Args:
        encoded: {"path": ..., "bytes": ...}, either of which may be None.
        place: name of the image in error messages if it has no path.

    Raises:
        BrokenPicture: if the image is missing, truncated or cannot be decoded.
    """
    if not encoded or not (encoded["bytes"] is not None or encoded["path"]):
        raise BrokenPicture(f"{place} has no image")
    if encoded["bytes"] is None:
        return named(from_path(encoded["path"]), encoded["path"])
    try:
        return named(read_image(encoded["bytes"]), encoded["path"] or place)
    except Exception as error:  # Pillow's decoders raise many types of errors on damaged data
        name = shorten(encoded["path"]) if encoded["path"] else place
        raise BrokenPicture(f"cannot read the image {name}: {get_first_line(error)}") from error


def named(picture: Image.Image, name: str) -> Image.Image:
    """Set the `filename` of an image, as Pillow does, for error messages, and return the image."""
    picture.filename = name  # type: ignore[attr-defined]
    return picture


def from_path(path: str) -> Image.Image:
    """Read an image from a file, a URL, or a file of a dataset on the Hub."""
    try:
        if path.startswith("hf://") or "::" in path:  # in a repository or an archive, which `datasets` opens
            import datasets

            return datasets.Image().decode_example({"path": path, "bytes": None})
        return read_image(path)
    except Exception as error:
        raise BrokenPicture(
            get_first_line(error) if isinstance(error, ValueError) else f"{shorten(path)}: {get_first_line(error)}"
        ) from error


NO_PICTURE = -1  # value in `broken` of a batch for an image that replaces no unreadable image


class BrokenPictures:
    """Count the unreadable images of one run.

    Args:
        describe: function that returns the error message of an unreadable image, in one line, from its index.
        warn: function that prints a line.
        limit: maximum number of unreadable images (`--max-broken-images`); the run stops if there are more.

    Every process calls `note` with the unreadable images of all processes, so that all stop at the same step.
    """

    def __init__(self, describe: Callable[[int], str], warn: Callable[[str], None], limit: int) -> None:
        self.describe = describe
        self.warn = warn
        self.limit = limit
        self.known: set[int] = set()

    @property
    def count(self) -> int:
        """Number of different unreadable images so far."""
        return len(self.known)

    def note(self, indices: Iterable[int]) -> None:
        """Count the values of `broken` of a batch, and print a warning for each new unreadable image.

        Raises:
            ValueError: if there are more unreadable images than the limit.
        """
        for index in indices:
            if index == NO_PICTURE or index in self.known:
                continue
            self.known.add(index)
            description = self.describe(index)
            self.warn(f"skipped an image: {description}")
            if self.count > self.limit:
                raise ValueError(
                    f"more than {self.limit} images cannot be read, the last one: {description} (repair or remove "
                    "them, or raise --max-broken-images)"
                )

"""Pictures that are decoded when they are asked for, by place, wherever they are kept.

    Arrays     in memory, all of one size (digits, MNIST)
    Files      files or URLs
    Encoded    a column of a data set of the `datasets` library
    Examples   encoded pictures in memory (from streamed data sets)
    Chosen     some pictures of another sequence

Each gives PIL images, and raises `BrokenPicture` for one that cannot be read. What happens to broken pictures is in
broken.py.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..image_processing_vitcls import get_first_line, read_image, shorten


class BrokenPicture(ValueError):
    """A picture that cannot be read; the message, of one line, names it and says why."""


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures, and the label of each: a class index, a list of 0.0 and 1.0 per class, or {task: class index}."""

    pictures: Sequence[Image.Image]
    labels: Sequence[Any]

    def __len__(self) -> int:
        return len(self.labels)

    def chosen(self, indices: Iterable[int]) -> "LabelledPictures":
        """Some of them, in the given order."""
        indices = list(indices)
        return LabelledPictures(Chosen(self.pictures, indices), [self.labels[index] for index in indices])


@dataclass(frozen=True)
class Chosen(Sequence):
    """Some elements of another sequence."""

    elements: Sequence[Image.Image]
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.elements[self.indices[index]]


@dataclass(frozen=True, eq=False)
class Arrays(Sequence):
    """Grey pictures of one size: [pictures, H, W] `uint8`."""

    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        return Image.fromarray(self.values[index])


@dataclass(frozen=True)
class Files(Sequence):
    """Pictures in files or behind URLs."""

    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        return decoded({"path": self.paths[index], "bytes": None}, f"row {index}")


@dataclass(frozen=True)
class Encoded(Sequence):
    """Pictures in a column of a data set; it has the type `datasets.Image(decode=False)`."""

    part: Any
    column: str

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: Any) -> Any:
        return decoded(self.part[index][self.column], f"row {index}")


@dataclass(frozen=True)
class Examples(Sequence):
    """Encoded pictures, as `decoded` takes them."""

    encoded: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: Any) -> Any:
        return decoded(self.encoded[index], f"example {index}")


def check_channels(picture: Image.Image, pixels: torch.Tensor, num_channels: int | None) -> None:
    """Refuse a picture whose pixels [C, H, W] are not of a model's number of channels; None takes any.

    The image processor brings all to three channels with `do_convert_rgb`, and leaves them as they are without.

    Raises:
        BrokenPicture: for another number.
    """
    if num_channels is not None and len(pixels) != num_channels:
        name = getattr(picture, "filename", "")
        which = f"the image {shorten(name)}" if name else f"an image of mode {picture.mode}"
        raise BrokenPicture(f"{which} has {len(pixels)} channels, the model takes {num_channels}")


def as_encoded(value: Any, folder: Path) -> dict[str, Any]:
    """What a column of images or paths holds -> {"path", "bytes"}; relative paths start at `folder`."""
    if isinstance(value, dict):
        return {"path": value["path"], "bytes": value["bytes"]}
    if isinstance(value, bytes):
        return {"path": None, "bytes": value}
    return {"path": path_in(folder, value), "bytes": None}


def path_in(folder: Path, path: str | None) -> str:
    """A path relative to a folder; URLs and absolute paths stay, and a missing one is empty."""
    if not path or "://" in path:
        return path or ""
    return str(folder / path)


def decoded(encoded: dict[str, Any] | None, place: str) -> Image.Image:
    """One picture from its bytes or its path, upright, in the mode it was stored in.

    Args:
        encoded: {"path": ..., "bytes": ...}, either of which may be None.
        place: names the picture where it has no path.

    Raises:
        BrokenPicture: for anything that is not a whole picture.
    """
    if not encoded or not (encoded["bytes"] is not None or encoded["path"]):
        raise BrokenPicture(f"{place} has no image")
    if encoded["bytes"] is None:
        return named(from_path(encoded["path"]), encoded["path"])
    try:
        return named(read_image(encoded["bytes"]), encoded["path"] or place)
    except Exception as error:  # Pillow's decoders raise almost anything on broken data
        name = shorten(encoded["path"]) if encoded["path"] else place
        raise BrokenPicture(f"cannot read the image {name}: {get_first_line(error)}") from error


def named(picture: Image.Image, name: str) -> Image.Image:
    """A picture that errors can call by its name, as one that Pillow has just opened."""
    picture.filename = name  # type: ignore[attr-defined]
    return picture


def from_path(path: str) -> Image.Image:
    """One picture from a file, a URL, or a file of a data set on the Hub."""
    try:
        if path.startswith("hf://") or "::" in path:  # inside a repository or an archive: `datasets` opens it
            import datasets

            return datasets.Image().decode_example({"path": path, "bytes": None})
        return read_image(path)
    except Exception as error:
        raise BrokenPicture(
            get_first_line(error) if isinstance(error, ValueError) else f"{shorten(path)}: {get_first_line(error)}"
        ) from error

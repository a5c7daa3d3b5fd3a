"""Pictures that are decoded when they are asked for, by place, wherever they are kept.

    Arrays     in memory, all of one size (digits, MNIST)
    Files      files or URLs
    Encoded    a column of a data set of the `datasets` library
    Examples   encoded pictures in memory (from streamed data sets)
    Chosen     some pictures of another sequence

Each gives PIL images, and raises `BrokenPicture` for one that cannot be read. What happens to broken pictures is in
images.py. Each also has, without decoding anything,
    names()    what identifies an image cheaply: its path within the data set, or a checksum; "" if there is neither
    content()  the bytes of one image; None if they cannot be read or are remote
    keys()     what decides whether it is held out (data/held_out.py): a checksum of its bytes, or of its path

Counts and names pictures that cannot be read, and says when there are too many.
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
    """A picture that cannot be read; the message, of one line, names it and says why."""


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures, and the label of each: a class index, a list of 0.0 and 1.0 per class, or {task: class index}."""

    pictures: Any  # one of the classes below, or any other sequence of PIL images
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
    """Grey pictures of one size: [pictures, H, W] `uint8`."""

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
    """Pictures in files or behind URLs; `folder` is that of the data set."""

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
    """Pictures in a column of a data set; it has the type `datasets.Image(decode=False)`, or holds bytes."""

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
    """Encoded pictures, as `decoded` takes them."""

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
    try:
        return None if "://" in example["path"] else Path(example["path"]).read_bytes()
    except (OSError, TypeError):
        return None


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


NO_PICTURE = -1  # in a batch's `broken`: the picture is the one that the plan asked for


class BrokenPictures:
    """The tally of one run.

    Args:
        describe: the index of a broken picture -> what is wrong with it, in one line.
        warn: shows a line.
        limit: the run stops at more broken pictures than these (`--max-broken-images`).

    A run on several processes calls `note` on all of them with what all of them met: each then stops at the same step.
    """

    def __init__(self, describe: Callable[[int], str], warn: Callable[[str], None], limit: int) -> None:
        self.describe = describe
        self.warn = warn
        self.limit = limit
        self.known: set[int] = set()

    @property
    def count(self) -> int:
        """Different pictures that could not be read so far."""
        return len(self.known)

    def note(self, indices: Iterable[int]) -> None:
        """Take the values of a batch's `broken`, and name each picture the first time.

        Raises:
            ValueError: beyond the limit.
        """
        for index in indices:
            if index == NO_PICTURE or index in self.known:
                continue
            self.known.add(index)
            description = self.describe(index)
            self.warn(f"skipped an image: {description}")
            if self.count > self.limit:
                raise ValueError(
                    f"more than {self.limit} images cannot be read, the last one: {description} (mend or remove them, "
                    "or raise --max-broken-images)"
                )

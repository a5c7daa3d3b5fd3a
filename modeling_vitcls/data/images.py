"""Sequences of images that are decoded on access, and the count of unreadable images.

    DatasetImages    a column of a `datasets.Dataset`: encoded images or paths

It returns PIL images, and raises ValueError for unreadable images, in one line with the name of the
image and the reason. Three methods do not decode images:

    select(indices)          a subset
    get_names()              the path of each image within the dataset, or the row number
    compute_content_keys()   a checksum of each image: training images are recognized under any name (splits_table.py)
"""

import base64
import hashlib
import io
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

import numpy as np
from PIL import ExifTags, Image
from torch import Tensor

from ..model.field_checks_vitcls import Size, open_regular_file
from ..model.image_processing_vitcls import get_image_formats, read_image, shorten_text
from ..runtime.errors import format_error
from ..runtime.files import find_file
from ..runtime.flags import expand_home


# Pillow warns about harmless properties of files, once per image and worker.
warnings.filterwarnings("ignore", module=r"PIL\.")

# More are not an accident: a wrong folder, another file type, or a full disk while they were copied.
MAX_UNREADABLE_IMAGES = 100
ROWS_PER_READ = 64  # Number of dataset rows that are read from disk at once
MIN_BASE64_LENGTH = 100  # Shorter texts are paths: photos are not that small
URL_SAFE = str.maketrans("-_", "+/")  # Another alphabet of base64
HARD = ("unsure", "unknown")  # Photos that a page showed for these reasons are harder than others
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass(frozen=True)
class LabeledImages:
    """Images and one label per image.

    A label is a class index, a list of class indices, or {task: class index}.
    """

    images: Any  # DatasetImages, or any other sequence of PIL images
    labels: Sequence[Any]
    # [N]; images of one group stay together: values of a column, or numbers (`Dataset.identify`)
    groups: np.ndarray | None = None
    keys: np.ndarray | None = None  # [N] uint64; checksums of the content, if they were computed
    # [N] why a person was asked about each image, "" if none was (answers.py); None without answers
    chosen: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_stratified(self) -> bool:
        """Whether held-out images can be selected by class: each image has one known label."""
        return all(isinstance(label, int) for label in self.labels)

    @property
    def is_counted(self) -> np.ndarray:
        """Whether each image measures a model, too [N]: not if a model chose it because it was unsure."""
        if self.chosen is None:
            return np.ones(len(self), bool)
        return ~np.isin(self.chosen, HARD)

    @property
    def class_ratio(self) -> float:
        """How many times larger the largest class is than the smallest; 1 for several labels."""
        if not self.is_stratified:
            return 1.0
        sizes = Counter(self.labels).values()
        return max(sizes) / min(sizes)

    def select(self, indices: Iterable[int]) -> "LabeledImages":
        """Select the images and labels at `indices`, in the given order."""
        indices = list(indices)
        arrays = (
            None if values is None else values[indices]
            for values in (self.groups, self.keys, self.chosen)
        )
        labels = [self.labels[index] for index in indices]
        return LabeledImages(self.images.select(indices), labels, *arrays)

    def divide(self, is_second: np.ndarray) -> tuple["LabeledImages", "LabeledImages"]:
        """Split the images by a mask [N]: False goes to the first part, True to the second."""
        return self.select(np.flatnonzero(~is_second)), self.select(np.flatnonzero(is_second))

    def join(self, other: "LabeledImages") -> "LabeledImages":
        """Append the images of another split, or of another dataset with the same classes."""
        arrays = (
            None if mine is None or theirs is None else np.concatenate([mine, theirs])
            for mine, theirs in (
                (self.groups, other.groups),
                (self.keys, other.keys),
                (self.chosen, other.chosen),
            )
        )
        return LabeledImages(self.images.join(other.images), [*self.labels, *other.labels], *arrays)

    def draw(self, num_images: int | None) -> "LabeledImages":
        """Draw `num_images` random images, always the same ones, in dataset order.

        Return all images if `num_images` is None or larger than the dataset. The images are drawn
        at random because datasets are often sorted by class.
        """
        if num_images is None or num_images >= len(self):
            return self
        # A permutation and not a choice: a larger number draws the same images, and more.
        indices = np.random.default_rng(0).permutation(len(self))[:num_images]
        return self.select(np.sort(indices).tolist())


@dataclass(frozen=True, eq=False)
class DatasetImages(Sequence):
    """Rows of a `datasets.Dataset` with one column of encoded images or paths.

    Encoded images have the type `datasets.Image(decode=False)`.
    """

    dataset: Any
    folder: Path  # Folder to which paths are relative
    rows: np.ndarray  # Row of each image

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> "DatasetImages":
        """Build a sequence from paths, or from encoded images {"path": ..., "bytes": ...}."""
        import datasets

        dataset = datasets.Dataset.from_dict({"image": values})
        return cls(dataset, Path(), np.arange(len(dataset)))

    @property
    def column(self) -> str:
        return self.dataset.column_names[0]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return decode_image(self.get_encoded_image(index), f"row {self.rows[index]}")

    def get_encoded_image(self, index: int) -> dict[str, Any]:
        """Return {"path": ..., "bytes": ...}, the input of `decode_image`.

        Raise IndexError at the end of the sequence, so that it can be iterated.
        """
        return to_encoded_image(self.dataset[int(self.rows[index])][self.column], self.folder)

    def join(self, other: "DatasetImages") -> "DatasetImages":
        """Append the images of another dataset. Files are not read."""
        import datasets

        parts = [self, other]
        if self.folder != other.folder or self.dataset.features != other.dataset.features:
            parts = [part.to_encoded() for part in parts]
        dataset = datasets.concatenate_datasets([part.dataset for part in parts])
        rows = np.append(parts[0].rows, len(parts[0].dataset) + parts[1].rows)
        return replace(parts[0], dataset=dataset, rows=rows)

    def to_encoded(self) -> "DatasetImages":
        """Name files by their whole path, so images of several folders can be joined."""
        import datasets

        values = [self.get_encoded_image(index) for index in range(len(self))]
        features = datasets.Features({"image": datasets.Image(decode=False)})
        dataset = datasets.Dataset.from_dict({"image": values}, features=features)
        return DatasetImages(dataset, Path.cwd(), np.arange(len(values)))

    def select(self, indices: Sequence[int]) -> "DatasetImages":
        return replace(self, rows=self.rows[np.asarray(indices, np.int64)])

    def get_names(self) -> list[str]:
        """Name each image by its path in the folder, or by its row. Images are not read."""
        import pyarrow
        import pyarrow.compute

        values = self.dataset.with_format("arrow")[:][self.column]  # The values are not copied
        is_encoded = pyarrow.types.is_struct(values.type)
        paths = pyarrow.compute.struct_field(values, "path") if is_encoded else values
        names = paths.take(pyarrow.array(self.rows)).to_pylist()
        if not is_encoded:
            names = [resolve_path(self.folder, name) for name in names]
        return [
            get_relative_path(name or "", self.folder) or str(row)
            for row, name in zip(self.rows, names, strict=True)
        ]

    def compute_content_keys(self) -> np.ndarray:
        """Compute a key of the content of each image. Several threads read the files."""
        keys: list[Any] = []
        with ThreadPoolExecutor() as pool:
            for rows in self.dataset.select(self.rows).iter(ROWS_PER_READ):
                images = [to_encoded_image(value, self.folder) for value in rows[self.column]]
                keys += pool.map(compute_key, images)
        return np.array(keys, np.uint64)


def read_size(images: Any, index: int) -> Size:
    """Read the height and width of an upright image; for a local file, only its header is read.

    Raise ValueError if the image cannot be read.
    """
    with (
        suppress(Exception),  # The image is decoded below
        open_encoded_image(images.get_encoded_image(index)) as stream,
        Image.open(stream, formats=get_image_formats()) as image,
    ):
        # Pillow turns the size of a TIFF itself
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4 and image.format != "TIFF"
        return image.size if is_turned else image.size[::-1]
    return images[index].size[::-1]  # type: ignore[no-any-return]


def open_encoded_image(encoded_image: dict[str, Any]) -> BinaryIO:
    """Open an encoded image for reading.

    If it is neither in memory nor a local file, the content is its path.
    """
    content = encoded_image["bytes"]
    path = encoded_image["path"] or ""
    if content is not None:
        return io.BytesIO(content)
    try:
        return open_regular_file(path)
    except (OSError, ValueError):  # An address, a file in an archive, a device, none, or no path
        return io.BytesIO(path.encode(errors="surrogateescape"))


def compute_content_key(stream: BinaryIO) -> int:
    """Compute the 63-bit key of an image from its encoded content, and close the stream.

    The whole file counts, because two uncompressed images may differ only in the middle. Reading it
    takes a twentieth of the time of decoding it.
    """
    with stream:
        digest = hashlib.file_digest(stream, partial(hashlib.blake2b, digest_size=8))  # type: ignore[arg-type]
    return int.from_bytes(digest.digest(), "little") >> 1


def compute_key(image: Any) -> int | None:
    """Compute the key of an encoded image or a path; None for arrays and PIL images."""
    if isinstance(image, Path):
        image = str(image)
    if not isinstance(image, dict | str | bytes):
        return None
    return compute_content_key(open_encoded_image(to_encoded_image(image, Path())))


NO_CONTENT_KEY = compute_content_key(io.BytesIO())  # Key of missing images and of empty files


def check_channels(image: Image.Image, pixels: Tensor, num_channels: int) -> None:
    """Raise ValueError if pixels [C, H, W] do not have `num_channels` channels.

    The image processor converts images to three channels only if `do_convert_rgb` is set.
    """
    if len(pixels) != num_channels:
        name = shorten_text(getattr(image, "filename", "in memory"))
        raise ValueError(
            f"the image {name} has {len(pixels)} channel(s), but the model requires {num_channels}"
        )


def check_is_no_address(path: str) -> None:
    """Refuse an address, because a table from others must cause no request from this network.

    The error names the path of a `file:` URI, such as those of Spark, Ray and Label Studio.
    """
    if path.startswith("file:/"):
        plain_path = f"/{unquote(path.removeprefix('file:')).lstrip('/')}"
        raise ValueError(
            f"{shorten_text(path)} is a URI. Pass the path: {shorten_text(plain_path)}"
        )
    if ADDRESS.match(path):
        raise ValueError(
            f"{shorten_text(path)} is an address, and images are read only from files. Download "
            f"it: `curl -O {path}`"
        )


def to_encoded_image(value: Any, folder: Path) -> dict[str, Any]:
    """Convert an encoded image or a path to {"path": ..., "bytes": ...}.

    Relative paths are joined to `folder`.
    """
    if isinstance(value, dict):
        return value
    if isinstance(value, bytes):
        return {"path": None, "bytes": value}
    return {"path": resolve_path(folder, value), "bytes": None}


def resolve_path(folder: Path, path: str | None) -> str:
    """Join a path to a folder.

    Addresses, data URIs and absolute paths are left unchanged, and base64 becomes a data URI. Return
    "" for a missing path.
    """
    if not path or "://" in path or path.startswith("data:"):
        return path or ""
    if (content := decode_base64(path)) is not None:
        return f"data:;base64,{base64.b64encode(content).decode()}"
    return find_file(str(folder / expand_home(path)))


def decode_base64(text: str | bytes) -> bytes | None:
    """Decode base64 as servers and tables have it: wrapped, URL-safe, or bytes of a data URI.

    Return None for anything else, such as a path or an encoded image.
    """
    if len(text) < MIN_BASE64_LENGTH or os.path.lexists(text):
        return None
    try:
        text = text if isinstance(text, str) else text.decode("ascii").rpartition("base64,")[2]
        text = "".join(text.split()).translate(URL_SAFE).rstrip("=")  # Programs wrap its lines
        return base64.b64decode(f"{text}{'=' * (-len(text) % 4)}", validate=True)
    except ValueError:
        return None


def get_relative_path(path: str, folder: Path) -> str:
    """Shorten the path of an image to the part within the dataset folder.

    Addresses, empty paths, and relative paths outside of the folder, such as names in a table, are left
    unchanged. A data URI has no path.
    """
    if path.startswith("data:"):
        return ""
    prefix = f"{folder}/"
    if path.startswith(prefix) and "/." not in path and "//" not in path:
        return path.removeprefix(prefix)
    if not path or "://" in path or not (path.startswith(prefix) or Path(path).is_absolute()):
        return path
    return Path(os.path.relpath(path, folder)).as_posix()


def decode_image(encoded_image: dict[str, Any], fallback_name: str) -> Image.Image:
    """Decode an image {"path": ..., "bytes": ...}, where one of the values may be None.

    Return the image in its stored mode and in upright orientation. Raise ValueError if the
    image is missing or cannot be decoded.

    The `filename` attribute of the image is the path (as in Pillow) or, if there is no path,
    `fallback_name`. Error messages contain this name.
    """
    content = encoded_image["bytes"]
    path = encoded_image["path"]
    if content is None and not path:
        raise ValueError(f"{fallback_name} has no image")
    try:
        if content is None:
            check_is_no_address(path)
        image = read_image(path if content is None else content)
    except ValueError as error:
        message = format_error(error)
        if content is not None:
            message = (
                f"cannot read the image {shorten_text(path) if path else fallback_name}: {message}"
            )
        raise ValueError(message) from error
    image.filename = path or fallback_name  # type: ignore[union-attr, attr-defined]
    return image


def count_unreadable(
    counted: set[int], errors: Mapping[int, str], warn: Callable[[str], None]
) -> None:
    """Add unreadable images to those that are counted already, with a warning for each new one.

    Every process calls it with the unreadable images of all processes, so that all processes stop
    at the same step.

    Args:
        counted: indices of the images so far, to which the new ones are added.
        errors: index -> error message.
        warn: function that prints a one-line warning.

    Raises:
        ValueError: if their number exceeds `MAX_UNREADABLE_IMAGES`.
    """
    for index, message in errors.items():
        if index in counted:
            continue
        counted.add(index)
        warn(f"skipped an image: {message}")
        if len(counted) > MAX_UNREADABLE_IMAGES:
            raise ValueError(
                f"more than {MAX_UNREADABLE_IMAGES} images cannot be read; the last: {message}. "
                "Remove these images"
            )

"""Inputs of a prediction, and image preprocessing.

An input is a sequence of records: name and undecoded image.

    PATHS       a list           known at the start
    datasets    DatasetRecords   random access with the `datasets` library

Several threads read, decode and preprocess images ahead of the forward pass (`prepare_ahead` in
image_pass.py).
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from inspect import iscoroutinefunction
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.ExifTags import Base
from torch import Tensor

from ..data.aspect_ratio import MAX_MEASURED_IMAGES
from ..data.columns import build_images, find_image_column
from ..data.image_folder import (
    IMAGE_SUFFIXES,
    ROOT,
    SKIPPED_FOLDERS,
    get_remedy,
    make_printable,
    scan_folder,
    warn_about_skipped,
)
from ..data.images import (
    DatasetImages,
    check_is_no_address,
    compute_key,
    decode_base64,
    open_encoded_image,
    resolve_path,
    to_encoded_image,
)
from ..data.in_memory import get_title
from ..data.sources import choose_split, open_source
from ..hub.model_files import SPLITS_FILE
from ..hub.model_folder import ModelFolder
from ..model.image_processing_vitcls import (
    SOURCE_TYPES,
    ViTCLSImageProcessor,
    flatten_images,
    pil_to_tensor,
    shorten_text,
)
from ..runtime.errors import format_error, format_name_list, warn_on_first_process
from ..runtime.flags import expand_home
from ..speed.fast_images import compute_pixels
from .options import PredictOptions


COMPOSITE = "composite"  # What an editor of images shows: the background and all layers
MAX_SHARED_PIXELS = 25_000_000  # Images with more are decoded one at a time
LARGE_IMAGE = Lock()
EQUAL_PIXELS = "almost of one color after reading, such as white on transparent, dark 16-bit values, or an index map"
OVERVIEW, MASK = 1, 4  # Bits of a TIFF's tag NewSubfileType
MIN_SPREAD = 64  # Gray levels of 255; a scan that uses 14 of 16 bits has fewer


class ImageRecord(NamedTuple):
    """One image of an input."""

    name: str
    # Path, data URI, encoded bytes, or any other input of the image processor; None: no image; an
    # error: a file object that cannot be read
    content: Any


# Lists --------------------------------------------------------------------------------------------


def list_records(paths: Iterable[str]) -> tuple[list[ImageRecord], list[str]]:
    """List the given files, the images in the given folders, and the folders in these that are left out.

    Images in a folder are sorted by name. Other files, and folders that are left out, cause a
    warning. Raise ValueError if there are no images.
    """
    files: list[str] = []
    folders: list[str] = []
    other_files: list[str] = []
    skipped_folders: list[str] = []
    for path in paths:
        check_is_no_address(path)
        if "*" in path and not os.path.lexists(path):
            raise ValueError(
                f"{path} does not exist. Pass the folder {Path(path).parent}, or files: patterns are "
                "expanded by a shell if they are not in quotes"
            )
        if not os.path.isdir(path):  # noqa: PTH112  # False for names of any length
            files.append(path)
            continue
        folders.append(path)
        folder = scan_folder(Path(path))
        unused = (*folder.other_files, *folder.tables, *folder.metadata)
        for name in (*folder.images, *unused):
            # The name of an image in `unused` is not valid text
            is_image = Path(name).suffix.lower() in IMAGE_SUFFIXES
            (files if is_image else other_files).append(str(Path(path, name)))
        skipped_folders += [
            str(Path(path, name)) for name in folder.skipped_folders if name != ROOT
        ]

    where = format_name_list(folders)
    warn_about_skipped(where, skipped_folders, SKIPPED_FOLDERS)
    if not files:
        found = f", but other files: {format_name_list(other_files)}" if other_files else ""
        raise ValueError(
            f"there are no images in {', '.join(paths)}{found}. "
            f"{get_remedy(other_files) or 'Pass image files, or folders of images'}"
        )
    warn_about_skipped(where, other_files, "files that are no images")
    if number := len(files) - len(set(map(os.path.abspath, files))):
        warn_on_first_process(
            f"photos that are in several of these paths ({number:,}) count each time. Name them once"
        )
    return [ImageRecord(get_source_name(file), file) for file in files], skipped_folders


def list_sources(images: Any) -> list[Any]:
    """List images of any kind as paths, data URIs, encoded images, PIL images and arrays.

    Args:
        images: one image, a file object, a batch [N, ...], or an iterable of these.

    Raises:
        ValueError: If `images` has another type.
    """
    is_single = isinstance(images, (*SOURCE_TYPES, Image.Image, Mapping)) or is_buffer(images)
    is_array = getattr(images, "ndim", 1) > 1
    if not is_single and not is_array and not hasattr(images, "read"):
        if not isinstance(images, Iterable):
            raise ValueError(
                f"`images` cannot be of type {type(images).__name__}. Pass a path, bytes, a file "
                "object, a PIL image, an array, a tensor, or a list of these"
            )
        images = list(images)
        # A gallery of Gradio has pairs of an image and its caption
        images = [image[0] if is_captioned(image) else image for image in images]
    return [expand_home(read_file_object(image)) for image in flatten_images(images)]


def is_captioned(image: Any) -> bool:
    """Tell whether an image in memory has its caption, or None, beside it."""
    return (
        isinstance(image, tuple)
        and len(image) == 2
        and isinstance(image[1], str | None)
        and not isinstance(image[0], SOURCE_TYPES)
    )


def is_buffer(image: Any) -> bool:
    """Check whether an image is encoded bytes in memory: a memoryview, or from np.fromfile or OpenCV."""
    is_array = isinstance(image, np.ndarray) and image.ndim == 1 and image.dtype == np.uint8
    return is_array or isinstance(image, memoryview)


def read_file_object(image: Any) -> Any:
    """Read a file object or base64.

    Other images are returned unchanged. For a file object that cannot be read, the error is
    returned: it is the answer for this image alone (`prepare_image`).
    """
    if isinstance(image, str | bytes):
        return decode_base64(image) or image
    if not hasattr(image, "read"):
        return image
    try:
        if iscoroutinefunction(image.read):  # An upload of FastAPI, which has a file
            image = getattr(image, "file", image)
        if hasattr(image, "seekable") and image.seekable():  # It may have been read before
            image.seek(0)
        content = image.read()
    except Exception as error:  # A closed file, or a file of another library
        return ValueError(f"cannot read the file object: {format_error(error)}")
    if not isinstance(content, bytes):
        return ValueError(
            f"the file object returns {type(content).__name__}, not bytes. Open it with mode 'rb', or "
            "pass its bytes"
        )
    return content or ValueError("the file object is empty, or has been read before")


def wrap_images(images: Any) -> list[ImageRecord]:
    """Build an input of images of any kind (`list_sources`), also in folders.

    Images in memory are named by index. What is neither a file nor a folder of images has a row with
    the error in a list, and raises ValueError alone.
    """
    records: list[ImageRecord] = []
    for index, image in enumerate(list_sources(images)):
        if not isinstance(image, str | Path):
            records.append(build_record(index, image, Path()))
            continue
        try:
            records += list_records([str(image)])[0]
        except (ValueError, OSError) as error:  # An address, a pattern, a folder without images
            if isinstance(images, str | os.PathLike):
                raise
            # The other images of the list are still predicted
            records.append(
                ImageRecord(get_source_name(str(image)), ValueError(format_error(error)))
            )
    return records


def get_source_name(source: str) -> str:
    """Name an image by its path, or by the start of a data URI or of base64."""
    is_path = not resolve_path(Path(), source).startswith("data:")
    return make_printable(source) if is_path else f"{source[:40]}..."


# Datasets -----------------------------------------------------------------------------------------


def build_record(index: int, value: Any, folder: Path) -> ImageRecord:
    """Build the record of an image or image path in a dataset.

    Relative paths are resolved against `folder`. The name of an image without a path is its index.
    """
    if isinstance(value, str):
        return ImageRecord(get_source_name(value), resolve_path(folder, value))
    if isinstance(value, dict):
        name = value.get("path")
        encoded = value.get("bytes")
        content = name if encoded is None else encoded
        if content is None and value:
            content = find_image(value)
        return ImageRecord(make_printable(name or str(index)), content)
    return ImageRecord(str(index), value.tobytes() if is_buffer(value) else value)


def find_image(value: Mapping[str, Any]) -> Any:
    """Find the image in a row of a dataset, or in what an editor of images returns."""
    for name in ("image", COMPOSITE):
        if value.get(name) is not None:
            return value[name]
    return ValueError(
        f"an image is a dict with the keys {format_name_list(sorted(map(str, value)))}. Pass its image"
    )


@dataclass(frozen=True, eq=False)
class DatasetRecords(Sequence):
    """The rows of a dataset on disk, each of which is read on access."""

    images: DatasetImages

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        value = self.images.dataset[index][self.images.column]
        return build_record(index, value, self.images.folder)


def open_input(options: PredictOptions) -> tuple[Sequence[ImageRecord], list[str]]:
    """Open the input that `paths` or `dataset` specifies, and list the folders that are left out.

    Labels are not required. Raise ValueError if the input has no images or the dataset cannot be
    read, and OSError if the dataset cannot be found.
    """
    if options.dataset is None:
        found, left_out = list_records(options.paths)
        if not any(os.path.lexists(record.content) for record in found):
            raise ValueError(
                f"{shorten_text(found[0].content)} does not exist. Pass image files, or folders of "
                "images"
            )
        return found, left_out

    source = open_source(options.dataset, label_columns=None)
    title = get_title(options.dataset)
    split = source.tables[choose_split(options.split, title, list(source.tables))]
    column = find_image_column(title, split, source.folder, options.image_column)
    return DatasetRecords(build_images(split, column, source.folder, title)), []


def compute_checksum(content: Any) -> str | None:
    """Compute the checksum of a path or an encoded image; None for arrays and PIL images."""
    key = compute_key(content)
    return None if key is None else f"{key:016x}"


# Preprocessing ------------------------------------------------------------------------------------


def prepare_image(processor: ViTCLSImageProcessor, content: Any, index: int) -> Tensor | str:
    """Read, decode and preprocess one image, or tell why it cannot be used.

    Args:
        processor: The image processor of the model.
        content: The content of the record.
        index: Index of the record in the input.
    """
    if content is None:
        return f"row {index} has no image"
    if isinstance(content, ValueError):
        return str(content)
    # The processor would take the first of several images, and request addresses among them
    if isinstance(content, list | tuple) or (getattr(content, "ndim", 0) > 3 and len(content) > 1):
        return f"row {index} has a list of length {len(content)}. Pass one image per row"
    try:
        if isinstance(content, str):
            check_is_no_address(content)
        with LARGE_IMAGE if is_large(content) else nullcontext():
            return compute_pixels(processor, content)
    except (ValueError, OSError, RuntimeError) as error:
        return format_error(error)


def is_large(content: Any) -> bool:
    """Tell from its header whether a file is large in memory: a scan of 20 kB may take gigabytes."""
    with (
        suppress(Exception),  # Images in memory, and unreadable ones
        open_encoded_image(to_encoded_image(content, Path())) as stream,
        Image.open(stream) as image,
    ):
        return image.width * image.height > MAX_SHARED_PIXELS
    return False


def find_note(content: Any, bit_depth: int) -> str | None:
    """Note what a model does not see of an image: other pages, or anything in almost equal pixels.

    Args:
        content: The content of a record.
        bit_depth: Of the image processor.
    """
    with (
        suppress(Exception),  # Other formats, images in memory, and unreadable ones
        open_encoded_image(to_encoded_image(content, Path())) as stream,
        Image.open(stream, formats=("TIFF", "PNG", "GIF", "WEBP", "BMP", "JPEG2000")) as image,
    ):
        # Reading may hide what such images show, so they are decoded here. Gray ones may have the
        # numbers of classes (0, 1, 2) instead of gray levels
        is_gray = image.mode == "L" or image.mode.startswith("I")
        is_odd = is_gray or image.has_transparency_data or re.search(";(16|32)", str(image.tile))
        if has_another_page(image):
            return "page 1 of several"
        if is_odd and image.width * image.height <= MAX_SHARED_PIXELS:
            pixels = pil_to_tensor(image, to_rgb=True, bit_depth=bit_depth)
            if pixels.max() - pixels.min() < MIN_SPREAD:
                return EQUAL_PIXELS
    return None


def has_another_page(image: Image.Image) -> bool:
    """Tell whether a file has a second page, beside the overviews and masks of its first."""
    page = 1
    with suppress(EOFError):  # Counting thousands of pages would take minutes
        while True:
            image.seek(page)
            kind = getattr(image, "tag_v2", {}).get(Base.NewSubfileType, 0)
            if not kind & (OVERVIEW | MASK):
                image.seek(0)
                return True
            page += 1
    image.seek(0)
    return False


def count_notes(images: Any, bit_depth: int) -> list[str]:
    """Count the notes of up to `MAX_MEASURED_IMAGES` images of a dataset, evenly spaced."""
    places = range(0, len(images), 1 + len(images) // MAX_MEASURED_IMAGES)
    notes = [find_note(images.get_encoded_image(place), bit_depth) for place in places]
    return [
        f"{number:,} of {len(places):,} images that were looked at: {note}"
        for note, number in Counter(filter(None, notes)).items()
    ]


# Images that trained a model ----------------------------------------------------------------------

# The list is splits.parquet (splits_table.py). Without it, nothing here imports pandas: a photo is
# predicted without libraries of tables.


def read_trained_checksums(folder: ModelFolder) -> frozenset[str]:
    """Read the checksums of the images that trained a model; none if its folder lists no images."""
    if not (folder.path / SPLITS_FILE).is_file():
        return frozenset()

    from ..data.splits_table import list_trained_keys, read_splits  # imports pandas

    return frozenset(f"{key:016x}" for key in list_trained_keys(read_splits(folder)))

"""Datasets in memory for the Python functions (cli/api.py).

Each dataset is converted to a named `datasets.DatasetDict`:

    datasets.Dataset, DatasetDict         used unchanged; columns are selected as for files (columns.py)
    pandas.DataFrame                      its columns, as in a table; images are paths (also `Path`) or encoded bytes
    list of (image, label)                images: PIL images, arrays, tensors, encoded bytes or paths
    torch.utils.data.Dataset              items as in a list; images are read once and kept in memory as PNG
    {"train": ..., "test": ...}           datasets of the types above, by split

    name = add_dataset(data)             # "memory:3f2a...", the value of `DataOptions.dataset` in this process

A label is a class name, a class index, a list of class names, a dict with the label of each task, or
None, NaN, NaT or pandas.NA for a missing label. The name is a digest of the data, so that a run can be
resumed with the same data; in messages, it is "the DataFrame". Paths are relative to the working folder.
"""

import hashlib
import io
import os
from collections.abc import Mapping
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import to_pil_image

from ..model.image_processing_vitcls import image_to_tensor, pil_to_array
from ..runtime.errors import format_error
from .cells import spell_label
from .images import resolve_path
from .tables import build_column


MEMORY_PREFIX = "memory:"
DATASETS: dict[str, Any] = {}  # `DatasetDict` by name
TITLES: dict[str, str] = {}  # "the DataFrame" by name
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # Others are stored as `predict` reads them


def add_dataset(data: Any) -> str:
    """Store a dataset in `DATASETS` and return its name.

    Raise ValueError if an item is not an (image, label) pair or cannot be stored, and TypeError if
    the dataset has no length or no items.
    """
    import datasets
    import pyarrow

    data_by_split = data if isinstance(data, Mapping) else {"train": data}
    try:
        splits = datasets.DatasetDict(
            {split: convert_split(data) for split, data in data_by_split.items()}
        )
    except (pyarrow.ArrowException, UnicodeEncodeError) as error:
        raise ValueError(
            f"cannot use the {type(data).__name__} ({format_error(error)}). Pass images as paths in "
            "UTF-8 or as encoded bytes, and labels of one type"
        ) from error
    fingerprints = [f"{split} {dataset._fingerprint}" for split, dataset in splits.items()]
    name = f"{MEMORY_PREFIX}{hashlib.sha256(repr(fingerprints).encode()).hexdigest()[:16]}"
    DATASETS[name] = splits
    TITLES[name] = f"the {type(data).__name__}"
    return name


def get_title(dataset: str) -> str:
    """Name a dataset for people, who don't know the names of data in memory."""
    return TITLES.get(dataset, dataset)


def get_dataset(name: str) -> Any:
    """Look up the `datasets.DatasetDict` with this name.

    Raise ValueError if this process has no such dataset.
    """
    if name not in DATASETS:
        raise ValueError(
            f"{name} exists only in the memory of another process. Pass the data again"
        )
    return DATASETS[name]


def convert_split(data: Any) -> Any:
    """Convert one split to a `datasets.Dataset`."""
    import datasets
    import pandas as pd
    import pyarrow

    if isinstance(data, datasets.Dataset):
        if data.format["type"] == "custom":
            raise ValueError(
                "the dataset has a transform, which would be ignored. Pass "
                "dataset.with_format(None)"
            )
        # Tensors are no labels. Another format would change the name of the data.
        return data if data.format["type"] is None else data.with_format(None)
    if isinstance(data, pd.DataFrame):
        # An index with a name was a column, as after `pd.read_csv(..., index_col=0)`
        if data.index.names != [None]:
            data = data.reset_index(drop=not {*data.columns}.isdisjoint(data.index.names))
        data = data.apply(lambda column: spell_column(column) if column.dtype == object else column)
        return datasets.Dataset.from_pandas(data, preserve_index=False)
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise TypeError(
            f"the data is a {type(data).__name__}, whose items have no numbers. Pass a path, a "
            "datasets.Dataset, a DataFrame, a torch Dataset with a length, or a list of (image, label) "
            "pairs"
        )
    rows = [convert_pair(data[index], index) for index in range(len(data))]
    columns = {"image": pyarrow.array([row["image"] for row in rows], datasets.Image().pa_type)}
    for column in dict.fromkeys(column for row in rows for column in row if column != "image"):
        values = pd.Series([row.get(column) for row in rows], dtype=object)
        # Otherwise, the texts of NaT and of the NA of pandas would become classes
        columns[column] = build_column(values.where(values.notna(), None).tolist())
    types: dict[str, Any] = {
        "image": datasets.Image()
    }  # Types that the values of a column do not show
    names = find_class_names(data)
    if names and "label" in columns:
        feature = datasets.ClassLabel(names=names)
        if pyarrow.types.is_list(columns["label"].type):
            feature = datasets.List(feature)
        # Truth values are names, and no class indices
        if not pyarrow.types.is_boolean(columns["label"].type):
            columns["label"] = datasets.table.cast_array_to_feature(columns["label"], feature)
            types["label"] = feature
    table = pyarrow.table(columns)
    features = datasets.Features({**datasets.Features.from_arrow_schema(table.schema), **types})
    return datasets.Dataset(table, datasets.DatasetInfo(features=features))


def spell_column(column: Any) -> Any:
    """Write paths as text, and numbers if others of the column are text: an Arrow column has one type."""
    column = column.map(spell_path)
    types = {Real if isinstance(each, Real) else type(each) for each in column.dropna()}
    return column.map(spell_label) if types == {Real, str} else column


def spell_path(value: Any) -> Any:
    """Write a `Path` as text, which Arrow requires; other values are returned unchanged."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def find_class_names(data: Any) -> list[str]:
    """Find the class names of a torchvision dataset, of the dataset that it is a part of, or of its parts.

    Raise ValueError if its parts have different ones: the index of a label has several meanings then.
    """
    while not hasattr(data, "classes") and hasattr(data, "dataset"):
        data = data.dataset
    parts = {tuple(find_class_names(part)) for part in getattr(data, "datasets", ())}
    if len(parts) > 1:
        raise ValueError(
            f"the parts of the {type(data).__name__} have different classes: {sorted(parts)[:2]}. Pass a "
            "list of (image, name of the class) pairs"
        )
    return [str(name) for name in getattr(data, "classes", None) or next(iter(parts), ())]


def convert_pair(pair: Any, index: int) -> dict[str, Any]:
    """Convert an (image, label) pair to a row of a `datasets.Dataset`."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(
            f"item {index} of the dataset is of type {type(pair).__name__} and not an (image, "
            "label) pair. Pass pairs, or a DataFrame or datasets.Dataset with columns for both"
        )
    image, label = pair
    if hasattr(label, "tolist"):  # NumPy and torch values
        label = label.tolist()
    labels = label if isinstance(label, dict) else {"label": label}
    return {"image": encode_image(image, index), **labels}


def read_own_file(image: Any) -> bytes | None:
    """Read the file that an image was opened from, if it still shows the same pixels.

    With the same bytes, a photo is recognized in other datasets.
    """
    try:
        content = Path(image.filename).read_bytes()
        with Image.open(io.BytesIO(content)) as stored:
            return content if image == stored else None
    except (OSError, AttributeError, TypeError):
        return None


def encode_image(image: Any, index: int) -> Any:
    """Encode an image as {"path": ..., "bytes": ...}, which keeps it small in memory.

    An image that was opened from a file keeps its bytes. Others are encoded as PNG, which is lossless
    but has no EXIF orientation: it is applied first. Arrays and tensors are [H, W], [H, W, C] or
    [C, H, W], of integers or of floats from 0 to 1.
    """
    if isinstance(image, str | os.PathLike):
        return {"path": resolve_path(Path(), os.fspath(image)), "bytes": None}
    content = image if isinstance(image, bytes) else read_own_file(image)
    if content is not None:
        return {"path": None, "bytes": content}
    try:
        if not isinstance(image, Image.Image):
            image = to_pil_image(image_to_tensor(torch.as_tensor(image), to_rgb=False))
        with suppress(SyntaxError):  # Damaged EXIF data have no orientation
            image = ImageOps.exif_transpose(image)
        if image.mode not in PNG_MODES:
            image = Image.fromarray(pil_to_array(image))
        image.save(file := io.BytesIO(), "PNG")
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"item {index} of the dataset has no valid image: {error}") from error
    return {"path": None, "bytes": file.getvalue()}

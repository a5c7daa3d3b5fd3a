"""Read image folders (one subfolder of images per class) as `datasets.DatasetDict`, without copying images.

    photos/cat/1.jpg, photos/dog/2.jpg                  classes cat, dog; one split, "train"
    photos/cat/2024/may/1.jpg                           class cat: images may be at any depth in a class folder
    photos/train/cat/1.jpg, photos/Testing/cat/2.jpg    splits "train" and "test"
    photos/bus/1.jpg, photos/train/2.jpg                classes bus, train
    photos/1.jpg                                        no classes: only for predictions and pre-training
    photos/metadata.csv (or .jsonl, .parquet)           columns of the table; `file_name` contains image paths

Splits are recognized only by the names of the first-level folders (`SPLIT_NAMES`, case-insensitive). Other folder and
file names are not interpreted. The first-level folders are splits if all first-level folders with images have split
names. If only some of these folders have split names, all first-level folders are classes. An error is raised if one
of these folders has a split name and contains class folders, because the structure is then ambiguous.

`ImageFolder.notes` lists the unused files (other file types, hidden files, images next to class folders). A folder
that contains tables, and at most as many images as tables, is not an image folder, and is read by `datasets`.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..errors import format_error
from ..files import replace_control_characters


if TYPE_CHECKING:
    import pyarrow


IMAGE_SUFFIXES = frozenset(
    ".apng .avif .avifs .bmp .dib .gif .ico .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .mpo .pbm .pcx .pgm "
    ".png .pnm .ppm .tga .tif .tiff .webp".split()
)
TABLE_SUFFIXES = frozenset(".arrow .csv .json .jsonl .parquet .tar .tsv .zip".split())
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

# Split by lowercase folder name.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SPLITS = ("train", "validation", "test")
MAX_SHOWN_NAMES = 3  # maximum number of names in a message


@dataclass(frozen=True)
class ImageFolder:
    """The files of an image folder. Paths are sorted, are relative to `path`, and use "/" as the separator."""

    path: Path
    images: list[str]
    metadata: list[str]
    tables: list[str]
    other_files: list[str]  # hidden files, files of other types, and files with names that are not valid text
    empty_folders: list[str]  # first-level folders without images
    notes: list[str] = field(default_factory=list)  # one line for each kind of unused file or unexpected structure

    @property
    def is_image_folder(self) -> bool:
        """Return whether the folder is read as an image folder, and not as a folder of tables."""
        return bool(self.images) and (bool(self.metadata) or len(self.images) > len(self.tables))


def scan_folder(path: Path) -> ImageFolder:
    """Return the files of a folder and of all subfolders. Symbolic links to folders are followed, except cycles."""
    files: dict[str, list[str]] = {"images": [], "metadata": [], "tables": [], "other_files": []}
    for name in list_files(path, ""):
        files[get_file_kind(name)].append(name)
    folders_with_images = {PurePosixPath(name).parts[0] for name in files["images"]}
    folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not is_hidden(entry.name))
    return ImageFolder(path, **files, empty_folders=[name for name in folders if name not in folders_with_images])


def list_files(root: Path, folder: str, parents: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the paths of the files below `root`/`folder`, sorted within each folder. A symbolic link to a folder that
    contains the link is not followed."""
    real_path = os.path.realpath(root / folder)
    if real_path in parents:
        return
    for entry in sorted(os.scandir(root / folder), key=lambda entry: entry.name):
        name = f"{folder}/{entry.name}" if folder else entry.name
        if entry.is_dir():
            yield from list_files(root, name, (*parents, real_path))
        else:
            yield name


def get_file_kind(name: str) -> str:
    """Return the name of the `ImageFolder` field to which a file belongs."""
    path = PurePosixPath(name)
    if any(map(is_hidden, path.parts)) or make_printable(name) != name:
        return "other_files"
    if path.name in METADATA_FILES:
        return "metadata"
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return "images"
    return "tables" if path.suffix.lower() in TABLE_SUFFIXES else "other_files"


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden or is a `__MACOSX` folder, which macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def make_printable(name: str) -> str:
    """Return a file name as valid text, with invalid bytes replaced."""
    return os.fsencode(name).decode("utf-8", errors="replace")


def read_image_folder(folder: ImageFolder, use_labels: bool) -> Any:
    """Return a `datasets.DatasetDict` of the splits, and add notes about unused files to `folder.notes`. Raise
    ValueError if labels are used and there are no class folders, or if the split folders are ambiguous.

    With metadata files, the columns are `image` and the columns of these files. Otherwise, the columns are `image`
    and, if labels are used, `label`. If labels are not used, images at any depth are included.
    """
    import datasets

    splits, has_split_folders = divide_into_splits(folder)
    if folder.metadata:
        datasets_by_split = read_metadata(folder, splits, has_split_folders)
    elif use_labels:
        datasets_by_split = label_by_folder(folder, splits, depth=1 if has_split_folders else 0)
    else:
        datasets_by_split = {split: build_split(folder, split, names) for split, names in splits.items()}
    add_unused_note(folder, sorted([*folder.other_files, *folder.tables]), "of other types")
    if folder.empty_folders:
        folder.notes.append(f"{folder.path}: folders without images: {shorten_list(folder.empty_folders)}")
    return datasets.DatasetDict(datasets_by_split)


# Splits and classes --------------------------------------------------------------------------------------------------


def divide_into_splits(folder: ImageFolder) -> tuple[dict[str, list[str]], bool]:
    """Return the images of each split, and whether the first-level folders are splits (see the module docstring).

    Raises:
        ValueError: if two folder names refer to the same split, or it is ambiguous whether a folder is a split.
    """
    images_by_folder: dict[str, list[str]] = {}
    for name in folder.images:
        if "/" in name:
            images_by_folder.setdefault(name.partition("/")[0], []).append(name)
    split_folders = [folder_name for folder_name in images_by_folder if folder_name.lower() in SPLIT_NAMES]
    if not split_folders or len(split_folders) < len(images_by_folder):
        if not folder.metadata:
            check_class_folders(folder, images_by_folder, split_folders)
        return {"train": folder.images}, False
    splits: dict[str, str] = {}
    for folder_name in split_folders:
        split = SPLIT_NAMES[folder_name.lower()]
        if split in splits:
            raise ValueError(
                f"{folder.path}: the folder names {splits[split]!r} and {folder_name!r} both stand for the split "
                f"{split!r}. Merge the folders, or rename one of them"
            )
        splits[split] = folder_name
    add_unused_note(folder, [name for name in folder.images if "/" not in name], "next to the split folders")
    return {split: images_by_folder[splits[split]] for split in SPLITS if split in splits}, True


def check_class_folders(folder: ImageFolder, images_by_folder: dict[str, list[str]], split_folders: list[str]) -> None:
    """Raise ValueError if a folder with a split name contains folders of images, and other folders have no split
    names."""
    for folder_name in split_folders:
        subfolders = sorted({name.split("/")[1] for name in images_by_folder[folder_name] if name.count("/") > 1})
        if subfolders:
            other_folder = next(name for name in images_by_folder if name not in split_folders)
            raise ValueError(
                f"{folder.path}: the folder {folder_name!r} has the name and the class folders of a split "
                f"({shorten_list(subfolders)}), but the folder {other_folder!r} does not have the name of a split "
                f"({', '.join(SPLITS)}). If the folders are splits, move {other_folder!r} elsewhere. If the folders "
                f"are classes, rename {folder_name!r}"
            )


def label_by_folder(folder: ImageFolder, splits: dict[str, list[str]], depth: int) -> dict[str, Any]:
    """Return the dataset of each split. The label of an image is the name of its class folder. `depth` is the number
    of folders above the class folders. A split without class folders is skipped. Raise ValueError if no split has
    class folders."""
    import datasets

    all_names = chain.from_iterable(splits.values())
    labels: dict[str, str | None] = {name: next(iter(name.split("/")[depth:-1]), None) for name in all_names}
    classes = sorted({label for label in labels.values() if label is not None})
    unlabeled_names = [name for name, label in labels.items() if label is None]
    if not classes:
        parent = folder.path / PurePosixPath(unlabeled_names[0]).parent
        raise ValueError(
            f"{parent} contains images, but no class folders. Move the images of each class into a separate folder "
            f"({parent / 'CLASS' / 'IMAGE'}), or set --dataset to a table of images and labels"
        )
    add_unused_note(folder, unlabeled_names, "outside of class folders")
    deep_folders = sorted({str(PurePosixPath(name).parent) for name in folder.images if name.count("/") > depth + 1})
    if deep_folders:
        folder.notes.append(
            f"{folder.path}: images in subfolders of class folders ({shorten_list(deep_folders)}) belong to the class "
            "of the class folder"
        )
    feature = datasets.ClassLabel(names=classes)
    datasets_by_split = {}
    for split, names in splits.items():
        if labeled_names := [name for name in names if labels[name] is not None]:
            indices = feature.str2int([labels[name] for name in labeled_names])
            datasets_by_split[split] = build_split(folder, split, labeled_names, indices, feature)
    return datasets_by_split


def describe_single_class(dataset: str, name: str) -> str:
    """Return the error message for a dataset with only one class; the dataset may be an image folder."""
    path = Path(dataset)
    if not path.is_dir():
        return f"a classifier requires two or more classes, but all images of {dataset} have the label {name!r}"
    parents = [path, *(entry for entry in sorted(path.iterdir()) if entry.name.lower() in SPLIT_NAMES)]
    folders = [parent / name for parent in parents if (parent / name).is_dir()]
    subfolder_names = sorted({entry.name for folder in folders for entry in folder.iterdir() if entry.is_dir()})
    hint = ""
    if subfolder_names:
        names = shorten_list(subfolder_names)
        hint = f". If the subfolders ({names}) are the classes or splits, set --dataset {folders[0]}"
    return (
        f"a classifier requires two or more classes, but {path} has a single class folder, {name!r}. Move the images "
        f"of each class into a separate folder{hint}"
    )


# Tables --------------------------------------------------------------------------------------------------------------


def build_split(
    folder: ImageFolder, split: str, names: list[str], labels: list[int] | None = None, feature: Any = None
) -> Any:
    """Return a `datasets.Dataset` of image paths and, if given, labels."""
    import datasets
    import pyarrow

    columns: dict[str, Any] = {"image": build_image_column(folder, names)}
    features = datasets.Features({"image": datasets.Image()})
    if labels is not None:
        columns["label"] = pyarrow.array(labels, pyarrow.int64())
        features["label"] = feature
    return build_dataset(folder, split, names, pyarrow.table(columns), features)


def build_image_column(folder: ImageFolder, names: list[str]) -> "pyarrow.Array":
    """Return a column of image paths in the storage format of `datasets.Image`."""
    import pyarrow

    paths = pyarrow.array([str(folder.path / name) for name in names], pyarrow.string())
    return pyarrow.StructArray.from_arrays([pyarrow.nulls(len(names), pyarrow.binary()), paths], ["bytes", "path"])


def build_dataset(folder: ImageFolder, split: str, names: list[str], table: "pyarrow.Table", features: Any) -> Any:
    """Return a `datasets.Dataset` in memory. The fingerprint is a hash of the columns, and of the names, sizes and
    modification times of the files."""
    import datasets

    digest = hashlib.sha256(repr(table.drop(["image"]).to_pydict()).encode())
    for name in names:
        try:
            stat = (folder.path / name).stat()
        except OSError:  # an error is reported when the image is read
            continue
        digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return datasets.Dataset(
        datasets.table.InMemoryTable(table),
        info=datasets.DatasetInfo(features=features),
        split=datasets.NamedSplit(split),
        fingerprint=digest.hexdigest()[:16],
    )


def read_metadata(folder: ImageFolder, splits: dict[str, list[str]], has_split_folders: bool) -> dict[str, Any]:
    """Return the dataset of each split: the rows of the metadata files, and the images at the paths in `file_name`.
    Raise ValueError if a metadata file cannot be read, has no column `file_name`, or contains the path of an image
    outside the folder of the file."""
    import datasets
    import pyarrow

    tables = [read_metadata_file(folder, file) for file in folder.metadata]
    try:
        table = pyarrow.concat_tables([table for table, _ in tables], promote_options="permissive")
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        files = ", ".join(folder.metadata)
        raise ValueError(
            f"the columns of {files} in {folder.path} have different types: {format_error(error)}"
        ) from error
    names = [name for _, images in tables for name in images]
    unlisted_names = sorted(set(folder.images) - set(names))
    add_unused_note(folder, unlisted_names, "not listed in a metadata file")
    features = datasets.Features({"image": datasets.Image(), **datasets.Features.from_arrow_schema(table.schema)})
    datasets_by_split = {}
    for split in splits:
        rows = [
            row
            for row, name in enumerate(names)
            if not has_split_folders or SPLIT_NAMES.get(name.partition("/")[0].lower()) == split
        ]
        if rows:
            images = [names[row] for row in rows]
            columns = table.take(rows).add_column(0, "image", build_image_column(folder, images))
            datasets_by_split[split] = build_dataset(folder, split, images, columns, features)
    return datasets_by_split


def read_metadata_file(folder: ImageFolder, file: str) -> tuple["pyarrow.Table", list[str]]:
    """Return the columns of a metadata file except `file_name`, and the image paths in the `file_name` column."""
    import pandas
    import pyarrow
    import pyarrow.json
    import pyarrow.parquet

    path = folder.path / file
    try:
        if path.suffix == ".csv":
            table = pyarrow.Table.from_pandas(pandas.read_csv(path), preserve_index=False).replace_schema_metadata()
        elif path.suffix == ".jsonl":
            table = pyarrow.json.read_json(path)
        else:
            table = pyarrow.parquet.read_table(path)
        names = [str(name) for name in table.column("file_name").to_pylist()]
    except (OSError, ValueError, KeyError) as error:  # includes pandas and Arrow errors
        raise ValueError(
            f"cannot read {path}: {format_error(error)}. The file requires a column `file_name` of paths relative to "
            "the folder of the file"
        ) from error
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "://" in name:
            raise ValueError(
                f"{path}: the image {name!r} is outside the folder of this file. Move the image into this folder"
            )
    parent = PurePosixPath(file).parent
    return table.drop(["file_name"]), [(parent / name).as_posix() for name in names]


# Notes ---------------------------------------------------------------------------------------------------------------


def add_unused_note(folder: ImageFolder, names: list[str], reason: str) -> None:
    """Add a note about unused files, if there are any. `reason` follows the word "files" in the note."""
    if names:
        files = "1 file" if len(names) == 1 else f"{len(names):,} files"
        folder.notes.append(f"{folder.path}: skipped {files} {reason}: {shorten_list(names)}")


def shorten_list(names: list[str]) -> str:
    """Return the first names and the number of omitted names."""
    suffix = f" and {len(names) - MAX_SHOWN_NAMES:,} more" if len(names) > MAX_SHOWN_NAMES else ""
    return ", ".join(map(replace_control_characters, names[:MAX_SHOWN_NAMES])) + suffix

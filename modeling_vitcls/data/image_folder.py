"""Read image folders (one subfolder of images per class) as `datasets.DatasetDict`, without copying images.

    photos/cat/1.jpg, photos/dog/2.jpg                  classes cat, dog; one split, "train"
    photos/cat/2024/may/1.jpg                           class cat: images may be at any depth in a class folder
    photos/train/cat/1.jpg, photos/Testing/cat/2.jpg    splits "train" and "test"
    photos/bus/1.jpg, photos/train/2.jpg                classes bus, train
    photos/1.jpg                                        no classes: only for predictions and pre-training
    photos/metadata.csv (or .jsonl, .parquet)           columns of the table; `file_name` contains image paths

Splits are recognized only by the names of the first-level folders (`SPLIT_BY_FOLDER_NAME`, case-insensitive). Other
folder and file names are not interpreted. The first-level folders are splits if all first-level folders with images
have split names. If only some of the first-level folders have split names, all first-level folders are classes. In
this case, an error is raised if a folder with a split name contains class folders, because the structure is ambiguous.

`ImageFolder.notes` lists the unused files (other file types, hidden files, images next to class folders). A folder
that contains at least as many tables as images, and no metadata files, is read by the `datasets` library instead.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..errors import format_error
from ..files import replace_control_characters, write_atomically
from .images import get_cache_file


if TYPE_CHECKING:
    import pyarrow


IMAGE_SUFFIXES = frozenset(
    ".apng .avif .avifs .bmp .dib .gif .ico .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .mpo .pbm .pcx .pgm "
    ".png .pnm .ppm .tga .tif .tiff .webp".split()
)
TABLE_SUFFIXES = frozenset(".arrow .csv .json .jsonl .parquet .tar .tsv .zip".split())
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

# Split by lowercase folder name.
SPLIT_BY_FOLDER_NAME = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SPLITS = ("train", "validation", "test")
MIN_STORED_IMAGES = 10_000  # number of images from which the table of a folder is stored in the cache
MAX_SHOWN_NAMES = 3  # maximum number of names in a message


@dataclass(frozen=True)
class ImageFolder:
    """The files of an image folder. Paths are sorted, relative to `path`, and use "/" as the separator."""

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
    """Return the files of a folder and its subfolders. Symbolic links to folders are followed, except cycles."""
    files: dict[str, list[str]] = {"images": [], "metadata": [], "tables": [], "other_files": []}
    for file in list_files(path, ""):
        files[get_file_kind(file)].append(file)
    folders_with_images = {PurePosixPath(image).parts[0] for image in files["images"]}
    folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not is_hidden(entry.name))
    return ImageFolder(path, **files, empty_folders=[name for name in folders if name not in folders_with_images])


def list_files(root: Path, folder: str, parent_paths: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the paths of the files in `root`/`folder` and its subfolders, relative to `root` and sorted within each
    folder. Symbolic links that form a cycle are not followed."""
    real_path = os.path.realpath(root / folder)
    if real_path in parent_paths:
        return
    for entry in sorted(os.scandir(root / folder), key=lambda entry: entry.name):
        path = f"{folder}/{entry.name}" if folder else entry.name
        if entry.is_dir():
            yield from list_files(root, path, (*parent_paths, real_path))
        else:
            yield path


def get_file_kind(file: str) -> str:
    """Return the name of the `ImageFolder` field to which a file belongs."""
    path = PurePosixPath(file)
    if any(map(is_hidden, path.parts)) or make_printable(file) != file:
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
    """Return a `datasets.DatasetDict` of the splits and add notes about unused files to `folder.notes`.

    If there are metadata files, the columns are `image` and the columns of the metadata files except `file_name`.
    Otherwise, the columns are `image` and, if labels are used, `label`. Without labels, images at any depth are
    included.

    Raise ValueError if labels are used but there are neither class folders nor metadata files, or if the split
    folders are ambiguous.
    """
    import datasets
    import pyarrow

    images_by_split, has_split_folders = divide_into_splits(folder)
    if folder.metadata:
        datasets_by_split = build_metadata_splits(folder, list(images_by_split), has_split_folders)
    elif use_labels:
        datasets_by_split = build_labeled_splits(folder, images_by_split, depth=1 if has_split_folders else 0)
    else:
        no_columns = pyarrow.table({})
        datasets_by_split = {
            split: build_dataset(folder, split, images, no_columns, {}) for split, images in images_by_split.items()
        }
    note_unused_files(folder, sorted([*folder.other_files, *folder.tables]), "of other types")
    if folder.empty_folders:
        folder.notes.append(f"{folder.path}: folders without images: {format_name_list(folder.empty_folders)}")
    return datasets.DatasetDict(datasets_by_split)


# Splits and classes --------------------------------------------------------------------------------------------------


def divide_into_splits(folder: ImageFolder) -> tuple[dict[str, list[str]], bool]:
    """Return the images of each split, and whether the first-level folders are splits (see the module docstring).
    Raise ValueError if two folder names refer to the same split, or if it is ambiguous whether a folder is a split."""
    images_by_folder: dict[str, list[str]] = {}
    for image in folder.images:
        if "/" in image:
            images_by_folder.setdefault(image.partition("/")[0], []).append(image)
    split_folders = [folder_name for folder_name in images_by_folder if folder_name.lower() in SPLIT_BY_FOLDER_NAME]
    if not split_folders or len(split_folders) < len(images_by_folder):
        if not folder.metadata:
            check_class_folders(folder, images_by_folder, split_folders)
        return {"train": folder.images}, False
    folder_by_split: dict[str, str] = {}
    for folder_name in split_folders:
        split = SPLIT_BY_FOLDER_NAME[folder_name.lower()]
        if split in folder_by_split:
            raise ValueError(
                f"{folder.path}: the folders {folder_by_split[split]!r} and {folder_name!r} both contain the split "
                f"{split!r}. Merge the folders, or rename one folder"
            )
        folder_by_split[split] = folder_name
    note_unused_files(folder, [image for image in folder.images if "/" not in image], "next to the split folders")
    return {split: images_by_folder[folder_by_split[split]] for split in SPLITS if split in folder_by_split}, True


def check_class_folders(folder: ImageFolder, images_by_folder: dict[str, list[str]], split_folders: list[str]) -> None:
    """Raise ValueError if a folder with a split name contains class folders. `images_by_folder` must also
    contain a folder without a split name."""
    for folder_name in split_folders:
        subfolders = sorted({image.split("/")[1] for image in images_by_folder[folder_name] if image.count("/") > 1})
        if subfolders:
            class_folder = next(name for name in images_by_folder if name not in split_folders)
            raise ValueError(
                f"{folder.path}: the folder {folder_name!r} has the name of a split and contains class folders "
                f"({format_name_list(subfolders)}), but the folder {class_folder!r} does not have the name of a split "
                f"({', '.join(SPLITS)}). If the folders are splits, move {class_folder!r} elsewhere. If the folders "
                f"are classes, rename {folder_name!r}"
            )


def build_labeled_splits(folder: ImageFolder, images_by_split: dict[str, list[str]], depth: int) -> dict[str, Any]:
    """Return the dataset of each split that has class folders. Class folders are first-level folders (`depth` 0) or
    subfolders of split folders (`depth` 1). Raise ValueError if no split has class folders."""
    import datasets
    import pyarrow

    labels: dict[str, str | None] = {
        image: next(iter(image.split("/")[depth:-1]), None) for image in chain.from_iterable(images_by_split.values())
    }
    classes = sorted({label for label in labels.values() if label is not None})
    unlabeled_images = [image for image, label in labels.items() if label is None]
    if not classes:
        parent = folder.path / PurePosixPath(unlabeled_images[0]).parent
        tables = [*(folder.path / table for table in folder.tables), *list_tables(folder.path.parent)]
        table_text = f"{tables[0]}, which may contain the labels" if tables else "a table of images and labels"
        raise ValueError(
            f"{parent} contains images, but no class folders. Move the images of each class into a separate folder "
            f"({parent / 'CLASS' / 'IMAGE'}), or set --dataset to {table_text}"
        )
    note_unused_files(folder, unlabeled_images, "outside of class folders")
    nested_folders = sorted(
        {str(PurePosixPath(image).parent) for image in folder.images if image.count("/") > depth + 1}
    )
    if nested_folders:
        folder.notes.append(
            f"{folder.path}: images in subfolders of class folders ({format_name_list(nested_folders)}) are labeled "
            "with the name of the class folder"
        )
    feature = datasets.ClassLabel(names=classes)
    datasets_by_split = {}
    for split, images in images_by_split.items():
        if labeled_images := [image for image in images if labels[image] is not None]:
            class_indices = feature.str2int([labels[image] for image in labeled_images])
            columns = pyarrow.table({"label": pyarrow.array(class_indices, pyarrow.int64())})
            datasets_by_split[split] = build_dataset(folder, split, labeled_images, columns, {"label": feature})
    return datasets_by_split


def list_tables(folder: Path) -> list[Path]:
    """Return the tables in a folder that may name the images of an adjacent folder."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in (".csv", ".tsv", ".jsonl", ".parquet"))


def describe_single_class(dataset: str, name: str) -> str:
    """Return the error message for a dataset with only one class."""
    path = Path(dataset)
    if not path.is_dir():
        return f"a classifier requires two or more classes, but all images of {dataset} have the label {name!r}"
    parents = [path, *(entry for entry in sorted(path.iterdir()) if entry.name.lower() in SPLIT_BY_FOLDER_NAME)]
    folders = [parent / name for parent in parents if (parent / name).is_dir()]
    subfolder_names = sorted({entry.name for folder in folders for entry in folder.iterdir() if entry.is_dir()})
    hint = ""
    if subfolder_names:
        names_text = format_name_list(subfolder_names)
        hint = f". If the subfolders ({names_text}) are the classes or splits, set --dataset {folders[0]}"
    return (
        f"a classifier requires two or more classes, but {path} has a single class folder, {name!r}. Move the images "
        f"of each class into a separate folder{hint}"
    )


# Tables --------------------------------------------------------------------------------------------------------------


def build_dataset(
    folder: ImageFolder, split: str, images: list[str], columns: "pyarrow.Table", features: dict[str, Any]
) -> Any:
    """Return a `datasets.Dataset` with the image paths and the given columns. The fingerprint is a hash of the
    columns, and of the names, sizes and modification times of the images. A large table is stored in the cache of
    `datasets` under its fingerprint, so that all processes share its memory."""
    import datasets
    import pyarrow

    paths = pyarrow.array([str(folder.path / image) for image in images], pyarrow.string())
    contents = pyarrow.nulls(len(images), pyarrow.binary())
    image_column = pyarrow.StructArray.from_arrays([contents, paths], ["bytes", "path"])  # format of `datasets.Image`
    table = pyarrow.table([image_column, *columns.columns], ["image", *columns.column_names])
    digest = hashlib.sha256(repr(columns.to_pydict()).encode())
    for image in images:
        try:
            stat = (folder.path / image).stat()
        except OSError:  # an error is reported when the image is read
            continue
        digest.update(f"{image} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    fingerprint, stored_table = digest.hexdigest()[:16], datasets.table.InMemoryTable(table)
    if len(images) >= MIN_STORED_IMAGES:
        file = get_cache_file(f"{fingerprint}.arrow")
        with suppress(OSError):  # a full disk
            if not file.is_file():
                with write_atomically(file) as temporary, pyarrow.ipc.new_stream(temporary, table.schema) as writer:
                    writer.write_table(table)
            stored_table = datasets.table.MemoryMappedTable.from_file(str(file))
    return datasets.Dataset(
        stored_table,
        info=datasets.DatasetInfo(features=datasets.Features({"image": datasets.Image(), **features})),
        split=datasets.NamedSplit(split),
        fingerprint=fingerprint,
    )


def build_metadata_splits(folder: ImageFolder, splits: list[str], has_split_folders: bool) -> dict[str, Any]:
    """Return the dataset of each split: the images at the paths in `file_name`, and the other columns of the metadata
    files. Raise ValueError if a metadata file is not valid, or if the files have different column types."""
    import datasets
    import pyarrow

    tables = [read_metadata_file(folder, file) for file in folder.metadata]
    try:
        table = pyarrow.concat_tables([table for table, _ in tables], promote_options="permissive")
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        files_text = ", ".join(folder.metadata)
        raise ValueError(
            f"the columns of {files_text} in {folder.path} have different types: {format_error(error)}. Use the same "
            "type in all metadata files"
        ) from error

    listed_images = [image for _, images in tables for image in images]
    unlisted_images = sorted(set(folder.images) - set(listed_images))
    note_unused_files(folder, unlisted_images, "not listed in a metadata file")
    features = datasets.Features.from_arrow_schema(table.schema)
    datasets_by_split = {}
    for split in splits:
        row_indices = [
            row
            for row, image in enumerate(listed_images)
            if not has_split_folders or SPLIT_BY_FOLDER_NAME.get(image.partition("/")[0].lower()) == split
        ]
        if row_indices:
            images = [listed_images[row] for row in row_indices]
            datasets_by_split[split] = build_dataset(folder, split, images, table.take(row_indices), features)
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
        images = [str(image) for image in table.column("file_name").to_pylist()]
    except (OSError, ValueError, KeyError) as error:  # includes pandas and Arrow errors
        raise ValueError(
            f"cannot read {path}: {format_error(error)}. The file must have a column `file_name` with image paths "
            "relative to the folder of the file"
        ) from error
    for image in images:
        if PurePosixPath(image).is_absolute() or ".." in PurePosixPath(image).parts or "://" in image:
            raise ValueError(
                f"{path}: the image {image!r} is outside the folder of this file. Move the image into this folder"
            )
    if "image" in table.column_names:
        raise ValueError(f"{path}: the column name 'image' is reserved for the images. Rename the column")
    parent = PurePosixPath(file).parent
    return table.drop(["file_name"]), [(parent / image).as_posix() for image in images]


def note_unused_files(folder: ImageFolder, files: list[str], reason: str) -> None:
    """Add a note about unused files, if there are any. `reason` follows the word "files" in the note."""
    if files:
        count_text = "1 file" if len(files) == 1 else f"{len(files):,} files"
        folder.notes.append(f"{folder.path}: skipped {count_text} {reason}: {format_name_list(files)}")


def format_name_list(names: list[str]) -> str:
    """Return the first names and the number of omitted names as text."""
    suffix = f" and {len(names) - MAX_SHOWN_NAMES:,} more" if len(names) > MAX_SHOWN_NAMES else ""
    return ", ".join(map(replace_control_characters, names[:MAX_SHOWN_NAMES])) + suffix

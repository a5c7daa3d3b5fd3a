"""Read image folders (one subfolder of images per class) as `datasets.DatasetDict`.

    scan_folder(path)            -> ImageFolder: its files by kind
    find_layout(...)             -> Layout: the folders of splits and classes (folder_layout.py)
    read_image_folder(folder)    -> splits, whose images are not copied; the labels are the class folders, or those in
                                    metadata.csv (or .jsonl, .parquet), also in split folders

What is skipped is logged (other file types, images next to class folders, folders of the system), and
so are folders that are not read although they look like classes. Hidden files
are ignored, and so are the folders of models and training runs, which contain figures. A folder that
contains at least as many tables as images, and no metadata files, is read by the `datasets` library;
a table with the same name as an image in its folder does not count.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from ..hub.model_files import CONFIG_FILES, RECIPE_FILE
from ..runtime.errors import format_name_list, warn_on_first_process
from .folder_layout import SPLIT_ORDER, Layout, find_layout
from .images import resolve_path
from .tables import read_table, wrap_table


IMAGE_SUFFIXES = frozenset(
    ".apng .avif .avifs .bmp .dib .gif .ico .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx "
    ".mpo .pbm .pgm "
    ".png .pnm .ppm .tif .tiff .webp".split()
)
HEIF_SUFFIXES = frozenset(".heic .heics .heif .heifs .hif".split())
HEIC_REMEDY = "To read HEIC, `pip install pillow-heif`, or convert the images to JPEG"
NAME_REMEDY = "To rename files to UTF-8, `convmv -r -f latin1 -t utf8 --notest FOLDER`"
if find_spec("pillow_heif"):
    IMAGE_SUFFIXES |= HEIF_SUFFIXES
TABLE_SUFFIXES = frozenset(".arrow .csv .json .jsonl .parquet .tar .tsv .zip".split())
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

# Folders and files of operating systems and network storage, in lower case
SYSTEM_PREFIXES = ("@", "$", "#recycle", "#snapshot", "lost+found")
HIDDEN_NAMES = frozenset(
    "__macosx, desktop.ini, ehthumbs.db, network trash folder, recycled, recycler, "
    "system volume information, temporary items, thumbs.db".split(", ")
)

ROOT = "."  # The image folder itself, as a relative path
MAX_NAMED_FOLDERS = 10  # In one warning


@dataclass(frozen=True)
class ImageFolder:
    """The files of an image folder.

    Paths are sorted, relative to `path`, and use "/" as the separator.
    """

    path: Path
    images: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    # Also files with names that are not valid text
    other_files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)  # Visible subfolders
    # Folders of runs and of the system; their files are not listed
    skipped_folders: list[str] = field(default_factory=list)

    def add(self, file: str) -> None:
        """Add a file to the list of its kind."""
        suffix = PurePosixPath(file).suffix.lower()
        # A name that is not valid text cannot be written to any table of results.
        if not is_valid_name(file):
            self.other_files.append(file)
        elif PurePosixPath(file).name in METADATA_FILES:
            self.metadata.append(file)
        elif suffix in IMAGE_SUFFIXES:
            self.images.append(file)
        else:
            (self.tables if suffix in TABLE_SUFFIXES else self.other_files).append(file)

    @property
    def is_image_folder(self) -> bool:
        """Whether the folder is read as an image folder, and not as a folder of tables.

        JSON files, and tables with the name of an image, are annotations of single images.
        """
        images = {PurePosixPath(image).with_suffix("").as_posix() for image in self.images}
        images.update(self.images)
        tables = [
            table
            for table in map(PurePosixPath, self.tables)
            if table.suffix.lower() != ".json" and table.with_suffix("").as_posix() not in images
        ]
        return bool(self.images) and (bool(self.metadata) or len(self.images) > len(tables))


def scan_folder(path: Path) -> ImageFolder:
    """List the files of a folder and its subfolders by kind, sorted within each folder.

    Hidden files are ignored. Symbolic links to folders are followed, except cycles. The folders of
    models and training runs, which contain figures, and folders of the system are skipped. Raise
    OSError if a folder cannot be read.
    """

    def stop(error: OSError) -> None:
        raise OSError(
            f"cannot read the folder {error.filename}: {error.strerror}. Change its permissions, "
            "or move it elsewhere"
        ) from error

    folder = ImageFolder(path)
    visited = set()
    for parent, subfolders, files in os.walk(path, onerror=stop, followlinks=True):
        visited.add(Path(parent).resolve())
        relative_parent = PurePosixPath(Path(parent).relative_to(path).as_posix())
        if RECIPE_FILE in files or set(CONFIG_FILES) <= set(files):
            folder.skipped_folders.append(str(relative_parent))
            # The root is not skipped, but reported by `read_image_folder`: it would leave no image
            # to read.
            if relative_parent.parts:
                subfolders.clear()
                continue

        visible = sorted(name for name in subfolders if not is_hidden(name))
        system = [name for name in visible if name.lower().startswith(SYSTEM_PREFIXES)]
        folder.skipped_folders.extend(str(relative_parent / name) for name in system)
        # Changed in place, because `os.walk` visits the folders that remain in this list. A folder
        # that was visited before is left out, or a link to a parent would never end.
        subfolders[:] = [
            name
            for name in visible
            if name not in system and Path(parent, name).resolve() not in visited
        ]
        folder.folders.extend(str(relative_parent / name) for name in subfolders)
        for name in sorted(files):
            if not is_hidden(name):
                folder.add(str(relative_parent / name))
    return folder


def is_hidden(name: str) -> bool:
    """Tell whether file managers hide a file or folder: it is then not meant as data."""
    return name.startswith(".") or name.lower() in HIDDEN_NAMES


def is_valid_name(name: str) -> bool:
    """Tell whether a file name is text: names on Linux are bytes, and need not be UTF-8."""
    return make_printable(name) == name


def make_printable(name: str) -> str:
    """Make a file name printable: invalid bytes are replaced."""
    return os.fsencode(name).decode("utf-8", errors="replace")


def read_image_folder(folder: ImageFolder, use_labels: bool) -> Any:
    """Read an image folder as a `datasets.DatasetDict`, and log which files are not used.

    If there are metadata files, the columns are `image` and the columns of the metadata files
    except `file_name`. Otherwise, the columns are `image` and, if labels are used, `label`. Without
    labels, images at any depth are included.

    Raise ValueError if labels are used but there are neither class folders nor metadata files, if
    the split folders are ambiguous, or if a training run has written its files next to the images.
    """
    import datasets

    if ROOT in folder.skipped_folders:
        raise ValueError(
            f"{folder.path} contains the files of a training run next to the images. Move the "
            "images, or the folders of the classes, to a folder of their own"
        )
    layout = find_layout(folder.path, folder.images, folder.metadata, use_labels)
    images_by_split: dict[str | None, list[str]] = {split: [] for split in (*SPLIT_ORDER, None)}
    for image in folder.images:
        images_by_split[layout.get_split(image.split("/")[:-1])].append(image)

    warn_about_skipped_folders(folder.skipped_folders)
    # Absolute: a run and its report may name one folder differently, and a message is logged once
    where = str(folder.path.absolute())
    warn_about_files(where, images_by_split.pop(None), "next to the split folders")
    warn_about_files(where, sorted([*folder.other_files, *folder.tables]), "that are no images")
    if folder.metadata:
        return read_metadata(folder, layout)
    if use_labels:
        warn_about_folders_without_images(folder)
        return build_labeled_splits(folder, images_by_split, layout)
    parts = {
        split: build_dataset([str(folder.path / image) for image in images], {})
        for split, images in images_by_split.items()
        if images
    }
    return datasets.DatasetDict(parts)


def read_metadata(folder: ImageFolder, layout: Layout) -> Any:
    """Read the metadata files by split, with the columns of the first file of each.

    Raise ValueError if a metadata file has no column `file_name`.
    """
    import datasets

    parts: dict[str, list[Any]] = {}
    for name in folder.metadata:
        split = layout.get_split(name.split("/")[:-1])
        if split is None:
            continue
        file = folder.path / name
        table = read_table(file)
        if "file_name" not in table.features:
            raise ValueError(
                f"{file} has no column 'file_name'. Add one with the name of each image"
            )
        paths = [path and resolve_path(file.parent, path) for path in table["file_name"]]
        others = table.remove_columns("file_name").with_format("arrow")[:]
        columns = dict(zip(others.column_names, others.columns, strict=True))
        parts.setdefault(split, []).append(build_dataset(paths, columns))
    return datasets.DatasetDict(
        {split: datasets.concatenate_datasets(part) for split, part in parts.items()}
    )


def build_labeled_splits(
    folder: ImageFolder, images_by_split: Mapping[Any, list[str]], layout: Layout
) -> Any:
    """Build the `DatasetDict` of the splits that have class folders.

    Raise ValueError if no split has class folders.
    """
    import datasets

    labels_by_split = {}
    unlabeled_images = []
    for split, images in images_by_split.items():
        labels = {image: layout.get_class(image.split("/")[:-1]) for image in images}
        unlabeled_images += [image for image in images if labels[image] is None]
        labels_by_split[split] = {image: label for image, label in labels.items() if label}

    classes = sorted(set(chain.from_iterable(map(dict.values, labels_by_split.values()))))
    if not classes:
        parent = folder.path / PurePosixPath(unlabeled_images[0]).parent
        raise ValueError(
            f"{parent} contains images, but no class folders. Move the images of each class into a "
            "separate folder, or set `dataset` to a table of images and labels"
        )
    warn_about_files(str(folder.path.absolute()), unlabeled_images, "outside of class folders")
    # One list of classes for all splits: a split without images of a class must not shift the
    # others.
    feature = datasets.ClassLabel(names=classes)
    parts = {
        split: build_dataset(
            [str(folder.path / image) for image in labels],
            {"label": [feature.str2int(label) for label in labels.values()]},
            label=feature,
        )
        for split, labels in labels_by_split.items()
        if labels
    }
    return datasets.DatasetDict(parts)


def build_dataset(paths: Sequence[str | None], columns: Mapping[str, Any], **features: Any) -> Any:
    """Build a `datasets.Dataset` with the column `image` of image files, and other columns.

    `features` are the types of columns whose values do not say it, such as class indices.
    """
    import datasets
    import pyarrow

    contents = pyarrow.nulls(len(paths), pyarrow.binary())
    images = pyarrow.StructArray.from_arrays(
        [contents, pyarrow.array(paths, pyarrow.string())], ["bytes", "path"]
    )
    table = pyarrow.table({"image": images, **columns})
    return wrap_table(table, {"image": datasets.Image(), **features})


# Unused files -------------------------------------------------------------------------------------


def check_output_is_not_read(output_dir: Path, dataset: str) -> None:
    """Raise ValueError if images in the output folder of a run would be images of the dataset."""
    root = Path(dataset).resolve()
    folder = output_dir.resolve()
    if not root.is_dir() or not folder.is_relative_to(root):
        return
    scanned = scan_folder(root)
    layout = find_layout(root, scanned.images, scanned.metadata, use_labels=False)
    split = layout.get_split(folder.relative_to(root).parts)
    if folder == root or (scanned.is_image_folder and split is not None):
        raise ValueError(
            f"`output_dir={str(output_dir)!r}` is in the folder of the dataset, so the "
            "figures of the run would become images of it. Set `output_dir` to a folder outside of "
            f"{dataset}"
        )


def warn_about_folders_without_images(folder: ImageFolder) -> None:
    """Log a warning about folders that have no image at any depth, such as a class of HEIC files."""
    # Folders with images, and those that another line names
    named = {ROOT, *folder.skipped_folders}
    for path in map(PurePosixPath, (*folder.images, *folder.skipped_folders)):
        named.update(map(str, path.parents))
    unused_files = [*folder.other_files, *folder.tables]
    files = {
        name: [file for file in unused_files if file.startswith(f"{name}/")]
        for name in folder.folders
        if name not in named and str(PurePosixPath(name).parent) in named
    }
    if files:
        folders = [f"{name} ({describe_types(each) or 'empty'})" for name, each in files.items()]
        remedy = get_remedy(list(chain.from_iterable(files.values())))
        warn_on_first_process(
            f"WARNING: {folder.path}: these folders have no image that can be read, so they are left "
            f"out: {format_name_list(folders, MAX_NAMED_FOLDERS)}. "
            f"{remedy or 'Convert their images to JPEG, or remove the folders'}"
        )


def warn_about_skipped_folders(folders: Sequence[str]) -> None:
    """Log which folders are skipped because a training run or the system has written them."""
    if folders:
        warn_on_first_process(
            f"skipped folders of training runs and of the system: {format_name_list(folders)}. If "
            "they have images of yours, move these elsewhere"
        )


def describe_types(files: Sequence[str]) -> str:
    """Count files by suffix as text, the most frequent first: `2 .heic`."""
    suffixes = Counter(make_printable(PurePosixPath(file).suffix.lower()) for file in files)
    return format_name_list(
        [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in suffixes.most_common()]
    )


def get_remedy(files: Sequence[str]) -> str:
    """Say how unread files can be read: HEIC, and names that are not UTF-8; "" for others."""
    if any(PurePosixPath(file).suffix.lower() in HEIF_SUFFIXES for file in files):
        return HEIC_REMEDY
    return "" if all(map(is_valid_name, files)) else NAME_REMEDY


def warn_about_files(where: str, files: Sequence[str], reason: str) -> None:
    """Log which files are not used, and why. `where` are their folders."""
    if files:
        count_text = "1 file" if len(files) == 1 else f"{len(files):,} files"
        remedy = get_remedy(files)
        warn_on_first_process(
            f"{where}: skipped {count_text} {reason}: {format_name_list(files)}"
            f"{remedy and f'. {remedy}'}"
        )

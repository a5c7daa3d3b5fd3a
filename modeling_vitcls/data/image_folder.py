"""Read image folders (one subfolder of images per class) as `datasets.DatasetDict`.

Images are not copied.

    photos/cat/1.jpg, photos/dog/2.jpg                  classes cat, dog; one split, "train"
    photos/cat/2024/may/1.jpg                           class cat: images may be at any depth in a class folder
    photos/train/cat/1.jpg, photos/Testing/cat/2.jpg    splits "train" and "test"
    photos/training_set/cat/.., photos/test_set/cat/..  the same, because both folders contain the same classes
    photos/cat/train/1.jpg, photos/cat/test/2.jpg       the same: class folders that contain only split folders
    photos/fold1/cat/1.jpg, photos/fold2/cat/2.jpg      an error: splits or classes?
    photos/bus/1.jpg, photos/train/2.jpg                classes bus, train
    photos/1.jpg                                        no classes: only for predictions and pre-training
    photos/metadata.csv (or .jsonl, .parquet)           a table of labels, also in split folders

File names are not interpreted. `ImageFolder.notes` lists what is skipped (other file types, images
next to class folders, folders of the system), and `ImageFolder.warnings` the folders that are not
read although they look like classes. Hidden files are ignored, and so are the folders of models and
training runs, which contain figures. A folder that contains at least as many tables as images, and
no metadata files, is read by the `datasets` library; a table named like an image beside it does not
count.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..hub.model_files import CONFIG_FILES, RECIPE_FILE
from ..runtime.errors import format_error, is_disk_full, name_full_disk
from ..runtime.files import replace_control_characters
from .tables import read_table, wrap_table


IMAGE_SUFFIXES = frozenset(
    ".apng .avif .avifs .bmp .dib .gif .ico .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx "
    ".mpo .pbm .pgm "
    ".png .pnm .ppm .tif .tiff .webp".split()
)
HEIF_SUFFIXES = frozenset(".heic .heics .heif .heifs .hif".split())
HEIC_REMEDY = "To read HEIC, `pip install pillow-heif`, or convert the images to JPEG"
if find_spec("pillow_heif"):
    IMAGE_SUFFIXES |= HEIF_SUFFIXES
TABLE_SUFFIXES = frozenset(".arrow .csv .json .jsonl .parquet .tar .tsv .zip".split())
LABEL_TABLE_SUFFIXES = frozenset(".csv .jsonl .parquet .tsv".split())
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

# Split by lowercase folder name.
SPLIT_BY_FOLDER_NAME = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# A word in the name of a folder, such as Train in "TrainImages" and test in "test_set-2"
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
DATE = re.compile(r"(19|20)\d\d([-_. ]?\d\d){0,2}")  # in names of folders that are no classes

# Folders and files of operating systems and network storage, in lower case
SYSTEM_PREFIXES = ("@", "$", "#recycle", "#snapshot", "lost+found")
HIDDEN_NAMES = frozenset(
    "__macosx, desktop.ini, ehthumbs.db, network trash folder, recycled, recycler, "
    "system volume information, temporary items, thumbs.db".split(", ")
)

ROOT = "."  # the image folder itself, as a relative path
MAX_NAMED_FOLDERS = 10  # in one warning


@dataclass(frozen=True)
class ImageFolder:
    """The files of an image folder.

    Paths are sorted, relative to `path`, and use "/" as the separator.
    """

    path: Path
    images: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    # also files with names that are not valid text
    other_files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)  # visible subfolders
    run_folders: list[str] = field(default_factory=list)  # whose files are not listed
    system_folders: list[str] = field(default_factory=list)  # likewise, without the hidden ones
    notes: list[str] = field(default_factory=list)  # one line for each kind of unused file
    warnings: list[str] = field(default_factory=list)  # one line for each kind of unused folder

    @property
    def files(self) -> list[str]:
        """Return all files."""
        return [*self.images, *self.metadata, *self.tables, *self.other_files]

    def add(self, file: str) -> None:
        """Add a file to the list of its kind."""
        suffix = PurePosixPath(file).suffix.lower()
        if make_printable(file) != file:
            self.other_files.append(file)
        elif PurePosixPath(file).name in METADATA_FILES:
            self.metadata.append(file)
        elif suffix in IMAGE_SUFFIXES:
            self.images.append(file)
        else:
            (self.tables if suffix in TABLE_SUFFIXES else self.other_files).append(file)

    @property
    def is_image_folder(self) -> bool:
        """Return whether the folder is read as an image folder, and not as a folder of tables.

        JSON files, and tables with the name of an image, are annotations of single images.
        """
        names = {PurePosixPath(image).with_suffix("").as_posix() for image in self.images}
        names.update(self.images)
        num_tables = 0
        for table in map(PurePosixPath, self.tables):
            is_annotation = table.with_suffix("").as_posix() in names
            num_tables += not is_annotation and table.suffix.lower() != ".json"
        return bool(self.images) and (bool(self.metadata) or len(self.images) > num_tables)


def scan_folder(path: Path) -> ImageFolder:
    """Return the files of a folder and its subfolders, sorted within each folder.

    Hidden files are ignored. Symbolic links to folders are followed, except cycles. The folders of
    models and training runs, which contain figures, and those of the system are skipped. Raise
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
            folder.run_folders.append(str(relative_parent))
            if relative_parent.parts:
                subfolders.clear()
                continue

        visible = sorted(name for name in subfolders if not is_hidden(name))
        system = [name for name in visible if name.lower().startswith(SYSTEM_PREFIXES)]
        folder.system_folders.extend(str(relative_parent / name) for name in system)
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


def compute_files_digest(path: Path) -> str | None:
    """Return a hash of the images and tables in a folder, or of one file; None if there is none.

    It is computed from names, sizes and modification times. Files are not read. Folders of training
    runs are skipped, because they change during a run.
    """
    if path.is_dir():
        folder = scan_folder(path)
        files = [path / name for name in (*folder.images, *folder.metadata, *folder.tables)]
    elif path.is_file():
        files = [path]
    else:
        return None

    digest = hashlib.sha256()
    for file in files:
        with suppress(OSError):  # a broken link
            stat = file.stat()
            name = os.fsencode(file.relative_to(path))
            digest.update(name + f" {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def is_hidden(name: str) -> bool:
    """Return whether file managers hide a file or folder."""
    return name.startswith(".") or name.lower() in HIDDEN_NAMES


def make_printable(name: str) -> str:
    """Return a file name as valid text, with invalid bytes replaced."""
    return os.fsencode(name).decode("utf-8", errors="replace")


def read_image_folder(folder: ImageFolder, use_labels: bool) -> Any:
    """Return the splits as a `datasets.DatasetDict`, and add notes about unused files.

    If there are metadata files, the columns are `image` and the columns of the metadata files
    except `file_name`. Otherwise, the columns are `image` and, if labels are used, `label`. Without
    labels, images at any depth are included.

    Raise ValueError if labels are used but there are neither class folders nor metadata files, if
    the split folders are ambiguous, or if a training run has written its files next to the images.
    """
    import datasets

    if ROOT in folder.run_folders:
        raise ValueError(
            f"{folder.path} contains the files of a training run next to the images. Move the "
            "images, or the folders of the classes, to a folder of their own"
        )
    layout = find_layout(folder, use_labels)
    images_by_split = divide_images(folder, layout)
    skipped = [name for name in folder.run_folders if layout.get_split(name.split("/"))]
    if skipped:
        folder.warnings.append(f"{folder.path}: {describe_skipped_runs(skipped)}")
    note_unused_files(folder, sorted([*folder.other_files, *folder.tables]), "of other types")
    if folder.system_folders:
        folder.notes.append(
            f"{folder.path}: skipped folders of the system: "
            f"{format_name_list(folder.system_folders)}"
        )
    if folder.metadata:
        return read_metadata(folder, layout)
    if use_labels:
        warn_about_folders_without_images(folder, layout)
        return build_labeled_splits(folder, images_by_split, layout)
    parts = {
        split: build_dataset(folder, split, images) for split, images in images_by_split.items()
    }
    return datasets.DatasetDict(parts)


def read_metadata(folder: ImageFolder, layout: "Layout") -> Any:
    """Return the rows of the metadata files by split, with the columns of the first file of each.

    Raise ValueError if a metadata file has no column `file_name`.
    """
    import datasets
    import pyarrow

    parts: dict[str, list[Any]] = {}
    for file in folder.metadata:
        split = layout.get_split(file.split("/")[:-1])
        if split is None:
            continue
        table = read_table(folder.path / file)
        if "file_name" not in table.features:
            raise ValueError(
                f"{folder.path / file} has no column 'file_name'. Add one with the name of each "
                "image"
            )
        parent = (folder.path / file).parent
        paths = [path and str(parent / path) for path in table["file_name"]]
        contents = pyarrow.nulls(len(paths), pyarrow.binary())
        images = pyarrow.StructArray.from_arrays(
            [contents, pyarrow.array(paths, pyarrow.string())], ["bytes", "path"]
        )
        others = table.remove_columns("file_name").with_format("arrow")[:]
        columns = {name: others[name] for name in others.column_names}
        dataset = wrap_table({"image": images, **columns})
        parts.setdefault(split, []).append(dataset.cast_column("image", datasets.Image()))
    return datasets.DatasetDict(
        {split: datasets.concatenate_datasets(part) for split, part in parts.items()}
    )


@contextmanager
def explain_reading_errors(name: str) -> Iterator[None]:
    """Raise the errors of `datasets` in the block as a one-line ValueError that names the cause.

    `datasets` does not log them. `name` is the dataset or the file.
    """
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        with name_full_disk(datasets.config.HF_DATASETS_CACHE):
            yield
    except datasets.data_files.EmptyDatasetError:
        raise ValueError(f"{name} contains no images and no tables. Check the path") from None
    except Exception as error:  # the readers raise many types of errors on damaged data
        if is_disk_full(error):
            raise
        cause: BaseException = error
        while isinstance(cause, datasets.exceptions.DatasetGenerationError) and cause.__cause__:
            cause = cause.__cause__
        if isinstance(cause, UnicodeDecodeError):
            raise ValueError(
                f"{name} is not encoded as UTF-8. Save it as UTF-8, such as with the file type "
                "'CSV UTF-8' of a spreadsheet"
            ) from error
        raise ValueError(
            f"cannot read the dataset {name!r} ({type(cause).__name__}: {format_error(cause)}). "
            "Check the path and the file format: CSV, JSON Lines or Parquet, or a folder of images "
            "or of such files"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)


# Splits and classes -------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where the splits and the classes are in the paths of an image folder."""

    # name of a split folder -> name of the split; empty if there is only the split "train"
    splits: dict[str, str]
    split_depth: int = 0  # number of folders above the split folders
    class_depth: int = 0  # number of folders above the class folders

    def get_split(self, folders: Sequence[str]) -> str | None:
        """Return the split of a file in nested folders; None if it is in no split folder."""
        if not self.splits:
            return "train"
        return self.splits.get(next(iter(folders[self.split_depth :]), ""))

    def get_class(self, folders: Sequence[str]) -> str | None:
        """Return the class of an image in nested folders; None if it is in no class folder."""
        return next(iter(folders[self.class_depth :]), None)


def find_layout(folder: ImageFolder, use_labels: bool) -> Layout:
    """Find the splits and the classes in the names of folders (see the module docstring).

    Raise ValueError if two folders are the same split, or if it is ambiguous whether folders are
    splits or classes.
    """
    paths: dict[str, list[list[str]]] = {}  # first-level folder -> folders of each image
    for image in folder.images:
        path = image.split("/")[:-1]
        if path:
            paths.setdefault(path[0], []).append(path)

    splits = {
        name: SPLIT_BY_FOLDER_NAME[name.lower()]
        for name in paths
        if name.lower() in SPLIT_BY_FOLDER_NAME
    }
    has_only_splits = len(splits) == len(paths) > 0
    if folder.metadata:
        is_divided = has_only_splits and all("/" in file for file in folder.metadata)
        return Layout(sort_splits(folder, splits) if is_divided else {})
    if has_only_splits:
        class_depth = find_class_depth(paths.values()) or 1
        return Layout(sort_splits(folder, splits), class_depth=class_depth)

    # Names such as seg_train and test_set are also those of classes, unless the folders contain the
    # same subfolders.
    named = {name: split for name in paths if (split := guess_split(name))}
    class_depth = find_class_depth([paths[name] for name in named])
    if class_depth and len(named) == len(paths):
        folder.notes.append(
            f"{folder.path}: "
            + ", ".join(f"{name} is the split {split!r}" for name, split in named.items())
        )
        return Layout(sort_splits(folder, named), class_depth=class_depth)

    for name in named if class_depth else splits:
        subfolders = sorted(list_names(paths[name], depth=1))
        other = next(other for other in paths if other not in (named if class_depth else splits))
        if subfolders:
            raise ValueError(
                f"{folder.path}: {name!r} has the name of a split and contains folders "
                f"({format_name_list(subfolders)}), but {other!r} is not a split (train, "
                f"validation, test). Move {other!r} elsewhere, or rename {name!r}"
            )

    subfolders = sorted(set().union(*(list_names(each, depth=1) for each in paths.values())))
    inner = {name: SPLIT_BY_FOLDER_NAME.get(name.lower(), "") for name in subfolders}
    has_files = any(len(path) == 1 for path in chain.from_iterable(paths.values()))
    if all(inner.values()) and len(set(inner.values())) > 1 and not has_files:
        return Layout(inner, split_depth=1)

    if use_labels and not has_files and find_class_depth(paths.values(), min_names=2):
        raise ValueError(
            f"{folder.path}: the folders {format_name_list(sorted(paths))} contain the same "
            f"folders ({format_name_list(subfolders)}), so these may be the classes. If so, rename "
            "the outer folders to train, validation and test, or merge them; otherwise, move the "
            "images out of the inner folders"
        )
    return Layout({})


def list_names(paths: Collection[Sequence[str]], depth: int) -> set[str]:
    """Return the names of folders at a depth of nested folders."""
    return {path[depth] for path in paths if len(path) > depth}


def find_class_depth(paths: Collection[Collection[Sequence[str]]], min_names: int = 1) -> int:
    """Return the depth at which several folders contain the same subfolders: 1, 2, or 0 if none.

    It is 2 if each of the folders contains a single subfolder: seg_train/seg_train/cat. Half of the
    subfolders of each folder must be in another one, because a class may be missing in a split.
    `paths` are the nested folders of the images in each folder.
    """

    def have_same_names(depth: int) -> bool:
        names = [list_names(each, depth) for each in paths]
        counts = Counter(chain.from_iterable(names))
        shared = {name for name in counts if counts[name] > 1 and not DATE.fullmatch(name)}
        return len(shared) >= min_names and all(
            2 * len(each & shared) >= len(each) > 0 for each in names
        )

    have_one_folder = all(
        len(list_names(each, depth=1)) == 1 and min(map(len, each)) > 1 for each in paths
    )
    if have_one_folder and have_same_names(depth=2):
        return 2
    return 1 if have_same_names(depth=1) else 0


def guess_split(name: str) -> str | None:
    """Return the split that a word in the name of a folder names, as in `seg_train`, or None."""
    words = [re.sub("(set|data|images)$", "", word.lower()) or word for word in WORD.findall(name)]
    splits = {SPLIT_BY_FOLDER_NAME[word] for word in words if word in SPLIT_BY_FOLDER_NAME}
    return splits.pop() if len(splits) == 1 else None


def sort_splits(folder: ImageFolder, splits: dict[str, str]) -> dict[str, str]:
    """Return split folders in the order train, validation, test.

    Raise ValueError if two of them are the same split.
    """
    order = list(dict.fromkeys(SPLIT_BY_FOLDER_NAME.values()))
    names = sorted(splits, key=lambda name: order.index(splits[name]))
    for first, second in pairwise(names):
        if splits[first] == splits[second]:
            raise ValueError(
                f"{folder.path}: the folders {first!r} and {second!r} are the same split. Merge "
                "them"
            )
    return {name: splits[name] for name in names}


def divide_images(folder: ImageFolder, layout: Layout) -> dict[str, list[str]]:
    """Return the images of each split, and note those beside the split folders."""
    images_by_split: dict[str, list[str]] = {split: [] for split in layout.splits.values()}
    images_by_split.setdefault("train", [])
    unused: list[str] = []
    for image in folder.images:
        split = layout.get_split(image.split("/")[:-1])
        (unused if split is None else images_by_split[split]).append(image)
    note_unused_files(folder, unused, "next to the split folders")
    return {split: images for split, images in images_by_split.items() if images}


def check_output_is_not_read(output_dir: Path, dataset: str) -> None:
    """Raise ValueError if images in the output folder of a run would be images of the dataset."""
    root = Path(dataset).resolve()
    folder = output_dir.resolve()
    if not root.is_dir() or not folder.is_relative_to(root):
        return

    path = folder.relative_to(root)
    is_read = folder == root
    scanned = scan_folder(root)
    if scanned.is_image_folder and not any(map(is_hidden, path.parts)):
        is_read = is_read or bool(find_layout(scanned, use_labels=False).get_split(path.parts))
    if is_read:
        raise ValueError(
            f"`output_dir={str(output_dir)!r}` is in the folder of the dataset, so that the "
            "figures of the run would become images of it. Set `output_dir` to a folder outside of "
            f"{dataset}"
        )


def warn_about_folders_without_images(folder: ImageFolder, layout: Layout) -> None:
    """Add a warning about folders in the places of classes and splits that have no images."""
    with_images: set[str] = set()
    for file in (*folder.images, *(f"{run}/{RECIPE_FILE}" for run in folder.run_folders)):
        with_images.update(map(str, PurePosixPath(file).parents))

    descriptions = []
    unread_files = []
    for name in folder.folders:
        folders = name.split("/")
        is_class = len(folders) == layout.class_depth + 1 and (
            layout.split_depth > 0 or layout.get_split(folders) is not None
        )
        is_split = len(folders) == 1 and name.lower() in SPLIT_BY_FOLDER_NAME
        if name in with_images or not (is_class or is_split):
            continue
        files = [
            file for file in (*folder.other_files, *folder.tables) if file.startswith(f"{name}/")
        ]
        unread_files += files
        descriptions.append(f"{name} ({describe_types(files) or 'empty'})")

    if descriptions:
        remedy = get_heic_remedy(unread_files)
        remedy = remedy or "Convert their images to JPEG, or remove the folders"
        folder.warnings.append(
            f"{folder.path}: these folders have no image of a readable type, so they are left "
            f"out: {format_name_list(descriptions, MAX_NAMED_FOLDERS)}. {remedy}"
        )


def describe_skipped_runs(folders: Sequence[str]) -> str:
    return (
        f"skipped folders that a training run has written: {format_name_list(folders)}. Move them "
        "elsewhere"
    )


def describe_types(files: Sequence[str]) -> str:
    """Return the suffixes of files with the number of files, the most frequent first: `2 .heic`."""
    suffixes = Counter(make_printable(PurePosixPath(file).suffix.lower()) for file in files)
    return format_name_list(
        [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in suffixes.most_common()]
    )


def get_heic_remedy(files: Sequence[str]) -> str:
    """Return what to do with the HEIC files among unread files; "" if there are none."""
    is_heic = any(PurePosixPath(file).suffix.lower() in HEIF_SUFFIXES for file in files)
    return HEIC_REMEDY if is_heic else ""


def build_labeled_splits(
    folder: ImageFolder, images_by_split: dict[str, list[str]], layout: Layout
) -> Any:
    """Return the `DatasetDict` of the splits that have class folders.

    Raise ValueError if no split has class folders.
    """
    import datasets

    labels = {
        image: layout.get_class(image.split("/")[:-1])
        for image in chain.from_iterable(images_by_split.values())
    }
    classes = sorted({label for label in labels.values() if label is not None})
    unlabeled_images = [image for image, label in labels.items() if label is None]
    if not classes:
        parent = folder.path / PurePosixPath(unlabeled_images[0]).parent
        files = [folder.path / table for table in folder.tables]
        files += sorted(folder.path.parent.iterdir())
        tables = [file for file in files if file.suffix.lower() in LABEL_TABLE_SUFFIXES]
        raise ValueError(
            f"{parent} contains images, but no class folders. Move the images of each class into a "
            "separate folder, or set `dataset` to "
            f"{tables[0] if tables else 'a table of images and labels'}"
        )
    note_unused_files(folder, unlabeled_images, "outside of class folders")
    parts = {}
    index_by_class = {name: index for index, name in enumerate(classes)}
    for split, images in images_by_split.items():
        indices = {}
        for image in images:
            label = labels[image]
            if label is not None:
                indices[image] = index_by_class[label]
        if indices:
            parts[split] = build_dataset(
                folder, split, list(indices), list(indices.values()), classes
            )
    return datasets.DatasetDict(parts)


def build_dataset(
    folder: ImageFolder,
    split: str,
    images: list[str],
    labels: Sequence[int] = (),
    classes: Sequence[str] = (),
) -> Any:
    """Return a `datasets.Dataset` with the image paths and, if there are classes, the labels.

    The fingerprint is a hash of the labels, and of the names, sizes and modification times of the
    images.
    """
    import datasets
    import pyarrow

    paths = pyarrow.array([str(folder.path / image) for image in images], pyarrow.string())
    contents = pyarrow.nulls(len(images), pyarrow.binary())
    # of `datasets.Image`
    columns = {"image": pyarrow.StructArray.from_arrays([contents, paths], ["bytes", "path"])}
    features: dict[str, Any] = {"image": datasets.Image()}
    if classes:
        columns["label"] = pyarrow.array(labels, pyarrow.int64())
        features["label"] = datasets.ClassLabel(names=list(classes))

    digest = hashlib.sha256(repr([classes, labels]).encode())
    for image in images:
        with suppress(OSError):  # an error is reported when the image is read
            stat = (folder.path / image).stat()
            digest.update(f"{image} {stat.st_size} {stat.st_mtime_ns}\n".encode())

    return datasets.Dataset(
        datasets.table.InMemoryTable(pyarrow.table(columns)),
        info=datasets.DatasetInfo(features=datasets.Features(features)),
        split=datasets.NamedSplit(split),
        fingerprint=digest.hexdigest()[:16],
    )


def describe_single_class(dataset: str, name: str) -> str:
    """Return the error message for a dataset with only one class."""
    folder = Path(dataset, name)
    hint = (
        f". If its subfolders are the classes or splits, set `dataset={str(folder)!r}`"
        if folder.is_dir()
        else ""
    )
    return (
        f"a classifier requires two or more classes, but {dataset} has the single class {name!r}"
        f"{hint}"
    )


def note_unused_files(folder: ImageFolder, files: list[str], reason: str) -> None:
    """Add a note about unused files, if there are any.

    `reason` follows the word "files" in the note.
    """
    if files:
        count_text = "1 file" if len(files) == 1 else f"{len(files):,} files"
        folder.notes.append(
            f"{folder.path}: skipped {count_text} {reason}: {format_name_list(files)}"
        )


def format_name_list(names: Sequence[str], max_names: int = 3) -> str:
    """Return the first names and the number of omitted names as text."""
    suffix = f" and {len(names) - max_names:,} more" if len(names) > max_names else ""
    return ", ".join(map(replace_control_characters, names[:max_names])) + suffix

"""Read image folders (one subfolder of images per class) as `datasets.DatasetDict`.

Images are not copied.

    photos/cat/1.jpg, photos/dog/2.jpg                  classes cat, dog; one split, "train"
    photos/cat/2024/may/1.jpg                           class cat: images may be at any depth in a class folder
    photos/train/cat/1.jpg, photos/Testing/cat/2.jpg    splits "train" and "test"
    photos/bus/1.jpg, photos/train/2.jpg                classes bus, train
    photos/1.jpg                                        no classes: only for predictions and pre-training
    photos/metadata.csv (or .jsonl, .parquet)           read by `load_dataset("imagefolder")`, also in split folders

Splits are recognized only by the names of the first-level folders (`SPLIT_BY_FOLDER_NAME`,
case-insensitive). Other folder and file names are not interpreted. The first-level folders are
splits if all first-level folders with images have split names. If only some of the first-level
folders have split names, all first-level folders are classes. In this case, an error is raised if a
folder with a split name contains class folders, because the structure is ambiguous.

`ImageFolder.notes` lists the unused files (other file types, images next to class folders), and
`ImageFolder.warnings` the folders that are not read although they look like classes. Hidden files
are ignored, and so are the folders of models and training runs, which contain figures. A folder
that contains at least as many tables as images, and no metadata files, is read by the `datasets`
library.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from ..hub.model_files import CONFIG_FILES, RECIPE_FILE
from ..runtime.errors import format_error
from ..runtime.files import replace_control_characters, write_atomically
from .images import get_cache_file
from .tables import read_table, wrap_table


IMAGE_SUFFIXES = frozenset(
    ".apng .avif .avifs .bmp .dib .gif .ico .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx "
    ".mpo .pbm .pcx .pgm "
    ".png .pnm .ppm .tga .tif .tiff .webp".split()
)
HEIF_SUFFIXES = frozenset(".heic .heics .heif .heifs .hif".split())
HEIC_REMEDY = "To read HEIC, `pip install pillow-heif`, or convert the images to JPEG"
if find_spec("pillow_heif"):
    IMAGE_SUFFIXES |= HEIF_SUFFIXES
TABLE_SUFFIXES = frozenset(".arrow .csv .json .jsonl .parquet .tar .tsv .zip".split())
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

# Split by lowercase folder name.
SPLIT_BY_FOLDER_NAME = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
ROOT = "."  # the image folder itself, as a relative path
MAX_NAMED_FOLDERS = 10  # in one warning
# Number of images from which the table of a folder is stored in the cache.
MIN_STORED_IMAGES = 10_000


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
    run_folders: list[str] = field(default_factory=list)  # whose files are not listed
    notes: list[str] = field(default_factory=list)  # one line for each kind of unused file
    warnings: list[str] = field(default_factory=list)  # one line for each kind of unused folder

    @property
    def is_image_folder(self) -> bool:
        """Return whether the folder is read as an image folder, and not as a folder of tables."""
        return bool(self.images) and (bool(self.metadata) or len(self.images) > len(self.tables))


def scan_folder(path: Path) -> ImageFolder:
    """Return the files of a folder and its subfolders."""
    folder = ImageFolder(path)
    for file in list_files(path, folder.run_folders):
        suffix = PurePosixPath(file).suffix.lower()
        if make_printable(file) != file:
            folder.other_files.append(file)
        elif PurePosixPath(file).name in METADATA_FILES:
            folder.metadata.append(file)
        elif suffix in IMAGE_SUFFIXES:
            folder.images.append(file)
        else:
            (folder.tables if suffix in TABLE_SUFFIXES else folder.other_files).append(file)
    return folder


def list_files(root: str | Path, run_folders: list[str]) -> Iterator[str]:
    """Yield the paths of the files in a folder and its subfolders, sorted within each folder.

    Paths are relative to the folder. Hidden files are ignored. Symbolic links to folders are
    followed, except cycles. The folders of models and training runs, which contain figures, are
    added to `run_folders`; the subfolders among them are skipped. Raise OSError if a folder cannot
    be read.
    """

    def stop(error: OSError) -> None:
        raise OSError(
            f"cannot read the folder {error.filename}: {error.strerror}. Change its permissions, "
            "or move it elsewhere"
        ) from error

    visited = set()
    for parent, folders, files in os.walk(root, onerror=stop, followlinks=True):
        visited.add(Path(parent).resolve())
        visible = sorted(name for name in folders if not is_hidden(name))
        folders[:] = [name for name in visible if Path(parent, name).resolve() not in visited]
        relative_parent = Path(parent).relative_to(root)
        if RECIPE_FILE in files or set(CONFIG_FILES) <= set(files):
            run_folders.append(relative_parent.as_posix())
            if relative_parent.parts:
                folders.clear()
                continue
        yield from (
            (relative_parent / name).as_posix() for name in sorted(files) if not is_hidden(name)
        )


def compute_files_digest(path: Path) -> str | None:
    """Return a hash of the images and tables in a folder, or of one file; None if there is none.

    It is computed from names, sizes and modification times. Files are not read. Folders of training
    runs are skipped, because they change during a run.
    """
    suffixes = IMAGE_SUFFIXES | TABLE_SUFFIXES
    if path.is_dir():
        files = [
            path / name
            for name in list_files(path, run_folders=[])
            if PurePosixPath(name).suffix.lower() in suffixes
        ]
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
    """Return whether a file or folder is hidden or is a `__MACOSX` folder of an archive."""
    return name.startswith(".") or name == "__MACOSX"


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
    images_by_folder = divide_into_splits(folder)
    skipped = [name for name in folder.run_folders if is_in_splits(name, images_by_folder)]
    if skipped:
        folder.warnings.append(f"{folder.path}: {describe_skipped_runs(skipped)}")
    images_by_split = {
        SPLIT_BY_FOLDER_NAME.get(name.lower(), "train"): images
        for name, images in images_by_folder.items()
    }
    note_unused_files(folder, sorted([*folder.other_files, *folder.tables]), "of other types")
    if folder.metadata:
        return read_metadata(folder, list(images_by_folder))
    if use_labels:
        warn_about_folders_without_images(folder, list(images_by_folder))
        return build_labeled_splits(
            folder, images_by_split, depth=0 if "" in images_by_folder else 1
        )
    parts = {
        split: build_dataset(folder, split, images) for split, images in images_by_split.items()
    }
    return datasets.DatasetDict(parts)


def read_metadata(folder: ImageFolder, split_folders: Sequence[str]) -> Any:
    """Return the rows of the metadata files by split, with the columns of the first file of each.

    Raise ValueError if a metadata file has no column `file_name`.
    """
    import datasets
    import pyarrow

    parts: dict[str, list[Any]] = {}
    for file in folder.metadata:
        name = file.partition("/")[0] if "" not in split_folders else ""
        if name not in split_folders:
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
        split = SPLIT_BY_FOLDER_NAME.get(name.lower(), "train")
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
        yield
    except datasets.data_files.EmptyDatasetError:
        raise ValueError(f"{name} contains no images and no tables. Check the path") from None
    except Exception as error:  # the readers raise many types of errors on damaged data
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


def divide_into_splits(folder: ImageFolder) -> dict[str, list[str]]:
    """Return the images of each split folder, in the order train, validation, test.

    All images are under the name "" if the first-level folders are not splits (see the module
    docstring). Raise ValueError if two folder names refer to the same split, or if it is ambiguous
    whether a folder is a split.
    """
    images_by_folder: dict[str, list[str]] = {}
    for image in folder.images:
        if "/" in image:
            images_by_folder.setdefault(image.partition("/")[0], []).append(image)

    splits = list(dict.fromkeys(SPLIT_BY_FOLDER_NAME.values()))
    split_folders = [name for name in images_by_folder if name.lower() in SPLIT_BY_FOLDER_NAME]
    other_folders = [name for name in images_by_folder if name not in split_folders]

    if not split_folders or other_folders or any("/" not in file for file in folder.metadata):
        for name in split_folders if not folder.metadata else []:
            subfolders = sorted(
                {image.split("/")[1] for image in images_by_folder[name] if image.count("/") > 1}
            )
            if subfolders:
                raise ValueError(
                    f"{folder.path}: {name!r} has the name of a split and contains folders "
                    f"({format_name_list(subfolders)}), but {other_folders[0]!r} is not a split "
                    f"({', '.join(splits)}). Move {other_folders[0]!r} elsewhere, or rename "
                    f"{name!r}"
                )
        return {"": folder.images}

    split_folders.sort(key=lambda name: splits.index(SPLIT_BY_FOLDER_NAME[name.lower()]))
    for first, second in pairwise(split_folders):
        if SPLIT_BY_FOLDER_NAME[first.lower()] == SPLIT_BY_FOLDER_NAME[second.lower()]:
            raise ValueError(
                f"{folder.path}: the folders {first!r} and {second!r} are the same split. Merge "
                "them"
            )

    note_unused_files(
        folder, [image for image in folder.images if "/" not in image], "next to the split folders"
    )
    return {name: images_by_folder[name] for name in split_folders}


def is_in_splits(path: str, names: Collection[str]) -> bool:
    """Return whether a relative path is in one of the folders that `divide_into_splits` returns."""
    return "" in names or path.partition("/")[0] in names


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
        is_read = is_read or is_in_splits(path.as_posix(), divide_into_splits(scanned))
    if is_read:
        raise ValueError(
            f"`output_dir={str(output_dir)!r}` is in the folder of the dataset, so that the "
            "figures of the run would become images of it. Set `output_dir` to a folder outside of "
            f"{dataset}"
        )


def warn_about_folders_without_images(folder: ImageFolder, split_folders: list[str]) -> None:
    """Add a warning about folders in the places of classes and splits that have no images.

    `split_folders` are those of `divide_into_splits`.
    """
    with_images = set()
    for image in folder.images:
        parts = image.split("/", 2)
        with_images |= {parts[0], "/".join(parts[:2])}

    candidates = list_subfolders(folder.path)
    if "" not in split_folders:
        candidates = [name for name in candidates if name.lower() in SPLIT_BY_FOLDER_NAME]
        for split_folder in split_folders:
            names = list_subfolders(folder.path / split_folder)
            candidates += [f"{split_folder}/{name}" for name in names]

    descriptions = []
    unread_files = []
    for name in candidates:
        prefix = f"{name}/"
        has_runs = any(f"{run}/".startswith(prefix) for run in folder.run_folders)
        if name in with_images or has_runs:
            continue
        files = [file for file in (*folder.other_files, *folder.tables) if file.startswith(prefix)]
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


def list_subfolders(path: Path) -> list[str]:
    """Return the names of the visible subfolders, sorted."""
    return sorted(
        entry.name for entry in path.iterdir() if entry.is_dir() and not is_hidden(entry.name)
    )


def build_labeled_splits(
    folder: ImageFolder, images_by_split: dict[str, list[str]], depth: int
) -> Any:
    """Return the `DatasetDict` of the splits that have class folders.

    Class folders are first-level folders (`depth` 0) or subfolders of split folders (`depth` 1).
    Raise ValueError if no split has class folders.
    """
    import datasets

    labels: dict[str, str | None] = {
        image: next(iter(image.split("/")[depth:-1]), None)
        for image in chain.from_iterable(images_by_split.values())
    }
    classes = sorted({label for label in labels.values() if label is not None})
    unlabeled_images = [image for image, label in labels.items() if label is None]
    if not classes:
        parent = folder.path / PurePosixPath(unlabeled_images[0]).parent
        tables = [folder.path / table for table in folder.tables]
        tables += sorted(
            file for file in folder.path.parent.iterdir() if file.suffix.lower() in TABLE_SUFFIXES
        )
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
    images. A large table is stored in the cache of `datasets` under its fingerprint, so that all
    processes share its memory.
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

    table = pyarrow.table(columns)
    digest = hashlib.sha256(repr([classes, labels]).encode())
    for image in images:
        with suppress(OSError):  # an error is reported when the image is read
            stat = (folder.path / image).stat()
            digest.update(f"{image} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    fingerprint = digest.hexdigest()[:16]

    stored_table = datasets.table.InMemoryTable(table)
    if len(images) >= MIN_STORED_IMAGES:
        file = get_cache_file(f"{fingerprint}.arrow")
        with suppress(OSError):  # a full disk
            if not file.is_file():
                with (
                    write_atomically(file) as temporary,
                    pyarrow.ipc.new_stream(temporary, table.schema) as writer,
                ):
                    writer.write_table(table)
            stored_table = datasets.table.MemoryMappedTable.from_file(str(file))

    info = datasets.DatasetInfo(features=datasets.Features(features))
    return datasets.Dataset(
        stored_table, info=info, split=datasets.NamedSplit(split), fingerprint=fingerprint
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

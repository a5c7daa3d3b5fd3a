"""Open the dataset in `--dataset`: a table of each split (`open_source`).

    digits                1,797 handwritten digits of 8 x 8 pixels from scikit-learn, in memory
    an image folder       a subfolder per class; read by image_folder.py
    CSV, JSON Lines       a file, or a folder with a file per split; read by tables.py
    Parquet, WebDataset   a file, or a folder with a file per split; read by the `datasets` library, offline
    saved with `datasets` a folder written by `save_to_disk`
    memory:...            a dataset in memory (in_memory.py)
    anything else         the id of a dataset on the Hub

dataset.py reads images, labels and groups from the tables (columns.py).
"""

import glob
import hashlib
import pickle
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from accelerate import PartialState
from huggingface_hub.errors import HfHubHTTPError

from ..hub.connection import name_cache
from ..hub.loading import (
    describe_hub_error,
    describe_missing_repo,
    is_hub_id,
)
from ..hub.local_paths import BUILT_IN_DATASET
from ..model.field_checks_vitcls import open_regular_file
from ..runtime.distributed import run_on_main
from ..runtime.errors import (
    describe_exhaustion,
    explain_damage,
    format_error,
    format_name_list,
    warn_on_first_process,
)
from ..runtime.files import check_parquet_size
from .cells import spell_label
from .columns import (
    FILE_NAME,
    has_label_column,
    read_column,
)
from .folder_layout import SPLIT_BY_FOLDER_NAME, SPLIT_ORDER
from .groups import NO_GROUPS
from .image_folder import (
    ImageFolder,
    find_classes,
    get_remedy,
    read_image_folder,
    scan_folder,
    warn_about_skipped,
)
from .images import resolve_path
from .in_memory import MEMORY_PREFIX, convert_split, get_dataset, get_title
from .tables import read_table


# Suffix of a table -> its reader: tables.py, or one of the `datasets` library. A folder is read by the
# first reader that finds tables in it.
READERS = {
    ".csv": "text",
    ".tsv": "text",
    ".jsonl": "text",
    ".ndjson": "text",
    ".parquet": "parquet",
    ".tar": "webdataset",
}
# A folder written by `save_to_disk` has one of them
SAVED_FILES = ("dataset_dict.json", "state.json")

Data = TypeVar("Data")
# Names of all splits -> names of the splits to read
SplitSelector = Callable[[list[str]], Collection[str]]


@dataclass(frozen=True)
class Source:
    """What a dataset is read from.

    Attributes:
        name: of the file or folder, or the id on the Hub.
        folder: to which image paths are relative.
        tables: a `datasets.Dataset` of each split, with all columns.
    """

    name: str
    folder: Path
    tables: Any


def load_on_main(dataset: str, load: Callable[[], Data]) -> Data:
    """Load a dataset on the main process, and return what `load` returns on all processes.

    A folder is then scanned once, and the held-out images are selected once. Tables on disk are not
    copied.

    A process loads a dataset itself if the dataset is in memory, or if the process does not share
    the file system of the main process's cache of `datasets`.
    """
    if PartialState().num_processes == 1 or dataset.startswith(MEMORY_PREFIX):
        return load()
    # Pickled before it is sent, because unpickling may fail on a process without the cached files.
    content = run_on_main(lambda: pickle.dumps(load()))
    try:
        return pickle.loads(content)
    except OSError:
        return load()


def open_source(
    dataset: str, label_columns: Collection[str] | None = (), group_column: str | None = None
) -> Source:
    """Open a dataset.

    Args:
        dataset: the value of `--dataset`.
        label_columns: those that a person or a model names: a table of them wins over class folders. None: no
            label is read.
        group_column: NO_GROUPS if the folders below a class mean nothing.

    Raises:
        ValueError: if the dataset cannot be read.
        OSError: if it is found neither locally nor on the Hub.
    """
    path = Path(dataset)
    if dataset == BUILT_IN_DATASET and not path.exists():
        return Source(dataset, Path.cwd(), {"train": load_digits()})
    if dataset.startswith(MEMORY_PREFIX):
        return Source(get_title(dataset), Path.cwd(), get_dataset(dataset))
    if path.is_dir():
        tables = read_folder(path, label_columns, group_column != NO_GROUPS)
        return Source(path.resolve().name, path, tables)
    suffix = path.suffix.lower()
    if path.exists() and suffix not in READERS:
        raise ValueError(
            f"{dataset} is not a table that can be read, because its suffix is not one of "
            f"{', '.join(READERS)}. Rename a file in such a format, save a spreadsheet as CSV UTF-8 with "
            "columns such as file_name and label, unpack an archive, or set `dataset` to a folder of images"
        )
    if path.exists():
        tables = read_tables(path.parent, READERS[suffix], {"train": [path]})
        return Source(path.resolve().name, path.parent, tables)
    if suffix in READERS or not is_hub_id(dataset):
        raise OSError(describe_missing_repo(dataset, "dataset"))

    import datasets

    with explain_reading_errors(dataset):
        return Source(dataset, path, datasets.load_dataset(dataset))


def load_digits() -> Any:
    """Load the handwritten digits from scikit-learn: images of 8 x 8 pixels with 17 gray levels."""
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    gray_levels = (digits.images * (255 / 16)).round().astype(np.uint8)  # [1797, 8, 8]
    # Files without compression: their bytes, and so their keys, are the same on every machine.
    files = [b"P5 8 8 255\n" + pixels.tobytes() for pixels in gray_levels]
    return convert_split(list(zip(files, digits.target, strict=True)))


def choose_split(
    split: str | None, dataset: str, names: Sequence[str], preferred: Sequence[str] = ()
) -> str:
    """Choose a split: `split`, else the first of the preferred ones, else the only one.

    Raise ValueError if there is no such split.
    """
    only = names if len(names) == 1 else ()
    wanted = (*preferred, *only) if split is None else (split,)
    for name in wanted:
        if name in names:
            return name
    raise ValueError(f"{dataset} has the splits {', '.join(names)}. Set `split` to one of them")


def read_folder(path: Path, label_columns: Collection[str] | None, has_groups: bool) -> Any:
    """Read the splits of an image folder, a folder of `save_to_disk`, or a folder of tables."""
    import datasets

    use_labels = label_columns is not None
    folder = scan_folder(path)
    if "." in folder.skipped_folders:  # The folder itself, which other scans leave out
        raise ValueError(
            f"{path} contains the files of a training run or a model. Move images, or the folders of "
            "classes, that are next to them to a folder of their own"
        )
    # Beside images that are in no class folders, such as train.csv, test.csv and images/
    split_tables = [
        file for file in folder.tables if find_split(file) and Path(file).suffix.lower() in READERS
    ]
    if folder.is_image_folder:
        if not (use_labels and split_tables) or len(find_classes(path, folder.images)) > 1:
            return read_image_folder(folder, use_labels, has_groups)
        folder = replace(folder, tables=split_tables)
    if any((path / file).is_file() for file in SAVED_FILES):
        with explain_reading_errors(str(path)):
            saved = datasets.load_from_disk(path)
        return saved if isinstance(saved, dict) else {"train": saved}
    check_configurations(path)
    for reader in dict.fromkeys(READERS.values()):
        if tables := find_tables(path, folder.metadata or folder.tables, reader):
            splits = read_tables(path, reader, tables)
            if (
                label_columns is not None
                and folder.metadata
                and has_unlabeled_rows(folder, splits, label_columns)
            ):
                return read_image_folder(folder, True, metadata=read_metadata(splits, path))
            return splits
    others = folder.other_files
    remedy = get_remedy(others) or (
        "Check the path, unpack archives, or save spreadsheets as CSV UTF-8"
    )
    if others and not any(Path(file).suffix for file in others):
        remedy = "Add the suffix of their format, such as .jpg, to the names of images"
    found = f", but {format_name_list(others)}" if others else ""
    raise ValueError(
        f"{path} contains no images and no tables ({', '.join(READERS)}){found}. {remedy}"
    )


def check_configurations(path: Path) -> None:
    """Raise ValueError for the copy of a repository of the Hub with several datasets, by its README."""
    readme = path / "README.md"
    if not readme.is_file():
        return
    header = readme.read_text(errors="replace").partition("\n---")[0]
    names = re.findall(r"^ *-? *config_name: *[\"']?([^\"'\n]+?)[\"']? *$", header, re.MULTILINE)
    configured = list(dict.fromkeys(names)) if "\nconfigs:" in header else []
    if len(configured) > 1:
        raise ValueError(
            f"{path} has the configurations {format_name_list(configured)}, each a dataset of its own. Set "
            "`dataset` to the folder of one, or to one of the tables"
        )


def has_unlabeled_rows(folder: ImageFolder, splits: Any, label_columns: Collection[str]) -> bool:
    """Tell whether the rows of metadata.csv, such as captions, only describe images of class folders.

    Raise ValueError if both the folders and a column could be the labels.
    """
    features = next(iter(splits.values())).features
    if FILE_NAME not in features:
        return False
    names = chain(*(read_column(table, FILE_NAME) for table in splits.values()))
    found = {resolve_path(folder.path, spell_label(name)) for name in names}
    listed = [image for image in folder.images if str(folder.path / image) in found]
    has_labels = has_label_column(features, label_columns)
    classes = [] if has_labels else find_classes(folder.path, listed)
    metadata = format_name_list(folder.metadata)
    if len(classes) < 2:
        unlisted = sorted({*folder.images} - {*listed})
        warn_about_skipped(str(folder.path), unlisted, f"images without a row in {metadata}")
        return False

    others = [name for name in features if name != FILE_NAME]
    (column, *rest) = others or [FILE_NAME]
    values = list(chain(*(map(repr, read_column(table, column)) for table in splits.values())))
    if not rest and not label_columns and 2 * len(set(values)) <= len(values):
        raise ValueError(
            f"{folder.path}: the labels may be the class folders ({format_name_list(classes)}) or the "
            f"column {column!r} of {metadata}. Set `label_column={column!r}`, or `label_column='label'` "
            "for the folders"
        )
    warn_on_first_process(
        f"WARNING: {folder.path.resolve()}: the class folders ({format_name_list(classes)}) are the labels, "
        f"because no column of {metadata} has labels: {', '.join(features)}. To train on a column, "
        f"set `label_column={column!r}`"
    )
    return True


def read_metadata(tables: Mapping[str, Any], folder: Path) -> Any:
    """Read the columns of metadata.csv, such as the object of each image, by the path of the image."""
    import pandas as pd

    rows = pd.concat(table.to_pandas() for table in tables.values()).map(spell_label)
    rows.index = [resolve_path(folder, name) for name in rows.pop(FILE_NAME).fillna("")]
    for column, numbers in rows.groupby(level=0).nunique(dropna=False).items():
        if numbers.max() > 1:
            del rows[column]
            warn_on_first_process(
                f"the column {column!r} is not used: {numbers.idxmax()} has several values in it"
            )
    return rows[~rows.index.duplicated()]


def find_split(file: str) -> str | None:
    """Find the split of a table by the words in its name and folders."""
    words = re.split(r"[/._=-]", file.lower())
    return next(filter(None, map(SPLIT_BY_FOLDER_NAME.get, words)), None)


def find_tables(root: Path, files: Sequence[str], reader: str) -> dict[str, list[Path]]:
    """Sort the tables of a folder into splits."""
    tables: dict[str, list[Path]] = {}
    for file in files:
        if READERS.get(Path(file).suffix.lower()) == reader:
            tables.setdefault(find_split(file) or "train", []).append(root / file)
    return {split: tables[split] for split in SPLIT_ORDER if split in tables}


def read_tables(folder: Path, reader: str, files: Mapping[str, Sequence[Path]]) -> Any:
    """Read the tables of each split in a folder as `datasets.Dataset`."""
    import datasets
    import pyarrow.dataset

    if reader == "text":
        return {
            split: datasets.concatenate_datasets([read_table(file, folder) for file in part])
            for split, part in files.items()
        }
    paths = list(chain(*files.values()))
    # The cache of `datasets` identifies a file by its time, which a copy may keep
    digest = hashlib.blake2b(digest_size=16)
    for file in paths:
        with open_regular_file(file) as stream:
            digest.update(hashlib.file_digest(stream, "blake2b").digest())
        if reader == "parquet":
            with explain_damage(file, "Save it as several files"):
                check_parquet_size(file, types=("string", "large_string", "dictionary"))
    # `datasets` reads each path as a pattern
    patterns = {split: [glob.escape(str(file)) for file in part] for split, part in files.items()}
    with explain_reading_errors(str(paths[0].parent if len(paths) > 1 else paths[0])):
        tables = datasets.load_dataset(
            reader,
            data_files=patterns,
            cache_dir=str(Path(datasets.config.HF_DATASETS_CACHE, "vitcls", digest.hexdigest())),
        )
    if reader == "parquet":
        for split, part in files.items():
            # Columns that folders such as label=cat/ of Spark and pandas name
            parts = pyarrow.dataset.dataset(list(map(str, part)), partitioning="hive")
            for name in set(parts.schema.names) - tables[split].features.keys():
                values = parts.to_table(columns=[name])[name].to_pylist()
                tables[split] = tables[split].add_column(name, values)
    return tables


@contextmanager
def explain_reading_errors(name: str) -> Iterator[None]:
    """Raise the errors of `datasets` in the block as a one-line ValueError that names the cause.

    `datasets` does not log them. `name` is the dataset or the file.
    """
    import datasets

    # The library logs what it then raises. Only the one line below is printed.
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        with name_cache():
            yield
    except Exception as error:  # The readers raise many types of errors on damaged data
        if describe_exhaustion(error) is not None or "HF_HOME" in str(error):
            raise
        cause: BaseException = error
        while isinstance(cause, datasets.exceptions.DatasetGenerationError) and cause.__cause__:
            cause = cause.__cause__
        if str(cause).startswith("BatchSize must be greater than 0"):  # An empty Parquet file
            raise ValueError(f"{name} is empty. Add rows with images") from error
        if isinstance(cause, datasets.exceptions.DatasetNotFoundError):
            raise OSError(describe_missing_repo(name, "dataset")) from error
        if isinstance(cause, ConnectionError | HfHubHTTPError):
            raise OSError(describe_hub_error(cause, name, repo_type="dataset")) from error
        raise ValueError(
            f"cannot read the dataset {name!r} ({type(cause).__name__}: {format_error(cause)}). "
            "Check the path or the name on the Hub, and the file format: CSV, JSON Lines or Parquet, "
            "or a folder of images or of such files"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)

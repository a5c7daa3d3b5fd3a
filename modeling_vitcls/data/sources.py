"""Load the splits of the dataset in `--dataset`.

    digits                1,797 handwritten digits of 8 x 8 pixels from scikit-learn, in memory
    an image folder       a subfolder per class; read by image_folder.py
    CSV, JSON Lines       a file, or a folder with a file per split; read by tables.py
    Parquet, WebDataset   a file, or a folder with a file per split; read by the `datasets` library, offline
    saved with `datasets` a folder written by `save_to_disk`
    memory:...            a dataset in memory (in_memory.py)
    anything else         the id of a dataset on the Hub

A table may have a column of splits and one of groups (columns.py). Held-out images are selected in
splits.py.
"""

import glob
import hashlib
import os
import pickle
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from ..hub.local_paths import BUILT_IN_DATASET, is_local, resolve_name
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
from .cells import NO_SEPARATOR, normalize_name, spell_label
from .columns import (
    FILE_NAME,
    NO_GROUPS,
    build_images,
    choose_groups,
    divide_by_column,
    find_image_column,
    find_label_columns,
    find_stem,
    has_label_column,
    read_column,
    read_labels,
)
from .folder_layout import SPLIT_BY_FOLDER_NAME, SPLIT_ORDER
from .image_folder import (
    FOLDER_COLUMN,
    ImageFolder,
    find_classes,
    get_remedy,
    read_image_folder,
    scan_folder,
    warn_about_skipped,
)
from .images import LabeledImages, resolve_path
from .in_memory import MEMORY_PREFIX, TITLES, add_dataset, convert_split, get_dataset, get_title
from .labels import UNLABELED, LabelSpace, OneLabel
from .options import DataOptions
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
class Splits:
    """The name, label space and selected splits of a dataset; the training split is the first."""

    name: str
    label_space: LabelSpace
    images_by_split: Mapping[str, LabeledImages]
    # Lines about what was read: the labels, and the columns of splits and groups
    facts: dict[str, str] = field(default_factory=dict)
    missing_reason: str | None = None  # Why groups cannot measure one another
    no_estimate: str | None = None  # Why a result says nothing about new photos

    @property
    def train(self) -> LabeledImages:
        return next(iter(self.images_by_split.values()))

    def join_fitted(self) -> "Splits":
        """Join the splits that can train a model: all but the last one, which measures it."""
        (train_split, train), *others = self.images_by_split.items()
        for _, part in others[:-1]:
            train = train.join(part)
        return replace(self, images_by_split=dict([(train_split, train), *others[-1:]]))


def load_splits(
    options: DataOptions,
    use_labels: bool = True,
    select: SplitSelector = list,
    trained: Mapping[str, Any] | None = None,
    keeps_unlabeled: bool = False,
    answer_classes: Sequence[str] = (),
) -> Splits:
    """Load the splits of `dataset`; with `more_data`, all are one split.

    Args:
        use_labels: whether labels are read. If False, every label is missing, and no label column is
            required.
        select: function that selects splits by name. Other splits, whose labels may be hidden, are
            not read.
        trained: `label_column` and `label_separator` of a model's training, which are used if the
            dataset has these columns.
        keeps_unlabeled: whether images without a label are kept, as None.
        answer_classes: further valid classes in `answers`, besides those of the dataset.

    Raises:
        ValueError: if the dataset cannot be read, or has no image or label column.
        OSError: if the dataset cannot be found.
    """
    if options.more_data:
        return load_several(options, use_labels, select, keeps_unlabeled, answer_classes)
    wanted = options.label_column or (trained or {}).get("label_column") or ()
    name, folder, splits = open_dataset(
        options.dataset, use_labels, wanted, options.group_column != NO_GROUPS
    )
    # A run and its report may name a folder differently, and warnings are logged once
    dataset = resolve_name(get_title(options.dataset))
    if is_local(dataset):
        dataset = os.path.normpath(dataset)
    if not splits:
        raise ValueError(f"{dataset} has no splits. Add at least one, with images")
    columns = next(iter(splits.values())).features
    if trained and all(find_stem(columns, each) for each in trained["label_column"]):
        options = replace(options, **trained)
    all_tables, facts = divide_by_column(
        splits, dataset, options.split_column, options.label_column or ()
    )
    empty = [split for split, table in all_tables.items() if split != "train" and not len(table)]
    if 0 < len(empty) < len(all_tables):
        warn_on_first_process(
            f"{dataset}: splits without rows are left out: {format_name_list(empty)}"
        )
        all_tables = {split: all_tables[split] for split in all_tables if split not in empty}
    # Selected before the labels are read: a test split may hide its labels, which would be an
    # error.
    tables = {split: all_tables[split] for split in select(list(all_tables))}
    first = next(iter(tables.values()))
    column = find_image_column(dataset, first, folder, options.image_column, options.label_column)
    images = {
        split: build_images(table, column, folder, dataset) for split, table in tables.items()
    }
    if not use_labels:
        unlabeled = {
            split: LabeledImages(each, [None] * len(each)) for split, each in images.items()
        }
        return Splits(name, UNLABELED, unlabeled, facts)

    columns = find_label_columns(dataset, tables, options.label_column, column)
    label_space, labels = read_labels(
        tables, columns, dataset, options.label_separator, options.label_names
    )
    parts = {split: LabeledImages(images[split], labels[split]) for split in tables}
    no_estimate = None
    if options.answers:
        from .answers import BELIEVED, apply_answers, read_answers  # imports pandas

        if answer_classes and label_space.kind == OneLabel.kind:
            ((label, names),) = label_space.columns.items()
            label_space = OneLabel({label: list(dict.fromkeys([*names, *answer_classes]))})
        parts, lines = apply_answers(parts, label_space, read_answers(options.answers))
        facts |= lines
        no_estimate = lines.get(BELIEVED)
    hidden = [
        split
        for split in [*parts][1:]
        if not keeps_unlabeled and all(label is None for label in parts[split].labels)
    ]
    if hidden:
        warn_on_first_process(
            f"{dataset}: splits without labels are left out: {format_name_list(hidden)}"
        )
        parts = {split: parts[split] for split in parts if split not in hidden}
    labeled = {
        split: part
        if keeps_unlabeled
        else drop_unlabeled_images(part, f"{dataset}, split {split!r}", columns)
        for split, part in parts.items()
    }
    tables = {split: tables[split].select(part.images.rows) for split, part in labeled.items()}
    groups, fact, reason = choose_groups(
        tables,
        dataset,
        options.group_column,
        list(map(label_space.format, chain(*(part.labels for part in labeled.values())))),
        (column, FOLDER_COLUMN, options.split_column or "", *columns),
    )
    if fact is not None:
        facts["groups"] = fact
    examples = [", ".join(map(repr, names[:3])) for names in label_space.columns.values()]
    # A class folder has no other column, and a line names its classes.
    if columns != ["label"]:
        facts["labels"] = (
            f"{label_space.description}, from {', '.join(map(repr, columns))}, such as "
            f"{'; '.join(examples)}"
        )
    grouped = {split: replace(part, groups=groups.get(split)) for split, part in labeled.items()}
    return Splits(name, label_space, grouped, facts, reason, no_estimate)


def load_several(
    options: DataOptions,
    use_labels: bool,
    select: SplitSelector,
    keeps_unlabeled: bool,
    answer_classes: Sequence[str],
) -> Splits:
    """Load `dataset` and `more_data` as one split: a table in memory, with images that are no files.

    If there are `answers`, the images of a further folder have no labels unless one of its folders has the
    name of a class: they may be years.

    Raise ValueError if a dataset has several splits, or several labels per image.
    """
    import pandas as pd

    loaded: list[Splits] = []
    tables = []
    for dataset in (options.dataset, *options.more_data):
        has_labels = use_labels
        if options.answers and loaded and Path(dataset).is_dir():
            folder = scan_folder(Path(dataset))
            names = {normalize_name(Path(each).name) for each in folder.folders}
            is_unknown = names.isdisjoint(map(normalize_name, loaded[0].label_space.names))
            has_labels = not (folder.is_image_folder and is_unknown)
        part = load_splits(
            replace(options, dataset=dataset, more_data=(), answers=()),
            has_labels,
            keeps_unlabeled=True,
        )
        if len(part.images_by_split) > 1 or part.label_space.kind != OneLabel.kind:
            raise ValueError(
                "`more_data` requires one split and one label per image in each dataset. Name a folder or file of "
                "one split, set `label_column`, or remove `more_data`"
            )
        loaded.append(part)
        images, groups = part.train.images, part.train.groups
        table = {
            "image": map(images.get_encoded_image, range(len(images))),
            "label": map(part.label_space.format, part.train.labels),
            FOLDER_COLUMN: None if groups is None else [f"{dataset} {each}" for each in groups],
        }
        tables.append(pd.DataFrame(table))
    joined = add_dataset(pd.concat(tables))
    TITLES[joined] = " and ".join(part.name for part in loaded)
    return load_splits(
        DataOptions(dataset=joined, answers=options.answers, label_separator=NO_SEPARATOR),
        use_labels,
        select,
        keeps_unlabeled=keeps_unlabeled,
        answer_classes=answer_classes,
    )


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


def drop_unlabeled_images(
    images: LabeledImages, name: str, columns: Sequence[str]
) -> LabeledImages:
    """Drop the images without a label, and log a warning that counts them.

    `name` names the split in messages, and `columns` have the labels. Raise ValueError if no image has a label.
    """
    labeled = [index for index, label in enumerate(images.labels) if label is not None]
    if len(labeled) == len(images):
        return images

    if not labeled:
        raise ValueError(
            f"{name}: no image has a label. Set a different `label_column`, or add labels"
        )
    is_list = isinstance(images.labels[labeled[0]], list)
    warn_on_first_process(
        f"{name}: skipped {len(images) - len(labeled):,} of {len(images):,} images (no label in "
        f"{format_name_list(columns)}{'; [] means none of the labels' if is_list else ''})"
    )
    return images.select(labeled)


def open_dataset(
    dataset: str,
    use_labels: bool,
    label_columns: Collection[str] = (),
    has_groups: bool = True,
) -> tuple[str, Path, Any]:
    """Open a dataset.

    `label_columns` are given by the user or a model; a table of them wins over class folders. Without
    `has_groups`, the folders below a class mean nothing.

    Returns:
        The name of the file or folder, or the id on the Hub; the folder to which image paths are
        relative; and a `datasets.Dataset` for each split, with all columns.

    Raises:
        ValueError: if the dataset cannot be read.
        OSError: if it is found neither locally nor on the Hub.
    """
    path = Path(dataset)
    if dataset == BUILT_IN_DATASET and not path.exists():
        return dataset, Path.cwd(), {"train": load_digits()}
    if dataset.startswith(MEMORY_PREFIX):
        return get_title(dataset), Path.cwd(), get_dataset(dataset)
    if path.is_dir():
        return path.resolve().name, path, read_folder(path, use_labels, label_columns, has_groups)
    suffix = path.suffix.lower()
    if path.exists() and suffix not in READERS:
        raise ValueError(
            f"{dataset} is not a table that can be read, because its suffix is not one of "
            f"{', '.join(READERS)}. Rename a file in such a format, save a spreadsheet as CSV UTF-8 with "
            "columns such as file_name and label, unpack an archive, or set `dataset` to a folder of images"
        )
    if path.exists():
        tables = read_tables(path.parent, READERS[suffix], {"train": [path]})
        return path.resolve().name, path.parent, tables
    if suffix in READERS or not is_hub_id(dataset):
        raise OSError(describe_missing_repo(dataset, "dataset"))

    import datasets

    with explain_reading_errors(dataset):
        return dataset, path, datasets.load_dataset(dataset)


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


def read_folder(
    path: Path, use_labels: bool, label_columns: Collection[str], has_groups: bool
) -> Any:
    """Read the splits of an image folder, a folder of `save_to_disk`, or a folder of tables."""
    import datasets

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
    for reader in dict.fromkeys(READERS.values()):
        if tables := find_tables(path, folder.metadata or folder.tables, reader):
            splits = read_tables(path, reader, tables)
            if use_labels and folder.metadata and has_unlabeled_rows(folder, splits, label_columns):
                return read_image_folder(folder, True, metadata=read_metadata(splits, path))
            return splits
    remedy = get_remedy(folder.other_files) or (
        "Check the path, unpack archives, or save spreadsheets as CSV UTF-8"
    )
    raise ValueError(f"{path} contains no images and no tables ({', '.join(READERS)}). {remedy}")


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

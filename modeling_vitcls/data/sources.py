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
from urllib.parse import unquote

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
from ..model.fast_image_processing_vitcls import open_regular_file
from ..runtime.distributed import run_on_main
from ..runtime.errors import (
    describe_exhaustion,
    explain_damage,
    format_error,
    format_name_list,
    warn_on_first_process,
)
from ..runtime.files import check_parquet_size, read_json
from .cells import spell_label
from .columns import (
    FILE_NAME,
    NO_GROUPS,
    choose_groups,
    divide_by_column,
    find_stem,
    has_label_column,
    read_column,
    read_labels,
)
from .dataset_parts import Source, join_parts, read_part, read_parts_of_several
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
from .in_memory import MEMORY_PREFIX, convert_split, get_dataset, get_title
from .labels import UNLABELED, LabelSpace
from .options import DataOptions, Dataset, list_datasets
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
    # Images that show none of the classes, as a person has answered
    others: Mapping[str, LabeledImages] = field(default_factory=dict)

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
) -> Splits:
    """Load the splits of `dataset`.

    Args:
        use_labels: whether labels are read. If False, every label is missing, and no label column is
            required.
        select: function that selects splits by name. Other splits, whose labels may be hidden, are
            not read.
        trained: `label_column` and `label_separator` of a model's training, which are used if the
            dataset has these columns.

    Raises:
        ValueError: if the dataset cannot be read, or has no image or label column.
        OSError: if the dataset cannot be found.
    """
    wanted = options.label_column or (trained or {}).get("label_column") or ()
    names = list_datasets(options.dataset)
    has_groups = options.group_column != NO_GROUPS
    opened = [open_source(each, use_labels, wanted, has_groups, len(names) == 1) for each in names]
    if trained and any(
        all(find_stem(source.first.features, each) for each in trained["label_column"])
        for source in opened
    ):
        options = replace(options, **trained)
    selected, facts = select_splits(opened, options, select)
    source = selected[0]
    if len(selected) == 1:
        parts = {split: read_part(source, split, options, use_labels) for split in source.tables}
    else:
        parts = read_parts_of_several(selected, options, use_labels)
    name = " and ".join(source.name for source in selected)
    dataset = " and ".join(source.title for source in selected)
    if not use_labels:
        unlabeled = {
            key: LabeledImages(part.images, [None] * len(part.images))
            for key, part in parts.items()
        }
        return Splits(name, UNLABELED, join_parts(parts, unlabeled), facts)

    first = next(iter(parts.values()))
    columns = first.label_columns
    tables = {key: part.table for key, part in parts.items()}
    label_space, labels = read_labels(
        tables, columns, dataset, options.label_separator, options.label_names
    )
    images = {key: LabeledImages(part.images, labels[key]) for key, part in parts.items()}
    others: Mapping[str, LabeledImages] = {}
    if options.answers:
        from .answers import apply_answers, read_answers  # imports pandas

        answered = apply_answers(images, label_space, read_answers(options.answers), dataset)
        images, others = answered.images, join_parts(parts, answered.others)
        facts["answers"] = answered.text
    labeled = {
        key: drop_unlabeled_images(
            part, f"{dataset}, split {key!r}", columns, may_be_empty=len(selected) > 1
        )
        for key, part in images.items()
    }
    tables = {key: table.select(labeled[key].images.rows) for key, table in tables.items()}
    groups, fact, reason = choose_groups(
        tables,
        dataset,
        options.group_column,
        list(map(label_space.format, chain(*(part.labels for part in labeled.values())))),
        (first.image_column, FOLDER_COLUMN, options.split_column or "", *columns),
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
    grouped = {key: replace(part, groups=groups.get(key)) for key, part in labeled.items()}
    return Splits(name, label_space, join_parts(parts, grouped), facts, reason, others)


def select_splits(
    sources: Sequence[Source], options: DataOptions, select: SplitSelector
) -> tuple[list[Source], dict[str, str]]:
    """Divide tables by their columns of splits, and select the splits that are read.

    Returns:
        The datasets with these splits, and the facts about the columns.

    Raises:
        ValueError: if one of several datasets has none of these splits.
    """
    divided = []
    facts: dict[str, str] = {}
    for source in sources:
        tables, own_facts = divide_by_column(
            source.tables, source.title, options.split_column, options.label_column or ()
        )
        divided.append(replace(source, tables=tables))
        facts |= own_facts
    # Selected before the labels are read: a test split may hide its labels, which would be an
    # error.
    names = select(list(dict.fromkeys(chain(*(source.tables for source in divided)))))
    selected = []
    for source in divided:
        tables = {split: source.tables[split] for split in names if split in source.tables}
        if not tables:
            raise ValueError(
                f"{source.title} has the splits {', '.join(source.tables)}, and of the other datasets the "
                f"splits {', '.join(names)} are read. Use it alone, or rename its splits"
            )
        selected.append(replace(source, tables=tables))
    return selected, facts


def load_on_main(dataset: Dataset, load: Callable[[], Data]) -> Data:
    """Load a dataset on the main process, and return what `load` returns on all processes.

    A folder is then scanned once, and the held-out images are selected once. Tables on disk are not
    copied.

    A process loads a dataset itself if the dataset is in memory, or if the process does not share
    the file system of the main process's cache of `datasets`.
    """
    is_in_memory = any(each.startswith(MEMORY_PREFIX) for each in list_datasets(dataset))
    if PartialState().num_processes == 1 or is_in_memory:
        return load()
    # Pickled before it is sent, because unpickling may fail on a process without the cached files.
    content = run_on_main(lambda: pickle.dumps(load()))
    try:
        return pickle.loads(content)
    except OSError:
        return load()


def drop_unlabeled_images(
    images: LabeledImages, name: str, columns: Sequence[str], may_be_empty: bool
) -> LabeledImages:
    """Drop the images without a label, and log a warning that counts them.

    `name` names the split in messages, and `columns` have the labels. Raise ValueError if no image has a
    label, unless it is one of several datasets, which `may_be_empty`.
    """
    labeled = [index for index, label in enumerate(images.labels) if label is not None]
    if len(labeled) == len(images):
        return images

    if not labeled and not may_be_empty:
        raise ValueError(
            f"{name}: no image has a label. Set a different `label_column`, or add labels"
        )
    is_list = bool(labeled) and isinstance(images.labels[labeled[0]], list)
    warn_on_first_process(
        f"{name}: skipped {len(images) - len(labeled):,} of {len(images):,} images (no label in "
        f"{format_name_list(columns)}{'; [] means none of the labels' if is_list else ''})"
    )
    return images.select(labeled)


def open_source(
    dataset: str,
    use_labels: bool,
    label_columns: Collection[str] = (),
    has_groups: bool = True,
    requires_labels: bool = True,
) -> Source:
    """Open a dataset.

    Args:
        label_columns: given by the user or a model; a table of them wins over class folders.
        has_groups: whether the folders below a class mean anything.
        requires_labels: whether a folder without class folders is an error.

    Raises:
        ValueError: if the dataset cannot be read.
        OSError: if it is found neither locally nor on the Hub.
    """
    # A run and its report may name a folder differently, and warnings are logged once
    title = resolve_name(get_title(dataset))
    if is_local(title):
        title = os.path.normpath(title)
    path = Path(dataset)
    name, folder = path.resolve().name, path
    if dataset == BUILT_IN_DATASET and not path.exists():
        name, folder, tables = dataset, Path.cwd(), {"train": load_digits()}
    elif dataset.startswith(MEMORY_PREFIX):
        name, folder, tables = title, Path.cwd(), get_dataset(dataset)
    elif path.is_dir():
        tables = read_folder(path, use_labels, label_columns, has_groups, requires_labels)
    elif path.exists():
        folder, tables = path.parent, read_file(path)
    else:
        name, tables = dataset, load_from_hub(dataset)
    if not tables:
        raise ValueError(f"{title} has no splits. Add at least one, with images")
    return Source(name, title, folder, tables)


def read_file(path: Path) -> Any:
    """Read a table that is a single file."""
    suffix = path.suffix.lower()
    if suffix not in READERS:
        remedy = get_remedy([path.name]) or (
            "Rename a file in such a format, save a spreadsheet as CSV UTF-8 with columns such as file_name and "
            "label, unpack an archive, or set `dataset` to a folder of images"
        )
        raise ValueError(
            f"{path} is not a table that can be read, because its suffix is not one of "
            f"{', '.join(READERS)}. {remedy}"
        )
    return read_tables(path.parent, READERS[suffix], {"train": [path]})


def load_from_hub(dataset: str) -> Any:
    """Load the splits of a dataset on the Hub."""
    if Path(dataset).suffix.lower() in READERS or not is_hub_id(dataset):
        raise OSError(describe_missing_repo(dataset, "dataset"))

    import datasets

    with explain_reading_errors(dataset):
        return datasets.load_dataset(dataset)


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
    path: Path,
    use_labels: bool,
    label_columns: Collection[str],
    has_groups: bool,
    requires_labels: bool,
) -> Any:
    """Read the splits of an image folder, a folder of `save_to_disk`, or a folder of tables."""
    import datasets

    folder = scan_folder(path)
    if "." in folder.skipped_folders:  # The folder itself, which other scans leave out
        raise ValueError(
            f"{path} contains the files of a training run or a model. Move images, or the folders of "
            "classes, that are next to them to a folder of their own"
        )
    if folder.is_image_folder:
        # Tables of splits beside photos, such as train.csv and test.csv, name their classes; other
        # tables may be predictions
        own_tables = [
            file
            for file in folder.tables
            if Path(file).suffix.lower() in READERS and find_split(file)
        ]
        are_labels = use_labels and requires_labels and bool(own_tables)
        if not are_labels or len(find_classes(path, folder.images, skips_others=True)) > 1:
            return read_image_folder(folder, use_labels, has_groups, requires_labels)
        folder = replace(folder, tables=own_tables)
    if any((path / file).is_file() for file in SAVED_FILES):
        # `datasets` cannot load a dataset without rows, which has no files
        for state in path.rglob(SAVED_FILES[1]):
            if not read_json(state).get("_data_files"):
                raise ValueError(f"{state.parent} is empty. Add rows with images")
        with explain_reading_errors(str(path)):
            saved = datasets.load_from_disk(path)
        return saved if isinstance(saved, dict) else {"train": saved}
    for reader in dict.fromkeys(READERS.values()):
        if tables := find_tables(path, folder.metadata or folder.tables, reader):
            splits = read_tables(path, reader, tables)
            has_metadata = use_labels and folder.metadata
            if has_metadata and has_unlabeled_rows(folder, splits, label_columns):
                return add_columns(read_image_folder(folder, True), splits, path)
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


def add_columns(images: Any, tables: Mapping[str, Any], folder: Path) -> Any:
    """Add the columns of metadata.csv, such as the object of each image, to the images of class folders."""
    import datasets

    cells: dict[str, dict[str, str | None]] = {}
    ambiguous: dict[str, str] = {}
    for table in tables.values():
        names = map(spell_label, read_column(table, FILE_NAME))
        paths = [resolve_path(folder, name) for name in names]
        for column in table.features.keys() - {FILE_NAME}:
            by_path = cells.setdefault(column, {})
            for path, text in zip(paths, map(spell_label, read_column(table, column)), strict=True):
                if by_path.setdefault(path, text) != text:
                    ambiguous[column] = path
    for column, path in ambiguous.items():
        del cells[column]
        warn_on_first_process(f"the column {column!r} is not used: {path} has several values in it")
    for split, part in images.items():
        files = part.cast_column("image", datasets.Image(decode=False))["image"]
        for column in sorted(cells.keys() - part.features.keys()):
            part = part.add_column(column, [cells[column].get(file["path"]) for file in files])
        images[split] = part
    return images


def find_split(file: str) -> str | None:
    """Find the split of a table by the words in its name and folders; None if they name none."""
    words = re.split(r"[/._=-]", file.lower())
    return next(filter(None, map(SPLIT_BY_FOLDER_NAME.get, words)), None)


def find_tables(root: Path, files: Sequence[str], reader: str) -> dict[str, list[Path]]:
    """Sort the tables of a folder into splits, by the words in their names and folders."""
    tables: dict[str, list[Path]] = {}
    for file in files:
        if READERS.get(Path(file).suffix.lower()) == reader:
            tables.setdefault(find_split(file) or "train", []).append(root / file)
    return {split: tables[split] for split in SPLIT_ORDER if split in tables}


def read_tables(folder: Path, reader: str, files: Mapping[str, Sequence[Path]]) -> Any:
    """Read the tables of each split in a folder as `datasets.Dataset`."""
    import datasets

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
            tables[split] = add_partitions(tables[split], folder, part)
    return tables


def add_partitions(table: Any, folder: Path, files: Sequence[Path]) -> Any:
    """Add the columns in the names of folders, such as label=cat/1.parquet, which Spark and pandas write."""
    from pyarrow.parquet import read_metadata

    columns: dict[str, list[str]] = {}
    for file in files:
        for part in file.relative_to(folder).parts[:-1]:
            name, is_partition, value = part.partition("=")
            is_split = value.lower() in SPLIT_BY_FOLDER_NAME
            if is_partition and not is_split and name not in table.features:
                columns.setdefault(name, []).extend([unquote(value)] * read_metadata(file).num_rows)
    for name, values in columns.items():
        table = table.add_column(name, values)
    return table


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

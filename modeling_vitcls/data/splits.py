"""Training split and held-out split of a dataset, and fingerprints of training data.

    --dataset -> sources.py: splits by name -> held_out.py, if there is only one split -> TrainingData
              -> streaming.py, with --streaming

Labels are read in labels.py. Images are decoded on access (images.py) and batched in batches.py.

`--resume` continues a run only with the data that the run started with: the same image names in the
same order, the same labels and the same held-out images (`describe_data`). The names are the
images' keys (images.py), so no images are read.
"""

import hashlib
import json
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from accelerate import Accelerator
from sklearn.model_selection import StratifiedGroupKFold

from ..model.heads_vitcls import IGNORED_LABEL
from ..runtime.distributed import run_on_main
from ..runtime.files import escape_csv_cell
from .held_out import (
    MAX_RECORDED_IMAGES,
    HeldOutRecord,
    HeldOutRule,
    encode_content_keys,
    join_copies,
)
from .image_folder import describe_single_class, format_name_list
from .images import DatasetImages, LabeledImages
from .in_memory import MEMORY_PREFIX
from .labels import LabelSpace, MultiHotLabels
from .options import DataOptions
from .sources import Splits, load_splits
from .streaming import MAX_HELD_OUT_IMAGES, StreamedImages, open_streams


# Names of held-out splits, in order of precedence.
HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "test")
# Splits that `vitcls evaluate` reads, in order of precedence.
EVALUATION_SPLITS = ("test", *HELD_OUT_SPLITS[:-1])
# fraction of the training images from which `--exclude` warns that right labels may be listed
MAX_EXCLUDED_FRACTION = 0.05

Data = TypeVar("Data")


def load_on_main(accelerator: Accelerator, dataset: str, load: Callable[[], Data]) -> Data:
    """Load a dataset on the main process, and return what `load` returns on all processes.

    A folder is then scanned once, and the held-out images are selected once. Tables on disk are not
    copied.

    A process loads the dataset itself if it is in memory, or if the files in the cache of
    `datasets` are not on a file system that it shares with the main process.
    """
    if accelerator.num_processes == 1 or dataset.startswith(MEMORY_PREFIX):
        return load()
    content = run_on_main(accelerator, lambda: pickle.dumps(load()))
    try:
        return pickle.loads(content)
    except OSError:
        return load()


# Training -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingData:
    """Training images and held-out images of a run."""

    name: str
    label_space: LabelSpace
    train_split: str  # name of the split with the training images
    train: LabeledImages | StreamedImages
    held_out: LabeledImages
    # name of the held-out split, or description of the rule that selected the images
    held_out_name: str
    record: HeldOutRecord
    # images for selecting the best checkpoint (`--select best`)
    selection: LabeledImages | None = None
    selection_name: str = ""  # name of the selection split, or description of the rule
    # training images that `--exclude` leaves out; None without it
    excluded: LabeledImages | None = None
    # lines about what was read: the labels, and the columns of splits and groups
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_training_images(self) -> int | None:
        """Return the number of training images; None for a stream, whose length is unknown."""
        return self.train.num_images

    @property
    def num_held_out_images(self) -> int:
        """Return the number of held-out images."""
        return len(self.held_out)

    def build_record(self) -> HeldOutRecord:
        """Return the record for results.json.

        It identifies the training and selection images by their content.

        Up to `MAX_RECORDED_IMAGES` images are read, without decoding them.
        """
        if isinstance(self.train, StreamedImages):
            return replace(self.record, dataset=self.name)
        parts = [self.train]
        if self.selection is not None:
            parts.append(self.selection)
        num_images = sum(map(len, parts))
        drawn = [
            part.draw(len(part) * MAX_RECORDED_IMAGES // max(num_images, MAX_RECORDED_IMAGES))
            for part in parts
        ]
        keys = np.concatenate([part.images.compute_content_keys() for part in drawn])
        return replace(
            self.record,
            dataset=self.name,
            num_training_images=num_images,
            training_images=encode_content_keys(keys),
        )

    @property
    def class_ratio(self) -> float:
        """Return the size of the largest class divided by that of the smallest.

        It is 1 if images have several labels.
        """
        if not is_stratified(self.train):
            return 1.0
        sizes = Counter(self.train.labels).values()  # type: ignore
        return max(sizes) / min(sizes)


def load_training_data(
    options: DataOptions, use_selection_split: bool = False, use_labels: bool = True
) -> TrainingData:
    """Load the training images and the held-out images.

    They are two splits of the dataset, or one split divided by a seeded rule (held_out.py). If
    `use_labels` is False, every label is -100, and the label space has no columns.

    If `use_selection_split` is set, the checkpoint is selected on selection images, which are
    separate from the held-out images. The selection images are the validation split if the dataset
    also has a test split. Otherwise, another seeded rule selects the selection images from the
    training images.

    Of a stream, the training images are streamed, and the first 10,000 images of the other splits,
    or of the held-out part, are read immediately and stored in memory without decoding.

    Raise ValueError if the dataset has no images, no labels (unless `use_labels` is False) or only
    one class, or is too small to be split.
    """

    def select(names: list[str]) -> list[str]:
        return [
            name for name in choose_training_splits(names, use_selection_split) if name is not None
        ]

    splits = (
        open_streams(options, use_labels)
        if options.streaming
        else load_splits(options, use_labels, select)
    )
    training_splits = choose_training_splits(splits.names, use_selection_split)
    check_splits(options, splits, training_splits, use_selection_split)
    train = splits.images_by_split[training_splits.train]

    if training_splits.held_out is not None:
        held_out = read_images(splits.images_by_split[training_splits.held_out])
        held_out_name = f"split {training_splits.held_out!r}"
        record = HeldOutRecord(training_splits.held_out, len(held_out))
    else:
        rule = build_held_out_rule(options)
        held_out_name = describe_rule(rule, train)
        train, held_out, record = hold_out_images(train, rule, options.dataset)
    if options.streaming and len(held_out) == MAX_HELD_OUT_IMAGES:
        held_out_name += f", of which the first {MAX_HELD_OUT_IMAGES:,} images are read"

    excluded = None
    if options.exclude is not None:
        train, excluded = exclude_images(train, training_splits.train, options.exclude)

    selection = None
    selection_name = ""
    if training_splits.selection is not None:
        selection = read_images(splits.images_by_split[training_splits.selection])
        selection_name = f"split {training_splits.selection!r}"
    elif use_selection_split:
        rule = HeldOutRule(options.held_out_part, options.split_seed, "selection")
        train, selection, _ = hold_out_images(train, rule, options.dataset)
        selection_name = f"{rule}; from the training images"

    return TrainingData(
        name=splits.name,
        label_space=splits.label_space,
        train_split=training_splits.train,
        train=train,
        held_out=held_out,
        held_out_name=held_out_name,
        record=record,
        selection=selection,
        selection_name=selection_name,
        excluded=excluded,
        facts=splits.facts,
    )


def read_images(images: LabeledImages | StreamedImages) -> LabeledImages:
    """Return stored images, or the first images of a streamed split."""
    return images.read_first(MAX_HELD_OUT_IMAGES) if isinstance(images, StreamedImages) else images


def exclude_images(
    images: LabeledImages, split: str, file: Path
) -> tuple[LabeledImages, LabeledImages]:
    """Return the training images to keep, and those that a table of the audit lists in this split.

    Held-out images are never left out, because this would only make the accuracy look better. Raise
    ValueError if the table does not have the columns `split` and `id`, or lists only other images
    or all images, and OSError if it cannot be read.
    """
    import pandas as pd

    table = pd.read_csv(file, dtype=str)
    if not {"split", "id"} <= set(table.columns):
        raise ValueError(
            f"`exclude={str(file)!r}`: the column 'split' or 'id' is missing. Use a table of "
            "`vitcls evaluate --audit`"
        )
    excluded = set(table["id"][table["split"].isin([split, escape_csv_cell(split)])])
    names = images.images.get_names()
    kept = [
        index
        for index, name in enumerate(names)
        if name not in excluded
        and escape_csv_cell(name) not in excluded  # the audit writes escaped names
    ]
    if excluded and len(kept) == len(names):
        raise ValueError(
            f"`exclude={str(file)!r}` lists {len(excluded):,} images of the split {split!r}, but "
            f"none of them is one of the {len(names):,} training images. Use a table of `vitcls "
            "evaluate --audit` with this dataset, or remove `exclude`"
        )
    if not kept:
        raise ValueError(
            f"`exclude={str(file)!r}` lists all {len(names):,} training images. Keep some of them"
        )
    others = sorted(set(range(len(names))) - set(kept))
    return images.select(kept), images.select(others)


class TrainingSplits(NamedTuple):
    """Names of the splits that training reads."""

    train: str
    held_out: str | None  # split for the reported metrics; None if the dataset has no such split
    selection: str | None  # split for selecting the best checkpoint; None if no split is used


def choose_training_splits(names: Collection[str], use_selection_split: bool) -> TrainingSplits:
    """Return the names of the splits that training reads.

    The reported metrics are measured on the test split only if there is no validation split, or if
    the validation split is used to select the checkpoint.
    """
    train = "train" if "train" in names else next(iter(names))
    held_out_names = [name for name in HELD_OUT_SPLITS if name in names and name != train]
    if use_selection_split and len(held_out_names) > 1 and "test" in held_out_names:
        return TrainingSplits(train, "test", held_out_names[0])
    return TrainingSplits(train, held_out_names[0] if held_out_names else None, None)


def check_splits(
    options: DataOptions, splits: Splits, training_splits: TrainingSplits, use_selection_split: bool
) -> None:
    """Raise ValueError if there is only one class, or if the splits do not support the options.

    A cross-validation, and the selection of a checkpoint (`use_selection_split`), require certain
    splits.
    """
    label_space = splits.label_space
    lacks_selection = use_selection_split and training_splits.selection is None
    if (
        label_space.kind == "single_label_classification"
        and label_space.columns
        and len(label_space.names) == 1
    ):
        raise ValueError(describe_single_class(options.dataset, label_space.names[0]))

    if options.folds is not None and training_splits.held_out is not None:
        split = training_splits.held_out
        raise ValueError(
            f"`folds` requires a dataset without a held-out split, but {options.dataset} has "
            f"{split!r}. Remove `folds`"
        )
    if lacks_selection and options.streaming:
        raise ValueError(
            "`select='best'` with `streaming=True` requires a validation split and a test split, "
            f"but {options.dataset} has only {', '.join(splits.names)}. Remove one of the two flags"
        )
    if lacks_selection and not options.held_out_part:
        raise ValueError(
            "`select='best'` requires images, but `held_out_fraction` is 0. Set a larger one"
        )


def build_held_out_rule(options: DataOptions) -> HeldOutRule:
    """Build the rule that selects the held-out images, as specified by the options."""
    if options.folds is not None and options.fold is not None:
        return HeldOutRule(
            1 / options.folds, options.split_seed, num_folds=options.folds, fold=options.fold
        )
    return HeldOutRule(options.held_out_part, options.split_seed)


def hold_out_images(
    images: Any, rule: HeldOutRule, dataset: str
) -> tuple[Any, LabeledImages, HeldOutRecord]:
    """Return the training images, the held-out images, and the record of the latter.

    The images are stored or streamed.

    Raise ValueError if none or all of the images would be held out.
    """
    if isinstance(images, StreamedImages):
        train = replace(images, held_out_rule=rule)
        held_out = LabeledImages(DatasetImages.from_list([]), [])
        if rule.fraction:
            held_out = replace(train, is_held_out_part=True).read_first(MAX_HELD_OUT_IMAGES)
        return train, held_out, HeldOutRecord.from_keys(rule, held_out.images.compute_keys())

    check_folds(rule, images, dataset)
    is_held_out, record = select_held_out(images, rule)
    check_both_parts(is_held_out, rule, images, dataset)
    train_indices = np.flatnonzero(~is_held_out)
    held_out_indices = np.flatnonzero(is_held_out)
    return images.select(train_indices.tolist()), images.select(held_out_indices.tolist()), record


def select_held_out(images: LabeledImages, rule: HeldOutRule) -> tuple[np.ndarray, HeldOutRecord]:
    """Return whether the rule holds out each image, and the record of the held-out images.

    Copies of an image are on the same side, unless there are more images than are read for it.
    """
    keys = images.images.compute_keys()
    if isinstance(images.images, DatasetImages) and len(images) <= MAX_RECORDED_IMAGES:
        _, group, counts = np.unique(
            images.images.compute_sizes(), return_inverse=True, return_counts=True
        )
        rows = np.flatnonzero(counts[group] > 1)  # only images of the same size are read
        content_keys = images.images.select(rows.tolist()).compute_content_keys()
        keys[rows] = join_copies(keys[rows], content_keys)
    labels = np.array(images.labels) if is_stratified(images) else np.full(len(keys), IGNORED_LABEL)
    if images.groups is None:
        is_held_out = rule.select(keys, labels)
    else:
        is_held_out = select_groups(keys, labels, images.groups, rule)
    return is_held_out, HeldOutRecord.from_keys(rule, keys[is_held_out])


def select_groups(
    keys: np.ndarray, labels: np.ndarray, groups: np.ndarray, rule: HeldOutRule
) -> np.ndarray:
    """Return whether each image is held out, together with all images of its group.

    All arrays are [N]. The held-out groups do not depend on the order of the images.
    """
    num_groups = len(np.unique(groups))
    if not rule.fraction or num_groups < 2:
        return np.zeros(len(keys), bool)
    num_folds = rule.num_folds or min(max(round(1 / rule.fraction), 2), num_groups)
    order = np.argsort(keys, kind="stable")
    folds = StratifiedGroupKFold(num_folds, shuffle=True, random_state=rule.hash_key(0) >> 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes with fewer images than folds
        parts = [part for _, part in folds.split(order, labels[order], groups[order])]
    is_held_out = np.zeros(len(keys), bool)
    is_held_out[order[parts[(rule.fold or 1) - 1]]] = True
    return is_held_out


def check_both_parts(
    is_held_out: np.ndarray, rule: HeldOutRule, images: LabeledImages, dataset: str
) -> None:
    """Raise ValueError if none or all of the images would be held out."""
    if rule.fraction > 0 and not is_held_out.any() and is_stratified(images):
        raise ValueError(
            f"{dataset}: no image can be held out, because each of the {len(set(images.labels))} "
            "classes has a single image (or copies of one). Add images, choose a different "
            "`label_column`, or set `held_out_fraction=0` to train on all images"
        )
    if is_held_out.all() or (not is_held_out.any() and rule.fraction > 0):
        amount, change = ("all", "smaller") if is_held_out.all() else ("none of the", "larger")
        raise ValueError(
            f"{dataset}: {amount} {len(is_held_out)} images would be held out. "
            f"Set a {change} `held_out_fraction`"
        )


def check_folds(rule: HeldOutRule, images: LabeledImages, dataset: str) -> None:
    """Raise ValueError if a fold of a cross-validation has no images.

    All folds are checked before the first one is trained.
    """
    for fold in range(1, (rule.num_folds or 0) + 1):
        if not select_held_out(images, replace(rule, fold=fold))[0].any():
            raise ValueError(
                f"{dataset}: fold {fold} of {rule.num_folds} has no images, because the "
                f"dataset has only {len(images)}. Set a smaller `folds`"
            )


def is_stratified(images: Any) -> bool:
    """Return whether held-out images are selected by class.

    It requires one known label per image.
    """
    if isinstance(images, StreamedImages) or isinstance(images.labels, MultiHotLabels):
        return False
    return all(isinstance(label, int) and label != IGNORED_LABEL for label in images.labels)


def describe_rule(rule: HeldOutRule, images: Any) -> str:
    """Return the description of a rule, and whether the split is stratified."""
    if is_stratified(images):
        return f"{rule}, stratified by class"
    has_several_labels = not isinstance(images, StreamedImages) and isinstance(
        images.labels[0], dict | list
    )
    return f"{rule}, not stratified: several labels per image" if has_several_labels else str(rule)


# Changes of the data ------------------------------------------------------------------------------


def describe_data(training_data: TrainingData) -> dict[str, Any]:
    """Return a description of the training data, to be stored in checkpoints.

    The description of a stream contains only the classes and the stored held-out images.
    """
    description: dict[str, Any] = {
        "classes": training_data.label_space.columns,
        "num_training_images": training_data.num_training_images,
        "num_held_out_images": training_data.num_held_out_images,
    }

    images = training_data.train
    if isinstance(images, StreamedImages):
        images = training_data.held_out

    if not isinstance(images, StreamedImages):
        labels = images.labels
        if isinstance(labels, MultiHotLabels):
            labels = [labels.offsets.tolist(), labels.indices.tolist()]
        keys = images.images.compute_keys()
        description |= {
            "image_names_or_order": hashlib.sha256(keys.tobytes()).hexdigest(),
            "labels": hashlib.sha256(json.dumps(labels).encode()).hexdigest(),
        }
    return description | {"held_out_images": asdict(training_data.record)}


def describe_change(
    stored_description: dict[str, Any], current_description: dict[str, Any]
) -> str | None:
    """Return the first difference between two outputs of `describe_data` as text, or None."""
    for name, current in current_description.items():
        stored = stored_description.get(name)
        if stored != current:
            numbers = " changed"
            if isinstance(stored, int) and current:
                numbers = f" was {stored:,} and is {current:,}"
            return (
                name.replace("num_", "number of ").replace("held_out", "held-out").replace("_", " ")
                + numbers
            )
    return None


def describe_exclusion(training_data: TrainingData) -> list[str]:
    """Return a warning if `--exclude` leaves out many images, or most images of a class."""
    excluded = training_data.excluded
    if not excluded:
        return []
    parts: list[Any] = [excluded, training_data.train]  # streams have no `exclude`
    if training_data.selection is not None:
        parts.append(training_data.selection)
    num_images = sum(map(len, parts))
    text = f"`exclude` leaves out {len(excluded):,} of {num_images:,} training images"

    emptied = []
    if all(map(is_stratified, parts)):
        sizes = Counter(label for part in parts for label in part.labels)
        emptied = [
            training_data.label_space.names[label]
            for label, count in sorted(Counter(excluded.labels).items())
            if count > sizes[label] / 2
        ]
    if emptied:
        text += f", most of those of {format_name_list(emptied)}"
    elif len(excluded) <= MAX_EXCLUDED_FRACTION * num_images:
        return []
    return [
        f"{text}. Many of their labels may be right: look at the page of the audit, and delete the "
        "rows of images to keep from the table"
    ]


def describe_copies(training_data: TrainingData) -> list[str]:
    """Return a warning about images of a held-out split that are training images, too.

    Streams, and datasets with more images than are read for it, are not compared. If a rule selects
    the held-out images, it keeps copies together.
    """
    train, held_out = training_data.train, training_data.held_out
    if training_data.record.split is None:
        return []
    if isinstance(train, StreamedImages) or isinstance(held_out, StreamedImages):
        return []
    if len(train) + len(held_out) > MAX_RECORDED_IMAGES:
        return []

    parts: list[Any] = [train.images, held_out.images]
    if all(isinstance(images, DatasetImages) for images in parts):
        sizes = [images.compute_sizes() for images in parts]
        shared = np.intersect1d(*sizes)  # only images of the same size are read
        parts = [
            images.select(np.flatnonzero(np.isin(size, shared)).tolist())
            for images, size in zip(parts, sizes, strict=True)
        ]
    train_keys, held_out_keys = (images.compute_content_keys() for images in parts)
    num_copies = int(np.isin(held_out_keys, train_keys).sum())
    if not num_copies:
        return []
    return [
        f"{num_copies:,} of the {len(held_out):,} held-out images are identical to training "
        "images, so the result is better than for new images. Remove these images, which `vitcls "
        "evaluate --audit` lists, from the training split"
    ]


def describe_missing_classes(training_data: TrainingData) -> list[str]:
    """Return warnings about classes without held-out images or without training images.

    There are none if the images have several labels.
    """
    parts: tuple[Any, Any] = (training_data.train, training_data.held_out)
    if not training_data.num_held_out_images or not all(map(is_stratified, parts)):
        return []
    names = training_data.label_space.names
    train, held_out = ({names[label] for label in images.labels} for images in parts)
    return [
        f"{len(missing)} of the {len(train | held_out)} classes have no {images}: "
        f"{format_name_list(sorted(missing))}"
        for missing, images in (
            (train - held_out, "held-out images"),
            (held_out - train, "training images"),
        )
        if missing
    ]

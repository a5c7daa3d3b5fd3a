"""Which images a run trains on, and which it holds out.

    --dataset -> sources.py: splits by name -> held-out images, if there is only one split -> TrainingData
              -> streaming.py, with --streaming

Held-out images of a dataset without an evaluation split are those with the smallest random numbers,
which depend on the seed and on the content of the image: of each class the given fraction, and at
least one of two. Copies of an image, and images of one group, are on the same side.
"""

import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from accelerate import Accelerator
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..model.heads_vitcls import IGNORED_LABEL
from ..runtime.distributed import run_on_main
from ..runtime.errors import format_name_list
from .images import NO_CONTENT_KEY, DatasetImages, LabeledImages, compute_digest
from .in_memory import MEMORY_PREFIX
from .labels import LabelSpace, MultiHotLabels
from .options import DataOptions
from .sampling import derive_seed, draw_numbers
from .sources import Splits, load_splits
from .splits_table import build_splits_table, get_keys
from .streaming import MAX_HELD_OUT_IMAGES, StreamedImages, open_streams


# Names of held-out splits, in order of precedence.
HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "test")
MAX_NAMED_IMAGES = 10  # with two labels

# ratio of the largest to the smallest class, above which balanced metrics are printed, too
MAX_CLASS_RATIO = 3

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
    held_out_split: str | None  # None if the held-out images were drawn from the only split
    held_out_name: str  # description of the held-out images
    # images for selecting the best checkpoint (`--select best`)
    selection: LabeledImages | None = None
    selection_name: str = ""
    # the stored images of the only split, before any were held out; None with an evaluation split
    undivided: LabeledImages | None = None
    # the training images with the selection images, if these were drawn from them; otherwise None
    unselected: LabeledImages | StreamedImages | None = None
    # lines about what was read: the labels, and the columns of splits and groups
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_training_images(self) -> int | None:
        """Return the number of training images; None for a stream, whose length is unknown."""
        return None if isinstance(self.train, StreamedImages) else len(self.train)

    @property
    def num_held_out_images(self) -> int:
        """Return the number of held-out images."""
        return len(self.held_out)

    @property
    def class_ratio(self) -> float:
        """Return the size of the largest class divided by that of the smallest.

        It is 1 if images have several labels.
        """
        if not is_stratified(self.train):
            return 1.0
        sizes = Counter(self.train.labels).values()  # type: ignore
        return max(sizes) / min(sizes)

    def build_splits_table(self, task: str = "") -> pd.DataFrame:
        """Return the rows of splits.parquet about this run, or about an added task."""
        parts = {"train": self.train, "validation": self.selection, "test": self.held_out}
        return build_splits_table(parts, task)


def load_training_data(
    options: DataOptions, use_selection_split: bool = False, use_labels: bool = True
) -> TrainingData:
    """Load the training images and the held-out images.

    They are two splits of the dataset, or one that is divided as described above. If `use_labels`
    is False, every label is -100, and the label space has no columns.

    If `use_selection_split` is set, the checkpoint is selected on selection images, which are
    separate from the held-out images. They are the validation split if the dataset also has a test
    split; otherwise, they are drawn from the training images.

    With a stream, only the training images are streamed. The first 10,000 images of the other splits,
    or of the held-out part, are read immediately and stored in memory without decoding.

    Raise ValueError if the dataset has no images, no labels (unless `use_labels` is False) or only
    one class, is too small to be split, or has an image with two labels.
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
    images = add_keys(splits.images_by_split)
    train = images[training_splits.train]

    undivided = None
    if training_splits.held_out is not None:
        held_out = read_images(images[training_splits.held_out])
        held_out_name = f"split {training_splits.held_out!r}"
    else:
        undivided = None if options.streaming else train
        held_out_name = describe_held_out(options, train)
        train, held_out = hold_out_images(train, options)
    if options.streaming and len(held_out) == MAX_HELD_OUT_IMAGES:
        held_out_name += f", of which the first {MAX_HELD_OUT_IMAGES:,} images are read"

    selection = unselected = None
    selection_name = ""
    if training_splits.selection is not None:
        selection = read_images(images[training_splits.selection])
        selection_name = f"split {training_splits.selection!r}"
    elif use_selection_split:
        selection_options = replace(options, split_seed=derive_seed(options.split_seed, 1))
        selection_name = f"about {options.held_out_part:.0%} of the training images"
        unselected = train
        train, selection = hold_out_images(train, selection_options)

    check_contradictions([train, held_out, selection], splits.label_space, options.dataset)
    return TrainingData(
        name=splits.name,
        label_space=splits.label_space,
        train_split=training_splits.train,
        train=train,
        held_out=held_out,
        held_out_split=training_splits.held_out,
        held_out_name=held_out_name,
        selection=selection,
        selection_name=selection_name,
        undivided=undivided,
        unselected=unselected,
        facts=splits.facts,
    )


def hold_out_nothing(data: TrainingData) -> TrainingData:
    """Return the data of a run on all images of the only split, which is not read again."""
    train = data.undivided
    assert train is not None
    held_out = train.select([])
    return replace(data, train=train, held_out=held_out, selection=None, unselected=None)


def select_nothing(data: TrainingData) -> TrainingData:
    """Return the data of a run whose selection images, if they were drawn, are for training."""
    if data.unselected is None:
        return data
    return replace(data, train=data.unselected, selection=None, selection_name="", unselected=None)


def read_images(images: LabeledImages | StreamedImages) -> LabeledImages:
    """Return stored images, or the first images of a streamed split."""
    return images.read_first(MAX_HELD_OUT_IMAGES) if isinstance(images, StreamedImages) else images


def add_keys(splits: Mapping[str, Any]) -> dict[str, Any]:
    """Return the splits with the keys of stored images, and groups that contain all copies."""
    parts = {
        name: part.images.compute_content_keys()
        for name, part in splits.items()
        if isinstance(part, LabeledImages)
    }
    if not parts:
        return dict(splits)
    _, copies = np.unique(np.concatenate(list(parts.values())), return_inverse=True)
    known = [splits[name].groups for name in parts if splits[name].groups is not None]
    groups = join_groups(copies, np.concatenate(known)) if known else copies
    ends = np.cumsum(list(map(len, parts.values())))[:-1]
    with_keys = {
        name: replace(splits[name], keys=keys, groups=part)
        for (name, keys), part in zip(parts.items(), np.split(groups, ends), strict=True)
    }
    return {**splits, **with_keys}


def join_groups(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return groups [N] in which images are together that share either of two groups [N]."""
    num_first = int(first.max(initial=-1)) + 1
    num_groups = num_first + int(second.max(initial=-1)) + 1
    pairs = (first, second + num_first)
    graph = coo_array((np.ones(len(first), bool), pairs), shape=(num_groups, num_groups))
    return connected_components(graph, directed=False)[1][first]  # type: ignore[no-any-return]


def check_contradictions(parts: Sequence[Any], label_space: LabelSpace, dataset: str) -> None:
    """Raise ValueError if an image has two labels, in any rows, folders and splits.

    The keys of some images are equal although only their start, middle and end are, so that the
    whole content is compared, too.
    """
    parts = [part for part in parts if part is not None]
    if not label_space.columns or not all(map(is_stratified, parts)):
        return
    keys = np.concatenate([part.keys for part in parts])
    labels = np.concatenate([np.asarray(part.labels, np.int64) for part in parts])
    rows = find_contradictions(np.where(keys == NO_CONTENT_KEY, np.arange(len(keys)), keys), labels)
    if not len(rows):
        return

    places = [(part.images, index) for part in parts for index in range(len(part))]
    digests = np.array([compute_digest(*places[row]) for row in rows])
    found = find_contradictions(digests, labels[rows])
    if not len(found):
        return

    texts: dict[str, list[str]] = {}
    for place in found.tolist():
        images, index = places[rows[place]]
        (name,) = images.select([index]).get_names()
        label = label_space.names[labels[rows[place]]]
        texts.setdefault(digests[place], []).append(f"{name} is {label!r}")
    copies = [" and ".join(each) for each in texts.values()]
    count_text = "1 image has" if len(copies) == 1 else f"{len(copies):,} images have"
    raise ValueError(
        f"{dataset}: {count_text} several labels: {format_name_list(copies, MAX_NAMED_IMAGES)}. "
        "Remove the copies with the wrong label"
    )


def find_contradictions(keys: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the images whose key [N] is also that of an image with another label [N]."""
    groups = pd.Series(labels).groupby(keys)
    return np.flatnonzero(groups.transform("min") < groups.transform("max"))


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

    The selection of a checkpoint (`use_selection_split`) requires certain splits.
    """
    label_space = splits.label_space
    lacks_selection = use_selection_split and training_splits.selection is None
    if (
        label_space.kind == "single_label_classification"
        and label_space.columns
        and len(label_space.names) == 1
    ):
        raise ValueError(
            f"a classifier requires two or more classes, but {options.dataset} has the single class "
            f"{label_space.names[0]!r}. If this is a folder of classes, set `dataset` to it"
        )

    if lacks_selection and (options.streaming or not options.held_out_part):
        raise ValueError(
            "`select='best'` requires a validation split and a test split, or a part of the "
            f"training images, but {options.dataset} has only {', '.join(splits.names)}. Set "
            "`held_out_fraction` above 0 without `streaming=True`, or remove `select='best'`"
        )


# Held-out images ----------------------------------------------------------------------------------


def hold_out_images(images: Any, options: DataOptions) -> tuple[Any, LabeledImages]:
    """Return the training images and the held-out images, which are stored or streamed.

    Raise ValueError if none or all of the images would be held out.
    """
    if isinstance(images, StreamedImages):
        fraction = options.held_out_part
        train = replace(images, held_out_fraction=fraction, split_seed=options.split_seed)
        if not fraction:
            return train, LabeledImages(
                DatasetImages.from_list([]), [], keys=np.zeros(0, np.uint64)
            )
        return train, train.read_first(MAX_HELD_OUT_IMAGES, is_held_out=True)

    return images.divide(select_held_out(images, options))  # type: ignore[no-any-return]


def select_held_out(images: LabeledImages, options: DataOptions) -> np.ndarray:
    """Return whether each image [N] is held out: a fraction of each class.

    The units are the groups of the images. Raise ValueError if none or all of the images would be
    held out.
    """
    assert images.keys is not None and images.groups is not None
    fraction = options.held_out_part
    if not fraction:
        return np.zeros(len(images), bool)

    _, first, group = np.unique(images.groups, return_index=True, return_inverse=True)
    sizes = np.bincount(group)
    numbers = np.full(len(sizes), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(numbers, group, draw_numbers(images.keys, options.split_seed))
    labels = np.array(images.labels)[first] if is_stratified(images) else np.zeros(len(first), int)

    is_held_out = np.zeros(len(sizes), bool)  # each group
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(numbers[members], kind="stable")]
        if len(members) > 1:
            # of each class, at least one group is held out, and at least one is not
            middles = np.cumsum(sizes[members]) - sizes[members] / 2
            num_held_out = int((middles <= fraction * sizes[members].sum()).sum())
            is_held_out[members[: min(max(num_held_out, 1), len(members) - 1)]] = True

    if not is_held_out.any():
        raise ValueError(
            f"{options.dataset}: no image can be held out, because each class has a single image "
            "(or copies or a group of one). Add images, choose a different `label_column`, or set "
            "`held_out_fraction=0` to train on all images"
        )
    return is_held_out[group]  # type: ignore[no-any-return]


def is_stratified(images: Any) -> bool:
    """Return whether held-out images are selected by class.

    It requires one known label per image.
    """
    if isinstance(images, StreamedImages) or isinstance(images.labels, MultiHotLabels):
        return False
    return all(isinstance(label, int) and label != IGNORED_LABEL for label in images.labels)


def describe_held_out(options: DataOptions, images: Any) -> str:
    """Return which images of the only split are held out."""
    part = f"about {options.held_out_part:.0%}"
    if is_stratified(images):
        return f"{part}, stratified by class, split seed {options.split_seed}"
    is_labeled = not isinstance(images, StreamedImages) and IGNORED_LABEL not in images.labels[:1]
    reason = ", not stratified: several labels per image" if is_labeled else ""
    return f"{part}, split seed {options.split_seed}{reason}"


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
    parts = {"images": training_data.train, "held_out_images": training_data.held_out}
    for name, part in parts.items():
        if isinstance(part, LabeledImages):
            assert part.keys is not None
            labels = part.labels
            if isinstance(labels, MultiHotLabels):
                labels = labels.indices
            description[f"{name} or their order"] = hashlib.sha256(part.keys.tobytes()).hexdigest()
            text = json.dumps(labels)
            description[f"labels of {name}"] = hashlib.sha256(text.encode()).hexdigest()
    return description


def describe_change(
    stored_description: dict[str, Any], current_description: dict[str, Any]
) -> str | None:
    """Return the first difference between two outputs of `describe_data` as text, or None."""
    for name, current in current_description.items():
        stored = stored_description.get(name)
        if stored != current:
            name = name.replace("num_", "number of ").replace("held_out", "held-out")
            is_number = isinstance(stored, int) and current
            numbers = f"was {stored:,} and is {current:,}" if is_number else "changed"
            return f"{name.replace('_', ' ')} {numbers}"
    return None


def describe_leaks(training_data: TrainingData, group_column: str | None) -> list[str]:
    """Return warnings about copies and groups with images in two splits of the dataset.

    Drawn held-out images have groups of their own, and streams are not compared.
    """
    train, held_out = training_data.train, training_data.held_out
    if isinstance(train, StreamedImages):
        return []
    warnings = []
    is_copy = np.isin(get_keys(held_out), get_keys(train))
    if is_copy.any():
        example = held_out.images.get_names()[is_copy.argmax()]
        warnings.append(
            f"{is_copy.sum():,} of the {len(held_out):,} held-out images are identical to training "
            f"images ({example}), so the result is better than for new images. Remove them from one "
            "of the splits"
        )
    assert train.groups is not None and held_out.groups is not None
    num_shared = len(np.intersect1d(train.groups, held_out.groups))
    if group_column is not None and num_shared:
        warnings.append(
            f"{num_shared:,} groups are on both sides of the dataset's own splits (`group_column="
            f"{group_column!r}`), so the result is better than for new groups. Divide the splits "
            "by group"
        )
    return warnings


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

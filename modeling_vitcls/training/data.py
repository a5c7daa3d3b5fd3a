"""Data sets: a training part and a held-out part.

    --dataset -> sources.py: splits by name -> held_out.py where there is only one -> TrainingData
              -> streaming.py, with --streaming

Labels are read in columns.py; pictures are decoded when they are asked for (pictures.py). How they become batches is
in batches.py.
"""

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from .columns import UNLABELLED
from .held_out import hold_out
from .labels import LabelSpace
from .options import DataOptions
from .pictures import BrokenPicture, LabelledPictures
from .sources import Splits, load_splits, without_labels
from .streaming import HeldOutPart, StreamedPictures, open_streams


__all__ = [
    "BrokenPicture",
    "LabelledPictures",
    "StreamedPictures",
    "TrainingData",
    "load_evaluation_data",
    "load_training_data",
    "load_unlabelled_data",
]

HELD_OUT_NAMES = ("validation", "valid", "val", "dev", "test")


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and evaluates on."""

    name: str
    label_space: LabelSpace
    train: LabelledPictures | StreamedPictures
    held_out: LabelledPictures
    held_out_name: str  # a split's name, or how it was made

    @property
    def num_training_images(self) -> int | None:
        """None for a stream, whose end is not known."""
        return None if isinstance(self.train, StreamedPictures) else len(self.train)


def load_training_data(options: DataOptions) -> TrainingData:
    """A training part and a held-out part: the data set's own splits, else a seeded choice, stratified by label.

    Of a stream the held-out part is read now, and kept in memory as it is encoded.

    Raises:
        ValueError: for a data set without images or labels, or too small to be split.
    """
    return load(options, labelled=True)


def load_unlabelled_data(options: DataOptions) -> TrainingData:
    """The same without labels: every label is -100, and the label space has no columns.

    Of a data set that has labels, the pictures are held out that fine-tuning on it would hold out.

    Raises:
        ValueError: for a data set without images, or too small to be split.
    """
    try:
        data = load(options, labelled=True)
    except ValueError:  # it has no labels, or none to stratify by
        return load(options, labelled=False)
    if isinstance(data.train, StreamedPictures):
        return load(options, labelled=False)  # streams hold out the same pictures with and without labels
    return replace(
        data,
        label_space=UNLABELLED,
        train=without_labels(data.train.pictures),
        held_out=without_labels(data.held_out.pictures),
    )


def load(options: DataOptions, labelled: bool) -> TrainingData:
    """Stored or streamed, with labels or without."""
    if options.streaming:
        return divided_streams(open_streams(options, labelled), options)
    return divided(load_splits(options, labelled), options)


def load_evaluation_data(options: DataOptions, split: str) -> tuple[LabelSpace, LabelledPictures]:
    """What labels mean, and one split; of a data set with a single split, `"test"` is the part that training holds
    out.

    Raises:
        ValueError: for a split that does not exist.
    """
    if options.streaming:
        return load_streamed_evaluation_data(options, split)
    splits = load_splits(options)
    if split in splits.parts and len(splits.parts) > 1:
        return splits.label_space, splits.parts[split]
    if len(splits.parts) == 1 and split in ("train", "test"):
        _, train = training_part(splits.parts)
        train, held_out, _ = hold_out(train, splits.label_space, options)
        return splits.label_space, held_out if split == "test" else train
    raise ValueError(f"{splits.name} has no split {split!r}: choose one of {', '.join(splits.parts)}")


def load_streamed_evaluation_data(options: DataOptions, split: str) -> tuple[LabelSpace, LabelledPictures]:
    """The same for a stream, whose pictures are read now; of a single split only the held-out part can be had."""
    streams = open_streams(options)
    _, train = training_part(streams)
    if split in streams and len(streams) > 1:
        return train.label_space, streams[split].held_out_pictures()
    if len(streams) == 1 and split == "test":
        held_out = replace(train, held_out=HeldOutPart(options.held_out_fraction, options.split_seed))
        return train.label_space, held_out.held_out_pictures()
    raise ValueError(f"{options.dataset} has no split {split!r}: choose one of {', '.join(streams)}")


# Dividing ------------------------------------------------------------------------------------------------------------

Part = TypeVar("Part")


def training_part(parts: dict[str, Part]) -> tuple[str, Part]:
    """The split to train on, and its name."""
    name = "train" if "train" in parts else next(iter(parts))
    return name, parts[name]


def held_out_split(parts: dict[str, Any], train_name: str) -> str | None:
    """The name of the split to evaluate on, if there is one."""
    return next((name for name in HELD_OUT_NAMES if name in parts and name != train_name), None)


def divided(splits: Splits, options: DataOptions) -> TrainingData:
    """The data set's own held-out part, or one taken out of its training part."""
    train_name, train = training_part(splits.parts)
    name = held_out_split(splits.parts, train_name)
    if name is not None:
        return TrainingData(splits.name, splits.label_space, train, splits.parts[name], f"split {name!r}")
    train, held_out, how = hold_out(train, splits.label_space, options)
    return TrainingData(splits.name, splits.label_space, train, held_out, how)


def divided_streams(streams: dict[str, StreamedPictures], options: DataOptions) -> TrainingData:
    """The same for a stream, which is read once for its held-out part."""
    train_name, train = training_part(streams)
    name = held_out_split(streams, train_name)
    if name is not None:
        held_out, how = streams[name].held_out_pictures(), f"split {name!r}"
    else:
        part = HeldOutPart(options.held_out_fraction, options.split_seed)
        train = replace(train, held_out=part)
        held_out, how = train.held_out_pictures(), str(part)
    return TrainingData(train.name, train.label_space, train, held_out, how)

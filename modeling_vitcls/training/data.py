"""Data sets: a training part and a held-out part.

    --dataset -> sources.py: splits by name -> held_out.py where there is only one -> TrainingData
              -> streaming.py, with --streaming

Labels are read in columns.py; pictures are decoded when they are asked for (pictures.py). How they become batches is
in batches.py.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from ..data.image_folder import describe_single_class
from .columns import UNLABELLED
from .held_out import hold_out
from .labels import LabelSpace
from .options import DataOptions
from .pictures import BrokenPicture, LabelledPictures
from .sources import Splits, load_splits, without_labels
from .streaming import HELD_OUT_PICTURES, HeldOutPart, StreamedPictures, open_streams


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

    Of a stream the held-out part is read now, and kept in memory as it is encoded; without a split of its own, the
    first 10,000 pictures of it.

    Raises:
        ValueError: for a data set without images or labels, with a single class, or too small to be split.
    """
    data = load(options, labelled=True)
    space = data.label_space
    if space.kind == "single_label_classification" and len(space.names) == 1:
        raise ValueError(describe_single_class(options.dataset, space.names[0]))
    return data


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
    return divided(load_splits(options, labelled, used=used_in_training), options)


def load_evaluation_data(options: DataOptions, split: str) -> tuple[LabelSpace, LabelledPictures]:
    """What labels mean, and one split, whole.

    Of a data set with a single split, `"train"` is the part to train on and, if the split is not called so itself,
    `"test"` the part that training holds out.

    Raises:
        ValueError: for a split that does not exist.
    """
    if options.streaming:
        return load_streamed_evaluation_data(options, split)
    splits = load_splits(options, used=lambda names: [split_that_holds(split, names, options)])
    (part,) = splits.parts.values()
    if not is_whole_split(split, splits.names):
        train, held_out, _ = hold_out(part, splits.label_space, options)
        part = train if split == "train" else held_out
    return splits.label_space, part


def load_streamed_evaluation_data(options: DataOptions, split: str) -> tuple[LabelSpace, LabelledPictures]:
    """The same for a stream, whose pictures are read now; of a single split, the part to train on cannot be had."""
    streams = open_streams(options)
    stream = streams[split_that_holds(split, list(streams), options)]
    if not is_whole_split(split, list(streams)):
        if split == "train":
            raise ValueError(
                f"{options.dataset} has a single split, and the part of it to train on cannot be evaluated as a "
                "stream: leave out --streaming, or choose `test`, the part that is held out"
            )
        stream = replace(stream, held_out=HeldOutPart(options.held_out_fraction, options.split_seed))
    return stream.label_space, stream.held_out_pictures()


def split_that_holds(asked: str, names: list[str], options: DataOptions) -> str:
    """The split to read for the one that is asked for: itself, or the only one, of which it is a part."""
    if asked in names:
        return asked
    if len(names) == 1 and asked in ("train", "test"):
        return names[0]
    raise ValueError(f"{options.dataset} has no split {asked!r}: choose one of {', '.join(names)}")


def is_whole_split(asked: str, names: list[str]) -> bool:
    """Whether what is asked for is a split, rather than a part of the only one."""
    return asked in names and not (asked == "train" and len(names) == 1)


# Dividing ------------------------------------------------------------------------------------------------------------


def training_split(names: Collection[str]) -> str:
    """The name of the split to train on."""
    return "train" if "train" in names else next(iter(names))


def held_out_split(names: Collection[str]) -> str | None:
    """The name of the split to evaluate on while training, if there is one."""
    return next((name for name in HELD_OUT_NAMES if name in names and name != training_split(names)), None)


def used_in_training(names: list[str]) -> list[str]:
    """The splits that training reads."""
    held_out = held_out_split(names)
    return [training_split(names), *([] if held_out is None else [held_out])]


def divided(splits: Splits, options: DataOptions) -> TrainingData:
    """The data set's own held-out part, or one taken out of its training part."""
    train = splits.parts[training_split(splits.parts)]
    name = held_out_split(splits.parts)
    if name is not None:
        return TrainingData(splits.name, splits.label_space, train, splits.parts[name], f"split {name!r}")
    train, held_out, how = hold_out(train, splits.label_space, options)
    return TrainingData(splits.name, splits.label_space, train, held_out, how)


def divided_streams(streams: dict[str, StreamedPictures], options: DataOptions) -> TrainingData:
    """The same for a stream, which is read for its held-out part."""
    train = streams[training_split(streams)]
    name = held_out_split(streams)
    if name is not None:
        held_out, how = streams[name].held_out_pictures(), f"split {name!r}"
    else:
        part = HeldOutPart(options.held_out_fraction, options.split_seed)
        train = replace(train, held_out=part)
        held_out, how = train.held_out_pictures(), str(part)
        if len(held_out) == HELD_OUT_PICTURES:
            how += f", evaluated on the first {HELD_OUT_PICTURES:,}"
    return TrainingData(train.name, train.label_space, train, held_out, how)

"""Training split and held-out split of a dataset.

    --dataset -> sources.py: splits by name -> held_out.py, if there is only one split -> TrainingData
              -> streaming.py, with --streaming

Labels are read in columns.py. Images are decoded on access (images.py) and batched in batches.py.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..options import DataOptions
from .fingerprint import compute_fingerprint
from .held_out import HeldOutPart, HeldOutRecord
from .image_folder import describe_single_class, shorten_list
from .images import BrokenPicture, LabelledPictures
from .labels import LabelSpace
from .sources import Splits, load_splits
from .streaming import HELD_OUT_PICTURES, StreamedPictures, open_streams


__all__ = [
    "BrokenPicture",
    "EvaluationData",
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
    """The training split and the held-out split of a run."""

    name: str
    label_space: LabelSpace
    train: LabelledPictures | StreamedPictures
    held_out: LabelledPictures
    held_out_name: str  # name of the split, or the rule that selected its images
    record: HeldOutRecord

    @property
    def num_training_images(self) -> int | None:
        """Number of training images; None for a stream, whose length is unknown."""
        return None if isinstance(self.train, StreamedPictures) else len(self.train)


def load_training_data(options: DataOptions) -> TrainingData:
    """Load the training split and the held-out split: splits of the dataset, or a seeded selection (held_out.py).

    The held-out images of a stream are read immediately and kept in memory, encoded. Without an evaluation split,
    only the first 10,000 held-out images are kept.

    Raises:
        ValueError: if the dataset has no images or labels, has a single class, or is too small to be split.
    """
    return load(options, labelled=True)


def load_unlabelled_data(options: DataOptions) -> TrainingData:
    """Load both splits without labels: every label is -100, and the label space has no columns.

    Fine-tuning on the same dataset holds out the same images.

    Raises:
        ValueError: if the dataset has no images or is too small to be split.
    """
    return load(options, labelled=False)


def load(options: DataOptions, labelled: bool) -> TrainingData:
    """Load stored or streamed data, with or without labels."""
    if options.streaming:
        streams = open_streams(options, labelled)
        if labelled:
            check_num_classes(options, next(iter(streams.values())).label_space)
        return divided_streams(streams, options)
    splits = load_splits(options, labelled, used=used_in_training)
    if labelled:
        check_num_classes(options, splits.label_space)
    return divided(splits, options)


def check_num_classes(options: DataOptions, space: LabelSpace) -> None:
    """Raise ValueError if there is only one class to train on."""
    if space.kind == "single_label_classification" and len(space.names) == 1:
        raise ValueError(describe_single_class(options.dataset, space.names[0]))


class EvaluationData(NamedTuple):
    """The images and labels that a model is evaluated on."""

    label_space: LabelSpace
    pictures: LabelledPictures
    split: str
    part: HeldOutPart | None  # None: `pictures` are a whole split, or the training images


def load_evaluation_data(
    options: DataOptions, split: str | None, record: HeldOutRecord | None = None
) -> EvaluationData:
    """Load all images of one split.

    If the dataset has a single split, `"train"` means its training images. `"test"` means the images that training
    holds out, unless the split itself has this name.

    Args:
        options: the data options.
        split: name of the split; if None, `choose_split` selects it.
        record: the held-out record of the model's run; the same images are held out here.

    Raises:
        ValueError: if the split does not exist, or the options hold out other images than `record`.
    """
    options = apply_record(options, record)
    if options.streaming:
        return load_streamed_evaluation_data(options, split, record)
    chosen = []

    def find_split(names: list[str]) -> list[str]:
        chosen.append(choose_split(split, names, record))
        return [split_that_holds(chosen[-1], names, options)]

    splits = load_splits(options, used=find_split)
    (pictures,) = splits.parts.values()
    (name,) = chosen
    if is_whole_split(name, splits.names):
        return EvaluationData(splits.label_space, pictures, name, None)
    part = HeldOutPart(options.held_out_fraction, options.split_seed)
    train, held_out, _ = hold_out(pictures, part, options)
    if name == "train":
        return EvaluationData(splits.label_space, train, name, None)
    return EvaluationData(splits.label_space, held_out, name, part)


def load_streamed_evaluation_data(
    options: DataOptions, split: str | None, record: HeldOutRecord | None
) -> EvaluationData:
    """Load one split of a stream and read its images. The training images of a single split are not supported."""
    streams = open_streams(options)
    name = choose_split(split, list(streams), record)
    stream = streams[split_that_holds(name, list(streams), options)]
    part = None
    if not is_whole_split(name, list(streams)):
        if name == "train":
            raise ValueError(
                f"{options.dataset} has a single split, and the part of it to train on cannot be evaluated as a "
                "stream: leave out --streaming, or choose `test`, the part that is held out"
            )
        part = HeldOutPart(options.held_out_fraction, options.split_seed)
        stream = replace(stream, held_out=part)
    return EvaluationData(stream.label_space, stream.held_out_pictures(), name, part)


def split_that_holds(asked: str, names: list[str], options: DataOptions) -> str:
    """Return the stored split that contains the requested split: the split itself, or the only split."""
    if asked in names:
        return asked
    if len(names) == 1 and asked in ("train", "test"):
        return names[0]
    raise ValueError(f"{options.dataset} has no split {asked!r}: choose one of {', '.join(names)}")


def is_whole_split(asked: str, names: list[str]) -> bool:
    """Return whether the requested split is stored as such, and is not a part of the only split."""
    return asked in names and not (asked == "train" and len(names) == 1)


def apply_record(options: DataOptions, record: HeldOutRecord | None) -> DataOptions:
    """Return options that hold out the images that a model's run held out; the same options if it recorded none.

    Raises:
        ValueError: if --split-seed or --held-out-fraction were set to other values.
    """
    part = None if record is None else record.part
    if part is None:
        return options
    for name, recorded in (("split_seed", part.seed), ("held_out_fraction", part.fraction)):
        value = getattr(options, name)
        if value not in (recorded, getattr(DataOptions, name)):
            raise ValueError(
                f"--{name.replace('_', '-')} {value}: the model's run used {recorded}, and with another value the "
                "model would be evaluated on images that it was trained on: leave it out"
            )
    return replace(options, split_seed=part.seed, held_out_fraction=part.fraction)


def choose_split(asked: str | None, names: Collection[str], record: HeldOutRecord | None) -> str:
    """Return the split to evaluate on.

    This is the requested split, the split that the model's run held out if the dataset has it, or "test".
    """
    if asked is not None:
        return asked
    return record.split if record is not None and record.split in names and record.split else "test"


def describe_data(data: TrainingData) -> dict[str, Any]:
    """Return the description of a run's data for its checkpoints (fingerprint.py).

    The description of a stream contains only the held-out images and the classes.
    """
    known = data.held_out if isinstance(data.train, StreamedPictures) else data.train
    return {
        "num_training_images": data.num_training_images,
        "num_held_out_images": len(data.held_out),
        "held_out": data.record.to_dict(),
        "classes": data.label_space.columns,
        **compute_fingerprint(known.pictures.names(), known.labels, known.pictures.content),
    }


# Splitting -----------------------------------------------------------------------------------------------------------


def training_split(names: Collection[str]) -> str:
    """Return the name of the training split."""
    return "train" if "train" in names else next(iter(names))


def held_out_split(names: Collection[str]) -> str | None:
    """Return the name of the split for evaluation during training; None if there is no such split."""
    return next((name for name in HELD_OUT_NAMES if name in names and name != training_split(names)), None)


def used_in_training(names: list[str]) -> list[str]:
    """Return the names of the splits that training reads."""
    held_out = held_out_split(names)
    return [training_split(names), *([] if held_out is None else [held_out])]


def divided(splits: Splits, options: DataOptions) -> TrainingData:
    """Return the dataset's own held-out split, or hold out images of its training split."""
    train = splits.parts[training_split(splits.parts)]
    name = held_out_split(splits.parts)
    if name is not None:
        held_out = splits.parts[name]
        record = HeldOutRecord(name, len(held_out))
        return TrainingData(splits.name, splits.label_space, train, held_out, f"split {name!r}", record)
    part = HeldOutPart(options.held_out_fraction, options.split_seed)
    train, held_out, record = hold_out(train, part, options)
    return TrainingData(splits.name, splits.label_space, train, held_out, str(part), record)


def hold_out(
    pictures: LabelledPictures, part: HeldOutPart, options: DataOptions
) -> tuple[LabelledPictures, LabelledPictures, HeldOutRecord]:
    """Return the training images, the held-out images, and the record of the held-out images.

    Raises:
        ValueError: if none or all of the images would be held out.
    """
    keys = pictures.pictures.keys()
    held_out = [index for index, key in enumerate(keys) if part.holds(key)]
    if not 0 < len(held_out) < len(keys):
        found = f"all of its {len(keys)}" if held_out else f"none of its {len(keys)}"
        change = "a smaller" if held_out else "a larger"
        raise ValueError(
            f"{options.dataset}: {found} images would be held out by --held-out-fraction {part.fraction} and "
            f"--split-seed {part.seed}: set {change} fraction or another seed, or add images"
        )
    chosen = set(held_out)
    train = [index for index in range(len(keys)) if index not in chosen]
    record = HeldOutRecord.from_keys(part, [keys[index] for index in held_out])
    return pictures.chosen(train), pictures.chosen(held_out), record


def divided_streams(streams: dict[str, StreamedPictures], options: DataOptions) -> TrainingData:
    """Return the training split and the held-out split of a stream, and read the held-out images."""
    train = streams[training_split(streams)]
    name = held_out_split(streams)
    if name is not None:
        held_out, how = streams[name].held_out_pictures(), f"split {name!r}"
        record = HeldOutRecord(name, len(held_out))
    else:
        part = HeldOutPart(options.held_out_fraction, options.split_seed)
        train = replace(train, held_out=part)
        held_out, how = train.held_out_pictures(), str(part)
        record = HeldOutRecord.from_keys(part, held_out.pictures.keys())
        if len(held_out) == HELD_OUT_PICTURES:
            how += f", evaluated on the first {HELD_OUT_PICTURES:,}"
    return TrainingData(train.name, train.label_space, train, held_out, how, record)


# Warnings ------------------------------------------------------------------------------------------------------------


def describe_missing_classes(data: TrainingData) -> list[str]:
    """Return warnings about classes without held-out images and classes without training images.

    The splits of a dataset are not checked, only images that were held out by their checksum.
    """
    if data.record.part is None or isinstance(data.train, StreamedPictures):
        return []
    trained, held_out = (find_classes(part.labels, data.label_space) for part in (data.train, data.held_out))
    num_classes = len(trained | held_out)
    remedy = "Add images, or set another --split-seed or --held-out-fraction"
    warnings = []
    if missing := sorted(trained - held_out):
        warnings.append(
            f"no image of {len(missing)} of the {num_classes} classes is held out ({shorten_list(missing)}): their "
            f"accuracy is not measured. {remedy}"
        )
    if missing := sorted(held_out - trained):
        warnings.append(
            f"all images of {len(missing)} of the {num_classes} classes are held out ({shorten_list(missing)}): the "
            f"model cannot learn them. {remedy}"
        )
    return warnings


def find_classes(labels: Sequence[Any], space: LabelSpace) -> set[str]:
    """Return the names of the classes in labels. With several tasks, each name starts with the name of its task."""
    if space.kind == "multi_task":
        named = [(task, names, label[task]) for task, names in space.columns.items() for label in labels]
        return {f"{task} {names[label]}" for task, names, label in named if label >= 0}
    if not space.columns:
        return set()
    if space.kind == "multi_label_classification":
        return {name for label in labels for name, value in zip(space.names, label, strict=True) if value}
    return {space.names[label] for label in labels}

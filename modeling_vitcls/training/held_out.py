"""Which pictures are held out where a data set has no split for it: a function of the split seed."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from .labels import LabelSpace
from .options import DataOptions
from .pictures import LabelledPictures


def hold_out(
    pictures: LabelledPictures, space: LabelSpace, options: DataOptions
) -> tuple[LabelledPictures, LabelledPictures, str]:
    """Divide into a training and a held-out part, and say how; the same for the same seed.

    One label per image: with the same share of each label; the only image of a label is for training. Several tasks:
    so for the first task whose labels are frequent enough. Several labels per image, or none: by chance alone.

    Raises:
        ValueError: for pictures too few to be divided.
    """
    from sklearn.model_selection import train_test_split

    single = single_images(pictures, space)
    divisible = [index for index in range(len(pictures)) if index not in single]
    for how, strata in stratifications(pictures.chosen(divisible), space):
        try:
            train, held_out = train_test_split(
                divisible, test_size=options.held_out_fraction, stratify=strata, random_state=options.split_seed
            )
        except ValueError as error:
            problem = error
            continue
        name = f"{options.held_out_fraction:.0%}{how}, split seed {options.split_seed}"
        if single:
            name += f", {len(single)} class{'es' * (len(single) > 1)} too small to hold out"
        return pictures.chosen([*train, *single]), pictures.chosen(held_out), name
    raise ValueError(
        f"{options.dataset}: its {len(pictures)} images cannot be split with --held-out-fraction "
        f"{options.held_out_fraction} ({problem})"
    )


def single_images(pictures: LabelledPictures, space: LabelSpace) -> dict[int, Any]:
    """The images that are the only ones of their label, by index."""
    if space.kind != "single_label_classification" or not space.columns:
        return {}
    counts = Counter(pictures.labels)
    return {index: label for index, label in enumerate(pictures.labels) if counts[label] == 1}


def stratifications(pictures: LabelledPictures, space: LabelSpace) -> Iterator[tuple[str, list[Any] | None]]:
    """What to keep in proportion, from the best to the least, with the words for it."""
    if space.kind == "single_label_classification" and space.columns:
        yield ", stratified", list(pictures.labels)
        return
    if space.kind == "multi_task":
        for task in space.columns:
            yield f", stratified by {task!r}", [label[task] for label in pictures.labels]
    yield ", by chance", None

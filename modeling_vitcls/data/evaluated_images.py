"""Images of a dataset that an evaluation reads.

    --split NAME                                        all images of this split
    default: `test`, else `validation`, else            all images of this split,
    the only split                                      except those that the model was trained on

If the split is the one that the model was trained on, the evaluated images are those that training
held out. Training images are recognized by their content (`HeldOutRecord`), so the dataset may have
been renamed, moved, extended or divided since training. Of runs whose training images were
streamed, they are not compared: the recorded rule selects the held-out images if the dataset has
the same name.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from .held_out import HeldOutRecord, HeldOutRule
from .images import LabeledImages
from .labels import LabelSpace
from .options import DataOptions
from .sources import Splits, load_splits
from .splits import (
    EVALUATION_SPLITS,
    build_held_out_rule,
    check_both_parts,
    select_held_out,
)


@dataclass(frozen=True)
class EvaluatedPart:
    """Which of the given images are evaluated, and why."""

    # whole: all of them. held_out: those that training held out. untrained: those that training did
    # not use. fraction: those that a rule selects, because the others fit a classifier.
    kind: Literal["whole", "held_out", "untrained", "fraction"]
    num_given: int
    num_trained: int | None = None  # number of given images that training used; None if unknown
    warning: str | None = None  # reason why training images may be among the evaluated images
    split: str | None = None  # None if the dataset has only one
    # number of images that were drawn at random from the part; None: all of them
    num_drawn: int | None = None

    def describe(self) -> str:
        """Return the description of the evaluated images as text."""
        images = f"{self.num_given:,} images"
        if self.split is not None:
            images += f" of split {self.split!r}"
        text = {
            "whole": f"all {images}",
            "held_out": f"those of the {images} that training held out",
            "untrained": f"those of the {images} that training did not use",
            "fraction": f"those of the {images} that the classifier is not fitted to",
        }[self.kind]
        if self.kind == "whole" and self.num_trained:
            text += f", of which training used {self.num_trained:,}"
        return text if self.num_drawn is None else f"drawn at random from {text}"

    def build_record(self) -> dict[str, Any]:
        """Return the entries of the results."""
        return {
            "images": self.kind,
            "num_given_images": self.num_given,
            "num_trained_images": self.num_trained,
        }


class EvaluationData(NamedTuple):
    """Images and labels for the evaluation of a model."""

    label_space: LabelSpace
    images: LabeledImages
    split: str
    part: EvaluatedPart


# Loading ------------------------------------------------------------------------------------------


def load_evaluation_data(
    options: DataOptions,
    split: str | None,
    record: HeldOutRecord | None = None,
    use_labels: bool = True,
    max_images: int | None = None,
) -> EvaluationData:
    """Load the images to evaluate.

    Args:
        options: the dataset.
        split: the split, of which all images are evaluated. None: chosen as described above.
        record: the held-out record of the model.
        use_labels: whether labels are read. If False, every label is -100.
        max_images: number of images to draw at random (`options.split_seed`).

    Raises:
        ValueError: if the split does not exist, if training used all of its images, or if the
            options contradict the record.
    """

    def select(names: list[str]) -> list[str]:
        return [choose_evaluation_split(split, names, options.dataset)]

    splits = load_splits(options, use_labels, select)
    (name,) = select(splits.names)
    images = splits.images_by_split[name]
    is_evaluated, part = find_evaluated_images(images, record, options, splits.name)
    images, part = select_part(images, is_evaluated, part, options.dataset, name, split is not None)
    return draw_data(splits, name, images, part, max_images, options.split_seed)


def load_fitting_and_evaluation_data(
    options: DataOptions,
    split: str | None,
    record: HeldOutRecord | None,
    max_images: int | None = None,
) -> tuple[EvaluationData, EvaluationData]:
    """Load images to fit a classifier or to calibrate a graph, and the images to evaluate.

    The latter are those of `load_evaluation_data`. If the dataset has only one split, the images
    are fitted to that are not evaluated; if training did not use the dataset, a rule divides it
    (`options.held_out_fraction`). With `split`, an only split is both.
    """
    choose_splits = partial(choose_fitting_and_evaluation_split, split, options.dataset)
    splits = load_splits(options, select=choose_splits)
    fitting_name, name = choose_splits(splits.names)
    images = splits.images_by_split[name]
    fitting_images = splits.images_by_split[fitting_name]
    is_evaluated, part = find_evaluated_images(images, record, options, splits.name)

    if split is None and fitting_name == name:
        if part.kind == "whole":
            rule = build_held_out_rule(options)
            is_evaluated, _ = select_held_out(images, rule)
            check_both_parts(is_evaluated, rule, images, options.dataset)
            part = replace(part, kind="fraction")
        fitting_images = images.select(np.flatnonzero(~is_evaluated).tolist())

    fitting_part = EvaluatedPart("whole", len(fitting_images))
    images, part = select_part(images, is_evaluated, part, options.dataset, name, split is not None)
    return (
        EvaluationData(splits.label_space, fitting_images, fitting_name, fitting_part),
        draw_data(splits, name, images, part, max_images, options.split_seed),
    )


def select_part(
    images: LabeledImages,
    is_evaluated: np.ndarray,
    part: EvaluatedPart,
    dataset: str,
    name: str,
    is_named: bool,
) -> tuple[LabeledImages, EvaluatedPart]:
    """Return the images of a part, or all images of a split `name` that the user has named.

    Raise ValueError if the part has no images.
    """
    if is_named:
        return images, EvaluatedPart("whole", part.num_given, part.num_trained)
    if not is_evaluated.any():
        raise ValueError(
            f"the model was trained on all {len(is_evaluated):,} images of {dataset}. Set "
            f"`dataset` to other images, or `split={name!r}` to evaluate these"
        )
    return images.select(np.flatnonzero(is_evaluated).tolist()), part


def draw_data(
    splits: Splits,
    name: str,
    images: Any,
    part: EvaluatedPart,
    max_images: int | None,
    seed: int,
) -> EvaluationData:
    """Return at most `max_images` images of a part of a split, drawn at random."""
    drawn = images.draw(max_images, seed)
    if drawn is not images and len(drawn) != images.num_images:
        part = replace(part, num_drawn=len(drawn))
    if len(splits.names) > 1:  # users have not given the name of an only split
        part = replace(part, split=name)
    return EvaluationData(splits.label_space, drawn, name, part)


# Splits -------------------------------------------------------------------------------------------


def choose_evaluation_split(split: str | None, names: Sequence[str], dataset: str) -> str:
    """Return the name of the split to evaluate. Raise ValueError if there is no such split."""
    if split is None:
        split = next(
            (name for name in EVALUATION_SPLITS if name in names),
            names[0] if len(names) == 1 else None,
        )
    if split is not None and split in names:
        return split
    problem = (
        f"has no split {split!r}"
        if split is not None
        else "has several splits, none of them for evaluation"
    )
    raise ValueError(f"{dataset} {problem}. Set `split` to one of {', '.join(names)}")


def choose_fitting_and_evaluation_split(
    split: str | None, dataset: str, names: Sequence[str]
) -> tuple[str, str]:
    """Return the names of the split that a classifier is fitted to, and of the evaluated split.

    They are the same if the dataset has only one.
    """
    evaluated = choose_evaluation_split(split, names, dataset)
    fitting_names = ["train"] if "train" in names else [each for each in names if each != evaluated]
    return (fitting_names or [evaluated])[0], evaluated


# Training images ----------------------------------------------------------------------------------


def find_evaluated_images(
    images: LabeledImages, record: HeldOutRecord | None, options: DataOptions, dataset: str
) -> tuple[np.ndarray, EvaluatedPart]:
    """Return whether each image is evaluated by default, and the part that these images are.

    `dataset` is the name of the dataset. Raise ValueError if the options contradict the record.
    """
    num_images = len(images)
    everything = np.ones(num_images, bool)
    if record is None:
        return everything, EvaluatedPart("whole", num_images)

    is_training_image = np.zeros(num_images, bool)
    recorded_fraction = 0.0
    if record.training_images is not None:
        keys, recorded_fraction = record.decode_training_images()
        is_training_image = np.isin(images.images.compute_content_keys(), keys)
        if not is_training_image.any():
            return everything, EvaluatedPart("whole", num_images, 0)
    elif record.dataset != dataset:
        return everything, EvaluatedPart("whole", num_images)

    # The recorded rule selects exactly the images that training held out if the names of all images
    # are the same.
    if record.rule is not None:
        is_held_out, found = select_held_out(images, check_rule(record.rule, options))
        is_same_dataset = (
            is_training_image[~is_held_out].sum() > recorded_fraction / 2 * (~is_held_out).sum()
        )
        if found.sha256 == record.sha256 and (is_same_dataset or record.training_images is None):
            return is_held_out, EvaluatedPart("held_out", num_images, int((~is_held_out).sum()))
        if record.training_images is None or (recorded_fraction < 1 and is_same_dataset):
            warning = (
                f"the images of {dataset} have changed since training, and the record of the model "
                "does not list all training images, so some of them may be among the evaluated "
                "images"
            )
            return is_held_out, EvaluatedPart("held_out", num_images, None, warning)
    num_trained = int(is_training_image.sum())
    return ~is_training_image, EvaluatedPart(
        "untrained" if num_trained else "whole", num_images, num_trained
    )


def check_rule(rule: HeldOutRule, options: DataOptions) -> HeldOutRule:
    """Return the recorded rule. Raise ValueError if the options contradict it."""
    for name, recorded_value in (("split_seed", rule.seed), ("held_out_fraction", rule.fraction)):
        value = getattr(options, name)
        if value not in (recorded_value, getattr(DataOptions, name)):
            raise ValueError(
                f"`{name}` is {value}, but training held out images with {recorded_value}. Remove "
                f"`{name}`"
            )
    return rule

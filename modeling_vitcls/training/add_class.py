"""`vitcls add-class`: more classes of a classifier, each a row of the classifier (see extend.py).

To add a class, no images of the old classes are needed (inference/class_statistics.py): its row is
the mean of its images, multiplied by the precision matrix that the old classes share.
"""

from typing import Any

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold

from ..data.cells import normalize_name, warn_about_similar_classes
from ..data.images import LabeledImages
from ..data.in_memory import get_title
from ..data.label_matching import translate_labels
from ..data.labels import LabelSpace, OneLabel, get_label_space
from ..data.sources import Splits, load_splits
from ..data.splits import add_keys, check_contradictions, choose_training_splits
from ..data.splits_table import build_splits_table, find_trained_images, read_splits
from ..hub.local_paths import strip_folders
from ..inference.class_statistics import ClassStatistics
from ..inference.frozen_features import Features
from ..inference.linear_probe import stack_tokens
from ..runtime.errors import warn_on_first_process
from ..runtime.staging import create_output_folder
from .extend import (
    append_head,
    build_head,
    build_result,
    check_has_one_label,
    describe_tokens,
    open_old_model,
)
from .options import AddClassOptions


NUM_FOLDS = 10  # that measure the recall of a new class


def add_class(options: AddClassOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Add classes, write the model folder, and return the record of the classes and the certificate.

    Raises:
        ValueError, OSError: if the model or the data cannot be read, if the model has one of the
            classes, or no class statistics. Nothing is written then.
    """
    old = open_old_model(options)
    statistics = ClassStatistics.from_model(old.model)
    if statistics is None:
        raise ValueError(
            f"{options.model} has no class statistics, which a classifier with one label per image "
            f"needs for another class. Run vitcls finetune --model {options.model}, which stores "
            "them, or add a task with vitcls add-task"
        )
    old_names = get_label_space(old.model.config).names
    label_space, images = select_new_images(load_splits(options), options.dataset, old_names)
    if num_trained := int(find_trained_images(images, read_splits(old.folder)).sum()):
        warn_on_first_process(
            f"{num_trained:,} of the {len(images):,} images of the new classes trained "
            f"{options.model} as other classes, and are still in their means. Repeat its run "
            "without them"
        )

    with create_output_folder(options.output_dir, "output_dir") as staging:
        features = old.compute_features(images, label_space, has_logits=True)
        extended = append_classes(old.model, statistics, features, label_space.names)
        record = {
            "kind": "classes",
            "labels": label_space.names[len(old_names) :],
            "num_new_images": len(features.labels),
            "reads": describe_tokens(statistics.tokens),
            "dataset": strip_folders(get_title(options.dataset)),
        }
        is_right = cross_validate(statistics, features, len(label_space.names))
        if is_right is not None:
            record["result"] = build_result("recall", is_right, features.groups, "cross-validated")
        return old.write(extended, record, images, build_splits_table({"train": images}), staging)


def select_new_images(
    splits: Splits, dataset: str, old_names: list[str]
) -> tuple[LabelSpace, LabeledImages]:
    """Select the training images of the new classes, labeled among all classes."""
    new_space = splits.label_space
    check_has_one_label(new_space, dataset)
    if known := sorted(set(new_space.names) & set(map(normalize_name, old_names))):
        raise ValueError(
            f"the model has the class {known[0]!r} already. Remove its images from `dataset`"
        )
    names = [*old_names, *new_space.names]
    warn_about_similar_classes(f"{dataset} and the model", names)

    images = add_keys(splits.images_by_split)
    check_contradictions(list(images.values()), new_space, dataset)
    train = images[choose_training_splits(False, images)[0]]
    label_space = OneLabel({"label": names})
    return label_space, translate_labels(train, new_space, label_space)


def append_classes(
    model: Any, statistics: ClassStatistics, features: Features, names: list[str]
) -> Any:
    """Build the classifier with a row, and with class statistics, for each new class.

    Args:
        model: classifier of the first C of the classes.
        statistics: of these C classes.
        features: of images of the others, with the logits of the model as the last columns.
        names: of all classes.
    """
    num_old = len(statistics.counts)
    extended_statistics = statistics.extend(features.get_tokens(), features.labels, len(names))
    missing = np.flatnonzero(extended_statistics.counts[num_old:] == 0)
    if len(missing):
        raise ValueError(
            f"the class {names[num_old + missing[0]]!r} has no images. Add images, or remove the "
            "class"
        )

    weight, bias = build_rows(statistics, features, len(names))
    head = build_head(statistics.tokens, names[num_old:]) | {"adds_classes": True}
    name = f"added_classes_{len(model.config.get_added_classes()) + 1:03d}"
    extended = append_head(model, name, head, weight, bias)
    extended_statistics.set_in_model(extended)
    # The fingerprint is that of the weights before they were rounded or merged: the old statistics
    # keep their bits.
    extended.class_distance.fingerprint.copy_(model.class_distance.fingerprint)
    return extended


def build_rows(
    statistics: ClassStatistics, features: Features, num_labels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Build a row for the mean of each new class, between the logits of the classifier.

    If the classifier was trained further, its logits have another mean and scale than logits from
    the statistics. The row of a new class is therefore shifted and scaled, by how the logits of the
    old classes differ on the new images.

    Args:
        statistics: of the C old classes.
        features: of the new images, with C logits as the last columns.
        num_labels: number C + L of classes.

    Returns:
        Weight [L, F] and bias [L], which is minus infinity for a class without images.
    """
    num_old = len(statistics.counts)
    known = np.flatnonzero(statistics.counts)
    tokens = features.get_tokens()
    old_weight, old_bias = statistics.build_classifier()
    own = (stack_tokens(tokens, statistics.tokens) @ old_weight.T + old_bias)[:, known]
    logits = features.values[:, -num_old:][:, known].astype(np.float64)
    scale = np.sqrt(logits.var(axis=1).mean() / own.var(axis=1).mean())

    extended = statistics.extend(tokens, features.labels, num_labels)
    weight, bias = extended.build_new_rows(num_old)
    return scale * weight, logits.mean() + scale * (bias - own.mean())


def cross_validate(
    statistics: ClassStatistics, features: Features, num_labels: int
) -> np.ndarray | None:
    """Find out which new images [N] are recognized by rows that were computed without their group.

    The arguments are as in `build_rows`. Copies of an image are one group. The result is None if
    all images of a class are one group.
    """
    groups, _ = pd.factorize(features.groups)
    labels = features.labels[np.unique(groups, return_index=True)[1]]  # of each group
    # Each class has images in every fold, so the smallest class limits their number.
    num_folds = min(NUM_FOLDS, np.unique(labels, return_counts=True)[1].min())
    if num_folds < 2:
        return None
    logits = features.values[:, -len(statistics.counts) :]
    inputs = stack_tokens(features.get_tokens(), statistics.tokens)
    is_right = np.zeros(len(groups), bool)
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=0)
    for _, left_out_groups in folds.split(labels, labels):
        left_out = np.isin(groups, left_out_groups)
        weight, bias = build_rows(statistics, features.take(~left_out), num_labels)
        new_logits = inputs[left_out] @ weight.T + bias
        predicted = np.hstack([logits[left_out], new_logits]).argmax(axis=1)
        is_right[left_out] = predicted == features.labels[left_out]
    return is_right

"""`vitcls add-class`: more classes of a classifier, each a row of the classifier (see extend.py).

To add a class, no images of the old classes are needed (inference/class_statistics.py): its row is
the mean of its images, multiplied by the precision matrix that the old classes share.
"""

import itertools
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import softmax
from sklearn.model_selection import StratifiedKFold

from ..data.cells import normalize_name, warn_about_similar_classes
from ..data.images import LabeledImages
from ..data.in_memory import get_title
from ..data.labels import LabelSpace, get_label_space
from ..data.sources import load_splits
from ..data.splits import add_keys, check_contradictions, choose_training_splits
from ..data.splits_table import build_splits_table, find_trained_images, read_splits
from ..hub.local_paths import strip_folders
from ..inference.class_statistics import ClassStatistics
from ..inference.frozen_features import Features
from ..inference.linear_probe import describe_layers, stack_tokens
from ..inference.near_copies import KnownScenes, describe_scenes, keep_together
from ..runtime.errors import warn_on_first_process
from .extend import (
    Addition,
    OldModel,
    append_head,
    build_result,
    check_has_one_label,
    list_left_out,
)
from .options import AddClassOptions


NUM_FOLDS = 10  # Number of folds that measure the recall of a new class


def build_classes(old: OldModel, options: AddClassOptions) -> Addition:
    """Build the classifier with a row, and with class statistics, for each new class.

    Raises:
        ValueError, OSError: if the data cannot be read, or if the model has one of the classes, or
            no class statistics.
    """
    model = old.model
    statistics = ClassStatistics.from_model(model)
    if statistics is None:
        raise ValueError(
            f"{options.model} has no class statistics, which a classifier with one label per image "
            f"needs for another class. Run vitcls finetune --model {options.model}, which stores "
            "them, or add a task with vitcls add-task"
        )
    label_space, images = load_new_images(options, get_label_space(model.config).names)
    if num_trained := int(find_trained_images(images, read_splits(old.folder)).sum()):
        warn_on_first_process(
            f"{num_trained:,} of the {len(images):,} images of the new classes trained "
            f"{options.model} as other classes, and are still in their means. Repeat its run "
            "without them"
        )

    features = old.compute_features(images, label_space, has_logits=True)
    names = label_space.names
    missing = np.setdiff1d(np.arange(len(names)), features.labels)
    if len(missing):
        raise ValueError(
            f"the class {names[missing[0]]!r} has no images. Add images, or remove the class"
        )
    features, scenes = keep_scenes_together(features, old, label_space)

    threshold = model.config.distance_threshold
    all_statistics = statistics.extend(
        features.get_tokens(), features.labels, len(names), features.groups, threshold
    )
    weight, bias = build_class_rows(statistics, all_statistics, features)
    # A task may have such a name
    names_of_heads = (f"added_classes_{number:03d}" for number in itertools.count(1))
    extended = append_head(
        model,
        next(name for name in names_of_heads if name not in (model.config.extra_heads or {})),
        statistics.tokens,
        names,
        weight,
        bias,
        adds_classes=True,
    )
    all_statistics.set_in_model(extended)
    # The fingerprint belongs to the weights before they were rounded or merged: the old statistics
    # keep their bits.
    extended.class_distance.fingerprint.copy_(model.class_distance.fingerprint)

    layers = list(dict.fromkeys(layer for layer, _ in statistics.tokens))
    record: dict[str, Any] = {
        "kind": "classes",
        "labels": names,
        "reads": f"means of the {describe_layers(layers)}",
        "dataset": strip_folders(get_title(options.dataset)),
        "near_copies": scenes,
    }
    rows = None
    measured = cross_validate(statistics, features, len(names), threshold)
    if measured is not None:
        logits, distances = measured
        labels = len(statistics.counts) + features.labels
        all_names = get_label_space(extended.config).names
        probabilities = softmax(logits, axis=1)
        rows = list_left_out(features, statistics.tokens, labels, probabilities, all_names)
        is_right = logits.argmax(axis=1) == labels
        record["result"] = build_result("recall", is_right, features.groups, "cross-validated")
        if threshold is not None:
            record["num_unknown"] = int((distances > threshold).sum())
    splits = build_splits_table({"train": images})
    return Addition(extended, record, images, label_space, splits, rows, features)


def load_new_images(
    options: AddClassOptions, old_names: list[str]
) -> tuple[LabelSpace, LabeledImages]:
    """Load the training images of the new classes."""
    dataset = options.dataset
    splits = load_splits(options, select=partial(choose_training_splits, False))
    label_space = splits.label_space
    check_has_one_label(label_space, dataset)
    if known := sorted(set(label_space.names) & set(map(normalize_name, old_names))):
        raise ValueError(
            f"the model has the class {known[0]!r} already. Remove its images from `dataset`"
        )
    warn_about_similar_classes(f"{dataset} and the model", [*old_names, *label_space.names])
    parts = list(add_keys(splits.images_by_split).values())
    check_contradictions(parts, label_space, dataset)
    return label_space, parts[0]  # The training split comes first


def keep_scenes_together(
    features: Features, old: OldModel, label_space: LabelSpace
) -> tuple[Features, dict[str, Any] | None]:
    """Group the photos of a scene: another shot of a left-out photo would recognize it.

    Returns:
        The features with these groups, and the record of `keep_together`; None if the model has no
        known scenes of these features.
    """
    known = KnownScenes.read(old.folder)
    if known is None or known.layout != features.layout:
        return features, None
    features, scenes = keep_together(features, known.max_distance, label_space)
    if text := describe_scenes(scenes):
        warn_on_first_process(text)
    return features, scenes


def build_class_rows(
    old: ClassStatistics, extended: ClassStatistics, features: Features
) -> tuple[np.ndarray, np.ndarray]:
    """Build a row for the mean of each new class, between the logits of the classifier.

    If the classifier was trained further, its logits have another mean and scale than logits from
    the statistics. The row of a new class is therefore shifted and scaled, by how the logits of the
    old classes differ on the new images.

    Args:
        old: statistics of the C old classes.
        extended: statistics of these and the L new classes.
        features: of the new images, with C logits.

    Returns:
        Weight [L, F] and bias [L].
    """
    num_old = len(old.counts)
    known = np.flatnonzero(old.counts)
    old_weight, old_bias = old.build_classifier()
    inputs = stack_tokens(features.get_tokens(), old.tokens)
    own = (inputs @ old_weight.T + old_bias)[:, known]
    logits = features.logits[:, known].astype(np.float64)
    scale = np.sqrt(logits.var(axis=1).mean() / own.var(axis=1).mean())
    weight, bias = extended.build_new_rows(num_old)
    return scale * weight, logits.mean() + scale * (bias - own.mean())


def cross_validate(
    statistics: ClassStatistics, features: Features, num_classes: int, threshold: float | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Compute the logits of the new images with rows that were computed without their group.

    Copies of an image are one group.

    Args:
        statistics: of the C old classes.
        features: of the new images, with C logits.
        num_classes: number of the new classes.
        threshold: of the distance.

    Returns:
        The logits [N, C + L] of each image, and its distance [N] from the nearest class; None if all
        images of a class are one group.
    """
    groups, _ = pd.factorize(features.groups)
    # The images of a group have one label, except for a scene that shows two classes.
    labels = features.labels[np.unique(groups, return_index=True)[1]]
    # Each class has images in every fold, so the smallest class limits their number.
    num_folds = min(NUM_FOLDS, np.unique(labels, return_counts=True)[1].min())
    if num_folds < 2:
        return None
    num_old = len(statistics.counts)
    tokens = features.get_tokens()
    inputs = stack_tokens(tokens, statistics.tokens)
    logits = np.zeros((len(groups), num_old + num_classes))
    distances = np.zeros(len(groups))
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=0)
    for _, left_out_groups in folds.split(labels, labels):
        left_out = np.isin(groups, left_out_groups)
        others = features.take(~left_out)
        if len(np.unique(others.labels)) < num_classes:  # They are one scene with another class
            return None
        extended = statistics.extend(
            others.get_tokens(), others.labels, num_classes, others.groups, threshold
        )
        weight, bias = build_class_rows(statistics, extended, others)
        new_logits = inputs[left_out] @ weight.T + bias
        logits[left_out] = np.hstack([features.logits[left_out], new_logits])
        own_tokens = {token: values[left_out] for token, values in tokens.items()}
        distances[left_out] = extended.compute_distances(own_tokens)
    return logits, distances

"""`vitcls add-class`: more classes of a classifier, each a row of the classifier (see extend.py).

To add a class, no images of the old classes are needed (frozen/class_statistics.py): its row is
the mean of its images, multiplied by the precision matrix that the old classes share.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np

from ..data.cells import normalize_name, warn_about_similar_names
from ..data.dataset import Dataset
from ..data.in_memory import get_title
from ..data.labels import LabelSpace, OneLabel, get_label_space
from ..data.splits import build_counted_record, load_undivided_images
from ..data.splits_table import find_trained_images, read_splits
from ..evaluation.evaluator import build_predictions, build_rows
from ..frozen.class_statistics import ClassStatistics
from ..frozen.linear_probe import Folds, describe_layers, split_folds, stack_tokens
from ..frozen.scenes import TrainedScenes
from ..hub.local_paths import strip_folders
from ..inference.features import Features
from ..runtime.errors import format_name_list, warn_on_first_process
from .extend import Addition, OldModel, append_head, check_has_one_label
from .options import AddClassOptions
from .records import build_result


def build_classes(old: OldModel, options: AddClassOptions) -> Addition:
    """Build the classifier with a row, and with class statistics, for each new class.

    Raises:
        ValueError, OSError: if the data cannot be read, or if the model has one of the classes, or
            no class statistics.
    """
    model = old.model
    statistics = read_statistics(model, options.model)
    label_space, splits = load_new_images(options, get_label_space(model.config).names)
    images = splits.train
    if num_trained := int(find_trained_images(images, read_splits(old.folder)).sum()):
        warn_on_first_process(
            f"{num_trained:,} of the {len(images):,} images of the new classes trained "
            f"{options.model} as other classes, and are still in their means. Repeat its run "
            "without them"
        )

    features = old.compute_features(images, label_space, select_logits=attrgetter("logits"))
    names = label_space.names
    if len(missing := np.setdiff1d(np.arange(len(names)), features.labels)):
        raise ValueError(
            f"the class {names[missing[0]]!r} has no images. Add images, or remove the class"
        )
    features, limit, scenes_record = old.keep_scenes_together(images, features, label_space)
    trained_scenes = dict(old.trained_scenes)
    if "" in trained_scenes:
        trained_scenes[""] = trained_scenes[""].join(TrainedScenes.of(features, limit))

    threshold = model.config.distance_threshold
    all_statistics = statistics.extend(
        features.get_tokens(), features.labels, len(names), features.groups, threshold
    )
    weight, bias = build_class_rows(statistics, all_statistics, features)
    extended = append_head(
        model,
        find_free_name(model.config.extra_heads or {}),
        statistics.tokens,
        names,
        weight,
        bias,
        adds_classes=True,
    )
    all_statistics.set_in_model(extended)

    layers = dict.fromkeys(layer for layer, _ in statistics.tokens)
    record: dict[str, Any] = {
        "kind": "classes",
        "labels": names,
        "reads": f"means of the {describe_layers(list(layers))}",
        "dataset": strip_folders(get_title(options.dataset)),
        "scenes": scenes_record,
    }
    rows = None
    folds = split_folds(features.labels, features.groups, min_classes=1)
    logits, distances = cross_validate(statistics, features, folds, len(names), threshold)
    can_measure = images.is_counted[features.indices]
    measured = np.flatnonzero(~np.isnan(distances) & can_measure)
    if not can_measure.any():
        record["missing_reason"] = "a page has asked about all images when a model was unsure"
    if len(measured):
        left_out = replace(
            features.take(measured),
            labels=len(statistics.counts) + features.labels[measured],
            logits=logits[measured].astype(np.float32),
        )
        predictions = build_predictions(get_label_space(extended.config), left_out)
        record["result"] = build_result("recall", predictions, len(folds))
        if options.answers:
            record["result"].update(build_counted_record(images, splits.no_estimate))
        rows = build_rows(predictions)
        if threshold is not None:
            record["num_unknown"] = int((distances[measured] > threshold).sum())
        warn_about_unmeasured(names, np.setdiff1d(features.labels, features.labels[measured]))
    return Addition(extended, record, {"train": images}, trained_scenes, rows)


def find_free_name(heads: Collection[str]) -> str:
    """Find a name for the head of the new classes; a task may have such a name."""
    names = (f"added_classes_{number:03d}" for number in itertools.count(1))
    return next(name for name in names if name not in heads)


def read_statistics(model: Any, name: str) -> ClassStatistics:
    """Read the class statistics of a model, named `name`; raise ValueError without two classes."""
    statistics = ClassStatistics.from_model(model)
    if statistics is None:
        raise ValueError(
            f"add-class requires class statistics, which a run with one label per image and CLS or mean "
            f"pooling stores: {name} has none. Run vitcls finetune --model {name} so, or use vitcls add-task"
        )
    if np.count_nonzero(statistics.counts) == 1:
        raise ValueError(
            f"add-class requires photos of two old classes, but those of {name} are all of one. Train "
            "with both again"
        )
    return statistics


def warn_about_unmeasured(names: Sequence[str], labels: np.ndarray) -> None:
    """Name the new classes, by their labels, that no left-out image measures."""
    if len(labels):
        warn_on_first_process(
            f"no result measures {format_name_list([names[label] for label in labels.tolist()])}, "
            "because the class has one image or one group, or none that is counted. Add images"
        )


def load_new_images(options: AddClassOptions, old_names: list[str]) -> tuple[LabelSpace, Dataset]:
    """Load the training images of the new classes, with the labels of the label space."""
    images = load_undivided_images(options, min_classes=1)
    check_has_one_label(images.label_space, images.name)
    ((column, names),) = images.label_space.columns.items()
    # A filtered dataset still declares the classes without images.
    labels, indices = np.unique(images.train.labels, return_inverse=True)
    label_space = OneLabel({column: [names[label] for label in labels]})
    old = set(map(normalize_name, old_names))
    if unused := set(images.label_space.names) - {*label_space.names, *old}:
        warn_on_first_process(
            f"not added, because no image has them: {format_name_list(sorted(unused))}"
        )
    if known := sorted(old & set(label_space.names)):
        raise ValueError(
            f"the model has the class {known[0]!r} already. Remove its images from `dataset`"
        )
    warn_about_similar_names(f"{images.name} and the model", [*old_names, *label_space.names])
    train = replace(images.train, labels=indices.tolist())
    split, *_ = images.images_by_split
    return label_space, replace(images, images_by_split={split: train})


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
    statistics: ClassStatistics,
    features: Features,
    folds: Folds,
    num_classes: int,
    threshold: float | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the logits of the new images with rows that were computed without their group.

    Copies of an image are one group.

    Args:
        statistics: of the C old classes.
        features: of the new images, with C logits.
        folds: of these images.
        num_classes: number of the new classes.
        threshold: of the distance.

    Returns:
        The logits [N, C + L] of each image, and its distance [N] from the nearest class; NaN if all
        images of its class are in one group.
    """
    tokens = features.get_tokens()
    inputs = stack_tokens(tokens, statistics.tokens)
    num_old = len(statistics.counts)
    logits = np.full((len(inputs), num_old + num_classes), np.nan)
    distances = np.full(len(inputs), np.nan)
    for train, left_out in folds:
        others = features.take(train)
        # Groups may keep all images of a class in one fold
        left_out = left_out[np.isin(features.labels[left_out], others.labels)]
        extended = statistics.extend(
            others.get_tokens(), others.labels, num_classes, others.groups, threshold
        )
        weight, bias = build_class_rows(statistics, extended, others)
        new_logits = inputs[left_out] @ weight.T + bias
        logits[left_out] = np.hstack([features.logits[left_out], new_logits])
        own_tokens = {token: values[left_out] for token, values in tokens.items()}
        distances[left_out] = extended.compute_distances(own_tokens)
    return logits, distances

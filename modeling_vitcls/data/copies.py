"""Copies of one image that have different labels: a mistake in data with one label per image."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from .held_out import MAX_RECORDED_IMAGES
from .image_folder import format_name_list
from .images import DatasetImages, LabeledImages, open_encoded_image


MAX_NAMED_COPIES = 10  # in one error


def check_copies(dataset: str, splits: Mapping[str, LabeledImages], classes: Sequence[str]) -> None:
    """Raise ValueError if copies of one image have different labels.

    Copies have the same content, in any rows, folders and splits. Only images whose size in bytes
    is that of an image with another label are read; none are in datasets of more than
    `MAX_RECORDED_IMAGES` images.

    Args:
        dataset: name of the dataset.
        splits: images with one class index each.
        classes: name of each class.
    """
    if sum(map(len, splits.values())) > MAX_RECORDED_IMAGES:
        return
    images = [split.images for split in splits.values()]
    labels = [np.array(split.labels, np.int64) for split in splits.values()]
    group = np.zeros(0, np.int64)

    # each round reads more of fewer images
    for compute in (
        DatasetImages.compute_sizes,
        DatasetImages.compute_content_keys,
        compute_digests,
    ):
        keys = np.concatenate([compute(each) for each in images])
        group, is_contradictory = find_contradictions(keys, np.concatenate(labels))
        if not is_contradictory.any():
            return
        group = group[is_contradictory]
        kept = np.split(is_contradictory, np.cumsum([len(each) for each in images])[:-1])
        for part, rows in enumerate(kept):
            images[part] = images[part].select(np.flatnonzero(rows).tolist())
            labels[part] = labels[part][rows]

    files = [name for each in images for name in each.get_names()]
    texts: dict[int, list[str]] = {}
    for copy, name, label in zip(group.tolist(), files, np.concatenate(labels), strict=True):
        texts.setdefault(copy, []).append(f"{name} is {classes[label]!r}")
    copies = [" and ".join(each) for each in texts.values()]
    count_text = "1 image has" if len(copies) == 1 else f"{len(copies):,} images have"
    raise ValueError(
        f"{dataset}: {count_text} several labels: {format_name_list(copies, MAX_NAMED_COPIES)}. "
        "Remove the copies with the wrong label"
    )


def find_contradictions(keys: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the group of each image, whose images have one key, and whether its labels differ."""
    _, group = np.unique(keys, return_inverse=True)
    lowest = np.full(len(keys), np.iinfo(np.int64).max)  # of each group
    highest = np.full(len(keys), -1)
    np.minimum.at(lowest, group, labels)
    np.maximum.at(highest, group, labels)
    return group, lowest[group] < highest[group]


def compute_digests(images: DatasetImages) -> np.ndarray:
    """Return the SHA-256 of each image; of its path if it is not a local file."""
    digests = []
    for index in range(len(images)):
        with open_encoded_image(images.get_encoded_image(index)) as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return np.array(digests, "U64")

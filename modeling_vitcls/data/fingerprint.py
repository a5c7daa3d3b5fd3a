"""Fingerprints of training data. `--resume` continues a run only on the data that it was started with.

    names_sha256         the images' names in order
    name_set_sha256      the sorted names, to distinguish a new order from other images
    labels_sha256        the labels in order
    contents_sha256      the bytes of `NUM_SAMPLES` images, spread evenly over all

Only the samples are read, so a fingerprint of a large dataset takes little time. The samples reveal a change of many
images under the same names, for example if the names of two class folders were swapped.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any


NUM_SAMPLES = 32


def compute_fingerprint(
    names: Sequence[str], labels: Iterable[Any], read_content: Callable[[int], bytes | None]
) -> dict[str, str]:
    """Return the digests that are listed above.

    Args:
        names: the name of each image.
        labels: the label of each image, in values that JSON can hold.
        read_content: index of an image -> its bytes, None if it cannot be read.
    """
    samples = sorted({len(names) * number // NUM_SAMPLES for number in range(NUM_SAMPLES)}) if names else []
    contents = [
        hashlib.sha256(content).hexdigest() for index in samples if (content := read_content(index)) is not None
    ]
    return {
        "names_sha256": compute_digest(names),
        "name_set_sha256": compute_digest(sorted(names)),
        "labels_sha256": compute_digest(labels),
        "contents_sha256": compute_digest(contents),
    }


def compute_digest(values: Iterable[Any]) -> str:
    """Return the SHA-256 of values that JSON can hold."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def describe_change(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return how data differs from the data that a run was started with; None if it is the same.

    Args:
        before: what `describe_data` of splits.py returned when the run was started.
        now: what it returns now.
    """
    if before == now:
        return None
    for column, names in now["classes"].items():
        if (known := before["classes"].get(column)) != names:
            return f"the classes of {column!r} were {list_classes(known)} and are {list_classes(names)}"
    for name, noun in (("num_training_images", "training images"), ("num_held_out_images", "held-out images")):
        if before[name] != now[name]:
            return f"there were {before[name]:,} {noun}, and now there are {now[name]:,}"
    if before["name_set_sha256"] != now["name_set_sha256"]:
        return "there are as many images as before, but with other names"
    if before["names_sha256"] != now["names_sha256"]:
        return "the images are the same, but in another order"
    if before["labels_sha256"] != now["labels_sha256"]:
        return "the images are the same, but some have other labels"
    if before["contents_sha256"] != now["contents_sha256"]:
        return "the names of the images are the same, but their contents are not, as if classes had been swapped"
    return "other images are held out"


def list_classes(names: Sequence[str] | None) -> str:
    """Return the number of classes and the first of them."""
    if not names:
        return "none"
    return f"{len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"

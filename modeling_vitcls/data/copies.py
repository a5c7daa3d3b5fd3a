"""Copies of an image: they have one label, in any rows, folders and splits."""

from collections.abc import Collection, Sequence
from itertools import chain, islice

import numpy as np
import pandas as pd

from ..runtime.errors import format_name_list
from .images import MAX_UNREADABLE_IMAGES, NO_CONTENT_KEY, LabeledImages
from .labels import LabelSpace


MAX_NAMED_IMAGES = 10  # In an error about images with two labels


def check_contradictions(
    parts: Collection[LabeledImages], label_space: LabelSpace, dataset: str
) -> None:
    """Raise ValueError if an image has two labels of a task, in any rows, folders and splits."""
    keys = np.concatenate([part.keys for part in parts])
    labels = list(chain.from_iterable(part.labels for part in parts))
    for task, own in label_space.tasks.items():
        table = pd.DataFrame({"key": keys})
        # Missing images and empty files share a key, but they are no copies of each other.
        table = table[table.duplicated("key", keep=False) & (keys != NO_CONTENT_KEY)]
        of_task = [labels[row][task] if task else labels[row] for row in table.index]
        table["label"] = list(map(own.format, of_task))  # None if it is missing
        table = table[table.groupby("key")["label"].transform("nunique") > 1].dropna()
        table = drop_unreadable(table, parts)
        if table.empty:
            continue

        names = list(chain.from_iterable(part.images.get_names() for part in parts))
        check_has_no_nested_copy(table, names, dataset)
        texts = {
            f"{names[row]} is {label!r}": None  # Several rows may say the same
            for row, label in table.sort_values("key", kind="stable")["label"].items()
        }
        raise ValueError(
            f"{dataset}: copies of an image have several labels: "
            f"{format_name_list([*texts], MAX_NAMED_IMAGES)}. Remove the copies with the wrong label; if an "
            "image has several labels, write them into one row, such as cat|dog"
        )


def drop_unreadable(table: pd.DataFrame, parts: Collection[LabeledImages]) -> pd.DataFrame:
    """Drop files that are no images, such as the same page of an error under the names of several photos.

    Args:
        table: the `key` of copies of images; the index has their places in the joined parts.
        parts: the images.
    """
    places = [(part.images, index) for part in parts for index in range(len(part))]
    unreadable = []
    # More unreadable images end a run
    for key, rows in islice(table.groupby("key").groups.items(), MAX_UNREADABLE_IMAGES + 1):
        images, index = places[rows[0]]
        try:
            images[index]
        except ValueError:
            unreadable.append(key)
    return table[~table["key"].isin(unreadable)]


def check_has_no_nested_copy(table: pd.DataFrame, names: Sequence[str], dataset: str) -> None:
    """Raise ValueError if a folder contains only images of several other ones again.

    Such as an archive that was unpacked twice (flowers/flowers), or a folder of all images.

    Args:
        table: the `key` of copies with different labels; the index has their places in `names`.
        names: the paths of all images.
        dataset: its name in messages.
    """
    folders = pd.Series([name.partition("/")[0] for name in names])
    sizes = folders.value_counts()
    found = pd.DataFrame({"key": table["key"], "folder": folders[table.index]})
    num_keys = found["key"].nunique()
    for folder, own in found.groupby("folder"):
        others = found[found["folder"] != folder]
        has_all = own["key"].nunique() == num_keys and len(own) == sizes[folder]
        if has_all and others["folder"].nunique() > 1:
            first = own.index[0]
            again = found.index[(found["key"] == own["key"].iloc[0]) & (found.index != first)][0]
            raise ValueError(
                f"{dataset}: the folder {folder!r} contains images of the other folders again "
                f"({names[first]} is {names[again]}). Move it elsewhere"
            )

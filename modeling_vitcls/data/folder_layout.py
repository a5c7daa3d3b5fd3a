"""Where the splits and the classes of an image folder are, found in the names of its subfolders.

    photos/cat/1.jpg, photos/dog/2.jpg                  classes cat, dog; one split, "train"
    photos/cat/2024/may/1.jpg                           class cat: images may be at any depth in a class folder
    photos/train/cat/1.jpg, photos/Testing/cat/2.jpg    splits "train" and "test"
    photos/training_set/cat/.., photos/test_set/cat/..  the same, because both folders contain the same classes
    photos/cat/train/1.jpg, photos/cat/test/2.jpg       the same: class folders that contain only split folders
    photos/fold1/cat/1.jpg, photos/fold2/cat/2.jpg      an error: splits or classes?
    photos/bus/1.jpg, photos/train/2.jpg                classes bus, train
    photos/1.jpg                                        no classes: only for predictions and pre-training

Files are not read, and their names are not interpreted.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from ..runtime.messages import format_name_list


# Split by lowercase folder name.
SPLIT_BY_FOLDER_NAME = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SPLIT_ORDER = ("train", "validation", "test")
# A word in the name of a folder, such as Train in "TrainImages" and test in "test_set-2"
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
DATE = re.compile(r"(19|20)\d\d([-_. ]?\d\d){0,2}")  # in names of folders that are no classes


class Layout(NamedTuple):
    """Where the splits and the classes are in the paths of an image folder."""

    # name of a split folder -> name of the split; empty if there is only the split "train"
    splits: dict[str, str]
    split_depth: int = 0  # number of folders above the split folders
    class_depth: int = 0  # number of folders above the class folders

    def get_split(self, folders: Sequence[str]) -> str | None:
        """Return the split of a file in nested folders; None if it is in no split folder."""
        if not self.splits:
            return "train"
        return self.splits.get(next(iter(folders[self.split_depth :]), ""))

    def get_class(self, folders: Sequence[str]) -> str | None:
        """Return the class of an image in nested folders; None if it is in no class folder."""
        return next(iter(folders[self.class_depth :]), None)


def find_layout(
    root: Path, images: Sequence[str], metadata: Sequence[str], use_labels: bool
) -> Layout:
    """Find the splits and the classes in the names of folders (see the module docstring).

    Args:
        root: the image folder.
        images: paths of the images in it.
        metadata: paths of the tables in it that contain the labels.
        use_labels: whether classes are used.

    Raises:
        ValueError: if two folders are the same split, or if it is ambiguous whether folders are
            splits or classes.
    """
    paths: dict[str, list[list[str]]] = {}  # first-level folder -> folders of each image
    for image in images:
        path = image.split("/")[:-1]
        if path:
            paths.setdefault(path[0], []).append(path)

    # Names such as seg_train and test_set are also those of classes, unless the folders contain the
    # same subfolders.
    guessed = {name: split for name in paths if (split := guess_split(name))}
    class_depth = find_class_depth([paths[name] for name in guessed])
    splits = guessed
    if not class_depth:
        splits = {name: split for name, split in guessed.items() if is_split_name(name)}
    is_divided = len(splits) == len(paths) > 0
    if metadata and not (is_divided and all("/" in file for file in metadata)):
        return Layout({})
    if is_divided:
        folder_of_split = {split: name for name, split in splits.items()}
        for name, split in splits.items():
            if (other := folder_of_split[split]) != name:
                raise ValueError(
                    f"{root}: the folders {name!r} and {other!r} are the same split. Merge them"
                )
        return Layout(splits, class_depth=class_depth or 1)

    subfolders_by_folder = {name: list_names(each, depth=1) for name, each in paths.items()}
    for name in splits:
        other = next(other for other in paths if other not in splits)
        if subfolders_by_folder[name]:
            raise ValueError(
                f"{root}: {name!r} has the name of a split and contains folders "
                f"({format_name_list(sorted(subfolders_by_folder[name]))}), but {other!r} is not a "
                f"split (train, validation, test). Move {other!r} elsewhere, or rename {name!r}"
            )

    subfolders = sorted(set().union(*subfolders_by_folder.values()))
    inner = {name: SPLIT_BY_FOLDER_NAME.get(name.lower(), "") for name in subfolders}
    has_files = any(len(path) == 1 for path in chain.from_iterable(paths.values()))
    if all(inner.values()) and len(set(inner.values())) > 1 and not has_files:
        return Layout(inner, split_depth=1)

    if use_labels and not has_files and find_class_depth(paths.values(), min_names=2):
        raise ValueError(
            f"{root}: the folders {format_name_list(sorted(paths))} contain the same "
            f"folders ({format_name_list(subfolders)}), so these may be the classes. If so, rename "
            "the outer folders to train, validation and test, or merge them; otherwise, move the "
            "images out of the inner folders"
        )
    return Layout({})


def is_split_name(name: str) -> bool:
    """Return whether a folder has the name of a split, in any case."""
    return name.lower() in SPLIT_BY_FOLDER_NAME


def guess_split(name: str) -> str | None:
    """Return the split that a word in the name of a folder names, as in `seg_train`, or None."""
    words = [re.sub("(set|data|images)$", "", word.lower()) or word for word in WORD.findall(name)]
    names = (name.lower(), *words)
    splits = {SPLIT_BY_FOLDER_NAME[word] for word in names if word in SPLIT_BY_FOLDER_NAME}
    return splits.pop() if len(splits) == 1 else None


def list_names(paths: Collection[Sequence[str]], depth: int) -> set[str]:
    """Return the names of folders at a depth of nested folders."""
    return {path[depth] for path in paths if len(path) > depth}


def find_class_depth(paths: Collection[Collection[Sequence[str]]], min_names: int = 1) -> int:
    """Return the depth at which several folders contain the same subfolders: 1, 2, or 0 if none.

    It is 2 if each of the folders contains a single subfolder: seg_train/seg_train/cat. Half of the
    subfolders of each folder must be in another one, because a class may be missing in a split.
    `paths` are the nested folders of the images in each folder.
    """

    def have_same_names(depth: int) -> bool:
        names = [list_names(each, depth) for each in paths]
        counts = Counter(chain.from_iterable(names))
        shared = {name for name in counts if counts[name] > 1 and not DATE.fullmatch(name)}
        return len(shared) >= min_names and all(
            2 * len(each & shared) >= len(each) > 0 for each in names
        )

    have_one_folder = all(
        len(list_names(each, depth=1)) == 1 and min(map(len, each)) > 1 for each in paths
    )
    if have_one_folder and have_same_names(depth=2):
        return 2
    return 1 if have_same_names(depth=1) else 0

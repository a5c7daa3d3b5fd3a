"""Where the splits and the classes of an image folder are, found in the names of its subfolders.

    photos/cat/1.jpg, photos/dog/2.jpg                  classes cat, dog; one split, "train"
    photos/cat/mug1/1.jpg, photos/cat/mug2/2.jpg        class cat; the images of each folder below a class are a group
    photos/cat/all/may/1.jpg                            class cat: images may be at any depth in a class folder
    photos/train/cat/1.jpg, photos/Testing/cat/2.jpg    splits "train" and "test"
    photos/cat/train/1.jpg, photos/cat/test/2.jpg       the same: class folders that contain only split folders
    photos/fold1/cat/1.jpg, photos/fold2/cat/2.jpg      an error: these look like splits (also seg_train, seg_test)
    photos/bus/1.jpg, photos/train/2.jpg                classes bus, train
    photos/1.jpg                                        no classes: only for predictions

Files are not read, and their names are not interpreted.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from ..runtime.errors import format_name_list


# Split by lowercase folder name.
SPLIT_BY_FOLDER_NAME = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# In a column of a table, also of competitions, of which a part of the test is public
SPLIT_BY_CELL = SPLIT_BY_FOLDER_NAME | {
    "public": "validation",
    "publictest": "validation",
    "private": "test",
    "privatetest": "test",
}
SPLIT_ORDER = ("train", "validation", "test")
# The column of an image folder with the folder below the class, or none
FOLDER_COLUMN = "folder below the class"
# Names of folders that are no classes: albums, and objects with a number
DATE = re.compile(r"(19|20)\d\d([-_. ]?\d\d){0,2}")
COUNTED = re.compile(r".*\d.*", re.DOTALL)
SPLIT_LIKE = re.compile(r"\d|train|test|val|fold|split", re.IGNORECASE)


class Place(NamedTuple):
    """The split and the class of an image, None if its folders do not say, and the folders below."""

    split: str | None
    label: str | None
    folders: tuple[str, ...]


def locate_image(image: str, split_folders: Mapping[str, str]) -> Place:
    """Find the place of an image by its path."""
    folders = image.split("/")[:-1]
    split = None if split_folders else "train"
    for depth in (1, 2):
        path = "/".join(folders[:depth])
        if path in split_folders:
            split = split_folders[path]
            del folders[depth - 1]  # What is left begins with the class
            break
    return Place(split, next(iter(folders), None), tuple(folders[1:]))


def find_groups(places: Any) -> list[str | None]:
    """Find the folder below the class that each image is in, such as all photos of one object.

    Folders that contain all images of a class are no groups, and neither is an only one. `places` is a
    table of them.
    """
    groups: dict[str, str] = {}
    for names, own in places.groupby(["split", "label"])["folders"]:
        levels = zip(*own, strict=False)
        depth = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
        folders = own.str[depth].dropna()
        if folders.nunique() > 1:
            groups |= {image: "/".join((*names, folder)) for image, folder in folders.items()}
    return [groups.get(image) for image in places.index]


def find_split_folders(root: Path, images: Sequence[str], has_classes: bool) -> dict[str, str]:
    """Find the split of each split folder, by its path; none if there is only the split "train".

    Args:
        root: the image folder.
        images: paths of the images in it.
        has_classes: whether folders that look like splits are an error, because they may be classes.

    Raises:
        ValueError: if it is ambiguous whether folders are splits or classes.
    """
    paths: dict[str, list[list[str]]] = {}  # First-level folder -> folders of each image
    for image in images:
        path = image.split("/")[:-1]
        if path:
            paths.setdefault(path[0], []).append(path)

    splits = {
        name: split
        for name in paths
        # Without the year, as in COCO's train2017
        if (split := SPLIT_BY_FOLDER_NAME.get(re.sub(r"20\d\d$", "", name.lower())))
    }
    if len(splits) == len(paths):
        return splits

    nested = {name: each for name, each in paths.items() if list_names(each, depth=1)}
    for name in splits:
        if name in nested:
            other = next(other for other in paths if other not in splits)
            raise ValueError(
                f"{root}: {name!r} has the name of a split and contains folders, but {other!r} is not "
                f"a split (train, validation, test). Move {other!r} elsewhere, or rename {name!r}"
            )

    inner_splits = {
        "/".join(path[:2]): SPLIT_BY_FOLDER_NAME.get("".join(path[1:2]).lower(), "")
        for path in chain.from_iterable(paths.values())
    }
    if all(inner_splits.values()) and len(set(inner_splits.values())) > 1:
        return inner_splits

    # photos/cat/object1 and photos/dog/object1 are groups; photos/fold1/cat and photos/fold2/cat, splits
    counted = DATE if any(map(SPLIT_LIKE.search, nested)) else COUNTED
    if has_classes and (classes := find_shared_folders(nested.values(), counted)):
        raise ValueError(
            f"{root}: the folders {format_name_list(sorted(nested))} contain the same folders "
            f"({format_name_list(classes)}), so they look like splits. Rename them to train, "
            "validation and test, each with the folders of the classes; if they are days, places or people, move them "
            f"into the folders of the classes ({classes[0]}/{min(nested)}); if they are the classes, set "
            "`group_column='none'`"
        )
    return {}


def list_names(paths: Iterable[Sequence[str]], depth: int) -> set[str]:
    """List the names of folders at a depth of nested folders."""
    return {path[depth] for path in paths if len(path) > depth}


def find_shared_folders(
    paths: Collection[Collection[Sequence[str]]], excluded: re.Pattern[str]
) -> list[str]:
    """Find the folders that several outer folders contain, given the nested folders of their images.

    `excluded` matches names that are no classes.
    They look like classes, and the outer folders like splits, if there are two or more of them, and
    if they make up half of each outer folder, because a class may be missing in a split. If each
    outer folder contains a single one (seg_train/seg_train/cat), the next level counts.
    """
    depth = 2 if all(len(list_names(each, depth=1)) == 1 for each in paths) else 1
    nested = [each for each in paths if list_names(each, depth)]
    if any(len(path) == depth for path in chain.from_iterable(nested)):
        return []
    names = [list_names(each, depth) for each in nested]
    counts = Counter(chain.from_iterable(names))
    # Albums of two years may both contain a folder 2024-05, which is no class.
    shared = {name for name in counts if counts[name] > 1 and not excluded.fullmatch(name)}
    is_half = all(2 * len(each & shared) >= len(each) for each in names)
    return sorted(shared) if is_half and len(shared) > 1 else []

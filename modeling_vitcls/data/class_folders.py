"""Folders that are no classes, found in names of folders and files, and in the tables beside them.

    check_class_folders(folder, places)     left out, asked about, or refused with a remedy

    no_label/, unsorted/                         left out: the name says that the photos have no label
    cat/, cat - Copy/                            a line asks: the copy of a class folder is a class of its own
    trash/, rejected/, New folder/               a line asks
    2023/, 2024/ and no other folders            a line asks
    front/1.jpg, back/1.jpg                      a line asks
    train/cat/, test/unknown/                    the split is left out: it has none of the classes
    100CANON/, 101CANON/                         an error: folders of a camera
    train_images/, test_images/                  an error: parts of a dataset
    images_001/, images_002/ beside a table      an error, if the table names the photos
    listing_0/kitchen.jpg, listing_1/kitchen.jpg    an error: the files are named like classes

Numbered folders without a table are classes (0, 1, 2 or class_1, class_2).
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..model.field_checks_vitcls import open_regular_file
from ..runtime.errors import format_name_list, warn_on_first_process
from .cells import normalize_name


# Words of other languages are those of file managers and of German, French and Spanish users
UNLABELED = re.compile(
    r"(no|un|not|without)[ _-]?(label(ed|led)?s?|sorted|tagged|annotated|sortiert)|"
    r"to[ _-]?(do|sort|label|annotate)|ohne[ _]label|(sin|por)[ _]etiquetar|(non|à)[ _]tri(er|ée?s?)",
    re.I,
)
DOUBTFUL = re.compile(
    r"rejected|discarded|excluded?|ignored?|skip(ped)?|deleted?|duplicates?|trash|junk|papierkorb|corbeille|papelera|"
    r"misc|all|old|backup|bak|te?mp|archive|inbox|incoming|pending|review|maybe|unsure|uncertain|unclear|blurry|"
    r"unclassified|unassigned|outputs?|results?|"
    r"(new|untitled|neuer|nouveau|nueva)[ _](folder|ordner|dossier|carpeta)( \(?\d+\)?)?",
    re.I,
)
# As file managers and people name the copy of a folder: "cat - Copy (2)", "cat copy 2", "cat (1)", "cat_old"
COPY = re.compile(
    r"( - copy| copy| - kopie| kopie| - copie)?( \(?\d+\)?)?$|"
    r"[ _-]+(old|new|backup|bak|orig(inal)?|checked|clean(ed)?|done|final|edited|resized|cropped|aug(mented)?|v\d)$|"
    r"^(copy of|kopie von|copie de|copia de) ",
    re.I,
)
CAMERA = re.compile(r"\d{3}[A-Z_]{4}[A-Z_\d]|\d{3}_\d{4}", re.I)  # 100CANON, 101_PANA, 102_0514
# Sides and bands of one object, if the folders have the same file names
SIDE = re.compile(
    r"front|back|left|right|side|top|bottom|obverse|reverse|before|after|rgb|n?ir|depth|thermal|mask",
    re.I,
)
# 2024, 2024-05, 20240501
DATED = re.compile(r"(19|20)\d\d([ ._-]?(0?[1-9]|1[0-2])([ ._-]?[0-3]?\d)?)?")
# With what a dataset adds to the name of a part: train_images, Train_jpg, test1
PART = re.compile(
    r"(images?|imgs?|photos?|jpe?g|png)?[ _-]?(train(ing)?|val(id(ation)?)?|dev|test(ing)?)"
    r"[ _-]?(images?|imgs?|photos?|jpe?g|png|set|data|\d)?",
    re.I,
)
TEXT_TABLES = (".csv", ".tsv")
MAX_TABLE_BYTES = 50_000_000
MIN_NAMED = 0.5  # Fraction of the photos that a table has to name


def check_class_folders(path: Path, places: Any, tables: Sequence[str]) -> Any:
    """Leave out photos of folders that are no classes, and ask about others.

    Args:
        path: The image folder.
        places: A table with the `label` (class folder) of each image, whose index has the paths.
        tables: Paths of the tables in the folder.

    Returns:
        The rows whose folders are classes.

    Raises:
        ValueError: If the folders are parts of a dataset, or the files are named like classes.
    """
    places = drop_other_splits(path, places)
    names = sorted(set(places["label"]))
    unlabeled = [name for name in names if UNLABELED.fullmatch(name)]
    others = [name for name in names if name not in unlabeled]
    if unlabeled and len(others) > 1:
        is_left_out = places["label"].isin(unlabeled)
        warn_on_first_process(
            f"{path}: folders whose names say that their images ({is_left_out.sum():,}) have no label are "
            f"left out: {format_name_list(unlabeled)}. If one is a class, rename it"
        )
        places = places[~is_left_out]
        names = others
    check_are_no_parts(path, names, places.index, tables)
    doubtful = [name for name in names if DOUBTFUL.fullmatch(name)]
    if len(names) > 1 and all(map(DATED.fullmatch, names)):
        doubtful = names
    stems = places.groupby("label").groups.values()
    are_same = len({frozenset(PurePosixPath(each).stem for each in own) for own in stems}) == 1
    if len(names) > 1 and are_same and all(map(SIDE.fullmatch, names)):
        doubtful = names
    copies = [name for name in names if find_original(name, names)]
    if doubtful or copies:
        warn_on_first_process(
            f"WARNING: {path}: are these classes of their own? {format_name_list([*copies, *doubtful])}. If "
            "not, move their images into the folder of their class, or elsewhere"
        )
    return places


def drop_other_splits(path: Path, places: Any) -> Any:
    """Leave out splits none of whose folders is a class of training, such as test/unknown/."""
    # In one Unicode form, as classes are matched: macOS and Windows write é differently
    labels = {split: {*map(normalize_name, own["label"])} for split, own in places.groupby("split")}
    known = labels.get("train", set())
    for split, own in labels.items():
        if known and known.isdisjoint(own):
            warn_on_first_process(
                f"WARNING: {path}: the split {split!r} is left out, because none of its folders "
                f"({format_name_list(sorted(own))}) is a class of the split 'train'"
            )
            places = places[places["split"] != split]
    return places


def find_original(name: str, names: Iterable[str]) -> str | None:
    """Find the class folder that a folder is a copy of, by its name."""
    original = COPY.sub("", name)
    return next((other for other in names if other == original and other != name), None)


def check_are_no_parts(
    path: Path, names: Sequence[str], images: Iterable[str], tables: Sequence[str]
) -> None:
    """Raise ValueError if all folders are parts of a dataset, which says nothing about classes."""
    if len(names) < 2:
        return
    if all(map(CAMERA.fullmatch, names)):
        raise ValueError(
            f"{path}: the folders {format_name_list(names)} are those of a camera, and no classes. Move the images of "
            "each class into a separate folder, or set `dataset` to a table of images and labels"
        )
    paths = [PurePosixPath(image) for image in images]
    are_numbered = len({re.sub(r"\d+", "", name) for name in names}) == 1
    if not are_numbered and not all(map(PART.fullmatch, names)):
        return
    table = find_naming_table(path, paths, tables)
    if table is not None:
        raise ValueError(
            f"{path}: the folders {format_name_list(names)} look like parts of a dataset, and {table} names "
            f"their images. Set `dataset={str(path / table)!r}`"
        )
    if not are_numbered:
        raise ValueError(
            f"{path}: the folders {format_name_list(names)} look like splits without classes. Move the images of "
            "each class into a separate folder in them, or set `dataset` to a table of images and labels"
        )
    words = [frozenset(each.stem.lower() for each in paths if name in each.parts) for name in names]
    if len(set(words)) == 1 and len(words[0]) > 1 and all(map(str.isalpha, words[0])):
        raise ValueError(
            f"{path}: each of the folders {format_name_list(names)} contains {format_name_list(sorted(words[0]))}, "
            "so the files look like the classes. Move those of each name into a separate folder, or set "
            "`dataset` to a table of images and labels"
        )


def find_naming_table(
    path: Path, images: Sequence[PurePosixPath], tables: Sequence[str]
) -> str | None:
    """Find a text table that names at least half of the images, by their file names or stems."""
    for table in tables:
        file = path / table
        if file.suffix.lower() not in TEXT_TABLES or file.stat().st_size > MAX_TABLE_BYTES:
            continue
        with open_regular_file(file) as stream:
            text = stream.read().decode("utf-8", errors="replace")
        cells = {PurePosixPath(cell.strip()).name for cell in re.split(r'[,;\t|"\n]', text)}
        num_named = sum(image.name in cells or image.stem in cells for image in images)
        if num_named >= MIN_NAMED * len(images):
            return table
    return None

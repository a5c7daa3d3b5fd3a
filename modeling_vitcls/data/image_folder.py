"""Read image folders (one subfolder of images per class) as `datasets.DatasetDict`.

    scan_folder(path)            -> ImageFolder: its files by kind
    find_split_folders(...)      -> the folders of splits (folder_layout.py)
    read_image_folder(folder)    -> splits, whose images are not copied; the labels are the class folders

What is skipped is logged (other file types, images next to class folders, folders of the system), and
so are folders that are not read although they look like classes. Hidden files
are ignored, and so are the folders of models and training runs, which contain figures. A folder that
contains metadata.csv (or .jsonl, .parquet), or at least as many tables as images, is a folder of tables
(sources.py); a table with the same name as an image in its folder does not count.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from ..hub.model_files import CONFIG_FILES, RECIPE_FILE
from ..runtime.errors import format_name_list, warn_on_first_process
from .class_folders import check_class_folders
from .folder_layout import FOLDER_COLUMN, SPLIT_ORDER, find_groups, find_split_folders, locate_image


IMAGE_SUFFIXES = frozenset(
    ".apng .avif .avifs .bmp .dib .gif .ico .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx "
    ".mpo .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)
HEIF_SUFFIXES = frozenset(".heic .heics .heif .heifs .hif".split())
# Pattern of the names of files that are not read -> what to do
REMEDIES = {
    r"\.(heics?|heifs?|hif)$": (
        "To read HEIC, `pip install pillow-heif`, or convert the images to JPEG"
    ),
    "-ubyte": "To read MNIST, set `dataset` to its images on the Hub, such as 'ylecun/mnist'",
    r"\.(icloud|nextcloud|owncloud)$": (
        "A cloud drive has not downloaded these files: select their folder, and Download Now"
    ),
    r"(^|/)labels/.*\.txt$|\.xml$|(^|/)(data\.yaml|obj\.names)$|coco\.json$": (
        "Boxes and annotations of detection are no classes: cut the objects out of the photos, and move "
        "those of each class into a separate folder"
    ),
    r"\.dvc$": "To get the files of DVC, run `dvc pull`",
    r"\.(tfrecords?|mdb|lmdb)$": "To read records, export the images as files, or to a Parquet file",
    r"\.(zip|tar|tgz|gz|7z|rar)$": "Unpack the archives, and set `dataset` to the folder of their images",
    r"\.(jpe?g|png|webp)[?&@_].*$": (
        "Rename files that a download has named 1.jpg?w=640, so that the name ends with .jpg or .png"
    ),
    r"\.(dcm|dicom)$": "To read DICOM, convert it: `dcmj2pnm --write-png IMAGE.dcm IMAGE.png` (DCMTK)",
    r"\.(np[yz]|h5|hdf5|mat|pkl)$": (
        "To use arrays, load them in Python: `finetune(model, list(zip(images, labels)), folder)`"
    ),
}
NAME_REMEDY = "Rename them: `convmv -r -f latin1 -t utf8 --notest FOLDER`"
if find_spec("pillow_heif"):
    IMAGE_SUFFIXES |= HEIF_SUFFIXES
# Folders and ends of names of what belongs to a photo and is no photo, and folders of photos. A class of
# faces without a mask is neither
MASK = re.compile(
    r"(?<![^/])(masks?|labels?|gt|ground_?truths?|seg\w*|annotations?)/|[ _.-]+[a-z]+[ _-]?\d*$",
    re.IGNORECASE,
)
# Microscopes write a file for each channel
CHANNEL = re.compile(r"[ _.-](w|ch|channel)[ _-]?\d$", re.IGNORECASE)
# The views of an object, such as 12_front and 12_back; numbers alone count photos
VIEW = re.compile(r"(?P<object>.*\d)[ _-](?P<view>[a-z]+\d?)", re.IGNORECASE)
MAX_VIEWS = 6
PHOTOS = re.compile(r"(?<![^/])(images?|imgs?|photos?|pictures?|scans?|inputs?)/", re.IGNORECASE)
TABLE_SUFFIXES = frozenset(".arrow .csv .json .jsonl .ndjson .parquet .tar .tsv .zip".split())
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

# Folders and files of operating systems and network storage, in lower case
SYSTEM_PREFIXES = ("@", "$", "#recycle", "#snapshot", "lost+found")
HIDDEN_NAMES = frozenset(
    "__macosx, desktop.ini, ehthumbs.db, network trash folder, recycled, recycler, "
    "system volume information, temporary items, thumbs.db".split(", ")
)

ROOT = "."  # The image folder itself, as a relative path
SKIPPED_FOLDERS = "folders of training runs, of the system, and hidden ones"


@dataclass(frozen=True)
class ImageFolder:
    """The files of an image folder.

    Paths are sorted, relative to `path`, and use "/" as the separator.
    """

    path: Path
    images: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    # Also files with names that are not valid text
    other_files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)  # Visible subfolders
    # Folders of runs, and hidden or system folders with images; their files are not listed
    skipped_folders: list[str] = field(default_factory=list)

    def add(self, file: str) -> None:
        """Add a file to the list of its kind."""
        suffix = PurePosixPath(file).suffix.lower()
        # A name that is not valid text cannot be written to any table of results.
        if not is_valid_name(file):
            self.other_files.append(file)
        elif PurePosixPath(file).name in METADATA_FILES:
            self.metadata.append(file)
        elif suffix in IMAGE_SUFFIXES:
            self.images.append(file)
        else:
            (self.tables if suffix in TABLE_SUFFIXES else self.other_files).append(file)

    @property
    def is_image_folder(self) -> bool:
        """Whether the folder is read as an image folder, and not as a folder of tables.

        JSON files, and tables with the name of an image, are annotations of single images.
        """
        images = {PurePosixPath(image).with_suffix("") for image in self.images}
        tables = [
            table
            for table in map(PurePosixPath, self.tables)
            if table.suffix.lower() != ".json" and table.with_suffix("") not in images
        ]
        return not self.metadata and len(self.images) > len(tables)


def scan_folder(path: Path) -> ImageFolder:
    """List the files of a folder and its subfolders by kind, sorted within each folder.

    Hidden files are ignored. Symbolic links to folders are followed, except cycles. The folders of
    models and training runs, which contain figures, hidden folders and folders of the system are
    skipped. Raise OSError if a folder cannot be read.
    """

    def stop(error: OSError) -> None:
        raise OSError(
            f"cannot read the folder {error.filename}: {error.strerror}. Change its permissions, "
            "or move it elsewhere"
        ) from error

    folder = ImageFolder(path)
    visited = set()
    for parent, subfolders, files in os.walk(path, onerror=stop, followlinks=True):
        directory = Path(parent)
        visited.add(directory.resolve())
        relative_parent = PurePosixPath(directory.relative_to(path).as_posix())
        if RECIPE_FILE in files or set(CONFIG_FILES) <= set(files):
            folder.skipped_folders.append(str(relative_parent))
            # The root is not skipped, but reported by `read_folder`: it would leave no image
            # to read.
            if relative_parent.parts:
                subfolders.clear()
                continue

        # Links come last: train is the folder itself, and test -> train has nothing of its own.
        subfolders.sort(key=lambda name: ((directory / name).is_symlink(), name))
        unread = [
            name
            for name in subfolders
            if is_hidden(name) or name.lower().startswith(SYSTEM_PREFIXES)
        ]
        for name in unread:
            paths = (directory / name).rglob("[!.]*")
            if count := sum(path.suffix.lower() in IMAGE_SUFFIXES for path in paths):
                folder.skipped_folders.append(f"{relative_parent / name} (images: {count:,})")
        # Changed in place, because `os.walk` visits the folders that remain in this list. A folder
        # that was visited before is left out, or a link to a parent would never end.
        subfolders[:] = [
            name
            for name in subfolders
            if name not in unread and (directory / name).resolve() not in visited
        ]
        folder.folders.extend(str(relative_parent / name) for name in subfolders)
        for name in sorted(files):
            if not is_hidden(name):
                folder.add(str(relative_parent / name))
    return folder


def is_hidden(name: str) -> bool:
    """Tell whether file managers hide a file or folder: it is then not meant as data.

    A placeholder of iCloud, such as .5.png.icloud, is, and they show it as 5.png.
    """
    if name.endswith(".icloud"):
        return False
    return name.startswith(".") or name.lower() in HIDDEN_NAMES


def is_valid_name(name: str) -> bool:
    """Tell whether a file name is text: names on Linux are bytes, and need not be UTF-8."""
    return make_printable(name) == name


def make_printable(name: str) -> str:
    """Make a file name printable: invalid bytes are replaced."""
    return os.fsencode(name).decode("utf-8", errors="replace")


def read_image_folder(
    folder: ImageFolder, use_labels: bool, has_groups: bool = True, metadata: Any = None
) -> Any:
    """Read an image folder as a `datasets.DatasetDict`, and log which files are not used.

    The columns are `image` and, if labels are used, `label` and `FOLDER_COLUMN`. Without labels, images
    at any depth are included. Without `has_groups`, the folders below a class mean nothing.

    Raise ValueError if labels are used but there are no class folders, or if the split folders are
    ambiguous.
    """
    import datasets
    import pandas as pd  # Predictions of photos read this file, and need no tables

    check_are_there(folder)
    split_folders = find_split_folders(folder.path, folder.images, use_labels and has_groups)
    rows = [locate_image(image, split_folders) for image in folder.images]
    places = pd.DataFrame(rows, folder.images)

    # Absolute: a run and its report may name one folder differently, and a message is logged once
    where = str(folder.path.resolve())
    warn_about_skipped(where, folder.skipped_folders, SKIPPED_FOLDERS)
    others = sorted([*folder.other_files, *folder.tables])
    warn_about_skipped(where, others, "files that are no images")
    required = ["split", "label"] if use_labels else ["split"]
    stray = list(places.index[places[required].isna().any(axis=1)])
    places = places.drop(stray)
    if places.empty:
        raise ValueError(
            f"{folder.path / PurePosixPath(stray[0]).parent} contains images, but no class folders. "
            f"{explain_layout(folder)}"
        )
    warn_about_skipped(where, stray, "images outside of class folders")
    # One list of classes for all splits: a split without images of a class must not shift the
    # others.
    features = datasets.Features(image=datasets.Image())
    if use_labels:
        warn_about_skipped(where, list_empty_folders(folder), "folders without images of their own")
        if repeated := find_repeated_names(folder.images):
            warn_on_first_process(
                f"WARNING: {where}: {len(repeated):,} images have the name of another one: "
                f"{format_name_list(repeated)}. Remove them if they are its mask, a channel or a copy, such "
                "as thumbnails: a classifier recognizes them, so the result would be too good"
            )
        if has_groups and not repeated and (views := find_views(list(places.index))):
            warn_on_first_process(
                f"WARNING: {where}: images such as {format_name_list(views)} look like views of one object, which "
                "may be on both sides of a split. Move those of each object into a folder below its class"
            )
        if has_groups:
            places = check_class_folders(folder.path, places, folder.tables)
        features["label"] = datasets.ClassLabel(names=sorted(set(places["label"])))
        features[FOLDER_COLUMN] = datasets.Value("string")
    images = [str(folder.path / image) for image in places.index]
    places = places.assign(**{"image": images, FOLDER_COLUMN: find_groups(places)})
    if metadata is not None:
        others = metadata[metadata.columns.difference(places.columns)]
        places = places.join(others, on="image")
        features |= dict.fromkeys(others, datasets.Value("string"))
    # A missing text is None, and not the number that pandas has for it
    places = places.astype(object).where(places.notna(), None)
    parts = {
        split: datasets.Dataset.from_dict(own[list(features)].to_dict("list"), features)
        for split, own in places.groupby("split")
    }
    return datasets.DatasetDict({split: parts[split] for split in SPLIT_ORDER if split in parts})


def check_are_there(folder: ImageFolder) -> None:
    """Raise ValueError if all images are links to files that do not exist, as before `git annex get`."""
    paths = [folder.path / image for image in folder.images]
    if paths and all(path.is_symlink() and not path.exists() for path in paths):
        target = str(paths[0].readlink())
        remedy = "Restore these files"
        if "annex" in target:
            remedy = f"Run `git annex get {folder.path}`"
        raise ValueError(
            f"{folder.path}: the images are links to files that are not there, such as {target}. {remedy}"
        )


def find_classes(root: Path, images: Sequence[str]) -> list[str]:
    """Find the class folders of some images; none if an image is in no class folder."""
    split_folders = find_split_folders(root, images, has_classes=True)
    classes = {locate_image(image, split_folders).label or "" for image in images}
    return [] if "" in classes else sorted(classes)


def check_output_is_not_read(output_dir: Path, dataset: str) -> None:
    """Raise ValueError if a run would write its files next to images of the dataset.

    A scan skips the folders of runs, with these images.
    """
    folder = output_dir.resolve()
    if not folder.is_dir() or not folder.is_relative_to(Path(dataset).resolve()):
        return
    scanned = scan_folder(folder)
    if scanned.images and ROOT not in scanned.skipped_folders:
        raise ValueError(
            f"`output_dir={str(output_dir)!r}` contains images of the dataset, which would then be "
            "skipped as figures of the run. Set `output_dir` to another folder"
        )


def find_repeated_names(images: Sequence[str]) -> list[str]:
    """Find images that have the name of another one in a folder above, or of the photo of a mask.

    Formats do not matter: a/1_mask.png belongs to a/1.jpg, and masks/1.png to images/1.jpg. Neither do
    channels: a/1_w2.tif belongs to a/1_w1.tif.
    """
    paths = {image: PurePosixPath(image).with_suffix("") for image in images}
    known = {*paths.values()}
    photos = {PHOTOS.sub("", str(path)) for path in known}
    seen: set[str] = set()
    repeated = []
    for image, path in paths.items():
        name = PHOTOS.sub("", str(path))
        photo = MASK.sub("", name)
        is_mask = photo != name and photo in photos
        without_channel = CHANNEL.sub("", str(path))
        is_seen = without_channel in seen
        seen.add(without_channel)
        if is_seen or is_mask or any(folder / path.name in known for folder in path.parent.parents):
            repeated.append(image)
    return repeated


def find_views(images: Sequence[str]) -> list[str]:
    """Find images that are views of one object by their names, such as 1_front.jpg and 1_back.jpg.

    The words at the end of the names are few, and most objects have several of them.
    """
    views: dict[str, dict[str, str]] = {}  # Object -> view -> image
    for image in images:
        if found := VIEW.fullmatch(str(PurePosixPath(image).with_suffix(""))):
            views.setdefault(found["object"], {})[found["view"].lower()] = image
    words = {word for each in views.values() for word in each}
    several = [each for each in views.values() if len(each) > 1]
    num_images = sum(map(len, several))
    if not several or len(words) > MAX_VIEWS or 2 * num_images < len(images):
        return []
    return sorted(several[0].values())


def explain_layout(folder: ImageFolder) -> str:
    """Say what a folder of images contains instead of several class folders, and what to do."""
    if remedy := get_remedy([*folder.other_files, *folder.tables]):
        return remedy
    tables = [table for table in folder.tables if not table.lower().endswith(".json")]
    if tables:
        return f"To read a table, set `dataset` to it: {format_name_list(tables)}"
    if folder.tables:
        return (
            f"JSON files ({format_name_list(folder.tables)}) are not read: write a table with a row for each "
            "image, its file name and its label, and set `dataset` to it"
        )
    above = {str(PurePosixPath(image).parent.parent) for image in folder.images}
    if inner := os.path.commonpath(above):
        return (
            f"If the folders in {inner} are the classes, set `dataset={str(folder.path / inner)!r}`"
        )
    return (
        "Move the images of each class into a separate folder, or set `dataset` to a table of images and "
        "labels"
    )


# Skipped files ------------------------------------------------------------------------------------


def list_empty_folders(folder: ImageFolder) -> list[str]:
    """List folders that have no image at any depth, such as a class of HEIC files."""
    # Folders with images, and those that another line names
    named = {ROOT, *folder.skipped_folders}
    for path in map(PurePosixPath, (*folder.images, *folder.skipped_folders)):
        named.update(map(str, path.parents))
    return [
        name
        for name in folder.folders
        if name not in named and str(PurePosixPath(name).parent) in named
    ]


def get_remedy(files: Sequence[str]) -> str:
    """Say how unread files can be read, of `REMEDIES` or with names that are not UTF-8; "" for others."""
    for pattern, remedy in REMEDIES.items():
        if any(re.search(pattern, file, re.IGNORECASE) for file in files):
            return remedy
    return "" if all(map(is_valid_name, files)) else NAME_REMEDY


def warn_about_skipped(where: str, names: Sequence[str], kind: str) -> None:
    """Log which files or folders of a kind, such as `files that are no images`, are not used."""
    if names:
        remedy = get_remedy(names)
        warn_on_first_process(
            f"{where}: skipped {kind} ({len(names):,}): {format_name_list(names)}"
            f"{remedy and f'. {remedy}'}"
        )

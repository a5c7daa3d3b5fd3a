"""Image folders: distinguish splits from classes, and use or name every file."""

import os
import zlib
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
from helpers.photo_folders import write_files, write_photos
from helpers.read_datasets import read_splits_of, read_training_data, read_undivided
from helpers.tiny_models import raises_one_line
from huggingface_hub import constants
from PIL import Image
from pytest import LogCaptureFixture, MonkeyPatch

from modeling_vitcls.data.evaluation_data import load_evaluation_data
from modeling_vitcls.data.image_folder import (
    NAME_REMEDY,
    find_repeated_names,
    read_image_folder,
    scan_folder,
)
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.splits import divide_images
from modeling_vitcls.model.image_processing_vitcls import get_image_formats


def write_images(root: Path, *names: str) -> Path:
    """Write small images of different colors."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        color = tuple(zlib.crc32(os.fsencode(name)).to_bytes(4, "big")[:3])
        Image.new("RGB", (8, 8), color).save(root / name)
    return root


def write_classes(root: Path, counts: dict[str, int]) -> Path:
    """Write a number of images into each folder."""
    return write_images(
        root, *(f"{folder}/{index}.png" for folder in counts for index in range(counts[folder]))
    )


def read(root: Path, use_labels: bool = True) -> dict[str, dict[str, list[str]]]:
    """Return the image names of each class of each split. Without labels, the class is ""."""
    opened = read_image_folder(scan_folder(root), use_labels)
    result = {}
    for split, part in opened.items():
        classes = part.features["label"].names if use_labels else [""]
        result[split] = {name: [] for name in classes}
        for row in part.cast_column("image", datasets.Image(decode=False)):
            name = Path(row["image"]["path"]).relative_to(root).as_posix()
            result[split][classes[row.get("label", 0)]].append(name)
    return result


# Splits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("Training", "Testing", "test"),
        ("TRAIN", "Val", "validation"),
        ("train", "valid", "validation"),
        ("train", "dev", "validation"),
        ("training", "evaluation", "test"),
    ],
)
def test_split_folders_are_recognized_in_any_case_but_not_among_their_classes(
    tmp_path: Path, train: str, other: str, split: str
) -> None:
    """`datasets` would put the images of a class called train into both splits."""
    write_classes(tmp_path, {f"{train}/cat": 3, f"{train}/train": 4, f"{train}/test": 5})
    write_classes(tmp_path, {f"{other}/cat": 2, f"{other}/cow": 1, f"{other}/train": 6})
    found = read(tmp_path)
    assert {
        name: {label: len(files) for label, files in part.items()} for name, part in found.items()
    } == {
        "train": {"cat": 3, "cow": 0, "test": 5, "train": 4},
        split: {"cat": 2, "cow": 1, "test": 0, "train": 6},
    }


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (["train/cat", "test/cat", "extra/cat"], ["'test'", "'extra'", "rename"]),
        (["train2017", "val2017"], ["train2017", "no class folders", "set `dataset` to a table"]),
        (["packed/cat"], ["the single class 'packed'", "in packed are the classes"]),
    ],
)
def test_folders_that_may_be_splits_or_classes_are_errors(
    folders: list[str], words: list[str], tmp_path: Path
) -> None:
    write_classes(tmp_path / "photos", dict.fromkeys(folders, 3))
    with raises_one_line(*words):
        read_training_data(tmp_path / "photos")


def test_a_split_without_class_folders_is_skipped_and_named(
    tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    write_classes(tmp_path, {"train/cat": 2, "train/dog": 2, "test": 5})
    write_images(tmp_path, "stray.png")

    assert list(read(tmp_path)) == ["train"]

    outside = "images outside of class folders (6): stray.png, test/0.png, test/1.png and 3 more"
    assert outside in caplog.text
    assert {split: len(found[""]) for split, found in read(tmp_path, use_labels=False).items()} == {
        "train": 4,
        "test": 5,
    }


# Classes ------------------------------------------------------------------------------------------


def test_deeper_folders_belong_to_the_class_of_the_first_level(tmp_path: Path) -> None:
    """Among classes, a folder called train is a class, and file names are not splits.

    This is unlike in `datasets`.
    """
    dogs = ["dog/eye-test-1.png", "dog/test_2.png", "dog/test/3.JPG", "dog/val/4.webp"]
    write_images(tmp_path, "cat/1.png", "cat/2024/may/2.png", *dogs, "train/5.png")
    classes = {"cat": ["cat/1.png", "cat/2024/may/2.png"], "dog": dogs, "train": ["train/5.png"]}
    assert read(tmp_path) == {"train": classes}


def test_skipped_files_are_named(tmp_path: Path, caplog: LogCaptureFixture) -> None:
    write_classes(tmp_path, {"cat": 9, "dog": 9})
    write_images(tmp_path, "stray.png")
    (tmp_path / "cat/notes.txt").write_text("?")
    (tmp_path / "labels.csv").write_text("a,b\n")
    # not valid text
    write_images(tmp_path, os.fsdecode(b"cat/\xff.png"))
    data = read_training_data(tmp_path)

    assert len(data.train) + len(data.held_out) == 18
    assert caplog.messages == [
        f"{tmp_path}: skipped files that are no images (3): cat/notes.txt, cat/\ufffd.png, labels.csv"
        f". {NAME_REMEDY}",
        f"{tmp_path}: skipped images outside of class folders (1): stray.png",
    ]


def test_folders_with_names_that_are_not_text_have_a_remedy(
    tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    latin = os.fsdecode("café".encode("latin-1"))
    write_images(tmp_path, f"only/{latin}/1.png", f"some/{latin}/2.png", "some/cat/3.png")
    with raises_one_line("only contains no images", "convmv -r -f latin1 -t utf8"):
        read_training_data(tmp_path / "only")
    assert read(tmp_path / "some") == {"train": {"cat": ["cat/3.png"]}}
    assert f"images of their own (1): caf\ufffd. {NAME_REMEDY}" in caplog.text


def test_one_class_can_be_evaluated(tmp_path: Path) -> None:
    found = load_evaluation_data(
        DataOptions(dataset=str(write_classes(tmp_path, {"test/cat": 4}))), None
    )
    assert found.label_space.names == ["cat"]
    assert len(found.images) == 4


def test_links_are_followed_without_cycles(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    write_classes(tmp_path, {"elsewhere/felis": 2, "photos/dog": 2})
    (tmp_path / "photos/cat").symlink_to(tmp_path / "elsewhere/felis")
    for name, target in (("all", "photos"), ("self", "photos/dog")):
        (tmp_path / "photos/dog" / name).symlink_to(tmp_path / target)
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "photos", Path("photos")):
        assert read(folder) == {
            "train": {"cat": ["cat/0.png", "cat/1.png"], "dog": ["dog/0.png", "dog/1.png"]}
        }


def test_a_split_that_is_a_link_to_another_one_has_no_images(tmp_path: Path) -> None:
    write_classes(tmp_path, {"train/cat": 1})
    (tmp_path / "test").symlink_to("train")
    assert read(tmp_path) == {"train": {"cat": ["train/cat/0.png"]}}


# Folders as programs and people leave them --------------------------------------------------------


def test_class_folders_that_contain_split_folders_are_read(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat/train": 2, "cat/Val/may": 1, "dog/train": 1})
    assert read(tmp_path) == {
        "train": {"cat": ["cat/train/0.png", "cat/train/1.png"], "dog": ["dog/train/0.png"]},
        "validation": {"cat": ["cat/Val/may/0.png"], "dog": []},
    }


@pytest.mark.parametrize(
    ("names", "other"),
    [
        (("fold0", "fold1"), "photo.png"),
        (("berlin", "paris", "rome"), "photo.png"),
        (("test_set", "training_set"), "pred_set/1.png"),
        (("seg_test/seg_test", "seg_train/seg_train"), "seg_pred/seg_pred/1.png"),
    ],
)
def test_folders_of_the_same_classes_look_like_splits_and_are_an_error(
    tmp_path: Path, names: tuple[str, ...], other: str
) -> None:
    for name in names:
        write_photos(tmp_path / name, range(1))
    write_images(tmp_path, other, f"{names[0]}/only_here/0.png")

    with raises_one_line(
        "cat, dog", "look like splits", "Rename them to train, validation and test"
    ):
        read(tmp_path)
    assert len(read(tmp_path, use_labels=False)["train"][""]) == 2 * len(names) + 2
    outer = {name.split("/")[0] for name in (*names, other)} - {"photo.png"}
    assert read_splits_of(tmp_path, group_column="none").label_space.names == sorted(outer)


@pytest.mark.parametrize(
    "names",
    [
        ("cat/2023/1.png", "cat/2024/2.png", "dog/2023/3.png", "dog/2024/4.png"),
        ("cat/day/1.png", "cat/night/2.png", "cat/3.png", "dog/day/4.png", "dog/night/5.png"),
        ("train_station/left/1.png", "bus_stop/right/2.png", "airport/3.png"),
    ],
)
def test_folders_within_class_folders_are_no_classes(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    write_images(tmp_path, *names)
    assert list(read(tmp_path)) == ["train"]
    assert set(read(tmp_path)["train"]) == {name.split("/")[0] for name in names}


@pytest.mark.parametrize("objects", [("mug", "pen", "cup", "jar"), ("object1", "object2") * 2])
def test_the_images_of_a_folder_below_a_class_are_on_one_side(
    tmp_path: Path, objects: tuple[str, ...]
) -> None:
    """Without groups, some photos of each object would be held out: names may be in both classes."""
    for index, name in enumerate(objects):
        write_classes(tmp_path, {f"{'ab'[index // 2]}/all/{name}/may": 5})
    write_images(tmp_path, "b/all/alone.png")
    images = read_undivided(tmp_path)
    assert images.label_space.names == ["a", "b"]
    groups = images.facts["groups"]
    assert groups.startswith("5, one for each folder below a class")
    assert ("in several classes or splits (object1, object2)" in groups) is ("object1" in objects)
    data = divide_images(images, 0.4)
    train, held_out = (
        {Path(name).parent for name in part.images.get_names()}
        for part in (data.train, data.held_out)
    )
    assert len(held_out) > 1
    assert not train & held_out

    ungrouped = read_undivided(tmp_path, group_column="none")
    assert len(set(ungrouped.train.groups.tolist())) == 21


def test_similar_class_folders_are_named_once(
    tmp_path: Path, caplog: LogCaptureFixture, monkeypatch: MonkeyPatch
) -> None:
    """The run reads a folder by its absolute path, and its report by the relative one."""
    write_photos(tmp_path / "photos", range(3), "Ameise", "ameise")
    monkeypatch.chdir(tmp_path)
    for name in ("photos", f"../{tmp_path.name}/photos"):
        read_undivided(name)
    (line,) = caplog.messages
    assert "the class folders: separate names differ only in case" in line
    assert "'Ameise' and 'ameise'. Merge them" in line


def test_what_is_there_instead_of_a_missing_folder_is_named(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    write_photos(tmp_path / "photos", range(1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with raises_one_line("photoss is not a file or folder (here: photos)", error=OSError):
        read_training_data("photoss")


def test_images_outside_of_the_folders_below_a_class_are_no_group(tmp_path: Path) -> None:
    write_images(tmp_path, *"cat/a/1.png cat/b/2.png cat/3.png dog/4.png dog/5.png".split())
    assert len(set(read_undivided(tmp_path).train.groups.tolist())) == 5


def test_a_single_folder_below_a_class_is_no_group(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat/images": 3, "dog": 2, "dog/more": 2})
    images = read_undivided(tmp_path)
    assert "groups" not in images.facts


def test_images_that_may_be_thumbnails_are_named(tmp_path: Path, caplog: LogCaptureFixture) -> None:
    """Of objects, whose photos may have the same names, none is one."""
    write_classes(tmp_path, {"cat": 2, "cat/thumbnails": 2, "dog/left1": 2, "dog/right1": 2})
    read(tmp_path)
    (line,) = caplog.messages
    assert "2 images" in line
    assert "cat/thumbnails/0.png, cat/thumbnails/1.png. Remove them" in line


@pytest.mark.parametrize(
    ("files", "repeated"),
    [
        ("cat/1.png cat/1_mask.png dog/1.png dog/1_2.png", "cat/1_mask.png"),
        ("images/1.jpg images/2.jpg masks/1.png masks/2_seg.png", "masks/1.png masks/2_seg.png"),
        ("mask/1.png no_mask/1.png photos/2.png sketch/2.png", ""),
    ],
)
def test_masks_have_the_names_of_photos(files: str, repeated: str) -> None:
    assert find_repeated_names(files.split()) == repeated.split()


def test_boxes_of_detection_are_no_classes(tmp_path: Path) -> None:
    write_images(tmp_path, "images/train/1.png", "images/val/2.png")
    write_files(tmp_path, "labels/train/1.txt")
    with raises_one_line("the single class 'images'", "cut the objects out"):
        read_undivided(tmp_path)


def test_folders_of_the_system_are_no_classes_and_are_named(
    tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    write_photos(tmp_path, range(2))
    trash = "#recycle/cat/1.png $RECYCLE.BIN/S-1-5/$R1.png @Recycle/1.png lost+found/1.png".split()
    thumbnails = ["@eaDir/1.png/THUMB_M.jpg", "cat/@eaDir/1.png/THUMB_M.jpg", ".\nthumbs/1.png"]
    write_images(tmp_path, *trash, *thumbnails, "__MACOSX/cat/._1.png", "cat/._0.png")
    (tmp_path / "cat/Thumbs.db").touch()

    found = read(tmp_path)["train"]

    assert {name: len(files) for name, files in found.items()} == {"cat": 2, "dog": 2}
    (line,) = caplog.messages
    skipped = (
        "hidden ones (7): #recycle (images: 1), $RECYCLE.BIN (images: 1), . thumbs (images: 1)"
    )
    assert skipped in line


@pytest.mark.parametrize("name", ["{}.json", "{}.png.json", "{}.txt", "{}.csv", "{}.tar"])
def test_a_file_of_annotations_beside_each_image_is_no_table(
    tmp_path: Path, name: str, caplog: LogCaptureFixture
) -> None:
    write_photos(tmp_path, range(3))
    for image in [*tmp_path.glob("*/*.png")]:
        image.with_name(name.format(image.stem)).write_text("{}")

    assert {label: len(files) for label, files in read(tmp_path)["train"].items()} == {
        "cat": 3,
        "dog": 3,
    }
    assert "skipped files that are no images (6)" in caplog.text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="requires named pipes")
@pytest.mark.parametrize("name", ["train.csv", "train.parquet"])
def test_a_named_pipe_is_no_table(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises((ValueError, OSError), match="regular file"):
        read_training_data(tmp_path)


# Other readers of folders -------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["file_name", "filename"])
def test_metadata_files_name_the_labels(column: str, tmp_path: Path) -> None:
    """Each split folder has its metadata file.

    Names of splits may be in upper case, and brackets are no pattern.
    """
    folder = tmp_path / "photos [1]"
    for split, shades in (("Train", "abab"), ("TEST", "ba")):
        write_classes(folder, {split: 5})
        table = pandas.DataFrame(
            {column: [f"{index}.png" for index in range(len(shades))], "shade": [*shades]}
        )
        table.to_csv(folder / split / "metadata.csv", index=False)
    data = read_training_data(folder, label_column=("shade",))
    assert (list(data.train.labels), list(data.held_out.labels)) == ([0, 1, 0, 1], [1, 0])
    assert data.held_out_name == "split 'test'"
    assert data.held_out.images.get_names() == ["TEST/0.png", "TEST/1.png"]


def write_metadata(root: Path, **columns: Any) -> None:
    """Describe the first images of two class folders, as many as there are values."""
    names = sorted(str(file.relative_to(root)) for file in root.glob("*/*.png"))
    number = len(next(iter(columns.values())))
    table = pandas.DataFrame({"file_name": names[:number], **columns})
    table.to_csv(root / "metadata.csv", index=False)


def test_class_folders_are_the_labels_beside_a_table_of_captions(
    tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    write_photos(tmp_path, range(4))
    write_metadata(tmp_path, caption=[f"photo {number}" for number in range(6)])
    data = read_training_data(tmp_path)
    assert data.label_space.names == ["cat", "dog"]
    assert len(data.train) + len(data.held_out) == 8
    assert "the class folders (cat, dog) are the labels" in caplog.text
    captions = read_training_data(tmp_path, label_column=("caption",), held_out_fraction=0)
    assert len(captions.label_space.names) == len(captions.train) == 6
    assert "skipped images without a row in metadata.csv (2): dog/2.png" in caplog.text


def test_a_column_of_metadata_groups_the_images_of_class_folders(tmp_path: Path) -> None:
    write_photos(tmp_path, range(4))
    write_metadata(tmp_path, caption=list("abcdefgh"), object=["mug", "mug", "cup", "cup"] * 2)
    data = read_training_data(tmp_path, group_column="object")
    assert data.label_space.names == ["cat", "dog"]
    assert set(data.train.groups.tolist()).isdisjoint(data.held_out.groups.tolist())
    assert len(data.train) + len(data.held_out) == 8

    table = tmp_path / "metadata.csv"
    table.write_text(table.read_text() + "cat/0.png,again,plate\n")
    with raises_one_line("no column 'object'"):
        read_training_data(tmp_path, group_column="object")


def test_a_column_that_may_have_the_labels_beside_class_folders_is_asked_for(
    tmp_path: Path,
) -> None:
    write_photos(tmp_path, range(4))
    write_metadata(tmp_path, breed=["a", "b"] * 4)
    with raises_one_line("cat, dog", "`label_column='breed'`", "`label_column='label'`"):
        read_training_data(tmp_path)
    for column, names in (("breed", ["a", "b"]), ("label", ["cat", "dog"])):
        assert read_training_data(tmp_path, label_column=(column,)).label_space.names == names


@pytest.mark.parametrize("other", ["other", "test"])
def test_folders_in_one_metadata_file_are_splits_or_mean_nothing(
    tmp_path: Path, other: str
) -> None:
    names = ["train/cat/0.png", f"{other}/0.png"]
    write_images(tmp_path, *names)
    (tmp_path / "metadata.csv").write_text(f"file_name,label\n{names[0]},a\n{names[1]},b\n")
    splits = read_splits_of(tmp_path).images_by_split
    parts = splits.values()
    assert set(splits) == {"train", other} - {"other"}
    assert list(chain(*(part.labels for part in parts))) == [0, 1]
    assert list(chain(*(part.images.get_names() for part in parts))) == names


def test_all_formats_that_can_be_decoded_are_images(tmp_path: Path) -> None:
    formats = get_image_formats()
    names = {
        f"a{suffix}" for suffix, name in Image.registered_extensions().items() if name in formats
    }
    write_files(tmp_path, *names)
    assert len(names) > 15
    assert names - set(scan_folder(tmp_path).images) <= {"a.pfm"}  # floating-point values


# Folders that are not classes ---------------------------------------------------------------------


def write_run(folder: Path) -> None:
    """Write the files of a training run that a scan of its folder sees."""
    write_images(folder, "images/attention.png")
    names = ["config.json", "preprocessor_config.json", "config.resolved.yaml", "metrics.jsonl"]
    write_files(folder, *names, content=b"{}\n")


def test_folders_of_training_runs_are_not_classes(
    tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    write_photos(tmp_path / "photos", range(5))
    write_run(tmp_path / "photos/run1")
    write_run(tmp_path / "photos/cat/run2")

    data = read_training_data(tmp_path / "photos")
    assert data.label_space.names == ["cat", "dog"]
    assert len(data.train) + len(data.held_out) == 10
    assert "training runs, of the system, and hidden ones (2): cat/run2, run1" in caplog.text


def test_folders_with_the_files_of_a_training_run_are_refused(tmp_path: Path) -> None:
    """With images next to them, or with the tables of the run alone."""
    write_photos(tmp_path, range(5))
    for folder in (tmp_path, tmp_path / "run"):
        write_run(folder)
        with raises_one_line("files of a training run", "Move"):
            read_training_data(folder)


def test_folders_without_readable_images_are_named(
    tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    write_photos(tmp_path / "train", range(3))
    write_files(tmp_path, "train/shoes/2024/a.nef", "test/shoes/b.nef", content=b"1")
    read_training_data(tmp_path)
    assert "skipped folders without images of their own (2): test, train/shoes" in caplog.text
    assert "no images (2): test/shoes/b.nef, train/shoes/2024/a.nef" in caplog.text

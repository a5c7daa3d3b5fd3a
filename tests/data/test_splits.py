"""Splits that training and evaluation read.

`--resume` with other data than at the start of the run is an error that names the change.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from helpers.photo_folders import draw_noise, write_photos
from helpers.read_datasets import read_training_data, read_undivided
from helpers.tiny_models import raises_one_line
from helpers.tiny_options import build_tiny_options, prepare_setup, run_training
from PIL import Image
from pytest import LogCaptureFixture

from modeling_vitcls.data.evaluation_data import load_evaluation_data
from modeling_vitcls.data.in_memory import add_dataset
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.splits import (
    choose_training_splits,
    describe_missing_classes,
    divide_images,
)
from modeling_vitcls.training.summary import describe_class_sizes, describe_splits


def test_a_changed_folder_is_an_error(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", range(20), "cat", "dog")
    options = build_tiny_options(
        tmp_path / "run", photos, max_steps=2, batch_size=8, keep_checkpoints=1
    )
    for each in (options, replace(options, resume=True)):  # with the same data
        run_training(each)
        (tmp_path / "run/results.json").unlink()  # it did not finish

    def assert_change(reason: str) -> None:
        with raises_one_line(
            "`resume=True`: the dataset has changed since the run in", reason, "Restore the dataset"
        ):
            run_training(replace(options, resume=True))

    cat, dog = photos / "cat/1.png", photos / "dog/1.png"
    content = cat.read_bytes()
    Image.new("RGB", (8, 8)).save(cat)
    assert_change("train images")
    cat.write_bytes(dog.read_bytes())
    dog.write_bytes(content)  # two images have changed their classes
    assert_change("train images")
    write_photos(photos, range(70, 90), "ant")
    assert_change("classes")


# Splits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "reads_all", "expected"),
    [
        (["train"], False, ["train"]),
        (["a", "b"], False, ["a"]),
        (["test", "train"], True, ["train", "test"]),
        (["test", "validation", "train"], False, ["train", "validation"]),
        (["test", "validation", "train"], True, ["train", "validation", "test"]),
        (["train", "validation", "dev"], True, ["train", "validation"]),
        (["test", "dev", "val"], True, ["test", "val"]),
    ],
)
def test_the_test_split_is_read_beside_a_validation_split_only_on_request(
    names: list[str], reads_all: bool, expected: list[str]
) -> None:
    assert choose_training_splits(reads_all, names) == expected


@pytest.mark.parametrize(
    ("splits", "read", "line"),
    [
        (
            {"train": [0, 1], "val": [], "test": [1]},
            {"train": 2, "test": 1},
            "splits without rows are left out: val",
        ),
        ({"train": [0, 1], "test": [-1]}, {"train": 2}, "splits without labels are left out: test"),
        ({"one": [0, 1], "two": [0]}, {"one": 2}, "splits that are not read: two."),
    ],
)
def test_splits_that_are_not_read_are_named(
    splits: dict[str, list[int]], read: dict[str, int], line: str, caplog: LogCaptureFixture
) -> None:
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["x", "y"])
    )
    images = iter(draw_noise(*[(8, 8)] * 6))
    data = {
        name: datasets.Dataset.from_dict(
            {"image": [next(images) for _ in labels], "label": labels}, features
        )
        for name, labels in splits.items()
    }
    found = read_undivided(add_dataset(datasets.DatasetDict(data))).images_by_split
    assert {name: len(part) for name, part in found.items()} == read
    assert line in caplog.text


def get_names(part: Any) -> set[str]:
    """Return the class folder and file name of each image."""
    return {"/".join(Path(name).parts[-2:]) for name in part.images.get_names()}


def test_labels_of_all_images_or_of_at_most_one_are_named(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", range(3), "x")
    tags = ["all|cat|once", "all|cat", "all"]
    rows = [f"x/{index}.png,{each}" for index, each in enumerate(tags)]
    (photos / "table.csv").write_text("\n".join(["file_name,label", *rows]))
    names = ("all", "cat", "none", "once")
    data = read_training_data(photos / "table.csv", label_names=names, held_out_fraction=0)
    assert [data.label_space.format(each) for each in data.train.labels][2] == "all"
    (warning,) = describe_missing_classes(data)
    assert "4 of the 4 labels are on at most one training image, or on all but" in warning
    assert warning.endswith(": all, cat, none and 1 more. Add other images, or remove these labels")


def test_classes_without_training_images_and_without_held_out_images_have_a_line_each(
    tmp_path: Path,
) -> None:
    for split, names in (("train", ("ant", "bee")), ("test", ("bee", "cow"))):
        write_photos(tmp_path / split, range(len(split), 9), *names)
    images = read_undivided(tmp_path)
    data = divide_images(images, 0.2)
    # Test photos do not count, and their folder is no split of that name
    assert describe_class_sizes(images) == "ant: 4, bee: 4, cow: 0"
    assert (
        load_evaluation_data(DataOptions(dataset=str(tmp_path / "test")), None).description
        == "all 10 images"
    )
    assert describe_missing_classes(data) == [
        "1 of the 3 classes have no training images: cow",
        "1 of the 3 classes have no held-out images: ant",
    ]


def test_declared_classes_without_images_are_named(tmp_path: Path) -> None:
    """As `filter` leaves them in a dataset."""
    files = sorted(map(str, write_photos(tmp_path, range(3)).rglob("*.png")))
    label = datasets.ClassLabel(names=["cat", "dog", "emu"])
    features = datasets.Features(image=datasets.Image(), label=label)
    rows = {"image": files, "label": [0, 0, 0, 1, 1, 1]}
    name = add_dataset(datasets.Dataset.from_dict(rows, features))
    (line,) = describe_missing_classes(read_training_data(name, held_out_fraction=0))
    assert line.startswith("no image is of emu, so the model will never predict")


def test_a_small_class_beside_large_ones_is_named_with_what_would_help(tmp_path: Path) -> None:
    write_photos(tmp_path, range(20), "ant", "bee")
    write_photos(tmp_path, range(3), "cow")
    data = read_training_data(tmp_path, held_out_fraction=0)
    (line,) = describe_missing_classes(data)
    assert line.startswith("1 of the 3 classes have fewer than 5 images")
    assert ": cow. Add images" in line


@pytest.mark.parametrize(("folder", "is_reported"), [("photos/test", True), ("photos", False)])
def test_training_on_a_split_named_test_is_reported(
    folder: str, is_reported: bool, tmp_path: Path
) -> None:
    write_photos(tmp_path / folder, range(20))
    run = prepare_setup(build_tiny_options(tmp_path / "out", tmp_path / "photos", epochs=1))
    lines: Any = describe_splits(SimpleNamespace(images=run.inputs.images, is_drawn=True))
    assert ("'test'" in lines.get("split", "")) is is_reported


# Copies in two classes ----------------------------------------------------------------------------
def test_the_same_page_of_an_error_in_two_classes_is_no_copy(tmp_path: Path) -> None:
    write_photos(tmp_path, range(3))
    for name in ("cat/9.jpg", "dog/9.jpg"):
        (tmp_path / name).write_text("<!DOCTYPE html>404 Not Found")
    assert len(read_undivided(tmp_path).train) == 8


def test_a_folder_that_contains_the_dataset_again_is_named(tmp_path: Path) -> None:
    write_photos(tmp_path, range(3))
    write_photos(tmp_path / "flowers", range(3))
    with raises_one_line("the folder 'flowers' contains images of the other folders again"):
        read_undivided(tmp_path)


def test_a_folder_of_all_images_is_named(tmp_path: Path) -> None:
    write_photos(tmp_path, range(2))
    (tmp_path / "all").mkdir()
    for file in list(tmp_path.glob("*/*.png")):
        (tmp_path / "all" / f"{file.parent.name}{file.name}").write_bytes(file.read_bytes())
    with raises_one_line("the folder 'all' contains images of the other folders again"):
        read_undivided(tmp_path)


def test_days_above_the_classes_are_sent_below_them(tmp_path: Path) -> None:
    for day in ("2024-05-01", "2024-05-02"):
        write_photos(tmp_path / day, range(2))
    with raises_one_line("into the folders of the classes (cat/2024-05-01)"):
        read_undivided(tmp_path)

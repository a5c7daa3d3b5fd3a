"""Folders whose names, files and tables say that they are no classes are left out, asked about or refused."""

import unicodedata
from pathlib import Path

import pytest
from helpers.photo_folders import draw_noise, write_files
from helpers.tiny_models import raises_one_line
from pytest import LogCaptureFixture

from modeling_vitcls.data.image_folder import find_repeated_names, read_image_folder, scan_folder


def write_photos(folder: Path, *paths: str) -> Path:
    for path, photo in zip(paths, draw_noise(*[(8, 8)] * len(paths)), strict=True):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        photo.save(folder / path)
    return folder


def read_classes(folder: Path) -> list[str]:
    splits = read_image_folder(scan_folder(folder), use_labels=True)
    return splits["train"].features["label"].names


# Left out -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["no_label", "Unlabeled", "unlabelled", "unsorted", "TODO", "non triées", "à trier"]
)
def test_a_folder_without_labels_is_left_out_with_a_line(
    name: str, tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    folder = write_photos(tmp_path, "cat/1.png", "dog/1.png", f"{name}/1.png", f"{name}/2.png")
    assert read_classes(folder) == ["cat", "dog"]
    assert f"images (2) have no label are left out: {name}" in caplog.text


def test_unsorted_is_a_class_beside_one_other(tmp_path: Path) -> None:
    assert read_classes(write_photos(tmp_path, "cat/1.png", "unsorted/1.png")) == [
        "cat",
        "unsorted",
    ]


def test_sorted_photos_are_a_class_in_french(tmp_path: Path) -> None:
    names = ["cat", "dog", "trié"]
    assert read_classes(write_photos(tmp_path, *(f"{name}/1.png" for name in names))) == names


def test_a_split_is_kept_whose_class_folders_have_the_unicode_form_of_macos(tmp_path: Path) -> None:
    for split, form in (("train", "NFC"), ("test", "NFD")):
        names = (unicodedata.normalize(form, name) for name in ("café", "thé"))
        write_photos(tmp_path, *(f"{split}/{name}/1.png" for name in names))
    splits = read_image_folder(scan_folder(tmp_path), use_labels=True)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 2, "test": 2}


# Asked about --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    ["cat - Copy", "cat - Copy (2)", "cat copy", "cat (1)", "cat 2", "trash", "rejected"],
)
def test_a_copy_of_a_class_folder_and_a_bin_are_asked_about(
    name: str, tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    folder = write_photos(tmp_path, "cat/1.png", "dog/1.png", f"{name}/1.png")
    assert name in read_classes(folder)
    assert f"classes of their own? {name}. " in caplog.text


def test_classes_with_numbers_and_words_are_not_asked_about(
    tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    names = ["boeing 737", "boeing 747", "0", "1", "trashcan", "notes", "test tube"]
    assert read_classes(write_photos(tmp_path, *(f"{name}/1.png" for name in names))) == sorted(
        names
    )
    assert caplog.text == ""


# Refused ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("train_images", "test_images"),
        ("Train_jpg", "Test_jpg"),
        ("images_training", "images_test"),
        ("train1", "test1"),
    ],
)
def test_parts_without_classes_are_refused(first: str, second: str, tmp_path: Path) -> None:
    folder = write_photos(tmp_path, f"{first}/cat.1.png", f"{second}/2.png")
    with raises_one_line(first, second, "look like splits without classes"):
        read_classes(folder)


@pytest.mark.parametrize("parts", [("images_001", "images_002"), ("train_images", "test_images")])
@pytest.mark.parametrize("has_suffix", [True, False])
def test_a_table_that_names_the_images_of_parts_is_named(
    parts: tuple[str, str], has_suffix: bool, tmp_path: Path
) -> None:
    images = [f"{part}/{part}{number}.png" for part in parts for number in (1, 2)]
    folder = write_photos(tmp_path, *images)
    names = [Path(image).name if has_suffix else Path(image).stem for image in images]
    rows = [f"{name},{index % 2}" for index, name in enumerate(names)]
    write_files(folder, "labels.csv", content="\n".join(["image,label", *rows]).encode())
    with raises_one_line("look like parts of a dataset", "Set `dataset=", "labels.csv"):
        read_classes(folder)


def test_a_table_of_other_images_does_not_count(tmp_path: Path) -> None:
    folder = write_photos(tmp_path, "class_1/a.png", "class_2/b.png")
    write_files(folder, "notes.csv", content=b"image,label\nx.png,1\n")
    assert read_classes(folder) == ["class_1", "class_2"]


def test_files_that_are_named_like_classes_in_each_folder_are_refused(tmp_path: Path) -> None:
    rooms = ("kitchen", "bath", "bed")
    folder = write_photos(tmp_path, *(f"listing_{n}/{room}.jpg" for n in (0, 1) for room in rooms))
    with raises_one_line("each of the folders listing_0, listing_1 contains bath, bed, kitchen"):
        read_classes(folder)


def test_numbered_files_in_numbered_classes_are_read(tmp_path: Path) -> None:
    folder = write_photos(tmp_path, *(f"{label}/{n}.png" for label in (0, 1) for n in (1, 2)))
    assert read_classes(folder) == ["0", "1"]


# Names of files -----------------------------------------------------------------------------------
def test_files_of_one_photo_in_two_formats_and_channels_are_repeated() -> None:
    images = ["a/1.jpg", "a/1.tif", "b/f07_w1.tif", "b/f07_w2.tif", "b/f07_w3.tif", "b/f08_w1.tif"]
    assert find_repeated_names(images) == ["a/1.tif", "b/f07_w2.tif", "b/f07_w3.tif"]


def test_numbers_at_the_end_of_a_name_are_no_channels() -> None:
    assert find_repeated_names(["a/dog_1.jpg", "a/dog_2.jpg", "a/w1.jpg", "a/w2.jpg"]) == []


@pytest.mark.parametrize(
    "name", ["cat_old", "cat_checked", "Copy of cat", "backup", "Neuer Ordner"]
)
def test_a_folder_that_people_set_aside_is_asked_about(
    name: str, tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    folder = write_photos(tmp_path, "cat/1.png", "dog/1.png", f"{name}/1.png")
    assert name in read_classes(folder)
    assert f"classes of their own? {name}. " in caplog.text


def test_folders_of_days_are_asked_about(tmp_path: Path, caplog: LogCaptureFixture) -> None:
    read_classes(write_photos(tmp_path, "2024-05-01/1.png", "2024-05-02/2.png"))
    assert "classes of their own? 2024-05-01, 2024-05-02" in caplog.text


def test_folders_of_a_camera_are_refused(tmp_path: Path) -> None:
    folder = write_photos(tmp_path, "100CANON/1.png", "101CANON/2.png")
    with raises_one_line("are those of a camera, and no classes"):
        read_classes(folder)


def test_views_of_one_object_are_named(tmp_path: Path, caplog: LogCaptureFixture) -> None:
    names = [
        f"{kind}/{coin}_{side}.png" for kind in "ab" for coin in "12" for side in ("obv", "rev")
    ]
    read_classes(write_photos(tmp_path, *names))
    assert "a/1_obv.png, a/1_rev.png look like views of one object" in caplog.text


def test_photos_with_a_word_in_their_name_are_no_views(
    tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    read_classes(write_photos(tmp_path, "a/1_hdr.png", "a/2.png", "b/3_hdr.png", "b/4_edit.png"))
    assert "views" not in caplog.text


def test_links_of_git_annex_without_files_name_its_command(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").symlink_to("../.git/annex/objects/1")
    with raises_one_line("links to files that are not there", "git annex get"):
        read_classes(tmp_path)


def test_a_split_without_any_class_of_training_is_left_out(
    tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    write_photos(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/unknown/1.png")
    assert list(read_image_folder(scan_folder(tmp_path), use_labels=True)) == ["train"]
    assert "the split 'test' is left out" in caplog.text


def test_sides_of_the_same_objects_are_asked_about(
    tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    read_classes(write_photos(tmp_path, "front/1.png", "front/2.png", "back/1.png", "back/2.png"))
    assert "classes of their own? back, front" in caplog.text

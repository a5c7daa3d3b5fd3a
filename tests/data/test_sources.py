"""Datasets: sources, columns, labels, held-out parts, unreadable images."""

import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from helpers.photo_folders import write_photos, write_two_colors
from helpers.read_datasets import read_splits_of, read_training_data
from helpers.tiny_models import raises_one_line
from PIL import Image
from pytest import LogCaptureFixture
from sklearn.datasets import load_digits

from modeling_vitcls.data.dataset import open_tables
from modeling_vitcls.data.evaluation_data import load_evaluation_data
from modeling_vitcls.data.options import DataOptions


@pytest.fixture(scope="module")
def color_images(module_path: Path) -> Path:
    return write_two_colors(module_path / "colors", 10)


def list_all(data: Any) -> list[tuple[Any, Any]]:
    """Return all images of both parts with their labels."""
    return [
        pair
        for part in (data.train, data.held_out)
        for pair in zip(part.images, part.labels, strict=True)
    ]


def is_noon(image: Image.Image) -> bool:
    return image.convert("RGB").getpixel((0, 0))[0] > 128


def list_paths(color_images: Path) -> list[str]:
    return sorted(map(str, color_images.glob("*/*.png")))


def write_table(file: Path, rows: dict[str, list[Any]], **features: Any) -> Path:
    """Write a Parquet file. Columns with a feature have its type."""
    table = datasets.Dataset.from_dict(rows)
    for column, feature in features.items():
        table = table.cast_column(column, feature)
    table.to_parquet(file)
    return file


# Sources ------------------------------------------------------------------------------------------


def test_the_digits_are_those_of_scikit_learn() -> None:
    images = np.stack([np.asarray(image) for image in read_splits_of("digits").train.images])
    assert np.array_equal(images, np.rint(load_digits().images * 255 / 16))
    data = read_training_data("digits")
    assert data.label_space.names == [str(digit) for digit in range(10)]
    assert (len(data.train), len(data.held_out)) == (1438, 359)
    assert set(data.held_out.labels) == set(range(10))


def test_web_dataset_shards_need_no_flags(tmp_path: Path) -> None:
    shard = tmp_path / "shards/train-0000.tar"
    shard.parent.mkdir()
    label = tmp_path / "label"
    with tarfile.open(shard, "w") as tar:
        for index, photo in enumerate(sorted(write_photos(tmp_path, range(20)).glob("*/*.png"))):
            label.write_text(str(7 * (index % 3)))
            tar.add(photo, f"{index:04}.png")
            tar.add(label, f"{index:04}.cls")
    for dataset in (shard, shard.parent):
        data = read_training_data(dataset)
        assert data.label_space.columns == {"cls": ["0", "7", "14"]}
        names = data.train.images.get_names()
        assert [int(Path(name).stem) % 3 for name in names] == data.train.labels
        assert len(data.train) + len(data.held_out) == 40


# Labels -------------------------------------------------------------------------------------------


def test_several_columns_are_several_tasks(color_images: Path, tmp_path: Path) -> None:
    """Because of missing values, `datasets` reads integers as floats, and text as None.

    A column that is named twice counts once.
    """
    rows = [
        f"{path},{Path(path).parent.name},{'' if index % 4 == 0 else index % 2 + 1}"
        for index, path in enumerate(list_paths(color_images))
    ]
    (tmp_path / "list.csv").write_text("\n".join(["image,shade,count", *rows]))
    data = read_training_data(tmp_path / "list.csv", label_column=("count", "shade", "count"))

    assert data.label_space.kind == "multi_task"
    assert "stratified" not in data.held_out_name
    assert data.label_space.columns == {"count": ["1", "2"], "shade": ["dusk", "noon"]}

    assert Counter(label["count"] for _, label in list_all(data)) == {None: 5, 0: 5, 1: 10}
    for image, label in list_all(data):
        assert is_noon(image) == (label["shade"] == 1)


@pytest.mark.parametrize(
    ("labels", "feature", "hint"),
    [
        ([0, 1, -1, 1], datasets.ClassLabel(names=["x", "y"]), ""),
        (["x", None, "y", "y"], datasets.Value("string"), ""),
        (["x|y", None, "y", "x"], datasets.Value("string"), "; [] means none of the labels"),
    ],
)
def test_rows_without_a_label_are_skipped_and_counted(
    labels: list[Any],
    feature: Any,
    hint: str,
    color_images: Path,
    tmp_path: Path,
    caplog: LogCaptureFixture,
) -> None:
    rows = {"image": list_paths(color_images), "label": labels * 5}
    data = read_training_data(write_table(tmp_path / "a.parquet", rows, label=feature))
    assert len(list_all(data)) == 15
    assert data.label_space.names == ["x", "y"]
    assert f"5 of 20 images (no label in label{hint})" in caplog.text


def test_contradictory_labels_are_named(color_images: Path, tmp_path: Path) -> None:
    paths = list_paths(color_images)
    rows = {"image": paths, "tags": [["x"]] * 20, "size": [0.5] * 20, "shade": ["a"] * 20}
    file = write_table(tmp_path / "table.parquet", rows)
    for options, message in (
        ({"label_column": ("tags", "shade")}, "`label_column`"),
        ({"label_column": ("shade",)}, "single class 'a'"),
        ({"label_column": ("shade", "size"), "label_separator": "|"}, "`label_separator`"),
    ):
        with pytest.raises(ValueError, match=message):
            read_training_data(file, **options)


# Held-out parts
# --------------------------------------------------------------------------------------------------


def test_classes_are_collected_from_all_splits_that_are_read(
    color_images: Path, tmp_path: Path
) -> None:
    for split, label in (("train", "b"), ("validation", "a"), ("test", "c")):
        paths = list_paths(color_images)["abc".index(label) : 18 : 3]
        write_table(tmp_path / f"{split}.parquet", {"image": paths, "label": [label] * 6})
    data = read_training_data(tmp_path)
    assert data.label_space.names == ["a", "b"]
    assert (set(data.train.labels), set(data.held_out.labels)) == ({1}, {0})


def test_missing_labels_of_an_unused_split_are_ignored(color_images: Path, tmp_path: Path) -> None:
    paths = list_paths(color_images)
    names = datasets.ClassLabel(names=["dusk", "noon"])
    for split, labels in (("train", [0, 1]), ("validation", [0, 1]), ("test", [-1, -1])):
        rows = {"image": paths, "label": np.repeat(labels, 10)}
        write_table(tmp_path / f"{split}.parquet", rows, label=names)
    data = read_training_data(tmp_path)
    assert (len(data.train), len(data.held_out)) == (20, 20)
    assert data.held_out_name == "split 'validation'"

    options = DataOptions(dataset=str(tmp_path))
    assert len(load_evaluation_data(options, "validation").images) == 20
    with raises_one_line("split 'test'", "`label_column`"):
        load_evaluation_data(options, "test")
    (tmp_path / "validation.parquet").unlink()
    assert len(read_training_data(tmp_path).held_out) == 4  # of the training images


def test_images_can_be_read_without_labels(color_images: Path, tmp_path: Path) -> None:
    for path in list_paths(color_images):
        (tmp_path / f"{Path(path).parent.name}-{Path(path).name}").symlink_to(path)
    for folder in (tmp_path, color_images):  # without and with sub-folders
        splits = open_tables(DataOptions(dataset=str(folder))).unlabeled()
        assert splits.label_space.columns == {}
        assert splits.train.labels == [None] * 20
        assert (
            len({np.asarray(image.convert("RGB")).tobytes() for image in splits.train.images}) == 20
        )

    with pytest.raises(ValueError, match="contains images, but no class folders"):
        read_training_data(tmp_path)


# Unusual and unreadable images --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("train-images-idx3-ubyte.gz", "'ylecun/mnist'"),
        ("photos.zip", "unpack archives"),
        ("labels.xlsx", "CSV UTF-8"),
        (".5.png.icloud", "Download Now"),
        ("1.dcm", "dcmj2pnm"),
        ("images.npz", "zip(images, labels)"),
    ],
)
def test_a_folder_of_files_that_are_not_read_has_a_remedy(
    file: str, remedy: str, tmp_path: Path
) -> None:
    (tmp_path / file).touch()
    with raises_one_line("contains no images and no tables", remedy):
        read_splits_of(tmp_path)


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    """By their files or rows; test_image_processing.py damages them in other ways."""
    contents = {"empty.png": b"", "text.png": b"not an image"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in contents]
    for kind, values, features, names in (
        ("path", paths, {}, [*contents]),
        ("image", paths, {"image": datasets.Image()}, [*contents]),
        ("bytes", list(contents.values()), {}, ["row 0", "row 1"]),
    ):
        columns = {"image": values, "label": ["x", "y"]}
        table = write_table(tmp_path / f"{kind}.parquet", columns, **features)
        images = read_splits_of(table).train.images
        for index, name in enumerate(names):
            with raises_one_line(name):
                images[index]


def test_missing_images_are_unreadable(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("image,label\nabsent.png,x\n,x\nlist.csv,y\n")
    images = read_splits_of(tmp_path / "list.csv").train.images
    assert images.get_names() == ["absent.png", "1", "list.csv"]
    table = write_table(tmp_path / "t.parquet", {"image": [None, b""], "label": ["x"] * 2})
    encoded = read_splits_of(table).train.images
    assert encoded.get_names() == ["0", "1"]
    for part, index, name in (
        (images, 0, "absent.png"),
        (images, 1, "row 1 has no image"),
        (encoded, 0, "row 0"),
        (encoded, 1, "row 1"),
    ):
        with pytest.raises(ValueError, match=name):
            part[index]

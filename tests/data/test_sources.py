"""Datasets: sources, columns, labels, held-out parts, unreadable images."""

import io
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from helpers.photo_folders import write_two_colors
from helpers.tiny_models import raises_one_line
from PIL import Image
from sklearn.datasets import load_digits

from modeling_vitcls.data.evaluation_data import load_evaluation_data
from modeling_vitcls.data.images import LabeledImages, UnreadableImage
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.sources import load_splits
from modeling_vitcls.data.splits import load_training_data


@pytest.fixture(scope="module")
def color_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_colors(tmp_path_factory.mktemp("colors"), 10)


def read(dataset: object, **options: Any) -> Any:
    return load_training_data(DataOptions(dataset=str(dataset), **options))


def read_single_split(dataset: object) -> LabeledImages:
    """Return the only split, without a held-out part."""
    (part,) = load_splits(DataOptions(dataset=str(dataset))).images_by_split.values()
    return part


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


def test_a_table_has_relative_paths_and_named_labels(color_images: Path, tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to(color_images)
    rows = [
        f"images/{Path(path).relative_to(color_images)},{Path(path).parent.name}"
        for path in list_paths(color_images)
    ]
    (tmp_path / "list.csv").write_text("\n".join(["path,category", *rows]), encoding="utf-8")
    data = read(tmp_path / "list.csv")

    assert data.name == "list.csv"
    assert data.label_space.columns == {"category": ["dusk", "noon"]}
    for image, label in list_all(data):
        assert is_noon(image) == (label == 1)


def test_the_digits_are_those_of_scikit_learn() -> None:
    images = np.stack([np.asarray(image) for image in read_single_split("digits").images])
    assert np.array_equal(images, np.rint(load_digits().images * 255 / 16))
    data = read("digits")
    assert data.label_space.names == [str(digit) for digit in range(10)]
    assert (len(data.train), len(data.held_out)) == (1438, 359)
    assert set(data.held_out.labels) == set(range(10))


# Labels -------------------------------------------------------------------------------------------


def test_several_columns_are_several_tasks(color_images: Path, tmp_path: Path) -> None:
    """Because of missing values, `datasets` reads integers as floats, and text as None."""
    rows = [
        f"{path},{Path(path).parent.name},{'' if index % 4 == 0 else index % 2 + 1}"
        for index, path in enumerate(list_paths(color_images))
    ]
    (tmp_path / "list.csv").write_text("\n".join(["image,shade,count", *rows]), encoding="utf-8")
    data = read(tmp_path / "list.csv", label_column=("count", "shade"))

    assert data.label_space.kind == "multi_task"
    assert "stratified" not in data.held_out_name
    assert data.label_space.columns == {"count": ["1", "2"], "shade": ["dusk", "noon"]}

    counts = Counter(label["count"] for _, label in list_all(data))
    assert counts == {None: 5, 0: 5, 1: 10}
    for image, label in list_all(data):
        assert is_noon(image) == (label["shade"] == 1)


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([0, 1, -1, 1], datasets.ClassLabel(names=["x", "y"])),
        (["x", None, "y", "y"], datasets.Value("string")),
    ],
)
def test_rows_without_a_label_are_skipped_and_counted(
    labels: list[Any],
    feature: Any,
    color_images: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = {"image": list_paths(color_images), "label": labels * 5}
    data = read(write_table(tmp_path / "a.parquet", rows, label=feature))
    assert len(list_all(data)) == 15
    assert data.label_space.names == ["x", "y"]
    assert "5 of 20" in caplog.text


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
            read(file, **options)


# Held-out parts
# --------------------------------------------------------------------------------------------------


def write_splits(folder: Path, color_images: Path, **labels: int | None) -> Path:
    """Write a Parquet file per split.

    All images of a split have the given label, or each image has its own.
    """
    paths = list_paths(color_images)
    names = datasets.ClassLabel(names=["dusk", "noon"])
    folder.mkdir(exist_ok=True)
    for split, label in labels.items():
        rows = {
            "image": paths,
            "label": [int("noon" in path) if label is None else label for path in paths],
        }
        write_table(folder / f"{split}.parquet", rows, image=datasets.Image(), label=names)
    return folder


def test_classes_are_collected_from_all_splits_that_are_read(
    color_images: Path, tmp_path: Path
) -> None:
    for split, label in (("train", "b"), ("validation", "a"), ("test", "c")):
        paths = list_paths(color_images)["abc".index(label) : 18 : 3]
        write_table(tmp_path / f"{split}.parquet", {"image": paths, "label": [label] * 6})
    data = read(tmp_path)
    assert data.label_space.names == ["a", "b"]
    assert (set(data.train.labels), set(data.held_out.labels)) == ({1}, {0})


def test_missing_labels_of_an_unused_split_are_ignored(color_images: Path, tmp_path: Path) -> None:
    folder = write_splits(tmp_path / "a", color_images, train=None, validation=None, test=-1)
    data = read(folder)
    assert (len(data.train), len(data.held_out), data.held_out_name) == (
        20,
        20,
        "split 'validation'",
    )

    options = DataOptions(dataset=str(folder))
    assert len(load_evaluation_data(options, "validation")[1]) == 20
    with raises_one_line("split 'test'", "`label_column`"):
        load_evaluation_data(options, "test")
    with raises_one_line("split 'test'", "`label_column`"):
        read(write_splits(tmp_path / "b", color_images, train=None, test=-1))


def test_images_can_be_read_without_labels(color_images: Path, tmp_path: Path) -> None:
    for path in list_paths(color_images):
        (tmp_path / f"{Path(path).parent.name}-{Path(path).name}").symlink_to(path)
    for folder in (tmp_path, color_images):  # without and with sub-folders
        data = load_training_data(DataOptions(dataset=str(folder)), use_labels=False)
        assert len(data.train) + len(data.held_out) == 20
        assert data.label_space.columns == {}
        assert "stratified" not in data.held_out_name
        assert {label for _, label in list_all(data)} == {None}
        assert (
            len({np.asarray(image.convert("RGB")).tobytes() for image, _ in list_all(data)}) == 20
        )

    with pytest.raises(ValueError, match="contains images, but no class folders"):
        read(tmp_path)


def test_unusable_datasets_are_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"absent\.csv is not a .*\. Check the path"):
        read(tmp_path / "absent.csv")
    with pytest.raises((OSError, ValueError), match=r"name on the Hub|not a file or folder"):
        read("nothere")


# Unusual and unreadable images --------------------------------------------------------------------


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    jpeg = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(jpeg, "JPEG")
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    contents = {
        "truncated.jpg": jpeg.getvalue()[:-200],
        "empty.png": b"",
        "text.png": b"not an image",
        "bomb.png": b"\x89PNG\r\n\x1a\n" + bomb,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in contents]
    rows = [f"row {index}" for index in range(len(contents))]
    for kind, values, features, names in (
        ("path", paths, {}, contents),
        ("image", paths, {"image": datasets.Image()}, contents),
        ("bytes", list(contents.values()), {}, rows),
    ):
        columns = {"image": values, "label": ["x", "y"] * 2}
        table = write_table(tmp_path / f"{kind}.parquet", columns, **features)
        images = read_single_split(table).images
        for index, name in enumerate(names):
            with raises_one_line(name, error=UnreadableImage):
                images[index]


def test_missing_images_are_unreadable(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("image,label\nabsent.png,x\n,x\nlist.csv,y\n")
    images = read_single_split(tmp_path / "list.csv").images
    assert images.get_names() == ["absent.png", "1", "list.csv"]
    table = write_table(tmp_path / "t.parquet", {"image": [None, b""], "label": ["x"] * 2})
    encoded = read_single_split(table).images
    assert encoded.get_names() == ["0", "1"]
    for part, index, name in (
        (images, 0, "absent.png"),
        (images, 1, "row 1 has no image"),
        (encoded, 0, "row 0"),
        (encoded, 1, "row 1"),
    ):
        with pytest.raises(UnreadableImage, match=name):
            part[index]

"""The columns of images and labels are found by type, by name, or because no other is possible."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers.photo_folders import write_photos
from helpers.read_datasets import read_splits_of
from helpers.tiny_models import raises_one_line

from modeling_vitcls.data.columns import find_image_column


def find(features: dict[str, Any]) -> str:
    """Find the column of images of a table with an empty row."""
    table = datasets.Dataset.from_dict(
        {name: [None] for name in features}, datasets.Features(features)
    )
    return find_image_column("table", table, Path(), column=None)


def test_the_image_column_contains_images() -> None:
    """A usual name is only used among columns of images, or if no column contains images."""
    image = datasets.Image()
    text = datasets.Value("string")

    encoded = {"bytes": datasets.Value("binary"), "path": text, "source": text}
    for feature in (image, encoded, datasets.Value("binary")):
        features = {"image": text, "thumbnail": feature, "photo": feature}
        assert find(features) == "photo"
        assert find({"image": text, "thumbnail": feature}) == "thumbnail"
    assert find({"box": {"path": text}, "id": text, "file": text}) == "file"
    with raises_one_line("cannot identify the image column among a, b. Set `image_column`"):
        find({"a": image, "b": image})


@pytest.mark.parametrize(
    "header",
    [
        "x,y",
        "kind,y",
        "image,y",
        "x,label",
        "x,kind,split",
        "file name,my label",
        "image_id,Category",
    ],
)
def test_of_two_columns_the_one_without_file_names_has_the_labels(
    header: str, tmp_path: Path
) -> None:
    photos = write_photos(tmp_path, range(4), "a")
    names = header.split(",")
    rows = [[f"a/{index}.png", "ab"[index % 2], "train"][: len(names)] for index in range(4)]
    for order in (1, -1):
        lines = [",".join(row[::order]) for row in [names, *rows]]
        (photos / "table.csv").write_text("\n".join(lines))
        splits = read_splits_of(photos / "table.csv")
        assert list(splits.train.labels) == [0, 1, 0, 1]
        assert splits.train.images.get_names()[0] == "a/0.png"


def test_of_several_possible_columns_none_is_chosen(tmp_path: Path) -> None:
    photos = write_photos(tmp_path, range(1), "a")
    (photos / "table.csv").write_text("x,kind,size\na/0.png,b,c\n")
    with raises_one_line("cannot identify the label column among x, kind, size"):
        read_splits_of(photos / "table.csv")

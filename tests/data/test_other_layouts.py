"""Files of other trades: each is read as what it is, or an error or a line says what it is."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from helpers.photo_folders import draw_noise, encode_image, write_files
from helpers.tiny_models import raises_one_line
from PIL import Image

from modeling_vitcls.data.in_memory import add_dataset
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.sources import Splits
from modeling_vitcls.data.splits import load_undivided_images


PHOTOS = [encode_image(photo) for photo in draw_noise(*[(12, 9)] * 24)]


def write(root: Path, *names: str) -> None:
    """Write different photos."""
    for index, name in enumerate(names):
        write_files(root, name, content=PHOTOS[index])


def read(dataset: object, **options: Any) -> Splits:
    return load_undivided_images(DataOptions(dataset=str(dataset), **options), reads_all=True)


def count(dataset: object, **options: Any) -> dict[str, int]:
    """Count the images of each split."""
    return {split: len(part) for split, part in read(dataset, **options).images_by_split.items()}


# Folders ------------------------------------------------------------------------------------------


def test_masks_beside_photos_are_named(tmp_path: Path, caplog: Any) -> None:
    names = [f"{name}/{index}" for name in "ab" for index in range(4)]
    write(tmp_path, *(f"{name}.png" for name in names), *(f"{name}_mask.png" for name in names))
    read(tmp_path)
    assert "8 images have the name of another image" in caplog.text


def test_endings_that_are_views_or_numbers_are_no_masks(tmp_path: Path, caplog: Any) -> None:
    write(tmp_path, *(f"{name}/{view}.png" for name in "ab" for view in ("1", "1_2", "x_front")))
    read(tmp_path)
    assert "the name of another image" not in caplog.text


def test_a_folder_of_masks_is_no_class(tmp_path: Path) -> None:
    names = [f"images/{index}.png" for index in range(4)]
    write(tmp_path, *names, *(f"masks/{index}_mask.png" for index in range(4)))
    with raises_one_line("'masks'", "is no class"):
        read(tmp_path)


def test_classes_with_equal_names_of_photos_are_no_masks(tmp_path: Path) -> None:
    write(tmp_path, *(f"{name}/{index}.png" for name in ("no_mask", "mask") for index in "12"))
    assert count(tmp_path) == {"train": 4}


def test_boxes_are_no_classes(tmp_path: Path) -> None:
    write(tmp_path, "images/train/1.png", "images/val/2.png")
    write_files(tmp_path, "labels/train/1.txt", "labels/val/2.txt")
    with raises_one_line("labels/train/1.txt", "detection"):
        read(tmp_path)


def test_the_folder_of_classes_below_a_wrapper_is_named(tmp_path: Path) -> None:
    write(tmp_path, "archive/photos/cat/1.png", "archive/photos/dog/2.png")
    with raises_one_line(f"`dataset='{tmp_path}/archive/photos'`"):
        read(tmp_path)
    assert count(tmp_path / "archive/photos") == {"train": 2}


@pytest.mark.parametrize(("file", "remedy"), [("a/1.dcm", "dcmj2pnm"), ("x.npz", "list(zip(")])
def test_files_of_other_programs_have_a_remedy(tmp_path: Path, file: str, remedy: str) -> None:
    write_files(tmp_path, file)
    with raises_one_line(remedy):
        read(tmp_path)


def test_photos_that_a_cloud_drive_has_not_downloaded_are_counted(
    tmp_path: Path, caplog: Any
) -> None:
    write(tmp_path, "cat/1.png", "dog/2.png")
    write_files(tmp_path, "cat/.3.png.icloud", "cat/.hidden.png")
    assert count(tmp_path) == {"train": 2}
    assert "(1): cat/.3.png.icloud" in caplog.text


def test_tables_beside_photos_have_their_splits(tmp_path: Path) -> None:
    write(tmp_path, *(f"images/{index}.png" for index in range(6)))
    for split, rows in {"train": range(4), "test": range(4, 6)}.items():
        lines = [f"images/{index}.png,{'ab'[index % 2]}" for index in rows]
        (tmp_path / f"{split}.csv").write_text("\n".join(["file_name,label", *lines]))
    assert count(tmp_path) == {"train": 4, "test": 2}
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").unlink()
    (tmp_path / "predicted.csv").write_text("image,label\nimages/0.png,a\nimages/1.png,b\n")
    with raises_one_line("set `dataset` to it: predicted.csv"):
        read(tmp_path)


def test_a_table_in_each_split_folder_names_files_beside_it(tmp_path: Path) -> None:
    write(tmp_path, *(f"{split}/{index}.png" for split in ("train", "valid") for index in range(3)))
    for split in ("train", "valid"):
        lines = ["filename,cat,dog", "0.png,1,0", "1.png,0,1", "2.png,1,1"]
        (tmp_path / split / "_classes.csv").write_text("\n".join(lines))
    assert count(tmp_path, label_column=("cat", "dog")) == {"train": 3, "validation": 3}


@pytest.mark.parametrize("columns", [["split"], ["label"], ["split", "label"]])
def test_partitions_of_parquet_are_splits_and_columns(tmp_path: Path, columns: list[str]) -> None:
    write(tmp_path, *(f"{index}.png" for index in range(6)))
    table = pd.DataFrame({"image": [str(tmp_path / f"{index}.png") for index in range(6)]})
    table["label"] = ["a", "b"] * 3
    if "split" in columns:
        table["split"] = ["train"] * 4 + ["test"] * 2
    table.to_parquet(tmp_path / "table", partition_cols=columns)
    found = read(tmp_path / "table")
    sizes = [len(part) for part in found.images_by_split.values()]
    assert sizes == ([4, 2] if "split" in columns else [6])
    assert sorted(found.train.labels) == [0] * (sizes[0] // 2) + [1] * (sizes[0] // 2)


# Columns ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "values", "sizes"),
    [
        ("is_train", "110110", {"train": 4, "test": 2}),
        ("is_test", "001001", {"train": 4, "test": 2}),
        ("Usage", ["Training"] * 4 + ["PublicTest", "Private Test"], {"train": 4}),
    ],
)
def test_the_division_of_a_dataset_is_named_and_can_be_set(
    tmp_path: Path, column: str, values: Any, sizes: dict[str, int]
) -> None:
    write(tmp_path, *(f"{index}.png" for index in range(6)))
    names = [f"{index}.png" for index in range(6)]
    table = pd.DataFrame({"file_name": names, column: list(values), "label": list("ababab")})
    table.to_csv(tmp_path / "table.csv", index=False)
    assert f"`split_column='{column}'`" in read(tmp_path / "table.csv").facts["groups"]
    found = read(tmp_path / "table.csv", split_column=column)
    assert "groups" not in found.facts
    parts = {split: len(part) for split, part in found.images_by_split.items()}
    assert parts == (sizes if len(sizes) == 2 else {"train": 4, "validation": 1, "test": 1})


def test_folds_of_a_dataset_are_named_as_groups(tmp_path: Path) -> None:
    write(tmp_path, *(f"{index}.png" for index in range(6)))
    lines = [f"{index}.png,{index // 2},{'ab'[index % 2]}" for index in range(6)]
    (tmp_path / "table.csv").write_text("\n".join(["file_name,fold,label", *lines]))
    assert "`group_column='fold'`" in read(tmp_path / "table.csv").facts["groups"]


def test_minus_one_as_a_decimal_number_is_questioned(tmp_path: Path, caplog: Any) -> None:
    write(tmp_path, *(f"{index}.png" for index in range(6)))
    lines = [f"{index}.png,{(index % 3) - 1}.0" for index in range(6)]
    (tmp_path / "table.csv").write_text("\n".join(["file_name,label", *lines]))
    read(tmp_path / "table.csv")
    assert "has the class -1.0. Does it mean" in caplog.text


def test_vectors_of_minus_one_and_one_are_an_error() -> None:
    table = pd.DataFrame({"image": PHOTOS[:4], "label": [[1, -1, -1], [-1, 1, 1]] * 2})
    with raises_one_line("Write 0 instead of -1"):
        read(add_dataset(table))


def test_a_field_of_a_list_of_objects_is_read(tmp_path: Path) -> None:
    write(tmp_path, *(f"{index}.png" for index in range(4)))
    cells = [f'"[{{""task"": ""T0"", ""value"": ""{word}""}}]"' for word in ("Yes", "No") * 2]
    lines = [f"{index}.png,{cell}" for index, cell in enumerate(cells)]
    (tmp_path / "table.csv").write_text("\n".join(["file_name,annotations", *lines]))
    found = read(tmp_path / "table.csv", label_column=("annotations.value",))
    assert found.label_space.columns == {"annotations.value": ["No", "Yes"]}


# Files --------------------------------------------------------------------------------------------


def test_the_mode_of_a_column_of_images_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "1.png", "2.png")
    files = [str(tmp_path / f"{index}.png") for index in (1, 2)]
    data = datasets.Dataset.from_dict({"image": files, "label": ["a", "b"]})
    with raises_one_line("has the mode 'L'"):
        read(add_dataset(data.cast_column("image", datasets.Image(mode="L"))))


def test_images_of_several_pages_are_counted(tmp_path: Path, caplog: Any) -> None:
    pages = draw_noise((12, 9), (12, 9))
    for name in "ab":
        (tmp_path / name).mkdir()
        for index in range(2):
            rotated = pages[0].rotate(90 * index)
            rotated.save(tmp_path / name / f"{index}{name}.tif", save_all=True, append_images=pages)
        Image.fromarray(np.full((9, 9), ord(name), np.uint8)).save(tmp_path / name / "single.tif")
    with raises_one_line("several labels"):
        read(tmp_path)
    (tmp_path / "b/0b.tif").write_bytes((tmp_path / "b/0b.tif").read_bytes() + b" ")
    (tmp_path / "b/1b.tif").write_bytes((tmp_path / "b/1b.tif").read_bytes() + b" ")
    read(tmp_path)
    assert "4 of 6 images have several pages" in caplog.text


def test_drawings_that_become_blank_are_counted(tmp_path: Path, caplog: Any) -> None:
    for index in range(4):
        drawing = np.zeros((9, 9, 4), np.uint8)
        drawing[index:, :, 3] = 255
        drawing[:, 0 if index else 5 :, :3] = 255
        write_files(
            tmp_path,
            f"{'ab'[index % 2]}/{index}.png",
            content=encode_image(Image.fromarray(drawing)),
        )
    read(tmp_path)
    assert "3 of 4 images are of one color" in caplog.text

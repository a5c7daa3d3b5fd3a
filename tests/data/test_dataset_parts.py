"""Several datasets of one kind of labels, and tables whose images are found by their checksums."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from helpers.command_in_process import run_here
from helpers.photo_folders import draw_noise, encode_image
from helpers.tiny_models import raises_one_line

from modeling_vitcls import evaluate, finetune, predict
from modeling_vitcls.data.evaluation_data import load_evaluation_data
from modeling_vitcls.data.images import DatasetImages
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.sources import load_splits
from modeling_vitcls.data.splits import load_undivided_images


PHOTOS = [encode_image(photo) for photo in draw_noise(*[(12, 9)] * 24)]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder: class folders, a collection, a CSV table and a Parquet table."""
    names = [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(4)]
    for index, name in enumerate([*(f"labels/{name}" for name in names), *"abc"]):
        path = tmp_path / (f"collection/2019/{name}.png" if len(name) == 1 else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PHOTOS[index])
    for name, index in {"12": 12, "13": 13, "copy": 0}.items():
        (tmp_path / f"{name}.png").write_bytes(PHOTOS[index])
    (tmp_path / "more.csv").write_text(
        "file_name;species\n12.png;owl\n13.png;dog\ncopy.png;cat\n", encoding="utf-8"
    )
    encoded = [{"bytes": PHOTOS[index], "path": None} for index in (14, 13)]
    pd.DataFrame({"image": encoded, "animal": ["owl", "dog"]}).to_parquet(tmp_path / "p.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(*datasets: str, **options: Any) -> dict[str, str | None]:
    """Return the label of each image of the first split, by name."""
    splits = load_undivided_images(DataOptions(dataset=datasets, **options))
    labels = map(splits.label_space.format, splits.train.labels)
    assert all(image.size == (9, 12) for image in splits.train.images)
    return dict(zip(splits.train.images.get_names(), labels, strict=True))


# Several datasets ---------------------------------------------------------------------------------


def test_label_columns_of_several_datasets_have_names_of_their_own(root: Path) -> None:
    labels = read("labels", "more.csv", "p.parquet")
    assert sorted(labels.values()) == ["cat"] * 4 + ["dog"] * 5 + ["owl"] * 2
    assert labels["12.png"] == "owl"


def test_a_copy_in_another_dataset_counts_once(root: Path, caplog: Any) -> None:
    labels = read("labels", "more.csv")
    assert "copy.png" not in labels
    assert len(labels) == 10
    assert caplog.text.count("11 rows name 10 images") == 1


def test_a_copy_with_another_label_in_another_dataset_is_an_error(root: Path) -> None:
    (root / "more.csv").write_text("file_name,species\ncopy.png,dog\n", encoding="utf-8")
    with raises_one_line("labels/cat/0.png is 'cat', copy.png is 'dog'"):
        read("labels", "more.csv")


def test_a_folder_without_classes_has_no_labels_beside_other_datasets(root: Path) -> None:
    (root / "loose").mkdir()
    (root / "12.png").rename("loose/12.png")
    assert len(read("loose", "labels")) == 8


def test_photos_without_labels_train_when_a_person_has_answered(root: Path) -> None:
    key = DatasetImages.from_list(["collection/2019/b.png"]).compute_content_keys()[0]
    (root / "answers.csv").write_text(f"checksum,label\n{key:016x},dog\n", encoding="utf-8")
    labels = read("labels", "collection", answers=("answers.csv",))
    assert labels["collection/2019/b.png"] == "dog"
    assert len(labels) == 9


def test_albums_named_by_dates_are_no_classes_beside_other_datasets(root: Path) -> None:
    assert {*read("collection", "labels").values()} == {"cat", "dog"}


def test_several_datasets_without_labels_are_an_error(root: Path) -> None:
    with raises_one_line("there are no labels in train of", "collection"):
        read("collection", "collection")


def test_a_label_column_that_no_dataset_has_is_an_error(root: Path) -> None:
    with raises_one_line("has no column 'spezies'"):
        read("more.csv", "p.parquet", label_column="spezies")


def test_splits_of_the_same_name_are_joined(root: Path) -> None:
    for name in ("train/cat/0.png", "train/dog/1.png", "test/cat/2.png", "test/dog/3.png"):
        path = root / "divided" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PHOTOS[20 + int(path.stem)])
    images = load_undivided_images(DataOptions(dataset=("divided", "labels"))).images_by_split
    assert {split: len(part) for split, part in images.items()} == {"train": 10, "test": 2}


def test_a_dataset_without_the_split_that_is_read_is_an_error(root: Path) -> None:
    shutil.copytree("labels", "divided/test")
    with raises_one_line("more.csv has the splits train"):
        load_evaluation_data(DataOptions(dataset=("divided", "more.csv")), "test")


def test_declared_labels_keep_their_names_under_another_column(root: Path) -> None:
    assert read("more.csv", "labels")["labels/cat/1.png"] == "cat"


def test_groups_of_one_dataset_do_not_need_a_column_in_others(root: Path) -> None:
    table = pd.read_csv("more.csv", sep=";").assign(animal=["a", "a", "b"])
    table.rename(columns={"species": "label"}).to_csv("more.csv", index=False)
    options = DataOptions(dataset=("labels", "more.csv"), group_column="animal")
    assert len({*load_splits(options).train.groups}) == 8 + 2


@pytest.mark.slow
def test_a_run_on_several_datasets_is_recorded_evaluated_and_predicted(root: Path) -> None:
    flags = ["--epochs", "1", "--image-size", "16", "--num-workers", "0"]
    datasets = ["labels", "more.csv", "collection"]
    command = ["finetune", "--model", "vitcls-tiny", "--output-dir", "run"]
    assert run_here(*command, *flags, "--held-out-fraction", "0.3", "--dataset", *datasets) == 0
    recorded = yaml.safe_load((root / "run/config.resolved.yaml").read_text(encoding="utf-8"))
    assert recorded["dataset"] == [f"./{name}" for name in datasets]
    results = json.loads((root / "run/results.json").read_text(encoding="utf-8"))
    assert results["datasets"] == [f"path/to/{name}" for name in datasets]
    assert run_here("finetune", "--config", "run/config.resolved.yaml", "--resume") == 0
    assert evaluate("run", ["more.csv", "labels"], split="train")["num_images"] == 10
    assert len(predict("run", dataset=["labels", "collection"])) == 11
    frame = pd.DataFrame({"image": [str(root / "12.png")], "label": ["owl"]})
    results = finetune("run", [root / "labels", frame], "next", epochs=1, num_workers=0)
    assert results["dataset"] == "labels and the DataFrame"


# Checksums ----------------------------------------------------------------------------------------


@pytest.fixture
def table(root: Path) -> pd.DataFrame:
    """Return the table that `predict` writes about the class folders, and write it."""
    names = [f"labels/{name}/{number}.png" for name in ("cat", "dog") for number in range(4)]
    keys = DatasetImages.from_list(names).compute_content_keys()
    checksums = [f"{key:016x}" for key in keys.tolist()]
    labels = [name.split("/")[1] for name in names]
    table = pd.DataFrame({"image": names, "label": labels, "checksum": checksums})
    table.to_csv("table.csv", index=False)
    return table


def test_renamed_and_moved_images_are_found_by_their_checksums(
    root: Path, table: pd.DataFrame
) -> None:
    expected = read("table.csv")
    (root / "labels/cat/3.png").rename(root / "labels/new.png")
    (root / "labels").rename(root / "archive")
    found = read("table.csv")
    assert found["archive/new.png"] == "cat"
    assert list(found.values()) == list(expected.values())


@pytest.mark.parametrize("column", ["image", "checksum"])
def test_a_table_of_which_one_column_was_moved_is_an_error(
    table: pd.DataFrame, column: str
) -> None:
    values = table[column].tolist()
    table.assign(**{column: [*values[1:], values[0]]}).to_csv("table.csv", index=False)
    with raises_one_line("the names and the checksums of 8 rows"):
        read("table.csv")


def test_rows_without_a_name_are_found_by_their_checksums(table: pd.DataFrame) -> None:
    expected = read("table.csv")
    table.assign(image=["", *table["image"][1:]]).to_csv("table.csv", index=False)
    assert read("table.csv") == expected


def test_an_edited_image_is_found_by_its_name(root: Path, table: pd.DataFrame) -> None:
    (root / "labels/cat/3.png").write_bytes(PHOTOS[20])
    assert read("table.csv")["labels/cat/3.png"] == "cat"


def test_checksums_of_another_kind_mean_nothing(table: pd.DataFrame) -> None:
    table.assign(checksum=table["checksum"] * 2).to_csv("table.csv", index=False)
    assert len(read("table.csv")) == 8

"""Several datasets as one: photos with labels, and a collection of which a person has answered some."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.command_in_process import fail, run_here
from helpers.photo_folders import write_photos
from helpers.read_datasets import read_undivided
from helpers.tiny_models import raises_one_line
from pytest import MonkeyPatch

from modeling_vitcls.data.evaluation_data import Trained, load_evaluation_data
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.inference.inputs import compute_checksum


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """Write ten labeled photos in `start`, and ten others in two years of `collection`, half of them answered."""
    monkeypatch.chdir(tmp_path)
    write_photos(Path("start"), range(5))
    files = sorted(write_photos(Path("collection"), range(5), "2024", "2025").rglob("*.png"))
    pd.DataFrame({"file_name": files, "label": ""}).to_csv("table.csv")
    table = pd.DataFrame({"checksum": map(compute_checksum, files[:5]), "label": "cat"})
    table.assign(chosen="random", time="").to_csv("answers.csv")


def read(other: str, *answers: str) -> Any:
    """Read the photos of `start` and of another dataset."""
    return read_undivided("start", more_data=other, answers=answers)


@pytest.mark.parametrize("other", ["collection", "table.csv"])
def test_photos_without_labels_are_used_if_they_have_an_answer(other: str) -> None:
    names = read(other, "answers.csv").train.images.get_names()
    assert len(names) == 15
    assert names[10:] == [f"collection/2024/{number}.png" for number in range(5)]


@pytest.mark.parametrize("other", ["photos", "photos.parquet"])
def test_labels_are_united_by_name(other: str) -> None:
    files = sorted(write_photos(Path("photos"), range(10, 12), "ant", "dog").rglob("*.png"))
    table = {"image": map(Path.read_bytes, files), "animal": ["ant", "ant", "dog", "dog"]}
    pd.DataFrame(table).to_parquet("photos.parquet")
    loaded = read(other)
    labels = map(loaded.label_space.format, loaded.train.labels)
    assert Counter(labels) == {"ant": 2, "cat": 5, "dog": 7}


def test_a_copy_in_another_dataset_counts_once() -> None:
    write_photos(Path("copies"), range(4, 6))
    assert len(read("copies").train) == 12


def test_folders_below_classes_stay_groups() -> None:
    for name in ("cat", "dog"):
        write_photos(Path("more", name), range(20, 23), f"{name} 1", f"{name} 2")
    assert len({*read("more").train.groups}) == 14


def write_patients(*tables: str) -> None:
    """Write tables that each have a photo of every one of six patients, of two classes each."""
    for number, table in enumerate(tables):
        files = sorted(
            write_photos(Path(f"of {table}"), range(6 * number, 6 * number + 3)).rglob("*.png")
        )
        rows = {
            "file_name": files,
            "label": ["cat", "dog"] * 3,
            "patient": [f"p{row}" for row in range(6)],
        }
        pd.DataFrame(rows).to_csv(table, index=False)


def test_rows_of_one_patient_in_two_tables_are_one_group() -> None:
    write_patients("a.csv", "b.csv")
    dataset = read_undivided("a.csv", more_data="b.csv", group_column="patient")
    assert len({*dataset.train.groups}) == 6
    assert dataset.facts["groups"].startswith("column 'patient': 6 groups")


def test_one_patient_in_each_table_is_no_single_group() -> None:
    for number, table in enumerate(("a.csv", "b.csv")):
        files = sorted(write_photos(Path(table[0]), [number], "cat", "dog").rglob("*.png"))
        rows = {"file_name": files, "label": ["cat", "dog"], "patient": table}
        pd.DataFrame(rows).to_csv(table, index=False)
    dataset = read_undivided("a.csv", more_data="b.csv", group_column="patient")
    first, second = np.split(dataset.train.groups, 2)
    assert {*first}.isdisjoint(second)
    assert len({*first}) == len({*second}) == 1


def test_a_column_of_patients_that_is_not_used_is_named_for_each_table() -> None:
    write_patients("a.csv", "b.csv")
    assert "`group_column='patient'`" in read_undivided("a.csv", more_data="b.csv").facts["groups"]


def test_folders_of_one_name_in_two_datasets_are_two_groups() -> None:
    for place, number in (("first", 20), ("second", 30)):
        for name in ("cat", "dog"):
            write_photos(Path(place, name), [number], f"{name} 1", f"{name} 2")
    assert len({*read_undivided("first", more_data="second").train.groups}) == 8


def test_names_of_folders_are_no_cells_of_a_table() -> None:
    for place, numbers in (("first", range(3)), ("second", range(3, 6))):
        write_photos(Path(place), numbers, "1.5", "[draft]", "a|b")
    assert read_undivided("first", more_data="second").label_space.names == [
        "1.5",
        "[draft]",
        "a|b",
    ]


def test_a_folder_of_tables_keeps_its_labels_with_answers() -> None:
    """Only the folders of an image folder may be years."""
    files = sorted(write_photos(Path("photos"), [40, 41], "photos").rglob("*.png"))
    Path("ants").mkdir()
    table = pd.DataFrame({"image": map(Path.read_bytes, files), "label": "ant"})
    table.to_parquet("ants/train.parquet")
    loaded = read("ants", "answers.csv")
    assert "ant" in map(loaded.label_space.format, loaded.train.labels)


def test_answers_of_an_evaluation_may_name_any_class_of_the_model() -> None:
    files = sorted(Path("collection/2024").iterdir())
    answers = pd.DataFrame({"checksum": map(compute_checksum, files), "label": "owl"})
    answers.assign(chosen="random", time="").to_csv("owls.csv")
    options = DataOptions(dataset="start", more_data=("collection",), answers=("owls.csv",))
    data = load_evaluation_data(options, None, Trained(classes=("cat", "dog", "owl")))
    assert data.images.labels.count(data.label_space.names.index("owl")) == 5


def test_another_dataset_with_several_splits_is_an_error() -> None:
    for split in ("train", "test"):
        write_photos(Path("more", split), range(2))
    with raises_one_line("requires one split"):
        read("more")


def test_a_run_trains_on_all_and_evaluation_knows_them(converted_encoder: Path) -> None:
    data = ["--dataset", "start", "collection", "--answers", "answers.csv"]
    run = ["finetune", "--model", converted_encoder, *data, "--output-dir", "run", "--no-report"]
    assert run_here(*run) == 0
    folder = ModelFolder(Path("run"))
    assert folder.results["num_images"] == 15
    assert folder.results["dataset"] == "start and collection"
    assert "more_data" not in folder.shareable_flags
    assert run_here(*run, "--resume") == 0
    assert "on all 15 images of start and collection" in fail("evaluate", "--model", "run", *data)
    for name, number in (("a", 30), ("b", 31)):
        write_photos(Path(name), [number])
    assert run_here("evaluate", "--model", "run", "--dataset", "a", "b", "--output", "r.json") == 0
    assert "a and b" in Path("r.json").read_text()

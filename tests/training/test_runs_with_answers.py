"""Runs with the labels that a person gave on pages, from the first page to the second."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.command_in_process import finetune, run_here
from helpers.photo_folders import write_photos
from helpers.source_checkpoints import save_converted_encoder

from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.inference.inputs import compute_checksum
from modeling_vitcls.publishing.report import write_report


COLUMNS = ["checksum", "image", "label", "before", "chosen", "time"]


@pytest.fixture(scope="module")
def encoder(module_path: Path) -> Path:
    return save_converted_encoder(module_path, num_layers=5)


@pytest.fixture(scope="module")
def photos(module_path: Path) -> Path:
    """Return noise of two classes, of which a classifier contradicts about half."""
    return write_photos(module_path / "photos", range(30))


@pytest.fixture(scope="module")
def first(encoder: Path, photos: Path, module_path: Path) -> dict[str, Any]:
    """Return what a run says that has written its page."""
    run = finetune(encoder, photos, module_path / "first")
    assert write_report(ModelFolder(run["folder"])) is not None
    return run


@pytest.fixture(scope="module")
def answers(first: dict[str, Any], module_path: Path) -> Path:
    """Return answers to all questions: dog, but one photo shows none of the classes."""
    return save_answers(module_path / "answers.csv", read_questions(first["folder"]), "dog")


@pytest.fixture(scope="module")
def second(encoder: Path, photos: Path, answers: Path, module_path: Path) -> dict[str, Any]:
    """Return what a run with these answers says."""
    run = finetune(encoder, photos, module_path / "second", "--answers", str(answers))
    assert write_report(ModelFolder(run["folder"])) is not None
    return run


def read_questions(folder: Path) -> list[dict[str, str]]:
    text = (folder / "labels.html").read_text(encoding="utf-8")
    (content,) = re.findall('<script type="application/json" id="data">(.*)</script>', text)
    questions: list[dict[str, str]] = json.loads(content)["questions"]
    return questions


def save_answers(file: Path, questions: list[dict[str, str]], label: str) -> Path:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for number, each in enumerate(questions):
            time = f"2026-12-01T00:00:{number:02}Z"
            writer.writerow({**each, "label": label if number else "", "time": time})
    return file


def test_a_run_counts_the_answers_and_leaves_out_photos_of_none_of_the_classes(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    questions = read_questions(first["folder"])
    (line,) = re.findall("answers   (.*)", second["printed"])
    assert line.startswith(
        f"{sum(each['before'] == 'cat' for each in questions[1:])} labels changed"
    )
    assert ", 1 show none of the classes; of " in line
    assert second["num_training_images"] == first["num_training_images"] - 1
    assert second["num_images"] == 59


def test_splits_table_says_why_a_person_was_asked(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    asked = {
        int(each["checksum"], 16): each["chosen"] for each in read_questions(first["folder"])[1:]
    }
    table = pd.read_parquet(second["folder"] / "splits.parquet").set_index("key")["chosen"]
    assert (table != "").sum() == len(asked)
    for key, chosen in asked.items():
        assert table[key].startswith(chosen)


def test_the_next_page_asks_about_other_photos(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    before = {each["checksum"] for each in read_questions(first["folder"])}
    assert not before & {each["checksum"] for each in read_questions(second["folder"])}


def test_predictions_name_the_content_of_each_photo(first: dict[str, Any], photos: Path) -> None:
    rows = pd.read_parquet(first["folder"] / "predictions.parquet")
    for row in rows.head(5).itertuples():
        assert row.checksum == compute_checksum(photos / row.image)


def test_evaluate_counts_photos_of_none_of_the_classes_that_are_unknown(
    encoder: Path, module_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = write_photos(module_path / "many", range(60))
    run = finetune(encoder, many, module_path / "of many")
    others = write_photos(module_path / "others", range(100, 104))
    questions = [
        {"checksum": compute_checksum(file) or "", "chosen": "random"}
        for file in sorted(others.glob("*/*"))
    ]
    file = save_answers(module_path / "others.csv", questions[:3], "")
    flags = ("--answers", file, "--output", module_path / "metrics.json")
    assert run_here("evaluate", "--model", run["folder"], "--dataset", others, *flags) == 0
    metrics = json.loads((module_path / "metrics.json").read_text())
    assert metrics["num_images"] == 5
    assert metrics["num_other_images"] == 3
    count = f"{metrics['num_unknown_others']} of 3 photos that show none of the classes"
    assert count in capsys.readouterr().out

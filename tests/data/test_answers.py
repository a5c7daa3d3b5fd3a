"""Labels that a person gave on a page of photos, for the photos of a dataset."""

import unicodedata
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.photo_folders import draw_noise
from helpers.tiny_models import raises_one_line
from pytest import MonkeyPatch

from modeling_vitcls.data.evaluation_data import Trained, load_evaluation_data
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.splits import load_undivided_images
from modeling_vitcls.inference.inputs import compute_checksum


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """Write five photos of two classes, of which one has no label, and their table."""
    monkeypatch.chdir(tmp_path)
    for number, image in enumerate(draw_noise(*[(8, 8)] * 5)):
        image.save(f"{number}.png")
    names = [f"{number}.png" for number in range(5)]
    write("photos.csv", file_name=names, label=["", "cat", "cat", "cat", "Äpfel"])


def write(file: str, **columns: Any) -> None:
    pd.DataFrame(columns).to_csv(file, index=False)


def answer(file: str, *labels: str, chosen: Any = "unsure", time: str = "2026-12-01") -> None:
    """Write answers about the first photos."""
    checksums = [compute_checksum(Path(f"{number}.png")) for number in range(len(labels))]
    write(file, checksum=checksums, label=labels, chosen=chosen, time=time)


def read(*files: str) -> Any:
    """Read the label of each photo, and the line about the answers."""
    loaded = load_undivided_images(DataOptions(dataset="photos.csv", answers=files))
    labels = map(loaded.label_space.format, loaded.train.labels)
    return dict(zip(loaded.train.images.get_names(), labels, strict=True)), loaded.facts["answers"]


def test_answers_replace_labels_and_are_counted() -> None:
    chosen = ["unsure", "contradicted", "contradicted", "random", "random"]
    answer("answers.csv", "cat", "Äpfel", "cat", "", "Äpfel", chosen=chosen)
    write("others.csv", checksum=["0" * 16], label="cat", chosen="", time="")
    labels, text = read("answers.csv", "others.csv")
    assert labels == {"0.png": "cat", "1.png": "Äpfel", "2.png": "cat", "4.png": "Äpfel"}
    assert text == (
        "1 labels changed, 2 confirmed, 1 photos without a label got one, 1 show none of the classes; "
        "1 answers are about other photos; of 2 labels of photos drawn at random, 1 were changed"
    )


def test_an_answer_belongs_to_the_content_of_a_photo() -> None:
    answer("answers.csv", "Äpfel", "Äpfel")
    Path("1.png").rename("new.png")
    write("photos.csv", file_name=["new.png", "2.png", "4.png"], label=["cat", "cat", "Äpfel"])
    assert read("answers.csv")[0]["new.png"] == "Äpfel"


def test_the_latest_answer_counts_in_a_table_that_a_spreadsheet_has_changed() -> None:
    answer("1.csv", "cat", time="2026-12-01T10:00:00Z")
    answer("2.csv", "Äpfel", time="2026-12-02T09:00:00Z")
    table = pd.concat(map(pd.read_csv, ("2.csv", "1.csv"))).iloc[:, ::-1]
    table.to_csv("answers.csv", index=False, encoding="utf-8-sig", sep=";")
    assert read("answers.csv")[0]["0.png"] == "Äpfel"


def test_an_answer_may_name_a_class_that_was_added_to_the_evaluated_model() -> None:
    answer("answers.csv", "dog", "cat", chosen="random")
    options = DataOptions(dataset="photos.csv", answers=("answers.csv",))
    found = load_evaluation_data(options, None, Trained(classes=["cat", "dog"]))
    labels = [found.label_space.format(label) for label in found.images.labels]
    assert labels == ["dog", "cat", "cat", "cat", "Äpfel"]


def test_answers_that_cannot_be_used_are_an_error() -> None:
    answer("answers.csv", "dog")
    with raises_one_line("has the labels dog, but the classes are cat, Äpfel"):
        read("answers.csv")
    with raises_one_line("photos.csv has no column checksum"):
        read("photos.csv")


def test_a_checksum_that_a_spreadsheet_has_changed_is_an_error_with_its_row() -> None:
    answer("answers.csv", "cat", "cat")
    text = Path("answers.csv").read_text()
    second = compute_checksum(Path("1.png")) or ""
    for changed in ("1.11122E+15", "12", ""):
        Path("answers.csv").write_text(text.replace(second, changed))
        with raises_one_line("answers.csv: row 1", repr(changed.lower()), "16 hexadecimal digits"):
            read("answers.csv")
    Path("answers.csv").write_text(text.replace(second, second.upper()))
    assert read("answers.csv")[0]["1.png"] == "cat"


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("9/12/2026 10:00", "10/12/2026 10:00"),
        ("2026-12-01T04:00:00+02:00", "2026-12-01T03:00:00Z"),
        ("2026-12-01 09:00", "2026-12-01T09:00:30.123Z"),
    ],
)
def test_times_are_compared_as_times(
    earlier: str, later: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer("later.csv", "Äpfel", time=later)
    answer("earlier.csv", "cat", time=earlier)
    assert read("later.csv", "earlier.csv")[0]["0.png"] == "Äpfel"


def test_two_answers_without_an_order_are_an_error() -> None:
    answer("1.csv", "cat", time="1/12/2026")
    answer("2.csv", "Äpfel", time="2026-06-01")
    with raises_one_line("1/12/2026 is one of two days", "2026-12-31"):
        read("1.csv", "2.csv")
    answer("2.csv", "Äpfel", time="")
    with raises_one_line("different labels", "no time"):
        read("1.csv", "2.csv")
    answer("2.csv", "Äpfel", time="yesterday evening")
    with raises_one_line("2.csv: row 0", "'yesterday evening'", "not a time"):
        read("1.csv", "2.csv")


def test_different_answers_about_a_photo_and_answers_about_other_photos_are_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer("1.csv", "cat", "cat", "cat")
    answer("2.csv", "Äpfel", "Äpfel", "cat", time="2026-12-02")
    first = compute_checksum(Path("0.png"))
    read("1.csv", "2.csv")
    assert f"different labels of 2 photos, and the later one counts: {first}" in caplog.text
    assert "no answer of" not in caplog.text
    write("3.csv", checksum=["0" * 16], label="cat", chosen="", time="2026-12-01")
    read("3.csv")
    assert "no answer of `answers` is about a photo" in caplog.text


def test_labels_reasons_and_columns_are_read_in_any_spelling() -> None:
    label = unicodedata.normalize("NFD", " Äpfel ")
    answer("answers.csv", label, "cat\t", chosen="Random ")
    Path("answers.csv").write_text(
        Path("answers.csv").read_text().replace("chosen", "Chosen ").replace("label", "LABEL")
    )
    labels, text = read("answers.csv")
    assert (labels["0.png"], labels["1.png"]) == ("Äpfel", "cat")
    assert "of 1 labels of photos drawn at random, 0 were changed" in text


def test_an_error_shows_invisible_differences_of_a_label() -> None:
    answer("answers.csv", "ca\u200bt")
    with raises_one_line(r"'ca\u200bt' (the class is 'cat')"):
        read("answers.csv")
    answer("answers.csv", "cat", chosen="surely")
    with raises_one_line("row 0", "'surely'", "random, contradicted, unsure, unknown"):
        read("answers.csv")

"""Labels that a person gave on a page of photos, for the photos of a dataset."""

import csv
import shutil
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
from helpers.photo_folders import draw_noise

from modeling_vitcls.data.answers import CHANGED, CONTRADICTED
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.splits import divide_images, load_undivided_images
from modeling_vitcls.inference.inputs import compute_checksum


COLUMNS = ["checksum", "image", "label", "before", "chosen", "time"]
CLASSES = ("cat", "Äpfel")
Row = dict[str, str]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return class folders of three photos each."""
    for name in CLASSES:
        (tmp_path / "photos" / name).mkdir(parents=True)
    for number, image in enumerate(draw_noise(*[(8, 8)] * 6)):
        image.save(tmp_path / "photos" / CLASSES[number % 2] / f"{number}.png")
    return tmp_path / "photos"


def answer(photo: Path, label: str, time: str = "2026-12-01T00:00:00.000Z") -> Row:
    """Answer as the page saves it."""
    checksum = compute_checksum(photo)
    assert checksum is not None
    image = f"{photo.parent.name}/{photo.name}"
    values = (checksum, image, label, photo.parent.name, "contradicted", time)
    return dict(zip(COLUMNS, values, strict=True))


def write(file: Path, rows: list[Row], **options: str) -> str:
    with file.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as stream:
        writer = csv.DictWriter(stream, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


def read(photos: Path, *files: str) -> dict[str, str]:
    """Read the label of each photo by the name of its file."""
    loaded = load_undivided_images(DataOptions(dataset=str(photos), answers=files))
    names = [Path(name).name for name in loaded.train.images.get_names()]
    return dict(zip(names, map(loaded.label_space.format, loaded.train.labels), strict=True))


def test_answers_replace_labels_and_are_counted(photos: Path, tmp_path: Path) -> None:
    rows = [
        answer(photos / "cat/0.png", "Äpfel"),
        answer(photos / "cat/2.png", "cat"),
        answer(photos / "Äpfel/1.png", ""),
        {**answer(photos / "cat/0.png", "cat"), "checksum": "0" * 16, "image": "gone.png"},
    ]
    files = (write(tmp_path / "answers.csv", rows),)
    loaded = load_undivided_images(DataOptions(dataset=str(photos), answers=files))
    assert loaded.facts["answers"] == (
        "1 labels changed, 1 confirmed, 0 photos without a label got one, 1 show none of the classes; "
        "1 are about photos that are not here"
    )
    found = read(photos, *files)
    assert found["0.png"] == "Äpfel"
    assert "1.png" not in found
    assert len(found) == 5
    assert loaded.train.chosen is not None
    assert sorted(loaded.train.chosen) == ["", "", "", CONTRADICTED, CHANGED]
    (others,) = loaded.others.values()
    assert [Path(name).name for name in others.images.get_names()] == ["1.png"]


def test_a_renamed_and_a_moved_photo_keep_their_answers(photos: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "answers.csv", [answer(photos / "cat/0.png", "Äpfel")])
    (photos / "cat/0.png").rename(photos / "cat/new.png")
    moved = photos.rename(tmp_path / "elsewhere")
    assert read(moved, file)["new.png"] == "Äpfel"


def test_the_latest_answer_counts_in_any_order_of_files(photos: Path, tmp_path: Path) -> None:
    photo = photos / "cat/0.png"
    first = write(tmp_path / "1.csv", [answer(photo, "cat", "2026-12-01T10:00:00Z")])
    second = write(tmp_path / "2.csv", [answer(photo, "Äpfel", "2026-12-02T09:00:00Z")])
    assert read(photos, second, first)["0.png"] == "Äpfel"


def test_two_answers_whose_order_a_spreadsheet_has_lost_are_an_error(
    photos: Path, tmp_path: Path
) -> None:
    photo = photos / "cat/0.png"
    rows = [answer(photo, "cat", "12/1/26 10:00"), answer(photo, "Äpfel", "12/2/26 9:00")]
    with pytest.raises(ValueError, match="their times do not tell which is the latest"):
        read(photos, write(tmp_path / "answers.csv", rows))


def test_a_spreadsheet_may_change_order_separator_and_encoding(
    photos: Path, tmp_path: Path
) -> None:
    rows = [answer(photos / "cat/0.png", unicodedata.normalize("NFD", "Äpfel"))]
    rows.append(answer(photos / "Äpfel/1.png", "cat"))
    rows = [dict(reversed(row.items())) | {"remark": "-"} for row in reversed(rows)]
    file = write(tmp_path / "answers.csv", rows, encoding="utf-8-sig", delimiter=";")
    found = read(photos, file)
    assert (found["0.png"], found["1.png"]) == ("Äpfel", "cat")


@pytest.mark.parametrize("column", ["image", "checksum"])
def test_a_column_that_was_sorted_alone_is_an_error(
    column: str, photos: Path, tmp_path: Path
) -> None:
    rows = [answer(photo, "cat") for photo in sorted(photos.glob("*/*.png"))]
    values = sorted((row[column] for row in rows), reverse=True)
    rows = [row | {column: value} for row, value in zip(rows, values, strict=True)]
    with pytest.raises(ValueError, match="another photo, as after a column was sorted alone"):
        read(photos, write(tmp_path / "answers.csv", rows))


def test_without_the_column_of_names_photos_may_have_exchanged_them(
    photos: Path, tmp_path: Path
) -> None:
    row = answer(photos / "cat/0.png", "Äpfel")
    shutil.move(photos / "cat/0.png", tmp_path / "x.png")
    shutil.move(photos / "cat/2.png", photos / "cat/0.png")
    shutil.move(tmp_path / "x.png", photos / "cat/2.png")
    with pytest.raises(ValueError, match="remove the column image"):
        read(photos, write(tmp_path / "answers.csv", [row]))
    del row["image"]
    assert read(photos, write(tmp_path / "answers.csv", [row]))["2.png"] == "Äpfel"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "dog"}, "cat/0.png is 'dog', but the classes are cat, Äpfel"),
        ({"checksum": "1.23E+15"}, "row 1: the checksum '1.23E.15' is damaged"),
        ({"checksum": "0" * 16}, "none of the 1 answers is about a photo of"),
    ],
)
def test_answers_that_cannot_be_used_are_an_error(
    changes: Row, message: str, photos: Path, tmp_path: Path
) -> None:
    row = answer(photos / "cat/0.png", "cat") | changes
    with pytest.raises(ValueError, match=message):
        read(photos, write(tmp_path / "answers.csv", [row]))


def test_photos_that_a_model_was_unsure_about_are_not_held_out(
    photos: Path, tmp_path: Path
) -> None:
    files = sorted(photos.glob("*/*.png"))
    held_out = set()
    for file in files:
        row = answer(file, file.parent.name) | {"chosen": "unsure"}
        options = DataOptions(dataset=str(photos), answers=(write(tmp_path / "1.csv", [row]),))
        names = divide_images(load_undivided_images(options), 0.4).held_out.images.get_names()
        assert len(names) == 2
        assert file.name not in {Path(name).name for name in names}
        held_out |= {*names}
    assert len(held_out) > 2  # Without this rule, it would be the same two


def test_a_table_without_answers_is_an_error(photos: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "labels.csv", [{"file_name": "cat/0.png", "label": "cat"}])
    with pytest.raises(ValueError, match="no column 'checksum'"):
        read(photos, file)


def test_of_a_table_of_predictions_only_what_a_person_said_is_an_answer(
    photos: Path, tmp_path: Path
) -> None:
    files = sorted(photos.glob("cat/*.png"))
    rows = [
        {"image": str(file), "checksum": compute_checksum(file), "label": "Äpfel", "source": source}
        for file, source in zip(files, ("person", "model", "model"), strict=False)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "table.parquet")
    found = read(photos, str(tmp_path / "table.parquet"))
    assert [found[file.name] for file in files[:2]] == ["Äpfel", "cat"]

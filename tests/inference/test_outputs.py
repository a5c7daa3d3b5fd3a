"""Outputs of prediction: files, tables and progress."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from helpers.tiny_models import raises_one_line

from modeling_vitcls.inference import outputs
from modeling_vitcls.inference.outputs import (
    get_output_columns,
    print_table,
    write_rows,
)


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


# Files ---------------------------------------------------------------------------------------------------------------


def test_files_are_written_atomically(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"index": 0, "image": "a", "error": None}
        raise ValueError("the input ends early")

    for suffix in (".csv", ".json", ".jsonl", ".parquet"):
        file = tmp_path / f"out{suffix}"
        file.write_text("from before", encoding="utf-8")
        with pytest.raises(ValueError, match="ends early"):
            write_rows(rows(), get_output_columns({}), file)
        assert file.read_text(encoding="utf-8") == "from before"
    assert len(list(tmp_path.iterdir())) == 4


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"]


def test_text_in_csv_files_is_not_a_formula(tmp_path: Path) -> None:
    """Spreadsheets evaluate cells that start with these characters. Other formats keep the text."""
    columns = get_output_columns({"labels": pa.list_(pa.string()), "=task_label": pa.string(), "p": pa.float32()})
    rows = [
        {"index": -1, "image": text, "labels": [text, "b"], "=task_label": text, "p": -0.5, "error": None}
        for text in FORMULAS
    ]
    write_rows(rows, columns, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        header, *found = csv.reader(file)
    assert header == ["index", "image", "labels", "'=task_label", "p", "error"]
    cells = [f"'{text}".replace("\t", " ").replace("\r", " ") for text in FORMULAS]
    assert found == [["-1", cell, f"{cell}|b", cell, "-0.5", ""] for cell in cells]
    write_rows([rows[0] | {"image": "a\x1b[31m\x07\nb"}], columns, tmp_path / "out.csv")
    assert "a\ufffd[31m\ufffd b" in (tmp_path / "out.csv").read_text(encoding="utf-8")
    write_rows(rows, columns, tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["image"] for line in lines[:-1]] == FORMULAS


def test_tables_show_errors_only_if_there_are_any_and_no_index(capsys: pytest.CaptureFixture) -> None:
    columns = {"index": pa.int64(), "image": pa.string(), "error": pa.string()}
    for error, header in ((None, ["image"]), ("damaged", ["image", "error"])):
        print_table(
            [{"index": 0, "image": "1.png", "error": None}, {"index": 1, "image": "2.png", "error": error}], columns
        )
        assert [cell.strip() for cell in capsys.readouterr().out.splitlines()[1].strip("┃ ").split("┃")] == header


def test_tables_show_numbers_with_four_decimals_and_lists_in_one_cell(capsys: pytest.CaptureFixture) -> None:
    columns = get_output_columns(
        {"labels": pa.list_(pa.string()), "probabilities": pa.list_(pa.float32()), "probability": pa.float32()}
    )
    row = {"index": 0, "image": "1.png", "labels": ["ant", "bee"], "probabilities": [0.75, 0.5], "error": None}
    print_table(
        [row | {"probability": 0.123456}, row | {"labels": [], "probabilities": [], "probability": None}], columns
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if "1.png" in line]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert cells == [["1.png", "ant, bee", "0.7500, 0.5000", "0.1235"], ["1.png", "", "", ""]]


def test_progress_counts_images_and_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is simulated. Without a terminal, a line is printed every ten seconds and at the end."""
    clock = [0.0]
    monkeypatch.setattr(outputs, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    rows = [{"error": "unreadable" if index % 3 == 0 else None} for index in range(10)]

    def read_rows(seconds: float) -> Iterator[dict[str, Any]]:
        for row in rows:
            clock[0] += seconds
            yield row

    for seconds, total, is_shown, counts, images_per_second in (
        (0.004, 2000, True, [(10, 4)], 250),
        (0.004, None, True, [(10, 4)], 250),
        (4.0, 2000, True, [(3, 1), (6, 2), (9, 3), (10, 4)], 0),
        (4.0, 2000, False, [], 0),
    ):
        with outputs.Progress(total, is_shown) as progress:
            assert list(progress.track_rows(read_rows(seconds))) == rows
        assert (progress.num_images, progress.num_failed) == (10, 4)
        assert capsys.readouterr().err.splitlines() == [
            f"{num_images}{' of 2,000' if total else ''} images, {images_per_second} images/s, "
            f"{num_failed} without a prediction (see the column `error`)"
            for num_images, num_failed in counts
        ]
    with pytest.raises(ValueError, match="an error"), outputs.Progress(2000, is_shown=True):
        raise ValueError("an error")
    assert not capsys.readouterr().err


def test_tables_show_no_control_characters(capsys: pytest.CaptureFixture) -> None:
    """A terminal would interpret escape sequences in names of files and classes."""
    name = "\x1b]0;title\x07\x1b[31m[bold]red\u202e\n\r2"
    print_table(
        [{"image": name, name: name, "error": None}], {"image": pa.string(), name: pa.string(), "error": pa.string()}
    )
    printed = capsys.readouterr().out
    assert not [character for character in printed if not character.isprintable() and character != "\n"]
    assert printed.count("[bold]red") == 3


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "out.json").mkdir()
    with raises_one_line(f"cannot write {tmp_path / 'out.json'}", error=OSError):
        write_rows([], get_output_columns({}), tmp_path / "out.json")

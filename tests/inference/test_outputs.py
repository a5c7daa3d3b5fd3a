"""Outputs of prediction: files, tables and progress."""

import codecs
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pytest import CaptureFixture

from modeling_vitcls.inference.outputs import (
    WRITERS,
    Columns,
    get_output_columns,
    print_table,
    write_csv,
)


FIRST = {"index": pa.int64(), "image": pa.string()}
LAST = {"error": pa.string()}


def write_rows(rows: list[dict[str, Any]], columns: Columns, file: Path) -> None:
    schema = pa.schema(list(columns.items()))
    tables = [pa.Table.from_pylist([row], schema) for row in rows]
    WRITERS[file.suffix](tables, schema, file)


# Files --------------------------------------------------------------------------------------------


def test_spreadsheets_of_other_languages_get_semicolons_and_decimal_commas(tmp_path: Path) -> None:
    table = pa.table({"image": ["a;b.jpg"], "probability": [0.25], "each": [[0.25, 0.5]]})
    write_csv([table], table.schema, tmp_path / "rows.csv", delimiter=";")
    text = (tmp_path / "rows.csv").read_text()
    assert text == 'image;probability;each\n"a;b.jpg";0,25;0,25|0,5\n'


def test_lists_and_half_precision_are_written_to_every_format(tmp_path: Path) -> None:
    """In CSV files, the labels of an image are in one cell.

    A missing prediction is empty or null.
    """
    types = {"labels": pa.list_(pa.string()), "p": pa.list_(pa.float16()), "unknown": pa.bool_()}
    first = {"index": 0, "image": "a\nb,c", "labels": ["x", "ü"], "p": [0.5, 0.25], "unknown": True}
    second = {"index": 1, "image": "d", **dict.fromkeys(types)}
    expected = [first | {"error": None}, second | {"error": "unreadable"}]
    rows = [first | {"p": np.float16([0.5, 0.25])}, expected[1]]
    for suffix in (".csv", ".json", ".jsonl", ".parquet"):
        write_rows(rows, FIRST | types | LAST, tmp_path / f"out{suffix}")

    # Excel takes a file for UTF-8 only if it begins with a mark.
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8-sig") as file:
        header, *found = csv.reader(file)
    assert header == ["index", "image", "labels", "p", "unknown", "error"]
    assert found == [
        ["0", "a\\nb,c", "x|ü", "0.5|0.25", "True", ""],
        ["1", "d", "", "", "", "unreadable"],
    ]
    assert (tmp_path / "out.csv").read_bytes().startswith(codecs.BOM_UTF8)
    write_rows(rows[1:], FIRST | types | LAST, tmp_path / "ascii.csv")
    assert (tmp_path / "ascii.csv").read_bytes().isascii()
    assert json.loads((tmp_path / "out.json").read_text()) == expected
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == expected
    assert "ü" in lines[0]
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == expected


def test_labels_that_contain_the_separator_are_told_apart_in_a_csv_file(tmp_path: Path) -> None:
    columns = {"labels": pa.list_(pa.string()), "probabilities": pa.list_(pa.float32())}
    rows = [
        {"labels": ["fruit|apple", "=red"], "probabilities": [0.75, 0.5]},
        {"labels": ["pear"], "probabilities": [0.5]},
    ]
    write_rows(rows, columns, tmp_path / "rows.csv")
    found = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [json.loads(row["labels"]) for row in found] == [["fruit|apple", "=red"], ["pear"]]
    assert found[0]["probabilities"] == "0.75|0.5"


def test_tables_show_no_control_characters(capsys: CaptureFixture) -> None:
    """A terminal would interpret escape sequences in names of files and classes."""
    name = "\x1b]0;title\x07\x1b[31m[bold]red\u202e\n\r2"
    columns = get_output_columns({name: pa.string()})
    print_table([dict.fromkeys(columns) | {"image": name, name: name}], columns)
    printed = capsys.readouterr().out
    assert not [
        character for character in printed if not character.isprintable() and character != "\n"
    ]
    assert printed.count("[bold]red") == 3

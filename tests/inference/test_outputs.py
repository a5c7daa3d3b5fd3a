"""Outputs of prediction: files, tables, progress, and folders of shards."""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from helpers.fresh_processes import SCRIPT_ENVIRONMENT
from helpers.tiny_models import raises_one_line

from modeling_vitcls.files import read_json
from modeling_vitcls.inference import outputs
from modeling_vitcls.inference.outputs import (
    ShardFolder,
    get_output_columns,
    iterate_shards,
    print_table,
    write_rows,
)


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


# Folders of shards ---------------------------------------------------------------------------------------------------


def test_a_folder_is_complete_if_every_shard_has_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "ROWS_PER_GROUP", 3)
    folder = ShardFolder(tmp_path, shard_size=4)
    rows = [{"index": index, "image": str(index), "error": None if index else "unreadable"} for index in range(9)]
    for number in range(3):
        assert not folder.is_complete(9)
        write_rows(rows[number * 4 : number * 4 + 4], get_output_columns({}), folder.get_shard_file(number))
    assert folder.is_complete(9) and not folder.is_complete(13)
    assert folder.count_rows(9) == (9, 1)
    for number, kept in ((1, rows[4:7]), (2, [])):
        write_rows(kept, get_output_columns({}), folder.get_shard_file(number))
        with raises_one_line(
            f"shard-00000{number}.parquet must have", f"but has {len(kept)}. Delete the file and repeat the command"
        ):
            folder.count_rows(9)
        write_rows(rows[number * 4 : number * 4 + 4], get_output_columns({}), folder.get_shard_file(number))


@pytest.mark.parametrize("num_images", [1, 7, 8, 9])
def test_each_image_is_in_one_shard(num_images: int) -> None:
    shards = list(iterate_shards(num_images, 4))
    assert [index for indices in shards for index in indices] == list(range(num_images))


HEARTBEAT = """
import sys, time
from pathlib import Path
from modeling_vitcls.inference import outputs
outputs.SECONDS_BETWEEN_HEARTBEATS = 0.05
with outputs.send_heartbeats(outputs.ShardFolder(Path(sys.argv[1]), 4).get_heartbeat_file(1)):
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_killed_processes_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "SECONDS_BETWEEN_HEARTBEATS", 0.05)
    monkeypatch.setattr(outputs, "MAX_HEARTBEAT_AGE", 2.0)
    folder = outputs.ShardFolder(tmp_path, 4)
    command = [sys.executable, "-c", HEARTBEAT, tmp_path]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, env=SCRIPT_ENVIRONMENT) as other,
        outputs.send_heartbeats(folder.get_heartbeat_file(0)),
    ):
        assert other.stdout is not None and other.stdout.readline() == b"ready\n"
        last = folder.get_heartbeat_file(1).stat().st_mtime_ns
        while folder.get_heartbeat_file(1).stat().st_mtime_ns == last:
            time.sleep(0.01)
        other.kill()
        with raises_one_line("lacks shards of a process that has ended. Repeat the command", error=OSError):
            folder.wait_for_shards(4, 2)
        folder.get_heartbeat_file(1).unlink()  # as after an error
        with raises_one_line("lacks shards of a process that has ended. Repeat the command", error=OSError):
            folder.wait_for_shards(4, 2)
        folder.get_shard_file(0).touch()
        folder.wait_for_shards(4, 2)
    assert [file.name for file in tmp_path.iterdir()] == ["shard-000000.parquet"]


def test_shards_are_awaited_while_other_processes_are_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats that are too old or missing are those of processes that have ended."""
    folder = ShardFolder(tmp_path, shard_size=4)
    other = folder.get_heartbeat_file(1)
    other.touch()
    waits = []

    def wait(seconds: float) -> None:
        """Write the last shard, as the other process does."""
        waits.append(seconds)
        folder.get_shard_file(len(waits) - 1).touch()

    monkeypatch.setattr(outputs.time, "sleep", wait)
    folder.wait_for_shards(8, 2)
    assert len(waits) == 2
    for age, has_ended in ((outputs.MAX_HEARTBEAT_AGE / 2, False), (outputs.MAX_HEARTBEAT_AGE * 2, True)):
        os.utime(other, (time.time() - age,) * 2)
        folder.get_shard_file(1).unlink()
        waits = [0.0]
        if has_ended:
            folder.get_heartbeat_file(2).touch()  # of a third process, which is running
            for num_processes in (2, 3):
                with raises_one_line("lacks shards of a process that has ended", error=OSError):
                    folder.wait_for_shards(8, num_processes)
            folder.wait_for_shards(4, 2)
        else:
            folder.wait_for_shards(8, 2)
    other.unlink()
    with raises_one_line("lacks shards of a process that has ended", error=OSError):
        folder.wait_for_shards(8, 2)


def test_a_heartbeat_is_removed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "SECONDS_BETWEEN_HEARTBEATS", 0.001)
    file = tmp_path / "heartbeat"
    with pytest.raises(ValueError, match="an error"), outputs.send_heartbeats(file):
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 60
        while file.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        raise ValueError("an error")
    assert not file.exists()


def test_unfinished_files_of_a_killed_start_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".shard-000000.parquet.77.unfinished").write_bytes(b"half")
    folder = ShardFolder(tmp_path, shard_size=2)
    assert folder.open({"input": "this"}) is None
    assert [file.name for file in tmp_path.iterdir()] == [".manifest.json"]
    folder.record_num_images(5)
    assert folder.open({"input": "this"}) == 5
    assert not folder.is_complete(5)
    manifest = read_json(tmp_path / ".manifest.json")
    for change, words in (({"format": 0}, "another format"), ({"old": 7}, "--old 7, not None")):
        (tmp_path / ".manifest.json").write_text(json.dumps(manifest | change), encoding="utf-8")
        with raises_one_line(f"was written with {words}. Use the same flags"):
            folder.open({"input": "this"})


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
    assert found == [["-1", f"'{text}", f"'{text}|b", f"'{text}", "-0.5", ""] for text in FORMULAS]
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

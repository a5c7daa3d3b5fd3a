"""Folders of predictions: a command accepts exactly the files of one prediction.

The commands are `--merge` and a repeated prediction.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.accelerate_state import reset_accelerate
from helpers.command_in_process import run_here
from helpers.photo_folders import write_photos
from helpers.tiny_models import build_tiny_config, save_with_processor
from PIL import Image

from modeling_vitcls import ViTCLSForImageClassification


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

NUM_IMAGES = 11
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    return save_with_processor(ViTCLSForImageClassification(build_tiny_config()), folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), range(NUM_IMAGES), "cat")


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two Parquet files of six images."""
    folder = tmp_path_factory.mktemp("stream")
    for number in range(2):
        images = [
            Image.fromarray(np.full((32, 32, 3), 20 * number + index, np.uint8))
            for index in range(6)
        ]
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": images}, features).to_parquet(
            folder / f"{number}.parquet"
        )
    return folder


def predict(model: Path, output: Path, *source: object, shard_size: int = 2) -> int:
    reset_accelerate()
    flags = ["--output", output, "--shard-size", shard_size]
    return run_here("predict", "--model", str(model), *map(str, [*source, *flags]))


@pytest.fixture(scope="module")
def finished(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with six shards of the photographs."""
    folder = tmp_path_factory.mktemp("finished") / "labels"
    assert predict(model, folder, photos) == 0
    return folder


@pytest.fixture
def labels(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "labels")


def change_metadata(file: Path, **fields: Any) -> None:
    """Write a shard with changed metadata."""
    table = pq.read_table(file)
    metadata = json.loads(table.schema.metadata[b"vitcls"]) | fields
    pq.write_table(table.replace_schema_metadata({"vitcls": json.dumps(metadata)}), file)


def change_settings(file: Path) -> None:
    settings = json.loads(pq.read_schema(file).metadata[b"vitcls"])["settings"]
    change_metadata(file, settings=settings | {"top_k": 2})


CHANGES: dict[str, Change] = {
    "a renamed copy": lambda folder: shutil.copy(
        folder / "shard-000003.parquet", folder / "shard-000003 (1).parquet"
    ),
    "a shard after the last": lambda folder: shutil.copy(
        folder / "shard-000003.parquet", folder / "shard-000018.parquet"
    ),
    "a shard in place of another": lambda folder: shutil.copy(
        folder / "shard-000003.parquet", folder / "shard-000004.parquet"
    ),
    "a shard of a stream": lambda folder: shutil.copy(
        folder / "shard-000003.parquet", folder / "shard-0000-000003.parquet"
    ),
    "other settings": lambda folder: change_settings(folder / "shard-000003.parquet"),
    "a pipe": lambda folder: os.mkfifo(folder / "shard-000006.parquet"),
}
needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")


def check_error(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1, printed.err
    assert all(word in printed.err for word in words), printed.err


@needs_pipes
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_merge_refuses_files_that_are_not_of_the_prediction(
    change: Change, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(labels)
    assert run_here("predict", "--merge", str(labels), "--output", str(tmp_path / "all.csv")) == 1
    check_error(capsys, str(labels))
    assert not (tmp_path / "all.csv").exists()


@needs_pipes
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_repeated_prediction_refuses_files_of_another_one(
    change: Change, labels: Path, model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(labels)
    (labels / "shard-000000.parquet").unlink()
    assert predict(model, labels, photos) == 1
    check_error(capsys, str(labels))
    assert not (labels / "shard-000000.parquet").exists()  # no image was predicted before the error


def test_an_absurd_number_of_shards_is_an_error(
    labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in labels.iterdir():
        change_metadata(file, num_shards=10**12)
    assert run_here("predict", "--merge", str(labels)) == 1
    check_error(capsys, str(labels))


def test_merge_does_not_write_into_the_folder_of_shards(
    labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = labels / "shard-000018.parquet"
    assert run_here("predict", "--merge", str(labels), "--output", str(output)) == 1
    check_error(capsys, str(output))
    assert not output.exists()


def test_merge_refuses_a_shard_after_the_last_one_of_a_stream(
    model: Path, stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels"
    assert predict(model, labels, "--dataset", stream, "--streaming", shard_size=5) == 0
    assert run_here("predict", "--merge", str(labels)) == 0
    capsys.readouterr()
    last = labels / "shard-0000-000002.parquet"
    extra = labels / "shard-0000-000003.parquet"
    table = pq.read_table(last)
    table = table.set_column(0, "index", [np.arange(15, 17)])
    pq.write_table(table, extra)
    assert run_here("predict", "--merge", str(labels)) == 1
    check_error(capsys, str(extra))


def test_a_stream_whose_files_changed_is_not_continued(
    model: Path, stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(stream, tmp_path / "source")
    labels = tmp_path / "labels"
    assert predict(model, labels, "--dataset", source, "--streaming") == 0
    (labels / "shard-0000-000005.parquet").unlink()
    table = pq.read_table(source / "0.parquet")
    pq.write_table(table.slice(0, 2), source / "0.parquet")
    capsys.readouterr()
    assert predict(model, labels, "--dataset", source, "--streaming") == 1
    check_error(capsys, "another input")


def test_a_living_process_keeps_its_partial_file(labels: Path, model: Path, photos: Path) -> None:
    """Several processes may write the same shard, for example after a job was requeued."""
    living, killed = (
        labels / f".shard-000001.parquet.{name}.unfinished" for name in ("living", "killed")
    )
    living.touch()
    killed.touch()
    os.utime(killed, (0, time.time() - 86400))
    (labels / "shard-000001.parquet").unlink()
    assert predict(model, labels, photos) == 0
    assert living.exists()
    assert not killed.exists()

"""Inputs of prediction: files, folders and datasets."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers.photo_folders import write_files
from helpers.tiny_models import raises_one_line
from PIL import Image

from modeling_vitcls.data import image_folder
from modeling_vitcls.inference import inputs
from modeling_vitcls.inference.inputs import (
    build_record,
    open_input,
    prepare_image,
)
from modeling_vitcls.inference.options import PredictOptions


def open_paths(*paths: Path | str) -> Any:
    return open_input(PredictOptions(model="model", paths=tuple(map(str, paths))))


def test_other_files_in_folders_are_counted_with_the_remedy_for_heic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without pillow-heif, Pillow has no decoder for HEIC."""
    suffixes = image_folder.IMAGE_SUFFIXES - image_folder.HEIF_SUFFIXES
    for module in (inputs, image_folder):
        monkeypatch.setattr(module, "IMAGE_SUFFIXES", suffixes)
    write_files(tmp_path, "a.heic", "inner/b.HEIC", "notes.txt")
    with raises_one_line("there are no images", "notes.txt", "to JPEG"):
        open_paths(tmp_path)

    (tmp_path / "c.png").touch()
    assert len(open_paths(tmp_path)[0]) == 1
    (message,) = caplog.messages
    assert "skipped files that are no images (3): " in message
    assert ". To read HEIC" in message


def test_images_of_folders_are_sorted_without_hidden_ones_and_those_of_training_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those in several paths count each time."""
    write_files(tmp_path, "b/2.PNG", "b/1.png", "a/3.jpg", "0.png", ".c/4.png", "a/.5.png")
    write_files(tmp_path, "a/6.txt", "run/config.resolved.yaml", "run/images/figure.png")
    source, left_out = open_paths(tmp_path, tmp_path / "b")
    names = ["0.png", "a/3.jpg", "b/1.png", "b/2.PNG", "b/1.png", "b/2.PNG"]
    assert [record.name for record in source] == [str(tmp_path / name) for name in names]
    assert left_out == [str(tmp_path / name) for name in (".c (images: 1)", "run")]
    assert left_out[1] in caplog.messages[0]
    assert "several of these paths (2)" in caplog.text


def test_values_of_a_column_are_paths_bytes_or_images(tmp_path: Path) -> None:
    image = Image.new("L", (4, 4))

    for value, name, content in (
        ("a.png", "a.png", str(tmp_path / "a.png")),
        ("memory://a.png", "memory://a.png", "memory://a.png"),
        ("a\udcff.png", "a\ufffd.png", str(tmp_path / "a\udcff.png")),
        ({"path": "a.png", "bytes": None}, "a.png", "a.png"),
        ({"path": "a.png", "bytes": b"encoded"}, "a.png", b"encoded"),
        ({"path": None, "bytes": b"encoded"}, "7", b"encoded"),
        (image, "7", image),
        (None, "7", None),
    ):
        assert build_record(7, value, tmp_path) == (name, content)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("https://a.org/1.png", "`curl -O https://a.org/1.png`"),
        ("no.jpg", "no.jpg' does not exist"),
    ],
)
def test_an_address_and_a_missing_file_are_refused(path: str, words: str) -> None:
    with raises_one_line(words):
        open_paths(path)


def test_datasets_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    table, empty = str(tmp_path / "table.csv"), str(tmp_path / "empty")
    Path(table).write_text("a,b\n1,2\n", encoding="utf-8")
    datasets.Dataset.from_dict({"image": []}).save_to_disk(empty)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"dataset": table}, "cannot identify the image column"),
        ({"dataset": table, "image_column": "c"}, "has no column 'c'. Choose one of a, b"),
        ({"dataset": table, "split": "test"}, "`split`"),
        ({"dataset": empty}, "empty is empty"),
    ]
    for options, words in wrong:
        with raises_one_line(words):
            open_input(PredictOptions(model="model", **options))


def test_large_images_are_decoded_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread would need gigabytes for a scan of 169 megapixels."""
    monkeypatch.setattr(inputs, "MAX_SHARED_PIXELS", 100)
    running: list[str] = []
    most: dict[str, int] = {}

    def process(file: str, **_: Any) -> dict[str, list[int]]:
        running.append(file)
        time.sleep(0.05)
        most[file] = max(most.get(file, 0), running.count(file))
        running.remove(file)
        return {"pixel_values": [0]}

    small, large = (str(tmp_path / f"{side}.png") for side in (10, 20))
    Image.new("1", (10, 10)).save(small)
    Image.new("1", (20, 20)).save(large)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda file: prepare_image(process, file, 0), [small, large] * 4))  # type: ignore
    assert most[large] == 1
    assert most[small] > 1

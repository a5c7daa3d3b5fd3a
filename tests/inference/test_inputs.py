"""Inputs of prediction: files, folders and datasets."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from helpers.photo_folders import write_files
from helpers.tiny_models import raises_one_line
from numpy.random import default_rng
from PIL import Image, TiffImagePlugin
from pytest import LogCaptureFixture, MonkeyPatch

from modeling_vitcls.data import image_folder
from modeling_vitcls.inference import inputs
from modeling_vitcls.inference.inputs import (
    build_record,
    find_note,
    open_input,
    prepare_image,
)
from modeling_vitcls.inference.options import PredictOptions


def test_other_files_in_folders_are_counted_with_the_remedy_for_heic(
    tmp_path: Path, monkeypatch: MonkeyPatch, caplog: LogCaptureFixture
) -> None:
    """Without pillow-heif, Pillow has no decoder for HEIC."""
    suffixes = image_folder.IMAGE_SUFFIXES - image_folder.HEIF_SUFFIXES
    for module in (inputs, image_folder):
        monkeypatch.setattr(module, "IMAGE_SUFFIXES", suffixes)
    write_files(tmp_path, "a.heic", "inner/b.HEIC", "notes.txt")
    options = PredictOptions(model="model", paths=(str(tmp_path),))
    with raises_one_line("there are no images", "notes.txt", "to JPEG"):
        open_input(options)

    (tmp_path / "c.png").touch()
    assert len(open_input(options)[0]) == 1
    (message,) = caplog.messages
    assert "skipped files that are no images (3): " in message
    assert ". To read HEIC" in message


def test_images_of_folders_are_sorted_without_hidden_ones_and_figures_of_a_training_run(
    tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    left = (".c/4.png", "a/.5.png", "a/6.txt", "run/config.resolved.yaml", "run/images/figure.png")
    write_files(tmp_path, "b/2.PNG", "b/1.png", "a/3.jpg", "0.png", *left)
    source, left_out = open_input(PredictOptions(model="model", paths=(str(tmp_path),)))
    names = [record.name for record in source]
    assert names == [str(tmp_path / name) for name in ("0.png", "a/3.jpg", "b/1.png", "b/2.PNG")]
    assert sorted(left_out) == [str(tmp_path / ".c (images: 1)"), str(tmp_path / "run")]
    assert caplog.text.count(str(tmp_path / "run")) == 1


def test_photos_in_several_paths_are_said_to_count_each_time(
    tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    write_files(tmp_path, "b/1.png", "0.png")
    open_input(PredictOptions(model="model", paths=(str(tmp_path), f"{tmp_path}/b")))
    assert "several of these paths (1)" in caplog.text


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


def test_an_address_is_refused_before_any_request(tmp_path: Path) -> None:
    address = "https://a.org/1.png"
    with raises_one_line(f"`curl -O {address}`"):
        open_input(PredictOptions(model="model", paths=(address,)))
    _, content = build_record(0, address, tmp_path)
    assert f"`curl -O {address}`" in prepare_image(None, content, 0)  # type: ignore


def test_datasets_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    table, empty = str(tmp_path / "table.csv"), str(tmp_path / "empty")
    Path(table).write_text("a,b\n1,2\n")
    rows = datasets.Dataset.from_dict({"image": ["a.png"]})
    rows.filter(lambda row: False).save_to_disk(empty)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"dataset": table}, "cannot identify the image column"),
        ({"dataset": table, "image_column": "c"}, "has no column 'c'. Choose one of a, b"),
        ({"dataset": table, "split": "test"}, "`split`"),
        ({"dataset": empty}, "empty is empty"),
        ({"paths": (str(tmp_path / "no.jpg"),)}, "no.jpg' does not exist"),
    ]
    for options, words in wrong:
        with raises_one_line(words):
            open_input(PredictOptions(model="model", **options))


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """Each thread would need gigabytes for a scan of 169 megapixels."""
    monkeypatch.setattr(inputs, "MAX_SHARED_PIXELS", 100)
    running: list[int] = []
    most: dict[int, int] = {}

    def process(content: str, **_: Any) -> dict[str, list[int]]:
        side = int(Path(content).stem)
        running.append(side)
        time.sleep(0.05)
        most[side] = max(most.get(side, 0), running.count(side))
        running.remove(side)
        return {"pixel_values": [side]}

    files = [str(tmp_path / f"{side}.png") for side in (20, 10)]
    for file in files:
        Image.new("1", (int(Path(file).stem),) * 2).save(file)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda file: prepare_image(process, file, 0), files * 4))  # type: ignore
    assert most[20] == 1
    assert most[10] > 1


# Notes --------------------------------------------------------------------------------------------


def write_pages(file: Path, *subfile_types: int) -> Path:
    """Write a TIFF with a page of each type of NewSubfileType: 0 page, 1 overview, 4 mask."""
    image = Image.fromarray(default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    with TiffImagePlugin.AppendingTiffWriter(str(file), True) as writer:
        for kind in subfile_types:
            tags = TiffImagePlugin.ImageFileDirectory_v2()
            tags[254] = kind
            image.save(writer, format="TIFF", tiffinfo=tags)
            writer.newFrame()
    return file


@pytest.mark.parametrize("kinds", [(0,), (0, 1), (0, 1, 1), (0, 4), (0, 5)], ids=str)
def test_overviews_and_masks_of_a_tiff_are_no_pages(kinds: tuple[int, ...], tmp_path: Path) -> None:
    assert find_note(str(write_pages(tmp_path / "tile.tif", *kinds)), 16) is None


@pytest.mark.parametrize("kinds", [(0, 0), (0, 1, 0), (0, 2)], ids=str)
def test_pages_of_a_tiff_are_noted(kinds: tuple[int, ...], tmp_path: Path) -> None:
    assert find_note(str(write_pages(tmp_path / "scan.tif", *kinds)), 16) == "page 1 of several"


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "jp2"])
def test_an_index_map_is_noted_and_a_gray_photo_is_not(suffix: str, tmp_path: Path) -> None:
    generator = default_rng(0)
    for name, high in (("map", 3), ("photo", 256)):
        pixels = generator.integers(0, high, (32, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.{suffix}")
    assert "index map" in str(find_note(str(tmp_path / f"map.{suffix}"), 16))
    assert find_note(str(tmp_path / f"photo.{suffix}"), 16) is None


def test_a_jpeg_2000_of_16_bits_that_is_almost_black_is_noted(tmp_path: Path) -> None:
    pixels = default_rng(0).integers(0, 1024, (32, 32)).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "dark.jp2")
    assert "16-bit" in str(find_note(str(tmp_path / "dark.jp2"), 16))

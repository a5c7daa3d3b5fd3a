"""Sequences of images: names, bytes and checksums, and errors of individual images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.photo_folders import encode_image
from PIL import Image
from PIL.ExifTags import Base

from modeling_vitcls.data.images import (
    DatasetImages,
    get_relative_path,
    read_size,
)


def build_rows(folder: Path) -> list[dict[str, Any]]:
    """Return encoded images with a path, with bytes, and with both, whose bytes have priority."""
    encoded = [encode_image(Image.new("L", (3, 2), shade)) for shade in (1, 2, 3)]
    (folder / "a.png").write_bytes(encoded[0])
    return [
        {"path": f"{folder}/a.png", "bytes": None},
        {"path": None, "bytes": encoded[1]},
        {"path": f"{folder}/c.png", "bytes": encoded[2]},
    ]


def test_a_subset_has_the_names_bytes_and_checksums_of_its_images(tmp_path: Path) -> None:
    rows = build_rows(tmp_path)
    images = replace(DatasetImages.from_list(rows), folder=tmp_path)
    subset = images.select([1, 2, 0]).select([1, 2, 0])  # the last image, the first and the second

    assert [image.getpixel((0, 0)) for image in subset] == [3, 1, 2]
    assert subset.get_names() == ["c.png", "a.png", "1"]
    keys = images.compute_content_keys().tolist()
    assert subset.compute_content_keys().tolist() == [keys[2], keys[0], keys[1]]
    assert len(set(keys)) == 3
    assert [image.filename for image in subset] == [rows[2]["path"], rows[0]["path"], "row 1"]


def test_names_are_paths_within_the_folder_however_the_path_is_written() -> None:
    for path in ("/photos/cat/1.png", "/photos//cat/1.png", "/photos/./cat//1.png", "cat/1.png"):
        assert get_relative_path(path, Path("/photos")) == "cat/1.png"
    assert get_relative_path("/other/1.png", Path("/photos")) == "../other/1.png"
    for path in ("", "https://a.org/1.png"):
        assert get_relative_path(path, Path("/photos")) == path


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_size_of_a_turned_photo_is_that_of_its_upright_pixels(file_format: str) -> None:
    exif = Image.Exif()
    exif[Base.Orientation] = 6
    file = encode_image(Image.new("RGB", (20, 10)), file_format, exif=exif)
    images = DatasetImages.from_list([{"path": None, "bytes": file}])
    assert read_size(images, 0) == images[0].size[::-1] == (20, 10)

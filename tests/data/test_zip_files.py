"""Image folders in .zip files."""

import shutil
import tempfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers.photo_folders import write_photos
from helpers.tiny_models import raises_one_line

from modeling_vitcls.data import zip_files
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.splits import TrainingData, load_training_data
from modeling_vitcls.data.zip_files import unpack_zip
from modeling_vitcls.inference.inputs import open_input
from modeling_vitcls.inference.options import PredictOptions


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a new cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pack(folder: Path, base: str = ".") -> Path:
    """Pack a folder, under the name `base` in the file."""
    name = shutil.make_archive(str(folder), "zip", folder if base == "." else folder.parent, base)
    return Path(name)


def load(file: Path) -> TrainingData:
    return load_training_data(DataOptions(dataset=str(file)))


@pytest.mark.parametrize("base", [".", "photos"])
def test_a_folder_is_read_with_or_without_an_outer_folder(tmp_path: Path, base: str) -> None:
    file = pack(write_photos(tmp_path / "photos", range(6)), base)
    shutil.rmtree(tmp_path / "photos")
    data = load(file)

    assert data.label_space.names == ["cat", "dog"]
    assert len(data.train) + len(data.held_out) == 12
    assert "cat/0.png" in [*data.train.images.get_names(), *data.held_out.images.get_names()]
    assert data.train.images[0].size == (8, 8)
    assert open_input(PredictOptions(model="model", dataset=str(file))).num_images == 12


def test_a_changed_file_is_unpacked_again(tmp_path: Path) -> None:
    file = pack(write_photos(tmp_path / "photos", range(6)))
    load(file)
    pack(write_photos(tmp_path / "photos", range(7)))
    data = load(file)

    assert len(data.train) + len(data.held_out) == 14


@pytest.mark.parametrize(
    "name", ["../evil.png", "/tmp/evil.png", "cat\\..\\..\\evil.png", "C:/a.png"]
)
def test_nothing_is_written_outside_of_the_folder(tmp_path: Path, cache: Path, name: str) -> None:
    file = pack(write_photos(tmp_path / "photos", range(2)))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(name, b"evil")

    with raises_one_line("outside of its folder", "evil.png" if "evil" in name else "C:"):
        load(file)
    assert not list(tmp_path.rglob("evil*"))
    assert not cache.exists()


@pytest.mark.parametrize("limit", ["MAX_FILES", "MAX_BYTES", "MAX_RATIO"])
def test_large_files_are_refused_before_unpacking(
    tmp_path: Path, cache: Path, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = pack(write_photos(tmp_path / "photos", range(2)))
    monkeypatch.setattr(zip_files, limit, 0)

    with raises_one_line("exceeds the limits", "set `dataset` to the folder"):
        load(file)
    assert not cache.exists()


def test_damaged_files_leave_nothing_behind(tmp_path: Path, cache: Path) -> None:
    file = pack(write_photos(tmp_path / "photos", range(2)))
    content = file.read_bytes()
    file.write_bytes(content.replace(b"IDAT", b"XXXX"))
    with raises_one_line("cannot unpack", "CRC"):
        load(file)
    file.write_bytes(content[: len(content) // 2])
    with raises_one_line("cannot unpack", "not a zip file"):
        load(file)

    assert not list(cache.rglob("*.png"))


def test_two_commands_unpack_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have unpacked all files before the first one moves them to the cache."""
    file = pack(write_photos(tmp_path / "photos", range(6)))
    both = threading.Barrier(2)

    def make_folder(**options: Any) -> Any:
        both.wait(timeout=100)
        return temporary_directory(**options)

    temporary_directory = tempfile.TemporaryDirectory
    monkeypatch.setattr(zip_files.tempfile, "TemporaryDirectory", make_folder)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(unpack_zip, [file, file])
    assert first == second
    assert len(list(first.glob("*/*.png"))) == 12

"""A working folder with photographs and a model of them."""

from pathlib import Path

import pytest
from pytest import MonkeyPatch


@pytest.fixture
def place(tmp_path: Path, monkeypatch: MonkeyPatch) -> Path:
    """Work in a folder with `photos` of cats and dogs, and `model`: a classifier with a task."""
    from helpers.photo_folders import write_photos
    from helpers.tiny_models import save_classifier

    write_photos(tmp_path / "photos", range(8))
    heads = {"weather": {"labels": ["rain", "sun"]}}
    save_classifier(tmp_path / "model", "cat", "dog", "fox", extra_heads=heads)
    monkeypatch.chdir(tmp_path)
    return tmp_path

"""Evaluation and prediction refuse ambiguous labels and damaged configurations."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.accelerate_state import reset_accelerate
from helpers.command_in_process import check_error, run_here
from helpers.photo_folders import write_photos
from helpers.tiny_models import save_classifier, save_encoder
from pytest import CaptureFixture

from modeling_vitcls.runtime.files import read_json


NAMES = ("cat", "dog", "fox")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", range(6), *NAMES)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_classifier(tmp_path / "model", *NAMES)


def run_evaluation(model: Path, photos: Path, *flags: object) -> int:
    reset_accelerate()
    data = ["--dataset", photos, "--num-workers", "0"]
    return run_here("evaluate", "--model", model, *map(str, [*data, *flags]))


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ({"pooling": "max"}, []),
        ({}, ["--pooling", "max", "--pooled-layers", "-2", "-1"]),
        ({"pooling": "attention"}, []),
        ({"pooled_norm": True}, []),
    ],
    ids=["max", "max of two layers", "attention", "pooled_norm"],
)
def test_a_frozen_run_is_evaluated_whatever_its_pooler(
    fields: dict[str, Any], flags: list[str], photos: Path, tmp_path: Path
) -> None:
    """The pooler reads the hidden states, which classifiers return, too."""
    encoder = save_encoder(tmp_path / "encoder", **fields)
    run = ["--output-dir", tmp_path / "run", "--trainable", "head", "--no-report", *flags]
    assert run_here("finetune", "--model", encoder, "--dataset", photos, *run) == 0
    card = (tmp_path / "run/README.md").read_text()
    assert "shrinkage LDA on the model's own pooling" in card  # Whatever its layers
    others = write_photos(tmp_path / "others", range(6, 8), *NAMES)
    assert run_evaluation(tmp_path / "run", others, "--output", tmp_path / "results.json") == 0
    assert read_json(tmp_path / "results.json")["in_trained_scenes"]["num_images"] == 6


def test_five_copies_of_each_photo_leave_the_interval_as_it_is(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    assert run_evaluation(model, photos, "--output", tmp_path / "once.json") == 0
    for file in photos.glob("*/*"):
        for number in range(4):
            shutil.copyfile(file, file.with_stem(f"{file.stem} copy {number}"))
    assert run_evaluation(model, photos, "--output", tmp_path / "copied.json") == 0
    once, copied = (read_json(tmp_path / f"{name}.json") for name in ("once", "copied"))
    assert copied["num_images"] == 5 * once["num_images"]
    assert copied["accuracy_interval"] == once["accuracy_interval"]


def test_labels_with_the_same_name_are_not_evaluated(
    photos: Path, tmp_path: Path, capsys: CaptureFixture
) -> None:
    """Published models have such labels: two classes of ImageNet are called crane."""
    label2id = {"cat": 3, "dog": 1, "fox": 2}
    model = save_classifier(tmp_path / "model", "cat", "dog", "fox", "cat", label2id=label2id)
    assert run_evaluation(model, photos) == 1
    check_error(capsys, "'cat'")

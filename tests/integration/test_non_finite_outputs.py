"""Outputs that are NaN are an error of every command that would publish a number about them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_in_process import check_error, run_here
from helpers.photo_folders import write_photos
from helpers.tiny_models import build_random, save_both

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor, ViTCLSModel


TRAINING = (
    "--model vitcls-tiny --hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 "
    "--image-size 32 --patch-size 8 --max-steps 2 --batch-size 4 --num-workers 0"
).split()


def save_nan_model(model: Any, weight: str, folder: Path) -> Path:
    """Save a model in which one weight is NaN."""
    model.get_parameter(weight).data.fill_(torch.nan)
    return save_both(model, folder, ViTCLSImageProcessor(size=32))


@pytest.fixture(scope="module")
def photos(module_path: Path) -> Path:
    return write_photos(module_path / "photos", range(8))


@pytest.fixture(scope="module")
def classifier(module_path: Path) -> Path:
    labels = {"id2label": {0: "cat", 1: "dog"}, "num_labels": 2}
    model = build_random(ViTCLSForImageClassification, **labels)
    return save_nan_model(model, "classifier.weight", module_path / "classifier")


@pytest.fixture(scope="module")
def encoder(module_path: Path) -> Path:
    model = build_random(ViTCLSModel)
    return save_nan_model(model, "layernorm.weight", module_path / "encoder")


def test_evaluate_reports_no_accuracy(
    classifier: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = ["--model", classifier, "--dataset", photos, "--num-workers", "0"]
    rows = ["--per-image", tmp_path / "rows.parquet"]
    assert run_here("evaluate", *model, *rows, "--output", tmp_path / "results.json") == 1
    check_error(capsys, "not finite", "16 of 16 images")
    assert not list(tmp_path.iterdir())


def test_finetune_does_not_learn_from_a_teacher(
    classifier: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--dataset", photos, "--output-dir", tmp_path / "run"]
    assert run_here("finetune", *flags, *TRAINING, "--teacher", classifier) == 1
    check_error(capsys, "not finite", str(classifier), "4 of 4 images")
    assert not (tmp_path / "run/model.safetensors").exists()


def test_finetune_fits_no_probe(
    encoder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--dataset", photos, "--output-dir", tmp_path / "run"]
    flags += "--batch-size 4 --num-workers 0 --trainable head".split()
    assert run_here("finetune", "--model", encoder, *flags) == 1
    check_error(capsys, "not finite", "images")

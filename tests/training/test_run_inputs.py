"""Whole runs in this process: defaults, the best checkpoint, and no held-out images."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.photo_folders import write_photos
from helpers.tiny_models import raises_one_line, save_encoder
from helpers.tiny_options import (
    build_tiny_options,
    read_metrics,
    run_training,
)
from pytest import CaptureFixture, MonkeyPatch

from modeling_vitcls.training.run_inputs import load_images


def build_options(folder: Path, dataset: object = "digits", **training: Any) -> Any:
    """Return the options of a run of a tiny model."""
    return build_tiny_options(
        folder, dataset, **{"batch_size": 16, "learning_rate": 3e-3} | training
    )


# Defaults -----------------------------------------------------------------------------------------


def test_defaults_are_recorded(tmp_path: Path) -> None:
    flags = {"crop_scale": None, "augment": None, "max_steps": 2, "weight_decay": 0.1}
    options = build_tiny_options(tmp_path / "run", "digits", **flags)
    run_training(options)
    resolved = yaml.safe_load((tmp_path / "run/config.resolved.yaml").read_text())
    expected = {
        "learning_rate": 0.001,
        "batch_size": 32,
        "layer_decay": 1.0,
        "crop_scale": 1.0,
        "mixed_precision": "no",
        "weight_decay": 0.1,
    }

    assert {name: resolved[name] for name in expected} == expected
    assert not resolved.keys() & {"config", "resume", "overwrite"}


# Splits -------------------------------------------------------------------------------------------


def test_a_validation_split_calibrates_and_the_test_split_is_reported(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    data = tmp_path / "data"
    splits = {"train": range(8), "val": range(8, 11), "test": range(11, 16)}
    for split, numbers in splits.items():
        write_photos(data / split, numbers)
    monkeypatch.setattr("modeling_vitcls.training.calibration.MIN_IMAGES", 6)
    encoder = save_encoder(tmp_path / "encoder")
    results = run_training(build_options(tmp_path / "run", data, max_steps=2, model=str(encoder)))
    assert results["split"] == "split 'test'"
    assert results["num_images"] == 10
    assert results["dataset"] == "data"
    assert results["calibration"]["num_images"] == 6
    names = {name for record in read_metrics(tmp_path / "run") for name in record}
    assert "selection_accuracy" in names
    assert not any(name.startswith("held_out") for name in names)
    assert results["num_training_images"] == 16


# Training on all images
# --------------------------------------------------------------------------


def test_a_run_on_all_images_has_no_accuracy(tmp_path: Path, capsys: CaptureFixture) -> None:
    flags = {"held_out_fraction": 0.0, "max_steps": 2, "report": True}
    results = run_training(build_options(tmp_path / "run", **flags))
    assert results["num_training_images"] == 300
    assert results["num_images"] == 0
    output = capsys.readouterr().out

    assert "accuracy" not in results
    assert "not evaluated" in output
    assert "WARNING" not in output


# Classes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("mixup", 0.1),
        ("augment", {"cutmix": 0.1}),
        ("class_balance", "weights"),
        ("teacher", "timm:resnet18"),
    ],
)
def test_mixing_balancing_and_teachers_require_one_label_per_image(
    flag: str, value: Any, tmp_path: Path
) -> None:
    write_photos(tmp_path, range(2))
    table = tmp_path / "table.csv"
    table.write_text("image,kind,tags\ncat/0.png,cat,wet\ncat/1.png,cat,wet|old\ndog/0.png,dog,old")

    def load(**labels: Any) -> Any:
        return load_images(build_options(tmp_path / "run", table, **{flag: value}, **labels))

    assert load(label_column=("kind",)).label_space.kind == "single_label_classification"
    with raises_one_line(f"`{flag}", "multi_label_classification"):
        load(label_column=("tags",), label_separator="|")
    with raises_one_line(f"`{flag}", "multi_task"):
        load(label_column=("kind", "tags"))

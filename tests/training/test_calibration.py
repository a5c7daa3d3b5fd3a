"""Temperature and energy threshold of a fine-tuned classifier, and the predictions of its held-out images."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.tiny_options import build_tiny_options
from torchmetrics.functional.classification import multiclass_calibration_error

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.hub.model_files import PREDICTIONS_FILE
from modeling_vitcls.training.run import train


pytestmark = pytest.mark.integration


@pytest.mark.parametrize("select", ["last", pytest.param("best", marks=pytest.mark.slow)])
def test_calibration_uses_images_that_are_not_reported(select: str, tmp_path: Path) -> None:
    flags = {"image_size": 8, "patch_size": 2, "select": select, "max_steps": 20, "batch_size": 32}
    folder = train(build_tiny_options(tmp_path / "run", "digits", **flags))
    results = json.loads((folder / "results.json").read_text())
    model, calibration = ViTCLSForImageClassification.from_pretrained(folder), results["calibration"]
    assert model.config.temperature == calibration["temperature"] != 1
    assert model.config.energy_threshold == calibration["energy_threshold"]

    rows = pd.read_parquet(folder / PREDICTIONS_FILE)
    assert len(rows) == results["num_images"]
    assert (rows["label"] == rows["prediction"]).mean() == pytest.approx(results["accuracy"], abs=1e-6)
    reported = rows[1::2] if select == "last" else rows  # the other half was used for the temperature
    if select == "last":
        assert calibration["num_images"] == len(rows) - len(reported)
    else:
        assert calibration["num_images"] == results["selection"]["num_images"]
    names = [model.config.id2label[index] for index in range(10)]
    labels = torch.tensor([names.index(label) for label in reported["label"]])
    probabilities = torch.tensor(np.stack(reported["probabilities"]))
    error = multiclass_calibration_error(probabilities, labels, 10, n_bins=15).item()
    assert results["calibration_error"] == pytest.approx(error, abs=1e-4)
    probabilities = (probabilities.log() * calibration["temperature"]).softmax(-1)
    error = multiclass_calibration_error(probabilities, labels, 10, n_bins=15).item()
    assert calibration["calibration_error_before"] == pytest.approx(error, abs=1e-3)


def test_too_few_images_are_not_calibrated(tmp_path: Path) -> None:
    options = build_tiny_options(tmp_path / "run", "digits", max_steps=2, batch_size=8, held_out_fraction=0.05)
    folder = train(options)
    assert json.loads((folder / "results.json").read_text())["calibration"] is None
    assert json.loads((folder / "config.json").read_text()).get("temperature", 1.0) == 1.0

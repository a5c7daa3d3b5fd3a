"""Temperature of a classifier, and its held-out predictions."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.read_datasets import read_training_data
from helpers.tiny_options import build_tiny_options, run_to_folder
from pytest import MonkeyPatch, approx
from torchmetrics.functional.classification import multiclass_calibration_error

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.frozen.confidence import fit_temperature
from modeling_vitcls.hub.model_files import PREDICTIONS_FILE
from modeling_vitcls.runtime.files import read_json
from modeling_vitcls.training.calibration import describe_fold_calibration


@pytest.mark.parametrize(("highest", "is_alike"), [(0.54, True), (0.6, False)])
def test_predictions_that_are_all_alike_have_words_instead_of_a_huge_temperature(
    highest: float, is_alike: bool
) -> None:
    probe = SimpleNamespace(
        losses_=np.array([0.7, 0.7]),
        lines_=None,
        temperature_=429237059.16,
        classes_=["ant", "bee"],
        out_of_fold_=np.array([[0.5, 0.5], [highest, 1 - highest]]),
    )
    assert ("all are near 1/2" in describe_fold_calibration(probe).text) == is_alike


def test_calibration_uses_images_that_are_not_reported(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """With just enough images."""
    data = read_training_data("digits")
    fitted = data.held_out.select(range(0, len(data.held_out), 2))
    monkeypatch.setattr("modeling_vitcls.training.calibration.MIN_IMAGES", len(fitted))
    flags = {"image_size": 8, "patch_size": 4, "max_steps": 20, "batch_size": 32}
    folder = run_to_folder(
        build_tiny_options(
            tmp_path / "run", "digits", model_config={"drop_path_rate": 0.5}, **flags
        )
    )
    results = read_json(folder / "results.json")
    model = ViTCLSForImageClassification.from_pretrained(folder)
    calibration = results["calibration"]
    assert calibration["temperature"] != 1

    rows = pd.read_parquet(folder / PREDICTIONS_FILE)
    assert rows["loss"].mean() == approx(results["loss"], abs=1e-5)
    # the other half was used for the temperature
    reported = rows[1::2]
    assert calibration["num_images"] == len(fitted)
    pixels = ViTCLSImageProcessor.from_pretrained(folder)(list(fitted.images), return_tensors="pt")[
        "pixel_values"
    ]
    logits = model.eval()(pixels).logits.detach().numpy()
    assert fit_temperature(logits, np.array(fitted.labels)) == approx(1, abs=1e-3)
    labels = torch.tensor([model.config.label2id[label] for label in reported["label"]])
    probabilities = torch.tensor(np.stack(reported["probabilities"]))
    before = (probabilities.log() * calibration["temperature"]).softmax(-1)
    for expected, each, tolerance in (
        (results["calibration_error"], probabilities, 1e-4),
        (calibration["calibration_error_before"], before, 1e-3),
    ):
        error = multiclass_calibration_error(each, labels, 10, n_bins=15).item()
        assert expected == approx(error, abs=tolerance)

"""Five epochs of all layers with every label, after which the classifier is fitted again."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.accelerate_state import reset_accelerate
from helpers.photo_folders import write_unequal_photos
from helpers.source_checkpoints import save_large_encoder
from numpy.testing import assert_allclose
from PIL import Image, ImageOps
from transformers import AutoImageProcessor

from modeling_vitcls import ViTCLSForImageClassification, evaluate
from modeling_vitcls.cli import main
from modeling_vitcls.runtime.files import read_json
from modeling_vitcls.training import defaults, probe
from modeling_vitcls.training.probe import Probe
from modeling_vitcls.training.reporter import Reporter


pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("fresh_accelerate")]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Yield a command without an output folder that fits the classifier again by default."""
    folder = tmp_path_factory.mktemp("sources")
    encoder = save_large_encoder(folder / "vit")
    photos = write_unequal_photos(folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defaults, "MIN_REFIT_IMAGES", 24)
        patch.setattr(defaults, "MIN_REFIT_CLASS_SIZE", 12)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache" / "hub"))
        yield [
            *("finetune", "--model", encoder, "--dataset", str(photos), "--image-size", "56"),
            *("--num-workers", "0", "--no-report"),
        ]


@pytest.fixture(scope="module")
def runs(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the default run and the frozen one."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in (("default", ()), ("frozen", ("--trainable", "head"))):
        reset_accelerate()
        main([*command, "--output-dir", str(folder / name), *flags])
    return folder


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return ViTCLSForImageClassification.from_pretrained(folder).state_dict()


def test_every_image_trains_all_layers(runs: Path) -> None:
    results = read_json(runs / "default/results.json")
    assert (results["num_training_images"], results["steps"]) == (24, 4)
    trained, frozen = load_weights(runs / "default"), load_weights(runs / "frozen")
    assert not torch.equal(
        trained["vitcls.layers.0.mlp.fc1.weight"], frozen["vitcls.layers.0.mlp.fc1.weight"]
    )


def test_the_result_is_that_of_the_frozen_model(runs: Path) -> None:
    trained, frozen = (read_json(runs / name / "results.json") for name in ("default", "frozen"))
    assert trained["split"] == "cross-validation"
    assert trained["accuracy_interval"] == frozen["accuracy_interval"]
    own, other = (
        pd.read_parquet(runs / name / "predictions.parquet") for name in ("default", "frozen")
    )
    assert_allclose(own["loss"], other["loss"])
    card = (runs / "default/README.md").read_text(encoding="utf-8")
    assert "**These are results of the frozen model**" in card
    assert "before fine-tuning" not in (runs / "frozen/README.md").read_text(encoding="utf-8")


def test_the_classifier_is_fitted_to_the_trained_features(
    runs: Path, command: list[str], tmp_path: Path
) -> None:
    """A frozen run of the trained encoder has the same classifier, temperature and threshold."""
    model = ViTCLSForImageClassification.from_pretrained(runs / "default")
    model.vitcls.save_pretrained(tmp_path / "encoder")
    AutoImageProcessor.from_pretrained(runs / "default").save_pretrained(tmp_path / "encoder")
    resize = read_json(runs / "default/results.json")["frozen"]["resize"]
    flags = ["--model", str(tmp_path / "encoder"), "--trainable", "head", "--resize", resize]
    main([*command, "--output-dir", str(tmp_path / "run"), *flags])

    again = ViTCLSForImageClassification.from_pretrained(tmp_path / "run")
    assert_allclose(again.classifier.weight.detach(), model.classifier.weight.detach(), rtol=1e-4)
    assert again.config.temperature == model.config.temperature
    assert again.config.distance_threshold == model.config.distance_threshold
    assert again.config.pooled_layers == model.config.pooled_layers


def test_the_temperature_lowers_the_confidence_to_the_accuracy_of_the_frozen_model(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temperatures = []
    run = Probe.run

    def fit(probabilities: np.ndarray, accuracy: float) -> float:
        temperatures.append(accuracy)
        return 2.0

    def run_and_record(self: Probe, *args: Any, **kwargs: Any) -> Any:
        frozen = run(self, *args, **kwargs)
        temperatures.append(frozen.probe.temperature_)
        return frozen

    monkeypatch.setattr(probe, "fit_confidence", fit)
    monkeypatch.setattr(Probe, "run", run_and_record)
    main([*command, "--output-dir", str(tmp_path / "run")])

    _, trained, accuracy = temperatures
    assert accuracy == read_json(tmp_path / "run/results.json")["accuracy"]
    config = read_json(tmp_path / "run/config.json")
    assert config["temperature"] == pytest.approx(2 * trained, abs=1e-4)


@pytest.mark.parametrize("has_test_split", [True, False])
def test_held_out_images_measure_the_saved_model(
    has_test_split: bool, command: list[str], tmp_path: Path
) -> None:
    """They are those of a test split, or those that the person holds out."""
    photos = Path(command[command.index("--dataset") + 1])
    flags = ["--held-out-fraction", "0.25"]
    if has_test_split:
        shutil.copytree(photos, tmp_path / "photos/train")
        for file in write_unequal_photos(tmp_path / "photos/test").glob("*/*"):
            ImageOps.mirror(Image.open(file)).save(file)
        photos = tmp_path / "photos"
        flags = ["--dataset", str(photos)]
    main([*command, "--refit", "--output-dir", str(tmp_path / "run"), *flags])

    results = read_json(tmp_path / "run/results.json")
    num_held_out = 24 if has_test_split else 6
    num_training = 24 if has_test_split else 18
    assert (results["num_images"], results["num_training_images"]) == (num_held_out, num_training)
    reset_accelerate()
    measured = evaluate(str(tmp_path / "run"), str(photos), num_workers=0)
    assert measured["num_images"] == num_held_out
    assert measured["accuracy"] == results["accuracy"]


def test_an_interrupted_run_ends_with_the_same_weights(
    runs: Path, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_step = Reporter.show_step

    def stop(reporter: Reporter, step: int) -> None:
        show_step(reporter, step)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "show_step", stop)
        with pytest.raises(SystemExit, match="143"):
            main([*command, "--output-dir", str(tmp_path / "run")])
    reset_accelerate()
    main([*command, "--output-dir", str(tmp_path / "run"), "--resume"])

    expected, weights = load_weights(runs / "default"), load_weights(tmp_path / "run")
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    results, uninterrupted = (
        read_json(folder / "results.json") for folder in (tmp_path / "run", runs / "default")
    )
    assert results["accuracy"] == uninterrupted["accuracy"]


def test_a_model_without_a_frozen_start_is_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "vitcls-tiny", "--image-size", "64", "--refit"]
    with pytest.raises(SystemExit, match="1"):
        main([*command, *flags, "--output-dir", str(tmp_path / "run")])
    assert (
        "requires a frozen model, which is off, because the initial weights are random"
        in " ".join(capsys.readouterr().err.split())
    )

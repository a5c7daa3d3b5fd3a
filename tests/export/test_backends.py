"""--backend onnx and openvino have the predictions of torch; int8 is measured on the file."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.command_in_process import run_here
from helpers.digits_models import train_digits_model
from helpers.tiny_models import build_tiny_config, randomize, save_with_processor
from PIL import Image

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor, evaluate, predict
from modeling_vitcls.export.exporter import export_model


pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mine"
    save_with_processor(randomize(ViTCLSForImageClassification(build_tiny_config(num_distillation_tokens=1))), folder)
    export_model(str(folder), "onnx", folder / "model.onnx", dynamic=False)
    export_model(str(folder), "openvino", folder / "model.xml", dynamic=False)
    return folder


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_backends_have_the_predictions_of_torch(backend: str, model: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for index in range(5):
        Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    rows = [predict(str(model), str(tmp_path), top_k=3, backend=name) for name in ("torch", backend)]
    for mine, theirs in zip(*rows, strict=True):
        assert [mine[f"label{suffix}"] for suffix in ("", "_2", "_3")] == [
            theirs[f"label{suffix}"] for suffix in ("", "_2", "_3")
        ]
        assert mine["probability"] == pytest.approx(theirs["probability"], abs=1e-5)


def test_missing_and_damaged_files_are_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "damaged.onnx").write_text("damaged")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for backend in ("no.onnx", str(tmp_path / "damaged.onnx")):
        assert run_here("predict", "--model", str(model), str(tmp_path / "a.png"), "--backend", backend) == 1
        error = capsys.readouterr().err
        assert backend in error and error.strip().count("\n") == 0, error


def test_int8_requires_a_dataset(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("export", "--model", str(model), "--format", "onnx", "--output", "a.onnx", "--int8") == 2
    assert "--dataset" in capsys.readouterr().err


@pytest.mark.slow
def test_the_accuracy_of_int8_is_that_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`evaluate --backend` repeats the result of the export, and a larger drop than --max-drop writes nothing."""
    trained = train_digits_model(id2label={index: str(index) for index in range(10)})
    processor = ViTCLSImageProcessor(size=8, do_convert_rgb=False, image_mean=[0.5], image_std=[0.5])
    folder, file = tmp_path / "mine", tmp_path / "mine" / "model.xml"
    save_with_processor(trained, folder, processor)
    export = ("export", "--model", str(folder), "--format", "openvino", "--int8", "--dataset", "digits")
    assert run_here(*export, "--output", str(file), "--max-drop", "-50") == 1
    assert "--max-drop" in capsys.readouterr().err and not file.exists()
    assert run_here(*export, "--output", str(file)) == 0
    scores = json.loads((folder / "model.xml.json").read_text())["int8"]
    assert scores["float32"] - scores["int8"] <= 0.005
    assert scores["num_calibration_images"] >= 200 and scores["interval"][0] <= scores["int8"] <= scores["interval"][1]
    results = evaluate(str(folder), "digits", backend="openvino")
    assert results["accuracy"] == pytest.approx(scores["int8"], abs=1e-3)

"""`--backend auto`: which engine runs, with the answers of PyTorch, and what is stored."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.photo_folders import write_photos
from helpers.tiny_models import build_tiny_config, save_with_processor
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.image_utils import SizeDict

from modeling_vitcls import (
    EmbedImages,
    ViTCLSConfig,
    ViTCLSForImageClassification,
    ViTCLSImageProcessor,
    evaluate,
    predict,
)
from modeling_vitcls.export import engine_choice
from modeling_vitcls.inference import engines
from modeling_vitcls.inference.engines import ENGINES_FOLDER, TORCH


pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("fresh_accelerate")]

LABELS = {
    "id2label": {0: "cat", 1: "dog", 2: "fox"},
    "label2id": {"cat": 0, "dog": 1, "fox": 2},
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), range(4), "cat", "dog", "fox")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = ViTCLSForImageClassification(build_tiny_config(**LABELS))
    return save_with_processor(model, tmp_path_factory.mktemp("models") / "saved")


@pytest.fixture(scope="module")
def measured(saved: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model with graphs for logits and tokens that were found faster."""
    folder = shutil.copytree(saved, tmp_path_factory.mktemp("measured") / "model")
    with pytest.MonkeyPatch.context() as patch:
        call_job_large(patch)
        let_win(patch, ".xml")
        predict_photos(folder, photos)
        predict_photos(folder, photos, features=["cls"])
    return folder


@pytest.fixture
def model(measured: Path, tmp_path: Path) -> Path:
    """Return the folder of a model with graphs that were found to be faster."""
    return shutil.copytree(measured, tmp_path / "model")


@pytest.fixture
def unmeasured(saved: Path, tmp_path: Path) -> Path:
    """Return the folder of a model without graphs."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def _large_job(monkeypatch: pytest.MonkeyPatch) -> None:
    call_job_large(monkeypatch)


@pytest.fixture
def _openvino_wins(_large_job: None, monkeypatch: pytest.MonkeyPatch) -> None:
    let_win(monkeypatch, ".xml")


large_job = pytest.mark.usefixtures("_large_job")
openvino_wins = pytest.mark.usefixtures("_openvino_wins")


def call_job_large(patch: pytest.MonkeyPatch) -> None:
    """Let twelve images be enough for a measurement."""
    patch.setattr(engines, "MIN_IMAGES", 0)
    patch.setattr(engine_choice, "MIN_FLOPS", 0)


def let_win(patch: pytest.MonkeyPatch, suffix: str) -> None:
    """Replace the seconds of the engines; those of the engine with a suffix are the shortest."""

    def measure(works: dict[str, Callable[[], Any]]) -> dict[str, float]:
        return {name: 1.0 if name.endswith(suffix) else 2.0 for name in works}

    patch.setattr(engine_choice, "measure_seconds", measure)


def predict_photos(folder: Path, photos: Path, **flags: Any) -> list[dict[str, Any]]:
    return predict(folder, photos, mixed_precision="no", **flags)


def list_engines(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / ENGINES_FOLDER).glob("*.xml"))


def test_few_images_write_no_graph(saved: Path, photos: Path) -> None:
    predict_photos(saved, photos)
    assert not (saved / ENGINES_FOLDER).exists()


@large_job
def test_measured_engines_are_those_that_are_installed(
    unmeasured: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    monkeypatch.setattr(
        engine_choice,
        "measure_seconds",
        lambda works: names.extend(works) or dict.fromkeys(works, 1.0),
    )
    predict_photos(unmeasured, photos)
    assert names == [TORCH, "logits-32x32.onnx", "logits-32x32.xml"]


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
@large_job
def test_the_fastest_graph_gives_the_probabilities_of_torch(
    suffix: str,
    unmeasured: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = predict_photos(unmeasured, photos, backend="torch")
    let_win(monkeypatch, suffix)
    rows = predict_photos(unmeasured, photos)
    assert engines.ENGINE_NAMES[suffix] in capsys.readouterr().err
    assert [row["label"] for row in rows] == [row["label"] for row in expected]
    np.testing.assert_allclose(
        [row["probability"] for row in rows], [row["probability"] for row in expected], atol=1e-5
    )


@large_job
def test_a_gain_below_ten_percent_keeps_torch(
    unmeasured: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        engine_choice,
        "measure_seconds",
        lambda works: {name: 1.09 if name == TORCH else 1.0 for name in works},
    )
    predict_photos(unmeasured, photos)
    assert "engine:" not in capsys.readouterr().err


@openvino_wins
def test_a_graph_with_other_outputs_is_not_chosen(
    model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        engine_choice, "measure_error", lambda outputs, reference: 0.1 if outputs else 0.0
    )
    monkeypatch.setattr(engine_choice, "measure_torch_error", lambda *arguments: 0.0)
    (model / ENGINES_FOLDER / engines.CHOICES_FILE).unlink()
    predict_photos(model, photos)
    assert engines.CHOICES_FILE in [file.name for file in (model / ENGINES_FOLDER).iterdir()]
    assert '"engine": "torch"' in (model / ENGINES_FOLDER / engines.CHOICES_FILE).read_text()


@large_job
def test_a_choice_is_used_again_without_a_measurement(
    model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_choice, "measure_engines", None)
    predict_photos(model, photos)
    assert "OpenVINO" in capsys.readouterr().err


@openvino_wins
def test_graphs_of_other_weights_are_not_run(model: Path, photos: Path) -> None:
    other = ViTCLSForImageClassification.from_pretrained(model)
    torch.nn.init.normal_(other.classifier.weight)
    other.save_pretrained(model)
    expected = predict_photos(model, photos, backend="torch")
    rows = predict_photos(model, photos)
    assert [row["label"] for row in rows] == [row["label"] for row in expected]
    assert list_engines(model) == ["logits-32x32.xml"]


@openvino_wins
def test_graphs_of_another_temperature_are_not_run(model: Path, photos: Path) -> None:
    """The temperature is in the graph, and in config.json instead of the weights."""
    config = ViTCLSConfig.from_pretrained(model)
    config.temperature = 3.0
    config.save_pretrained(model)
    expected = predict_photos(model, photos, backend="torch")
    rows = predict_photos(model, photos)
    np.testing.assert_allclose(
        [row["probability"] for row in rows], [row["probability"] for row in expected], atol=1e-5
    )


@openvino_wins
def test_images_of_several_sizes_are_computed_by_torch(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processor = ViTCLSImageProcessor.from_pretrained(model)
    processor.size = SizeDict(shortest_edge=32)
    processor.save_pretrained(model)
    rows = predict_photos(model, photos)
    assert all(row["error"] is None for row in rows)
    assert "engine:" not in capsys.readouterr().err


@openvino_wins
def test_a_classifier_whose_logits_are_zero_is_measured(unmeasured: Path, photos: Path) -> None:
    zero = ViTCLSForImageClassification.from_pretrained(unmeasured)
    torch.nn.init.zeros_(zero.classifier.weight)
    torch.nn.init.zeros_(zero.classifier.bias)
    zero.save_pretrained(unmeasured)
    rows = predict_photos(unmeasured, photos)
    assert rows[0]["probability"] == pytest.approx(1 / 3)


def test_an_output_that_is_not_finite_has_no_error_that_passes_a_limit() -> None:
    reference = {"logits": torch.ones(1, 3), "cls_logits": torch.ones(1, 3)}
    outputs = {"logits": torch.ones(1, 3), "cls_logits": torch.tensor([[1.0, torch.nan, 1.0]])}
    assert not engine_choice.measure_error(outputs, reference) <= 1e9


@large_job
def test_evaluation_measures_pytorch_in_the_precision_of_the_job(
    unmeasured: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[tuple[bool, bool]] = []

    def measure(works: dict[str, Callable[[], Any]]) -> dict[str, float]:
        def record(module: Any, inputs: Any) -> None:
            states.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))

        handle = register_module_forward_pre_hook(record)
        works[TORCH]()
        handle.remove()
        return dict.fromkeys(works, 1.0)

    monkeypatch.setattr(engine_choice, "measure_seconds", measure)
    evaluate(unmeasured, photos, mixed_precision="bf16", num_workers=0)
    assert set(states) == {(True, False)}


@large_job
def test_a_damaged_graph_is_replaced_by_torch(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / ENGINES_FOLDER / "logits-32x32.xml").write_text("damaged")
    rows = predict_photos(model, photos)
    assert "engine: PyTorch, because" in capsys.readouterr().err
    assert all(row["error"] is None for row in rows)


@large_job
def test_features_of_layers_are_computed_by_torch(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = predict_photos(model, photos, features=["cls@1"])
    assert rows[0]["features"] is not None
    assert "engine:" not in capsys.readouterr().err


def test_embed_images_uses_a_graph_that_was_chosen_before(model: Path, photos: Path) -> None:
    embed = EmbedImages(model)
    images = {"image": sorted(map(str, photos.glob("*/*")))}
    features = embed(images)["cls"]
    assert isinstance(embed.predictor.model, engines.ExportedModel)
    expected = EmbedImages(model, backend="torch")(images)["cls"]
    np.testing.assert_allclose(features, expected, atol=1e-4)

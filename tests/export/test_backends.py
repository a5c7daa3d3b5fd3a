"""--backend onnx and openvino have the predictions of torch; int8 is measured on the file."""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch
from helpers.command_in_process import run_here
from helpers.digits_models import train_digits_model
from helpers.fresh_processes import run_fresh
from helpers.tiny_models import (
    build_images,
    build_tiny_config,
    raises_one_line,
    randomize,
    save_with_processor,
)
from PIL import Image
from transformers import pipeline

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
    predict,
)
from modeling_vitcls.export import exporter, measurement
from modeling_vitcls.export.exporter import export_model
from modeling_vitcls.export.options import ExportOptions
from modeling_vitcls.export.quantization import check_drop, rank_layers
from modeling_vitcls.inference.class_statistics import ClassStatistics
from modeling_vitcls.inference.exported_graphs import ExportedGraph
from modeling_vitcls.inference.intervals import compute_proportion_interval


pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("fresh_accelerate")]
# Pixels of the digits are 0 to 16, saved as 0 to 255.
DIGITS_PROCESSOR = ViTCLSImageProcessor(
    size=8, do_convert_rgb=False, image_mean=[0.5], image_std=[0.5]
)


def add_statistics(model: Any) -> None:
    """Store class statistics of random features in a classifier."""
    random = np.random.default_rng(0)
    size = model.config.hidden_size
    features = {token: random.normal(size=(60, size)) for token in ((-1, "cls"), (-2, "mean"))}
    statistics = ClassStatistics.fit(features, np.arange(60) % 3, model.config.num_labels)
    statistics.set_in_model(model)
    model.config.distance_threshold = size**0.5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an exported model with its weights.

    The labeled images of the export are next to it.
    """
    parent = tmp_path_factory.mktemp("models")
    for index in range(25):
        folder = parent / "images" / ("test" if index < 12 else "train") / f"LABEL_{index % 5 % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(
            np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        )
        image.save(folder / f"{index}.png")
    config = build_tiny_config(num_distillation_tokens=1, temperature=2.5, position_antialias=True)
    classifier = randomize(ViTCLSForImageClassification(config))
    add_statistics(classifier)
    source = str(save_with_processor(classifier, parent / "mine"))
    dataset = str(parent / "images")
    export_model(
        ExportOptions(model=source, format="openvino", output=parent / "exported", dataset=dataset)
    )
    export_model(
        ExportOptions(
            model=source, format="onnx", output=parent / "exported" / "model.onnx", dynamic=False
        )
    )
    shutil.copy(parent / "mine" / "model.safetensors", parent / "exported")
    return parent / "exported"


def test_the_export_measures_the_file_on_labeled_images(model: Path) -> None:
    report = json.loads((model / "model.xml.json").read_text())
    rows = predict(str(model), str(model.parent / "images" / "test"))
    num_right = sum(f"/{row['label']}/" in row["image"] for row in rows)
    accuracy = pytest.approx(num_right / 12, abs=1e-6)
    expected = {
        "dataset": "path/to/images",
        "split": "test",
        "num_images": 12,
        "metric": "accuracy",
        "model": accuracy,
        "file": accuracy,
        "interval": compute_proportion_interval(num_right, 12),
    }
    assert report["evaluation"] | expected == report["evaluation"]
    compared = {"num_images": 12, "output": "logits", "top1_agreement": 1}
    assert report["comparison"] | compared == report["comparison"]
    assert json.loads((model / "results.json").read_text())["files"] == {"model.xml": report}


def test_a_file_contains_no_paths_of_the_machine(model: Path) -> None:
    assert str(model.parent).encode() not in (model / "model.xml").read_bytes()


def test_a_size_is_fixed_on_request_or_for_a_reason(model: Path) -> None:
    report = json.loads((model / "model.xml.json").read_text())
    assert "position_antialias" in report["fixed_because"]
    fixed = json.loads((model / "model.onnx.json").read_text())
    assert fixed["input"]["shape"] == ["batch", 3, 32, 32]
    assert not fixed["fixed_because"]


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_backends_have_the_predictions_of_torch(backend: str, model: Path) -> None:
    images = str(model.parent / "images" / "test")
    expected, found = (
        predict(str(model), images, top_k=3, backend=name) for name in ("torch", backend)
    )
    for row, other in zip(expected, found, strict=True):
        for name in ("label", "label_2", "label_3", "unknown"):
            assert row[name] == other[name]
        assert row["probability"] == pytest.approx(other["probability"], abs=1e-5)
        assert row["distance"] == pytest.approx(other["distance"], rel=1e-4)


def test_an_int8_graph_has_no_distance_and_a_prediction_says_so(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exporter, "NUM_CALIBRATION_IMAGES", 4)
    options = ExportOptions(
        model=str(model.parent / "mine"),
        format="openvino",
        int8=True,
        max_drop=100.0,
        dataset=str(model.parent / "images"),
        output=tmp_path / "exported",
    )
    assert export_model(options)["lacks_distance"]
    (row,) = predict(str(options.output), Image.new("RGB", (40, 40)), backend="openvino")
    assert "distance" not in row
    assert "does not compute `distance`" in capsys.readouterr().err


@pytest.mark.parametrize("backend", [pytest.param("onnx", marks=pytest.mark.slow), "openvino"])
def test_a_folder_without_weights_predicts(backend: str, model: Path, tmp_path: Path) -> None:
    """The graph, the configuration and the image processor are enough."""
    folder = tmp_path / "exported"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    images = str(model.parent / "images")

    rows = [
        predict(str(source), images, backend=name)
        for source, name in ((model, "torch"), (folder, backend))
    ]
    assert [row["label"] for row in rows[0]] == [row["label"] for row in rows[1]]


@pytest.mark.parametrize(
    "words", [["predict"], ["evaluate", "--dataset"]], ids=["predict", "evaluate"]
)
def test_weights_that_are_missing_are_named_with_the_graph_that_is_there(
    words: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "exported"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert run_here(*words, str(model.parent / "images"), "--model", str(folder)) == 1
    error = capsys.readouterr().err
    assert "vitcls predict --backend onnx" in error
    assert error.count("\n") == 1


def test_graphs_and_the_pipeline_have_calibrated_probabilities(model: Path) -> None:
    """softmax(logits / temperature); the weights are those of the model without a temperature."""
    plain: Any = ViTCLSForImageClassification.from_pretrained(model)
    plain.config.temperature = 1.0
    processor = ViTCLSImageProcessor.from_pretrained(model)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = (plain(pixel_values).logits / 2.5).softmax(-1)
    found = ExportedGraph(model / "model.xml")(pixel_values)["logits"].softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    loaded: Any = ViTCLSForImageClassification.from_pretrained(model)
    rows = pipeline("image-classification", model=loaded, image_processor=processor)(image)
    scores = [row["score"] for row in rows]
    assert scores == pytest.approx(sorted(expected[0].tolist(), reverse=True), abs=1e-5)


def test_the_hint_in_the_report_has_the_outputs_of_the_model(model: Path) -> None:
    """Without a hint, OpenVINO computes in bf16 wherever the CPU can."""
    images = build_images(3)
    with torch.no_grad():
        expected = ViTCLSForImageClassification.from_pretrained(model)(images).logits.numpy()
    hint = json.loads((model / "model.xml.json").read_text())["compile_config"]
    openvino = importlib.import_module("openvino")
    found = openvino.Core().compile_model(model / "model.xml", "CPU", hint)(images.numpy())[
        "logits"
    ]
    assert np.abs(found - expected).max() <= 1e-4
    assert "compile_config" not in (model / "model.onnx.json").read_text()


RELEASE_IN_A_THREAD = """
import pathlib, signal, sys, threading
from modeling_vitcls.inference.class_statistics import ClassStatistics
from modeling_vitcls.inference.exported_graphs import ExportedGraph
graphs = [ExportedGraph(pathlib.Path(sys.argv[1]))]
thread = threading.Thread(target=graphs.clear)
thread.start()
thread.join()
signal.signal(signal.SIGTERM, lambda number, frame: None)
signal.raise_signal(signal.SIGTERM)
"""


@pytest.mark.slow
def test_a_graph_can_be_released_in_any_thread(model: Path) -> None:
    """Garbage is collected in any thread. OpenVINO installs a signal stack on CPUs with AMX."""
    assert run_fresh("-c", RELEASE_IN_A_THREAD, model / "model.xml").returncode == 0


def test_the_precision_of_a_graph_is_checked(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    words = (
        "predict",
        "--model",
        str(model),
        str(tmp_path / "a.png"),
        "--mixed-precision",
        "bf16",
        "--backend",
    )
    assert run_here(*words, "openvino") == 0
    assert run_here(*words, "onnx") == 1
    assert "--mixed-precision" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["no.onnx", "damaged.onnx"])
def test_missing_and_damaged_files_are_one_line(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.onnx").write_text("damaged")
    with raises_one_line(name):
        predict(str(model), Image.new("RGB", (8, 8)), backend=str(tmp_path / name))


@pytest.mark.parametrize("feature", ["cls", "cls@1"])
def test_a_graph_of_a_classifier_has_no_features(feature: str, model: Path) -> None:
    image = Image.new("RGB", (40, 40))
    with raises_one_line("no output last_hidden_state"):
        predict(str(model), image, features=feature, backend="onnx")


def test_int8_requires_a_dataset(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run_here(
            "export", "--model", str(model), "--format", "onnx", "--output", "a.onnx", "--int8"
        )
        == 2
    )
    assert "--dataset" in capsys.readouterr().err


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model of the digits that was trained for a few seconds."""
    folder = tmp_path_factory.mktemp("digits") / "mine"
    names = {index: str(index) for index in range(10)}
    trained = train_digits_model(
        epochs=30, id2label=names, label2id={name: index for index, name in names.items()}
    )
    trained.save_pretrained(folder)  # `save_with_processor` would randomize the weights
    DIGITS_PROCESSOR.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["openvino", "onnx"])
def test_int8_loses_at_most_0_3_points(
    file_format: Literal["openvino", "onnx"], digits_model: Path, tmp_path: Path
) -> None:
    """A larger drop than `max_drop` writes nothing."""
    options = ExportOptions(
        model=str(digits_model),
        format=file_format,
        int8=True,
        max_drop=0.3,
        dataset="digits",
        output=tmp_path / "exported",
    )
    with raises_one_line("`exclude_layers="):
        export_model(replace(options, max_drop=-50.0))
    assert not options.output.exists()

    report = export_model(options)
    scores = report["evaluation"]
    assert scores["model"] > 0.9
    assert scores["model"] - scores["file"] <= 0.003
    assert scores["num_images"] > 300
    assert scores["interval"][0] <= scores["file"] <= scores["interval"][1]
    assert report["num_calibration_images"] >= 200
    assert report["comparison"]["relative_error"] < 0.2


@pytest.mark.slow
def test_int8_leaves_the_patch_projection_and_excluded_layers_in_float32(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "int8.onnx"
    monkeypatch.setattr(exporter, "NUM_CALIBRATION_IMAGES", 8)
    monkeypatch.setattr(measurement, "NUM_COMPARED_IMAGES", 5)
    report = export_model(
        ExportOptions(
            model=str(model.parent / "mine"),
            format="onnx",
            output=file,
            split="train",
            int8=True,
            max_drop=100.0,
            exclude_layers=(2,),
            dataset=str(model.parent / "images"),
        )
    )
    assert (report["dtype"], report["limit"], report["excluded_layers"]) == ("int8", None, [2])
    assert (report["evaluation"]["split"], report["evaluation"]["num_images"]) == ("train", 13)
    assert (report["num_calibration_images"], report["comparison"]["num_images"]) == (8, 5)
    assert report["largest_differences"]["logits"] > 1e-3

    nodes = onnx.load(file).graph.node
    int8_values = {
        name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output
    }
    products = [node for node in nodes if node.op_type in ("MatMul", "Conv")]
    assert {node.name.partition("/")[0] for node in products if int8_values & set(node.input)} == {
        "layers.0"
    }


@pytest.fixture
def outlier_model() -> Any:
    """Return a model in which one large input of layer 3 leaves few int8 values for the others."""
    model: Any = randomize(ViTCLSForImageClassification(build_tiny_config(num_hidden_layers=4)))
    model.vitcls.layers[2].layernorm_after.bias.data[0] = -300.0
    return model


def test_the_layer_with_outliers_is_ranked_first(outlier_model: Any) -> None:
    first, *others = rank_layers(outlier_model, build_images())
    assert (first, sorted(others)) == (3, [1, 2, 4])


@pytest.mark.parametrize(
    ("excluded_layers", "drop_interval", "remedy"),
    [
        ([], [0.25, 0.4], "`exclude_layers=(3,)`,"),
        ([2, 3, 4], [0.25, 0.4], "`exclude_layers=(1, 2, 3, 4)`,"),
        ([], None, "`exclude_layers=(3,)`,"),  # of a metric that is no accuracy
    ],
)
def test_layers_to_exclude_are_named_if_the_metric_falls(
    excluded_layers: list[int], drop_interval: list[float] | None, remedy: str, outlier_model: Any
) -> None:
    scores = {"metric": "accuracy", "model": 0.75, "file": 0.5, "num_images": 4}
    report = {
        "evaluation": scores | {"drop_interval": drop_interval},
        "excluded_layers": excluded_layers,
    }
    check_drop(report, 25.0, outlier_model, build_images())
    with raises_one_line("from 75.0% to 50.0% on 4 images", "`max_drop=24.9`", remedy):
        check_drop(report, 24.9, outlier_model, build_images())


@pytest.mark.slow
def test_features_of_an_exported_encoder_equal_those_of_torch(tmp_path: Path) -> None:
    save_with_processor(ViTCLSModel(build_tiny_config(num_register_tokens=1)), tmp_path)
    export_model(
        ExportOptions(
            model=str(tmp_path), format="openvino", output=tmp_path / "model.xml", dynamic=False
        )
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    found, expected = (
        predict(tmp_path, [image], features="cls", backend=name)[0]
        for name in ("openvino", "torch")
    )
    assert found["features"] == pytest.approx(expected["features"], abs=1e-4)

"""A graph that is not one of the model is an error before the first image."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.command_in_process import run_here
from helpers.photo_folders import write_photos
from helpers.tiny_models import build_tiny_config, save_with_processor
from onnx import TensorProto, helper

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.hub.model_files import hash_files, hash_weights


pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("fresh_accelerate")]

NAMES = ("cat", "dog", "fox")
LABELS = {
    "id2label": dict(enumerate(NAMES)),
    "label2id": {name: index for index, name in enumerate(NAMES)},
}


def predict(model: Path, photos: Path) -> list[str]:
    return ["predict", "--model", str(model), str(photos)]


def write_graph(
    file: Path, num_outputs: int = 3, output_type: int = TensorProto.FLOAT, name: str = "logits"
) -> None:
    """Write an ONNX file whose logits are sums of the mean color, and its report."""
    weights = np.ones((3, num_outputs), dtype=np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["pixel_values", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["sums"]),
        helper.make_node("Cast", ["sums"], [name], to=output_type),
    ]
    graph = helper.make_graph(
        nodes=nodes,
        name="graph",
        inputs=[
            helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 32, 32])
        ],
        outputs=[helper.make_tensor_value_info(name, output_type, ["batch", num_outputs])],
        initializer=[
            onnx.numpy_helper.from_array(np.array([2, 3]), "axes"),
            onnx.numpy_helper.from_array(weights, "weights"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.save(model, file)
    write_report(file)


def write_report(file: Path) -> None:
    report = {
        "weights_sha256": hash_weights(file.parent),
        "config_sha256": hash_files([file.parent / "config.json"]),
        "sha256": {},
    }
    file.with_name(f"{file.name}.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), range(4), *NAMES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = ViTCLSForImageClassification(build_tiny_config(**LABELS))
    return save_with_processor(model, tmp_path_factory.mktemp("models") / "saved")


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """Return the folder of a model with a graph that is accepted."""
    folder = shutil.copytree(saved, tmp_path / "model")
    write_graph(folder / "model.onnx")
    return folder


def check_error(command: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Check that a command prints a single error with these words, and no result."""
    assert run_here(*command, "--backend", "onnx") == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1, printed.err
    assert all(word in printed.err for word in words), printed.err
    assert not printed.out


def test_a_graph_of_the_model_is_run(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(*predict(model, photos), "--backend", "onnx") == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if ".png" in line]) == 12


@pytest.mark.parametrize("num_outputs", [1, 2, 7])
def test_a_graph_with_another_number_of_labels_is_an_error(
    num_outputs: int,
    model: Path,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_graph(model / "model.onnx", num_outputs)
    check_error(predict(model, photos), capsys, "model.onnx", f"[1, {num_outputs}]", "[1, 3]")


def test_a_graph_with_integer_logits_is_an_error(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_graph(model / "model.onnx", output_type=TensorProto.INT64)
    check_error(predict(model, photos), capsys, "int64")


def test_a_graph_without_logits_is_one_error(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_graph(model / "model.onnx", name="other")
    check_error(predict(model, photos), capsys, "no output logits")


def test_a_graph_of_another_image_size_is_one_error_and_no_file(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = json.loads((model / "preprocessor_config.json").read_text())
    settings["size"] = {"height": 64, "width": 64}
    (model / "preprocessor_config.json").write_text(json.dumps(settings))
    command = [*predict(model, photos), "--output", str(tmp_path / "rows.csv")]
    check_error(command, capsys, "[1, 3, 64, 64]")
    assert not (tmp_path / "rows.csv").exists()


def test_a_graph_of_other_weights_is_an_error(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ViTCLSForImageClassification(build_tiny_config(num_register_tokens=1, **LABELS))
    other.save_pretrained(model)
    check_error(predict(model, photos), capsys, "other weights", "vitcls export")


def test_a_graph_without_a_report_next_to_weights_is_an_error(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "model.onnx.json").unlink()
    check_error(predict(model, photos), capsys, "model.onnx.json is missing")


def test_a_folder_with_a_graph_and_results_of_other_weights_is_an_error(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "model.safetensors").unlink()
    (model / "results.json").write_text(
        json.dumps({"weights_sha256": {"model.safetensors": "other"}})
    )
    check_error(predict(model, photos), capsys, "other weights")


def test_a_graph_that_replaced_the_exported_one_is_an_error(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((model / "model.onnx.json").read_text())
    report["sha256"] = {"model.onnx": "of the exported file"}
    (model / "model.onnx.json").write_text(json.dumps(report))
    check_error(predict(model, photos), capsys, "has changed")


def test_finetune_with_overwrite_removes_exported_graphs(model: Path, photos: Path) -> None:
    write_graph(model / "other.onnx")
    report = {"weights_sha256": {}, "sha256": {"other.onnx": "1", "other.onnx.data": "2"}}
    (model / "other.onnx.json").write_text(json.dumps(report))
    (model / "annotations.xml").write_text("<a/>")  # not written by `vitcls export`
    sizes = (
        "--hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 --image-size 32 "
        "--patch-size 8"
    ).split()
    flags = [
        "--model",
        "vitcls-tiny",
        *sizes,
        "--max-steps",
        "1",
        "--batch-size",
        "4",
        "--num-workers",
        "0",
    ]

    command = [
        "finetune",
        "--dataset",
        str(photos),
        "--output-dir",
        str(model),
        *flags,
        "--no-report",
    ]
    assert run_here(*command, "--overwrite") == 0
    assert (model / "results.json").is_file()
    assert {
        file.name for file in model.iterdir() if ".onnx" in file.name or ".xml" in file.name
    } == {"annotations.xml"}

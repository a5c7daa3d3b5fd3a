"""A graph that is not one of the model is an error before the first image."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def keep_only_the_graph(folder: Path) -> None:
    """Leave a graph, and results of other weights."""
    (folder / "model.safetensors").unlink()
    (folder / "results.json").write_text(
        json.dumps({"weights_sha256": {"model.safetensors": "other"}})
    )


OTHER_MODEL = ViTCLSForImageClassification(build_tiny_config(num_register_tokens=1, **LABELS))
# Name -> what changes the folder of a model with its graph, and words of the error.
CHANGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "one label": (lambda folder: write_graph(folder / "model.onnx", 1), ["[1, 1]", "[1, 3]"]),
    "seven labels": (lambda folder: write_graph(folder / "model.onnx", 7), ["[1, 7]", "[1, 3]"]),
    "integers": (
        lambda folder: write_graph(folder / "model.onnx", output_type=TensorProto.INT64),
        ["int64"],
    ),
    "another output": (
        lambda folder: write_graph(folder / "model.onnx", name="other"),
        ["no output logits"],
    ),
    "another image size": (
        lambda folder: change_json(
            folder / "preprocessor_config.json", size={"height": 64, "width": 64}
        ),
        ["[1, 3, 64, 64]"],
    ),
    "other weights": (OTHER_MODEL.save_pretrained, ["other weights", "vitcls export"]),
    "results of other weights": (keep_only_the_graph, ["other weights"]),
    "another temperature": (
        lambda folder: change_json(folder / "config.json", temperature=2.0),
        ["config.json has changed"],
    ),
    "no report": (
        lambda folder: (folder / "model.onnx.json").unlink(),
        ["model.onnx.json is missing"],
    ),
    "another graph": (
        lambda folder: change_json(folder / "model.onnx.json", sha256={"model.onnx": "other"}),
        ["model.onnx has changed"],
    ),
}


def predict(model: Path, photos: Path, output: Path) -> int:
    flags = ["--model", str(model), "--backend", "onnx", "--output", str(output)]
    return run_here("predict", str(photos), *flags)


def test_a_graph_of_the_model_is_run(model: Path, photos: Path, tmp_path: Path) -> None:
    assert predict(model, photos, tmp_path / "rows.csv") == 0
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 13


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_a_graph_that_is_not_one_of_the_model_is_one_error_and_no_file(
    change: Callable[[Path], Any],
    words: list[str],
    model: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(model)
    assert predict(model, photos, tmp_path / "rows.csv") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert all(word in error for word in words), error
    assert not (tmp_path / "rows.csv").exists()


def test_finetune_with_overwrite_removes_exported_graphs(model: Path, photos: Path) -> None:
    write_graph(model / "other.onnx")
    change_json(model / "other.onnx.json", sha256={"other.onnx": "1", "other.onnx.data": "2"})
    (model / "annotations.xml").write_text("<a/>")  # not written by `vitcls export`
    flags = (
        "--model vitcls-tiny --hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 "
        "--image-size 32 --patch-size 8 --max-steps 1 --batch-size 4 --num-workers 0 --no-report"
    ).split()
    folders = ["--dataset", str(photos), "--output-dir", str(model)]
    assert run_here("finetune", *folders, *flags, "--overwrite") == 0
    assert (model / "results.json").is_file()
    assert {
        file.name for file in model.iterdir() if ".onnx" in file.name or ".xml" in file.name
    } == {"annotations.xml"}

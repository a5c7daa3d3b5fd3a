"""A folder that `vitcls export` wrote: `vitcls evaluate` measures its ONNX file in place of weights."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers.command_in_process import run_here
from helpers.photo_folders import write_photos
from helpers.tiny_models import build_tiny_config, raises_one_line, randomize, save_with_processor
from onnx import TensorProto, helper
from PIL import Image
from transformers import pipeline

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    evaluate,
)
from modeling_vitcls.data.aspect_ratio import get_resize, set_resize
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.splits import load_training_data
from modeling_vitcls.data.splits_table import write_splits
from modeling_vitcls.export.exporter import export_model, fit_processor
from modeling_vitcls.export.options import ExportOptions
from modeling_vitcls.export.tracing import GraphShape
from modeling_vitcls.inference.class_statistics import ClassStatistics
from modeling_vitcls.inference.onnx_graph import OnnxGraph


pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("fresh_accelerate")]

NAMES = ("cat", "dog", "fox")
LABELS = {
    "id2label": dict(enumerate(NAMES)),
    "label2id": {name: index for index, name in enumerate(NAMES)},
}


def add_statistics(model: Any) -> None:
    """Store class statistics of random features in a classifier."""
    random = np.random.default_rng(0)
    features = {token: random.normal(size=(60, 16)) for token in ((-1, "cls"), (-2, "mean"))}
    statistics = ClassStatistics.fit(features, np.arange(60) % 3, model.config.num_labels)
    statistics.set_in_model(model)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), range(8), *NAMES)


@pytest.fixture(scope="module")
def folders(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folder of a model that was trained on some of the photos, and of its graph."""
    parent = tmp_path_factory.mktemp("models")
    config = build_tiny_config(num_distillation_tokens=1, **LABELS)
    classifier = randomize(ViTCLSForImageClassification(config))
    add_statistics(classifier)
    save_with_processor(classifier, parent / "mine")
    data = load_training_data(DataOptions(dataset=str(photos)))
    write_splits(data.build_splits_table(), parent / "mine")
    export_model(
        ExportOptions(model=str(parent / "mine"), output=parent / "exported", dynamic=False)
    )
    return parent / "mine", parent / "exported"


def test_a_graph_is_evaluated_like_its_model(folders: tuple[Path, Path], photos: Path) -> None:
    expected, found = (evaluate(str(folder), str(photos)) for folder in folders)
    assert found["num_left_out_images"] == expected["num_left_out_images"] > 0
    for name in ("num_images", "accuracy", "confusion_matrix", "cls_accuracy"):
        assert found[name] == expected[name]
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)


def test_a_graph_of_several_tasks_is_evaluated_like_its_model(tmp_path: Path) -> None:
    tasks = {"animal": ["cat", "dog"], "color": ["brown", "gray", "red"]}
    model = ViTCLSForMultiTaskClassification(build_tiny_config(tasks=tasks, num_cls_tokens=2))
    save_with_processor(model, tmp_path / "mine")
    options = {"model": str(tmp_path / "mine"), "output": tmp_path / "exported"}
    export_model(ExportOptions(**options, dynamic=False))
    photos = write_photos(tmp_path / "photos", range(6), "all")
    rows = [f"{index}.png,{'cat' if index % 2 else 'dog'},gray" for index in range(6)]
    table = photos / "all" / "photos.csv"
    table.write_text("\n".join(["image,animal,color", *rows]))
    expected, found = (evaluate(str(tmp_path / name), str(table)) for name in ("mine", "exported"))
    for name in ("num_images", "animal_accuracy", "color_accuracy"):
        assert found[name] == expected[name]


def test_the_processor_of_a_graph_of_one_size_makes_this_size(
    folders: tuple[Path, Path], photos: Path, tmp_path: Path
) -> None:
    options = {"model": str(folders[0]), "output": tmp_path / "exported", "dynamic": False}
    report = export_model(ExportOptions(**options, image_size=(24, 56)))
    processor = ViTCLSImageProcessor.from_pretrained(tmp_path / "exported")
    images = processor(Image.new("RGB", (40, 30)), return_tensors="pt")
    assert images["pixel_values"].shape == (1, 3, 24, 56)
    assert report["preprocessing"]["size"] == {"height": 24, "width": 56}
    assert evaluate(str(tmp_path / "exported"), str(photos))["num_images"] > 0


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_a_processor_resizes_as_before_to_the_size_of_the_graph(resize: str) -> None:
    processor = ViTCLSImageProcessor()
    set_resize(processor, resize, (64, 64))
    fit_processor(processor, GraphShape((24, 56), (24, 56), is_dynamic=False))
    assert get_resize(processor) == resize
    images = processor(Image.new("RGB", (40, 30)), return_tensors="pt")
    assert images["pixel_values"].shape == (1, 3, 24, 56)


@torch.no_grad()
def test_graphs_and_the_pipeline_have_calibrated_probabilities(
    folders: tuple[Path, Path],
) -> None:
    """Those of softmax, because the temperature is a part of the weights."""
    model, exported = folders
    plain: Any = ViTCLSForImageClassification.from_pretrained(model)
    processor = ViTCLSImageProcessor.from_pretrained(model)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    expected = (plain(pixel_values).logits).softmax(-1)
    graph = OnnxGraph(exported / "model.onnx", plain.config)
    found = graph(pixel_values)["logits"].softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    loaded: Any = ViTCLSForImageClassification.from_pretrained(model)
    rows = pipeline("image-classification", model=loaded, image_processor=processor)(image)
    scores = [row["score"] for row in rows]
    assert scores == pytest.approx(sorted(expected[0].tolist(), reverse=True), abs=1e-5)


@torch.no_grad()
def test_a_graph_has_the_distances_of_the_model(folders: tuple[Path, Path]) -> None:
    model: Any = ViTCLSForImageClassification.from_pretrained(folders[0]).eval()
    images = torch.rand(3, 3, 32, 32)
    expected = model(images).distance
    found = OnnxGraph(folders[1] / "model.onnx", model.config)(images)["distance"]
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-4)


def test_a_file_contains_no_paths_of_the_machine(folders: tuple[Path, Path]) -> None:
    assert str(folders[0].parent).encode() not in (folders[1] / "model.onnx").read_bytes()


def test_a_command_that_requires_weights_names_what_runs_the_graph(
    folders: tuple[Path, Path], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here("predict", photos, "--model", folders[1]) == 1
    error = capsys.readouterr().err
    assert "`vitcls evaluate`" in error
    assert error.count("\n") == 1


def test_a_graph_has_no_other_precision_than_its_own(
    folders: tuple[Path, Path], photos: Path
) -> None:
    with raises_one_line("`mixed_precision='no'`"):
        evaluate(str(folders[1]), str(photos), mixed_precision="bf16")


# Graphs that are not those of the configuration ---------------------------------------------------


def write_graph(file: Path, num_outputs: int = 3, name: str = "logits") -> None:
    """Write an ONNX file whose logits are sums of the mean color, and its report."""
    weights = np.ones((3, num_outputs), dtype=np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["pixel_values", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], [name]),
    ]
    image = ["batch", 3, 32, 32]
    graph = helper.make_graph(
        nodes=nodes,
        name="graph",
        inputs=[helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, image)],
        outputs=[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", num_outputs])],
        initializer=[
            onnx.numpy_helper.from_array(np.array([2, 3]), "axes"),
            onnx.numpy_helper.from_array(weights, "weights"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.save(model, file)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Return a folder with a graph of three labels, and no weights."""
    model = ViTCLSForImageClassification(build_tiny_config(**LABELS))
    folder = save_with_processor(model, tmp_path / "written")
    (folder / "model.safetensors").unlink()
    write_graph(folder / "model.onnx")
    return folder


def test_a_graph_without_a_report_is_evaluated(written: Path, photos: Path) -> None:
    """As a person writes it who quantizes the graph."""
    assert evaluate(str(written), str(photos))["num_images"] == 24


# Name -> what changes the folder of a graph, and words of the error.
CHANGES: dict[str, tuple[Any, list[str]]] = {
    "one label": (lambda file: write_graph(file, 1), ["logits with 3 labels", "['batch', 1]"]),
    "seven labels": (lambda file: write_graph(file, 7), ["logits with 3 labels"]),
    "another output": (lambda file: write_graph(file, name="other"), ["other"]),
    "a damaged file": (lambda file: file.write_text("damaged"), ["cannot be read"]),
    "another image size": (
        lambda file: ViTCLSImageProcessor(size=64).save_pretrained(file.parent),
        ["[8, 3, 64, 64]"],
    ),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_a_graph_of_another_model_is_one_error(
    change: Any, words: list[str], written: Path, photos: Path
) -> None:
    change(written / "model.onnx")
    with raises_one_line("model.onnx", *words):
        evaluate(str(written), str(photos), batch_size=8)


def test_finetune_with_overwrite_removes_the_graph_of_the_folder(
    written: Path, photos: Path
) -> None:
    ViTCLSForImageClassification(build_tiny_config(**LABELS)).save_pretrained(written)
    write_graph(written / "mine.onnx")
    flags = (
        "--model vitcls-tiny --hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 "
        "--image-size 32 --patch-size 8 --max-steps 1 --batch-size 4 --num-workers 0 --no-report"
    ).split()
    output = ["--dataset", photos, "--output-dir", written]
    assert run_here("finetune", *output, *flags, "--overwrite") == 0
    assert (written / "results.json").is_file()
    assert [file.name for file in written.iterdir() if ".onnx" in file.name] == ["mine.onnx"]

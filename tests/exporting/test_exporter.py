"""Test scripts/export.py: graphs with the outputs of the model for any size, and errors.

The tests run each written file in onnxruntime, at sizes that the script did not compare. A fixture
runs the script in this process for several tests. The other tests call its functions.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.photo_folders import get_file_names
from helpers.scripts_in_process import run_in_process
from helpers.tiny_models import (
    build_images,
    build_random,
    build_tiny_config,
    edit_config,
    raises_one_line,
    save_with_processor,
)
from PIL import Image
from pytest import MonkeyPatch
from torch.testing import assert_close

from modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
)
from modeling_vitcls.data.aspect_ratio import get_resize, set_resize
from modeling_vitcls.exporting import onnx_file
from modeling_vitcls.exporting.exporter import export_model, fit_processor
from modeling_vitcls.exporting.onnx_file import OnnxGraph
from modeling_vitcls.exporting.options import ExportOptions
from modeling_vitcls.exporting.tracing import GraphShape, NamedOutputsModel, get_smallest_size
from modeling_vitcls.hub.model_files import hash_files, hash_weights
from modeling_vitcls.runtime.files import read_json


LIMIT = 1e-4
TASKS = {"age": 2, "species": 4}
NAMES = {0: "cow", 1: "ant", 2: "bee"}

# Models that together have every token, position, pooling, mask and block type: class, fields,
# names of the outputs.
MODELS = {
    "tokens": (
        ViTCLSForImageClassification,
        {
            "num_hidden_layers": 1,
            "image_size": [32, 48],
            "patch_size": [8, 4],
            "num_distillation_tokens": 1,
            "num_register_tokens": 4,
            "position_antialias": True,
            "layer_scale_init_value": 0.1,
            "qk_norm": True,
        },
        ["logits", "cls_logits", "distillation_logits"],
    ),
    "no_cls": (
        ViTCLSModel,
        {
            "num_hidden_layers": 1,
            "num_cls_tokens": 0,
            "num_register_tokens": 2,
            "pooling": "attention",
            "position_embedding_type": "rope_2d",
            "layer_type": "parallel",
            "pre_norm": True,
            "mlp_type": "swiglu",
            "norm_type": "rmsnorm",
        },
        ["last_hidden_state", "pooler_output"],
    ),
    "tasks": (
        ViTCLSForMultiTaskClassification,
        {
            "num_hidden_layers": 1,
            "num_cls_tokens": 2,
            "tasks": TASKS,
            "cls_scopes": ["image", [2, 3, 1, 2]],
            "position_embedding_type": "sincos_2d",
            "attention_type": "differential",
        },
        ["age", "species"],
    ),
    "masks": (
        ViTCLSForImageClassification,
        {
            "num_hidden_layers": 1,
            "num_register_tokens": 2,
            "fading_tokens": {"registers": 1},
            "relative_position_bias": "layer",
            "position_interpolation": "crop",
            "head_type": "mlp",
        },
        ["logits"],
    ),
    "layers": (
        ViTCLSForImageClassification,
        {"pooled_layers": [-2, -1], "pooling": "cls_mean", "num_register_tokens": 1},
        ["logits"],
    ),
    "extra heads": (
        ViTCLSForImageClassification,
        {
            "extra_heads": {
                "weather": {
                    "labels": ["rain", "snow", "sun"],
                    "pooling": "cls_mean",
                    "pooled_layers": [-2, -1],
                },
                "indoors": {"labels": ["no", "yes"]},
            }
        },
        ["logits", "indoors", "weather"],
    ),
    "backbone": (
        ViTCLSBackbone,
        {
            "out_indices": [0, 2],
            "position_embedding_type": "learned_rope_mixed",
            "layer_type": "post",
        },
        ["stem", "stage2"],
    ),
}


def checkpoint(
    folder: Path, model_class: type = ViTCLSForImageClassification, **fields: Any
) -> Any:
    """Save a small model with random weights and an image processor, and return the model."""
    model = model_class(build_tiny_config(**fields))
    processor = ViTCLSImageProcessor(size=[32, 32], image_mean=[0.5, 0.4, 0.3])
    save_with_processor(model, folder, processor)
    return model


def export(folder: Path, output: Path, **flags: Any) -> dict[str, Any]:
    """Export a model to a file, and return the report."""
    return export_model(ExportOptions(model=str(folder), output=output, **flags))


def check_outputs(file: Path, model: Any, pixel_values: torch.Tensor) -> None:
    """Check that a file has the outputs of the model, by name."""
    expected = NamedOutputsModel(model)(pixel_values)
    found = OnnxGraph(file)(pixel_values)
    assert_close(found, expected, atol=LIMIT, rtol=0)


# Models


def check_sizes(file: Path, model: Any) -> None:
    """Check that a file has the outputs of the model for several batch and image sizes."""
    smallest = (1, *get_smallest_size(model.config))
    for batch, height, width in ((1, 32, 32), (5, 24, 72), (2, 61, 30), smallest):
        check_outputs(file, model, build_images(batch, height, width, seed=7))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != "tokens"])
def test_an_onnx_file_has_the_outputs_of_the_model(name: str, tmp_path: Path) -> None:
    """The model "tokens" is in `test_the_exported_file_has_the_outputs_of_the_model`."""
    model_class, fields, names = MODELS[name]
    model = checkpoint(tmp_path / "model", model_class, **fields)
    report = export(tmp_path / "model", tmp_path / "model.onnx")
    assert not report["fixed_because"]
    assert list(report["outputs"]) == names
    check_sizes(tmp_path / "model.onnx", model)


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_the_preprocessing_of_a_graph_of_one_size_makes_this_size(resize: str) -> None:
    processor = ViTCLSImageProcessor()
    set_resize(processor, resize, (64, 64))
    fit_processor(processor, GraphShape((24, 56), (24, 56), is_dynamic=False))
    assert get_resize(processor) == resize
    images = processor(Image.new("RGB", (40, 30)), return_tensors="pt")
    assert images["pixel_values"].shape == (1, 3, 24, 56)


def test_a_graph_with_other_outputs_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    checkpoint(tmp_path / "model", num_hidden_layers=1)
    monkeypatch.setitem(onnx_file.LIMITS, "float32", -1.0)
    with raises_one_line("differs", "logits", "limit"):
        export(tmp_path / "model", tmp_path / "not/a.onnx", dynamic=False)
    assert get_file_names(tmp_path) == {"model"}


# The script


@pytest.fixture(scope="module")
def exported(module_path: Path) -> tuple[Any, Path]:
    """Return the model "tokens" and its ONNX file.

    The weights are in a second file, like those of a large model.
    """
    model_class, fields, _ = MODELS["tokens"]
    model = checkpoint(module_path / "model", model_class, id2label=NAMES, **fields)
    output = module_path / "new/folder/mine.onnx"
    with MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "MAX_ONNX_WEIGHTS", 2 * model.num_parameters())  # bytes
        assert (
            run_in_process("export.py", "--model", module_path / "model", "--output", output) == 0
        )
    return model, output


def test_the_exported_file_has_the_outputs_of_the_model(exported: tuple[Any, Path]) -> None:
    model, file = exported
    check_sizes(file, model)

    files = {"mine.onnx", "mine.onnx.data", "mine.onnx.json"}
    assert get_file_names(file.parent) == files
    # no temporary folder is left
    assert get_file_names(file.parents[2]) == {"model", "new"}
    assert str(file.parents[2]).encode() not in file.read_bytes()


@pytest.fixture
def report(exported: tuple[Any, Path]) -> dict[str, Any]:
    _, file = exported
    return read_json(file.with_name("mine.onnx.json"))


def test_the_report_describes_inputs_and_outputs(
    exported: tuple[Any, Path], report: dict[str, Any]
) -> None:
    _, file = exported
    names = ("mine.onnx", "mine.onnx.data")
    heads = MODELS["tokens"][2]
    expected = {
        "file": "mine.onnx",
        "model": "path/to/model",
        "model_class": "ViTCLSForImageClassification",
        "weights_sha256": hash_weights(file.parents[2] / "model"),
        "dtype": "float32",
        "input": {
            "name": "pixel_values",
            "dtype": "float32",
            "shape": ["batch", 3, "height", "width"],
            "image_size": [32, 48],
            "smallest_image_size": [16, 8],
        },
        "outputs": {name: ["batch", 3] for name in heads},
        "labels": {name: list(NAMES.values()) for name in heads},
        "sha256": hash_files(file.with_name(name) for name in names),
        "num_bytes": sum(file.with_name(name).stat().st_size for name in names),
    }
    assert report | expected == report
    assert report["preprocessing"]["image_mean"] == [0.5, 0.4, 0.3]
    assert report["preprocessing"]["resample"] == "bicubic"
    assert str(file.parents[2]) not in json.dumps(report)
    assert report["versions"].keys() >= {"torch", "onnx", "onnxruntime", "transformers"}


def test_native_other_and_smallest_sizes_are_compared(report: dict[str, Any]) -> None:
    shapes = [tuple(trial["shape"]) for trial in report["tried"]]
    assert shapes == [(3, 3, 32, 48), (2, 3, 24, 64), (1, 3, 40, 49), (1, 3, 16, 8)]
    for name in MODELS["tokens"][2]:
        differences = [trial["differences"][name] for trial in report["tried"]]
        assert report["largest_differences"][name] == max(differences) <= LIMIT


# Errors


@pytest.mark.parametrize(
    ("architectures", "words"),
    [
        (["ViTCLSForImageClassification"], "the weight classifier.bias"),
        (["ViTCLSForMaskedImageModeling"], "contains ViTCLSForMaskedImageModeling"),
    ],
)
def test_models_without_weights_or_of_another_class_are_errors(
    architectures: list[str], words: str, tmp_path: Path
) -> None:
    checkpoint(tmp_path, ViTCLSModel)
    edit_config(tmp_path, architectures=architectures)
    with raises_one_line(words):
        export(tmp_path, tmp_path / "vit.onnx")


def test_an_unsupported_size_is_an_error(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    with raises_one_line("41 is not a multiple"):
        export(tmp_path, tmp_path / "vit.onnx", image_size=(41, 32), dynamic=False)


@pytest.mark.parametrize("name", ["vit.onnx", "vit.onnx.json", "vit.onnx.data"])
def test_existing_files_are_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with raises_one_line(f"{tmp_path / name} exists"):
        export(Path("nowhere"), tmp_path / "vit.onnx")


def test_a_file_name_of_another_format_is_an_error(tmp_path: Path) -> None:
    with raises_one_line("a file must end in .onnx"):
        export(Path("nowhere"), tmp_path / "vit.xml")


@pytest.mark.slow
def test_a_preset_is_exported_to_a_folder(tmp_path: Path) -> None:
    flags = ("--model", "vitcls-tiny", "--output", tmp_path / "new")
    assert run_in_process("export.py", *flags) == 0
    files = get_file_names(tmp_path / "new")
    assert files == {"config.json", "preprocessor_config.json", "model.onnx", "model.onnx.json"}


def test_a_new_folder_has_the_processor_of_a_graph_of_one_size_with_resampled_positions(
    tmp_path: Path,
) -> None:
    """Also of a folder without one, and of a model in half precision, without its dropout."""
    fields = {"num_hidden_layers": 1, "hidden_dropout_prob": 0.5}
    model = build_random(ViTCLSModel, **fields).bfloat16()
    model.save_pretrained(tmp_path / "model")
    report = export(tmp_path / "model", tmp_path / "served", image_size=(24, 56), dynamic=False)
    assert report["input"]["shape"] == ["batch", 3, 24, 56]
    assert report["preprocessing"]["size"] == {"height": 24, "width": 56}
    processor = ViTCLSImageProcessor.from_pretrained(tmp_path / "served")
    images = processor(Image.new("RGB", (40, 30)), return_tensors="pt")["pixel_values"]
    assert images.shape == (1, 3, 24, 56)
    assert report["dtype"] == "float32"
    check_outputs(tmp_path / "served/model.onnx", model.float(), images)

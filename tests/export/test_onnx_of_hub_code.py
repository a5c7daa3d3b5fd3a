"""`torch.onnx.export` called on a model directly, as users of the code on the Hub do."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import build_images, build_tiny_config, each_layout, randomize

from modeling_vitcls import ViTCLSForImageClassification


pytestmark = pytest.mark.integration


onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


def export_and_run(model: torch.nn.Module, file: Path, num_images: int) -> dict[str, torch.Tensor]:
    """Export with an example of one image, and return the outputs of the file for more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (build_images(1),),
            file,
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (graph_input,) = session.get_inputs()
    assert graph_input.shape == ["batch", 3, 32, 32]
    names = [output.name for output in session.get_outputs()]
    arrays = session.run(None, {graph_input.name: build_images(num_images).numpy()})
    return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


@pytest.mark.slow
@each_layout
def test_the_batch_is_dynamic_and_no_output_is_repeated(
    tmp_path: Path, layout: dict[str, Any]
) -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**layout)))
    outputs = list(export_and_run(model, tmp_path / "model.onnx", 5).values())
    with torch.no_grad():
        expected = model(build_images(5))
    names = [
        "logits",
        *(
            ["cls_logits", "distillation_logits"]
            if expected.distillation_logits is not None
            else []
        ),
    ]

    assert len(outputs) == len(names)
    for name, output in zip(names, outputs, strict=True):
        assert (output - expected[name]).abs().max() <= 1e-5, name


def test_outside_of_an_export_the_logits_have_both_names() -> None:
    outputs = randomize(ViTCLSForImageClassification(build_tiny_config()))(build_images())
    assert outputs.cls_logits is outputs.logits

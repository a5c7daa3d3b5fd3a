"""`torch.onnx.export` called on a model directly, as users of the code on the Hub do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    build_images,
    build_random,
    each_layout,
)

from modeling_vitcls import ViTCLSForImageClassification


onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@each_layout
@torch.no_grad()
def test_the_batch_is_dynamic_and_no_output_is_repeated(
    tmp_path: Path, layout: dict[str, Any]
) -> None:
    """The example has one image; docs/exporting.md."""
    model = build_random(ViTCLSForImageClassification, **layout)
    file = tmp_path / "model.onnx"
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    torch.onnx.export(model, (build_images(1),), file, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (graph_input,) = session.get_inputs()
    assert graph_input.shape == ["batch", 3, 32, 32]
    found = session.run(None, {graph_input.name: build_images(5).numpy()})

    outputs = model(build_images(5))
    expected = [outputs.logits]
    if outputs.distillation_logits is not None:
        expected += [outputs.cls_logits, outputs.distillation_logits]
    torch.testing.assert_close(list(map(torch.from_numpy, found)), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "added",
    [
        {"num_register_tokens": 4},
        {"num_distillation_tokens": 1, "num_register_tokens": 2},
        {"num_cls_tokens": 2, "cls_scopes": ["image", [2, 2, 1, 0]]},
    ],
    ids=str,
)
def test_models_with_gated_tokens_are_exported_as_they_are(
    added: dict[str, Any], tmp_path: Path
) -> None:
    """Their parameters require gradients, and so would the attention bias."""
    model = build_random(ViTCLSForImageClassification).adapt(**added).eval()
    file = tmp_path / "model.onnx"
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    torch.onnx.export(model, (build_images(1),), file, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found, *_ = session.run(None, {session.get_inputs()[0].name: build_images(5).numpy()})
    torch.testing.assert_close(
        torch.from_numpy(found), model(build_images(5)).logits.detach(), atol=1e-5, rtol=0
    )


def test_outside_of_an_export_the_logits_have_both_names() -> None:
    outputs = build_random(ViTCLSForImageClassification)(build_images())
    assert outputs.cls_logits is outputs.logits

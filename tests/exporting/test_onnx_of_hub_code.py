"""`torch.onnx.export` called on a model directly, as users of the code on the Hub do."""

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import IMAGES, LAYOUTS, build_images, build_random
from torch.testing import assert_close

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.conversion.weight_rules import Fields


onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


# Their attention has a bias, because they are still faded in.
ADDED = [
    {"num_register_tokens": 4},
    {"num_distillation_tokens": 1, "num_register_tokens": 2},
    {"num_cls_tokens": 2, "cls_scopes": ["image", [2, 2, 1, 0]]},
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("layout", "added"),
    [*((layout, {}) for layout in LAYOUTS.values()), *(({}, added) for added in ADDED)],
    ids=str,
)
def test_the_batch_is_dynamic_and_no_output_is_repeated(
    tmp_path: Path, layout: Fields, added: Fields
) -> None:
    """The example has one image; docs/exporting.md."""
    model = build_random(ViTCLSForImageClassification, **layout).adapt(**added).eval()
    file = tmp_path / "model.onnx"
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    torch.onnx.export(model, (build_images(1),), file, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (graph_input,) = session.get_inputs()
    assert graph_input.shape == ["batch", 3, 32, 32]
    found = session.run(None, {graph_input.name: build_images(5).numpy()})

    with torch.no_grad():
        outputs = model(build_images(5))
    expected = [outputs.logits]
    if outputs.distillation_logits is not None:
        expected += [outputs.cls_logits, outputs.distillation_logits]
    assert_close(list(map(torch.from_numpy, found)), expected, atol=1e-5, rtol=0)


def test_outside_of_an_export_the_logits_have_both_names() -> None:
    outputs = build_random(ViTCLSForImageClassification)(IMAGES)
    assert outputs.cls_logits is outputs.logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fields", [{}, {"position_antialias": True}], ids=["bicubic", "antialias"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_older_exporter_keeps_the_batch_size_dynamic(
    attention: str, fields: Fields, tmp_path: Path
) -> None:
    model = build_random(ViTCLSForImageClassification, **fields)
    model.set_attn_implementation(attention)
    axes = {"pixel_values": {0: "batch"}}
    torch.onnx.export(
        model, (build_images(3),), tmp_path / "model.onnx", dynamo=False, opset_version=18,
        input_names=["pixel_values"], output_names=["logits"], dynamic_axes=axes,
    )  # fmt: skip
    images = build_images(5)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(["logits"], {"pixel_values": images.numpy()})
    assert_close(torch.tensor(logits), model(images).logits, rtol=1e-5, atol=1e-5)

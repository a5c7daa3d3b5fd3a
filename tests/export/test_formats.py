"""Files of the export formats: errors for files that do not run, and for an opset that is not written."""

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import build_images, build_tiny_config, raises_one_line, randomize

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.export import formats
from modeling_vitcls.export.tracing import select_graph_shape, trace_model


pytestmark = pytest.mark.integration


def test_files_that_do_not_run(tmp_path: Path) -> None:
    (tmp_path / "vit.onnx").write_text("damaged")
    with raises_one_line("vit.onnx"):
        formats.FORMATS["onnx"].run(tmp_path / "vit.onnx", [build_images()], ["logits"])


@pytest.mark.slow
def test_torch_files_that_do_not_run(tmp_path: Path) -> None:
    (tmp_path / "vit.pt2").write_text("damaged")
    with raises_one_line("the written graph does not run in a separate process: ", "zip file"):
        formats.FORMATS["torch"].run(tmp_path / "vit.pt2", [build_images()], ["logits"])


@pytest.mark.slow
def test_an_opset_that_the_exporter_does_not_write(tmp_path: Path) -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(num_hidden_layers=1)))
    shape = select_graph_shape(model, None, dynamic=False)
    graph = formats.TracedModel(trace_model(model, shape, torch.float32), shape, ["logits"], opset=99)
    with raises_one_line("--opset is 99", "Omit --opset"):
        formats.write_onnx(graph, tmp_path / "vit.onnx")

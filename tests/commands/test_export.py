"""`vitcls export`: how flags are passed on, and the printed report."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modeling_vitcls.commands import export


def test_the_report_of_an_export_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    report: Any = SimpleNamespace(
        format="onnx",
        model="mine",
        weights="trained",
        opset=18,
        limit=(1e-4, 0.01),
        tried=[SimpleNamespace(shape=(2, 3, 32, 48), differences={"logits": 1e-6})],
        input={"shape": ["batch", 3, "height", "width"], "image_size": [32, 32], "smallest_image_size": [8, 16]},
        outputs={"logits": ["batch", 3]},
        fixed_because="",
        preprocessing={},
        versions={"torch": "2"},
    )
    export.print_report(report, Path("out.onnx"))
    lines = capsys.readouterr().out.splitlines()
    title = "Largest differences between onnx and mine (limit 0.0001 + 0.01 of the largest value)"
    assert " ".join(" ".join(lines).split()).startswith(title)
    assert ["2 of 32 x 48", "1.0e-06"] in [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert lines[-6:] == [
        "Accepts any batch size and images of at least 8 x 16 pixels",
        "Versions: opset 18, torch 2",
        "",
        "Wrote the model to out.onnx, and a description of its inputs and outputs to out.onnx.json. "
        "Run the exported model with",
        '  session = onnxruntime.InferenceSession("out.onnx")',
        '  outputs = session.run(None, {"pixel_values": pixel_values})',
    ]

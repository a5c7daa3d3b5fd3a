"""`vitcls export`: how flags are passed on, and the printed report."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from helpers.command_in_process import run_here

from modeling_vitcls.cli import export
from modeling_vitcls.export import exporter
from modeling_vitcls.export.options import ExportOptions


def test_flags_and_report_of_an_export(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real quantization takes minutes (tests/export/test_backends.py)."""
    passed: list[ExportOptions] = []
    report: dict[str, Any] = {
        "format": "onnx",
        "dtype": "float32",
        "model": "m",
        "tried": [{"shape": [2, 3, 32, 48], "differences": {"cls": 1e-6, "logits": 2e-6}}],
        "input": {
            "image_size": [32, 48],
            "smallest_image_size": [8, 8],
            "shape": ["batch", 3, 32, 48],
        },
        "fixed_because": "the positions are learned",
        "comparison": {
            "output": "cls",
            "num_images": 64,
            "relative_error": 0.0123,
            "cosine_similarity": 0.98765,
        },
        "speed": {"images_per_second": 123.5, "batch_size": 16, "device": "CPU"},
        "evaluation": {
            "metric": "accuracy",
            "file": 0.875,
            "model": 0.9375,
            "num_images": 321,
            "num_equal_labels": 300,
            "drop_interval": [0.01, 0.09],
        },
        "num_bytes": 3 * 2**20,
    }

    def export_model(options: ExportOptions) -> dict[str, Any]:
        passed.append(options)
        return report

    monkeypatch.setattr(exporter, "export_model", export_model)
    flags = "--model m --format onnx --output o.onnx --int8 --dataset d --split s --max-drop 2.5 --exclude-layers 1 3"
    assert run_here("export", *flags.split(), "--image-size", "32", "48") == 0
    assert passed == [
        ExportOptions(
            "m", "onnx", Path("o.onnx"), True, 2.5, (1, 3), (32, 48), dataset="d", split="s"
        )
    ]
    printed = capsys.readouterr().out
    measured = (
        "file 87.50%",
        "model 93.75%",
        "321",
        "cls of 64",
        "1.2e-02",
        "300 of 321",
        "positions are learned",
    )
    assert "--backend" not in printed  # a file
    measured += ("123.5 images/s in batches of 16, CPU", "3.0 MiB", "only images of 32 x 48")
    for fact in (*measured, "2 images of 32 x 48: cls 1.0e-06, logits 2.0e-06"):
        assert fact in printed
    report["input"] |= {"shape": ["batch", 3, "height", "width"]}
    export.print_report(report | {"evaluation": None, "comparison": None}, Path("folder"))
    printed = capsys.readouterr().out
    assert "8 x 8" in printed
    assert "--model folder --backend onnx" in printed
    assert "321" not in printed


def test_flags_and_report_of_an_export_for_transformers_js(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    comparisons = [{"file": "model.onnx", "largest_difference": 0.00123, "top1_agreement": 0.875}]
    comparisons.append({"file": "model_q8.onnx", "largest_difference": 0.5, "top1_agreement": None})
    write = Mock(return_value={"comparisons": comparisons})
    monkeypatch.setattr("modeling_vitcls.export.transformers_js.export_for_transformers_js", write)
    flags = "--model m --format transformers.js --output web --dataset d --split s"
    assert run_here("export", *flags.split()) == 0
    write.assert_called_once_with("m", Path("web"), "d", "s")
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert "1.2e-03" in first
    assert "87.5%" in first
    assert "5.0e-01" in second
    assert "%" not in second

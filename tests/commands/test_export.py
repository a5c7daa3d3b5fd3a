"""`vitcls export`: how flags are passed on, and the printed report."""

from pathlib import Path
from typing import Any

import pytest
from helpers.command_in_process import run_here

from modeling_vitcls.export import exporter
from modeling_vitcls.options import ExportOptions


def test_every_flag_reaches_the_exporter(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A real quantization takes minutes (tests/export/test_backends.py)."""
    passed: list[ExportOptions] = []
    report = {
        "format": "onnx",
        "dtype": "float32",
        "model": "m",
        "tried": [],
        "input": {"image_size": [32, 48], "smallest_image_size": [8, 8], "shape": ["batch", 3, 32, 48]},
        "fixed_because": "",
        "weights": "trained",
        "comparison": None,
        "evaluation": {"metric": "accuracy", "file": 0.875, "model": 0.9375, "num_images": 321},
        "num_bytes": 3 * 2**20,
    }

    def export_model(options: ExportOptions) -> dict[str, Any]:
        passed.append(options)
        return report

    monkeypatch.setattr(exporter, "export_model", export_model)
    flags = "--model m --format onnx --output o.onnx --int8 --dataset d --split s --max-drop 2.5 --exclude-layers 1 3"
    assert run_here("export", *flags.split(), "--image-size", "32", "48") == 0
    assert passed == [ExportOptions("m", "onnx", Path("o.onnx"), True, 2.5, (1, 3), (32, 48), dataset="d", split="s")]
    printed = capsys.readouterr().out
    for number in ("87.50%", "93.75%", "321", "32 x 48", "3.0 MiB"):
        assert number in printed

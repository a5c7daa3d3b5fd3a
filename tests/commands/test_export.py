"""`vitcls export`: how flags are passed on, and the printed report."""

from typing import Any

import pytest
from helpers.command_in_process import run_here

from modeling_vitcls.export import exporter


def test_every_flag_reaches_the_exporter(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A real quantization takes minutes (tests/export/test_backends.py)."""
    passed: dict[str, Any] = {}
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

    def export_model(model: str, format: str, output: Any, *sizes: Any, **others: Any) -> dict[str, Any]:
        passed.update(others, model=model, format=format, output=str(output), sizes=sizes)
        return report

    monkeypatch.setattr(exporter, "export_model", export_model)
    flags = "--model m --format onnx --output o.onnx --int8 --dataset d --split s --max-drop 2.5 --exclude-layers 1 3"
    assert run_here("export", *flags.split(), "--image-size", "32", "48") == 0
    assert passed == {
        "model": "m",
        "format": "onnx",
        "output": "o.onnx",
        "sizes": ((32, 48), True, "float32"),
        "int8": True,
        "dataset": "d",
        "split": "s",
        "max_drop": 2.5,
        "exclude_layers": (1, 3),
    }
    printed = capsys.readouterr().out
    for number in ("87.50%", "93.75%", "321", "32 x 48", "3.0 MiB"):
        assert number in printed

"""`vitcls convert`: how flags are passed on, and the printed report."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_in_process import run_here

from modeling_vitcls.commands import convert


def test_the_parity_report_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    report = {
        "source": "timm:name",
        "model_class": "ViTCLSForImageClassification",
        "classifier": "kept",
        "limit": 1e-5,
        "comparisons": [
            {"image_size": (32, 32), "differences": {"cls": 1e-6, "logits": 2e-6}},
            {"image_size": (24, 40), "differences": {"cls": 3e-6, "logits": 4e-6}},
        ],
        "not_compared": "",
        "preprocessing": {"assumed_because": ""},
        "notes": ["a note"],
    }
    convert.print_report(report, Path("out"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "Largest differences between ViTCLSForImageClassification and timm:name (limit 1e-05):",
        "- 32 x 32 pixels: cls 1.0e-06, logits 2.0e-06",
        "- 24 x 40 pixels: cls 3.0e-06, logits 4.0e-06",
        "a note",
        "Classifier: kept",
    ]
    assert lines[-1] == "  vitcls push --model out --hub-model-id YOUR-NAME/out"
    changes: dict[str, Any] = {"not_compared": "fixed size", "preprocessing": {"assumed_because": "there is none"}}
    convert.print_report(report | changes, Path())
    printed = capsys.readouterr().out
    assert "fixed size" in printed and "assumed, because there is none" in printed
    assert f" YOUR-NAME/{Path.cwd().name}\n" in printed


def test_the_family_of_a_file_is_passed_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"cls_token": torch.zeros(1, 1, 8)}, tmp_path / "a.pth")
    words = ("--source", str(tmp_path / "a.pth"), "--output", str(tmp_path / "out"), "--family", "swin")
    assert run_here("convert", *words) == 1 and "swin" in capsys.readouterr().err

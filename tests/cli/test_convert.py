"""`vitcls convert`: how flags are passed on, and the printed report."""

import re
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from helpers.command_in_process import run_here

from modeling_vitcls.cli import convert
from modeling_vitcls.conversion.convert import convert_checkpoint, write_native_model


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
    printed = capsys.readouterr().out
    measured = (
        "32 x 32 .*cls 1.0e-06, logits 2.0e-06",
        "24 x 40 .*cls 3.0e-06, logits 4.0e-06",
        "a note",
        "kept",
    )
    for facts in (
        *measured,
        "ImageClassification .*timm:name .*1e-05",
        "push --model out --hub-model-id YOUR-NAME/out",
    ):
        assert re.search(facts, printed), facts
    changes: dict[str, Any] = {
        "not_compared": "fixed size",
        "preprocessing": {"assumed_because": "there is none"},
    }
    convert.print_report(report | changes, Path())
    printed = capsys.readouterr().out
    assert "fixed size" in printed
    assert "assumed, because there is none" in printed
    assert f" YOUR-NAME/{Path.cwd().name}\n" in printed


def test_flags_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = create_autospec(convert_checkpoint, side_effect=ValueError)
    back = create_autospec(write_native_model, side_effect=ValueError)
    monkeypatch.setattr("modeling_vitcls.conversion.convert.convert_checkpoint", forward)
    monkeypatch.setattr("modeling_vitcls.conversion.convert.write_native_model", back)
    assert run_here(*"convert --source a.pth --output out --random-init --family dino".split()) == 1
    assert run_here(*"convert --to transformers --model mine --output native".split()) == 1
    forward.assert_called_once_with("a.pth", Path("out"), random_init=True, family="dino")
    back.assert_called_once_with("mine", Path("native"))

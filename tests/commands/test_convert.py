"""`vitcls convert`: how flags are passed on, and the printed report."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modeling_vitcls.commands import convert
from modeling_vitcls.conversion.parity_report import ParityReport, SizeComparison


def test_the_parity_report_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    report = ParityReport(
        source="timm:name",
        source_revision=None,
        source_class="VisionTransformer",
        random_init=False,
        model_class="ViTCLSForImageClassification",
        num_parameters=1,
        image_size=(32, 32),
        num_labels=3,
        provenance={},
        classifier="kept",
        limit=1e-5,
        comparisons=[
            SizeComparison((32, 32), {"cls": 1e-6, "logits": 2e-6}, {}),
            SizeComparison((24, 40), {"cls": 3e-6, "logits": 4e-6}, {}),
        ],
        not_compared="",
        preprocessing={
            "assumed_because": "",
            "origin": "preprocessor_config.json",
            "largest_difference_in_grey_levels": 0.25,
        },
        versions={"torch": "2", "timm": "1"},
        sha256={"model.safetensors": "abc"},
        notes=["a note"],
    )
    convert.print_report(report, Path("out"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "Largest differences between ViTCLSForImageClassification and timm:name (limit 1e-05):",
        "- 32 x 32 pixels: cls 1.0e-06, logits 2.0e-06",
        "- 24 x 40 pixels: cls 3.0e-06, logits 4.0e-06",
        "a note",
        "Classifier: kept",
    ]
    assert '  model = AutoModelForImageClassification.from_pretrained("out", trust_remote_code=True)' in lines
    assert lines[-1] == "  vitcls push --model out --hub-model-id YOUR-NAME/out"
    changes: dict[str, Any] = {"not_compared": "fixed size", "preprocessing": {"assumed_because": "there is none"}}
    changes |= {"model_class": "ViTCLSModel"}
    convert.print_report(replace(report, **changes), Path("out"), trust_argument="")
    printed = capsys.readouterr().out
    assert "fixed size" in printed and "assumed, because there is none" in printed
    assert '\n  model = AutoModel.from_pretrained("out")\n' in printed

"""`vitcls convert`: how flags are passed on, and the printed report."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modeling_vitcls.commands import convert
from modeling_vitcls.conversion.parity_report import ParityReport, SizeComparison


def test_the_parity_report_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
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
    title, _, header, _, cls, logits, _, *lines = capsys.readouterr().out.splitlines()
    assert title.strip() == "Largest differences between ViTCLSForImageClassification and timm:name"
    assert [[cell.strip() for cell in re.split("[│┃]", row)[1:-1]] for row in (header, cls, logits)] == [
        ["values", "32 x 32 pixels", "24 x 40 pixels"],
        ["cls", "1.0e-06", "3.0e-06"],
        ["logits", "2.0e-06", "4.0e-06"],
    ]
    assert lines == [
        "a note",
        "Classifier: kept. Maximum allowed difference: 1e-05",
        "Image processor: settings of preprocessor_config.json; pixel values differ by at most 0.25 gray levels "
        "(0 to 255)",
        "Versions: torch 2, timm 1",
        "SHA-256 of model.safetensors: abc",
        "",
        "Written to out. Load the model with",
        '  model = AutoModelForImageClassification.from_pretrained("out", trust_remote_code=True)',
        '  processor = AutoImageProcessor.from_pretrained("out", trust_remote_code=True)',
        "Push the model and its card to the Hub, and verify the pushed model, with",
        "  vitcls push --model out --hub-model-id YOUR-NAME/out",
    ]
    changes: dict[str, Any] = {"not_compared": "fixed size", "preprocessing": {"assumed_because": "there is none"}}
    changes |= {"family": "dino", "source_sha256": "def", "model_class": "ViTCLSModel"}
    convert.print_report(replace(report, **changes), Path("out"), trust_argument="")
    printed = capsys.readouterr().out
    for line in (
        "Not compared at a second image size: fixed size",
        "Image processor: the settings are assumed, because there is none. Check them",
        "SHA-256 of the source (dino): def",
        '  model = AutoModel.from_pretrained("out")',
    ):
        assert f"\n{line}\n" in printed

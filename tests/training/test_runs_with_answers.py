"""Runs with the labels that a person gave on a page, from the first page to the second."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.command_in_process import finetune
from helpers.photo_folders import write_photos
from helpers.tiny_models import edit_config
from pytest import CaptureFixture

from modeling_vitcls import evaluate, predict
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.inference.inputs import compute_checksum
from modeling_vitcls.publishing.report import write_report


@pytest.fixture(scope="module")
def run(converted_encoder: Path, module_path: Path) -> Any:
    """Return a function that trains on noise of two classes, and reads the questions of its page."""
    photos = write_photos(module_path / "photos", range(30))

    def run_once(name: str, *flags: str) -> tuple[dict[str, Any], pd.DataFrame]:
        results = finetune(converted_encoder, photos, module_path / name, *flags)
        write_report(ModelFolder(results["folder"]))
        assert (results["folder"] / "report.html").exists()
        page = results["folder"] / "labels.html"
        text = page.read_text() if page.exists() else ""
        questions = re.findall(r"^ *(\{.*\}),$", text, re.MULTILINE)
        return results, pd.DataFrame(map(json.loads, questions))

    return run_once


def test_who_believes_the_model_gets_no_estimate_and_unsure_photos_only_train(
    run: Any, module_path: Path
) -> None:
    results, questions = run("first")
    # Photos that only look like one scene with two labels may have the label that the model says.
    believed = questions.query("chosen == 'random' or answer != before")
    answers = believed.assign(label=believed["answer"], time="")
    answers["chosen"] = answers["chosen"].replace("random", "unsure")
    answers.to_csv(module_path / "answers.csv")
    second, others = run("second", "--answers", str(module_path / "answers.csv"))
    num_unsure = (answers["chosen"] == "unsure").sum()
    assert second["num_uncounted"] == num_unsure
    assert second["num_images"] == results["num_images"] - num_unsure
    assert re.search(r"\d right\. No estimate: (\d+) of \1 labels", second["printed"])
    assert not {*answers["checksum"]} & {*others["checksum"]}


def test_photos_that_are_held_out_are_never_on_a_page(run: Any) -> None:
    _, questions = run("held out", "--held-out-fraction", "0.2")
    assert questions.empty


def test_unknown_photos_are_counted_among_those_that_show_none_of_the_classes(
    run: Any, module_path: Path, capsys: CaptureFixture
) -> None:
    results, _ = run("third")
    others = write_photos(module_path / "others", range(40, 44))
    *checksums, last = map(compute_checksum, sorted(others.rglob("*.png"))[:3])
    table = {"checksum": [*checksums, last], "chosen": ["unsure", "random", "unknown"]}
    answers = pd.DataFrame(table).assign(label="", time="")
    answers.to_csv(module_path / "none.csv")
    rows = predict(results["folder"], str(others))
    near, far = sorted(row["distance"] for row in rows if row["checksum"] in checksums)
    edit_config(results["folder"], distance_threshold=(near + far) / 2)
    measured = evaluate(results["folder"], str(others), answers=(str(module_path / "none.csv"),))
    assert measured["num_images"] == 5
    assert measured["outside"] == {"num_images": 2, "num_unknown": 1}
    assert "1 of 2 photos that show none of the classes" in capsys.readouterr().out

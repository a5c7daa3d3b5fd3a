"""After a training run, publishing adds the report and the card from the folder alone."""

import base64
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.local_hub import LocalHub
from helpers.model_folders import write_run_folder
from helpers.photo_folders import write_photos
from helpers.tiny_models import raises_one_line, save_classifier
from helpers.tiny_options import TINY
from huggingface_hub import ModelCard
from PIL import Image
from pytest import CaptureFixture, MonkeyPatch

from modeling_vitcls import finetune
from modeling_vitcls.data.splits import load_run_data
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.inference.stated_result import format_name, state_result
from modeling_vitcls.publishing.card import write_card
from modeling_vitcls.publishing.report import finish_run, write_report
from modeling_vitcls.runtime.files import read_json


RUN = vars(TINY) | {"dataset": "digits", "num_workers": 0}


@pytest.mark.usefixtures("few_digits")
def test_a_run_gets_a_report_and_a_card_from_its_folder(
    tmp_path: Path, capsys: CaptureFixture, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr("modeling_vitcls.publishing.report.NUM_SHOWN_IMAGES", 2)
    folder = tmp_path / "run"
    finetune(output_dir=folder, max_steps=2, **RUN)
    output = capsys.readouterr().out
    assert f"written   {folder}/README.md, {folder}/report.html" in output
    card = ModelCard.load(folder / "README.md").text
    report = (folder / "report.html").read_text()
    rows = pd.read_parquet(folder / "predictions.parquet")
    num_wrong = int((rows["label"] != rows["prediction"]).sum())
    assert f"{num_wrong} of {len(rows)} predictions are wrong" in report
    results = read_json(folder / "results.json")
    assert results["num_right"] == len(rows) - num_wrong
    statement = state_result(results)
    assert f"{statement}. Measured on {len(rows)} held-out images" in output
    assert f"<h1>{statement}.</h1>" in report
    assert f"| Accuracy | {state_result(results, format_label=format_name)} |" in card
    assert "images/attention.png" in card
    assert "[report.html]" in card
    assert report.count('class="sheet"') == 2
    # The card's image begins with the report's first photo, which is compressed there.
    (encoded,) = re.findall(r'class="tile"><img src="data:image/jpeg;base64,([^"]+)"', report)[:1]
    shown = np.asarray(Image.open(BytesIO(base64.b64decode(encoded))).convert("RGB"), float)
    strip = np.asarray(Image.open(folder / "images/attention.png").convert("RGB"), float)
    assert strip.shape[1] == 3 * shown.shape[1]
    assert np.abs(strip[:, : shown.shape[1]] - shown).mean() < 4

    # The folder is all that publishing reads.
    for file in (folder / "README.md", folder / "report.html", *(folder / "images").iterdir()):
        file.unlink()
    moved = folder.rename(tmp_path / "moved")

    finish_run(ModelFolder(moved))
    assert (moved / "report.html").is_file()
    text = ModelCard.load(moved / "README.md").text
    expected = card.replace(f"{folder.parent.name}/run", f"{tmp_path.name}/moved")
    assert text.rpartition("<!--")[0] == expected.rpartition("<!--")[0]


def test_a_report_without_rows_of_photos_has_a_table_of_the_metrics(tmp_path: Path) -> None:
    """There are none of several labels per image."""
    write_photos(tmp_path / "photos", range(4), "dusk", "noon", "x")
    results = {"steps": 0, "accuracy": 0.75, "num_images": 400}
    flags = {"dataset": str(tmp_path / "photos"), "held_out_fraction": 0.2}
    run = write_run_folder(tmp_path / "run", results, flags)
    write_report(ModelFolder(run))
    assert "<td>300 of 400 right" in (run / "report.html").read_text()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_report_reads_the_images_that_measured_the_run(split: str, tmp_path: Path) -> None:
    """A frozen run trains on the validation split, too, and is measured on the test split."""
    for name in ("train", "validation", "test"):
        write_photos(tmp_path / "photos" / name, range(4), "dusk", "noon", "x")
    run = write_run_folder(tmp_path / "run", {"held_out_split": split})
    data = load_run_data(ModelFolder(run), str(tmp_path / "photos"))
    assert {Path(name).parts[0] for name in data.held_out.images.get_names()} == {split}


@pytest.mark.usefixtures("few_digits", "in_this_process")
def test_a_run_is_pushed_and_verified(
    hub: LocalHub, tmp_path: Path, capsys: CaptureFixture
) -> None:
    """A token without permission stops the run before the training.

    Other processes of a run do not push.
    """
    flags = {**RUN, "max_steps": 1, "report": False, "push_to_hub": True}
    with raises_one_line("bob/mine"):
        finetune(output_dir=tmp_path / "run", hub_model_id="bob/mine", **flags)
    assert not (tmp_path / "run").exists()

    finetune(output_dir=tmp_path / "mine", **flags)
    commit = hub.repositories["ann/mine"].branches["main"]

    output = capsys.readouterr().out
    assert f"pushed    {hub.url}/ann/mine/commit/{commit} (public)" in output
    assert "verified: ann/mine at" in output
    assert "# ann/mine" in hub.read("ann/mine", "README.md").decode()


def test_a_run_without_a_report_is_finished(tmp_path: Path, capsys: CaptureFixture) -> None:
    """The dataset was moved. Warnings and paths are printed as they are."""
    folder = write_run_folder(tmp_path / "[old]", None, {"dataset": "./gone [old]"})
    finish_run(ModelFolder(folder))
    warning, written = capsys.readouterr().out.splitlines()
    assert "report.html" in warning
    assert "gone [old]" in warning
    assert written.endswith(f" {folder}/README.md")


def test_a_model_saved_by_hand_gets_a_card(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "mine", "a", "b", "c")
    write_report(ModelFolder(folder))
    assert not (folder / "report.html").exists()

    write_card(ModelFolder(folder))
    card = ModelCard.load(folder / "README.md")
    assert "for image classification with 3 classes" in card.text
    assert card.data.eval_results is None
    assert f'model="{tmp_path.name}/mine"' in card.text
    assert str(tmp_path) not in card.text

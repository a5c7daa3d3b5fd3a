"""A training run: the folder is complete, and publishing adds the report and the card from the folder alone."""

from pathlib import Path

import pytest
from helpers.tiny_models import build_tiny_config, save_with_processor
from huggingface_hub import ModelCard
from PIL import Image

from modeling_vitcls import ViTCLSForImageClassification, finetune
from modeling_vitcls.analysis.inspection_inputs import InspectionImages
from modeling_vitcls.files import read_json
from modeling_vitcls.publishing.card import write_card
from modeling_vitcls.publishing.report import write_report


def fail(message: str) -> None:
    """Fail the test: no warning is expected."""
    raise AssertionError(message)


@pytest.mark.integration
@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_gets_a_report_and_a_card_from_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    flags = {"max_steps": 2, "image_size": 16, "patch_size": 8, "num_workers": 0, "num_register_tokens": 1}
    finetune("vitcls-tiny", "digits", folder, **flags)
    output = capsys.readouterr().out
    assert f"written   {folder}/README.md, {folder}/report.html" in output and "diagnosis" in output
    results, card = read_json(folder / "results.json"), ModelCard.load(folder / "README.md").text
    assert f"{results['accuracy']:.2%}" in card and "images/attention.png" in card and "[report.html]" in card
    assert results["provenance"] is None and "trained from scratch on `digits`" in card
    # The folder is all that publishing reads.
    for file in (folder / "README.md", folder / "report.html", *(folder / "images").iterdir()):
        file.unlink()
    moved = folder.rename(tmp_path / "moved")
    assert write_report(moved, fail)
    write_card(moved)
    text = ModelCard.load(moved / "README.md").text
    expected = card.replace("# run", "# moved").replace('"run"', '"moved"')
    assert text.rpartition("<!--")[0] == expected.rpartition("<!--")[0]


def test_a_model_saved_by_hand_gets_a_report_and_a_card(tmp_path: Path) -> None:
    config = build_tiny_config(num_register_tokens=1, id2label={0: "a", 1: "b", 2: "c"})
    save_with_processor(ViTCLSForImageClassification(config), tmp_path / "mine")
    pictures = [Image.new("RGB", (32, 32), (value, 0, 90)) for value in range(0, 250, 50)]
    images = InspectionImages(pictures, [str(index) for index in range(5)], None, "five images")
    summary = write_report(tmp_path / "mine", fail, images)
    write_card(tmp_path / "mine")
    assert summary is not None and (tmp_path / "mine" / "report.html").is_file()
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert "for image classification with 3 classes" in card.text and card.data.eval_results is None
    assert "images/token_layout.png" in card.text and 'model="mine"' in card.text

"""The command scripts/inspect_tokens.py: folders of images, datasets, and one-line errors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.local_hub import LocalHub, read_files
from helpers.photo_folders import write_photos
from helpers.scripts_in_process import run_in_process
from helpers.tiny_models import edit_weights, raises_one_line, save_classifier
from pytest import CaptureFixture, approx

from modeling_vitcls import inspect_tokens
from modeling_vitcls.analysis.report import write_tables
from modeling_vitcls.model.attention_masks_vitcls import TokenFadeIn


CLASSES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def model(module_path: Path) -> str:
    """Return a classifier whose second register is almost hidden."""
    fields: dict[str, Any] = {"num_register_tokens": 2, "fading_tokens": {"registers": 1}}
    folder = save_classifier(module_path / "model", *CLASSES, **fields)
    with edit_weights(folder) as weights:
        weights["vitcls.fade_in.progress"].fill_(31 * TokenFadeIn.FULL // 1000)
    return str(folder)


@pytest.fixture(scope="module")
def image_folder(module_path: Path) -> Path:
    """Write images of two classes, one without a class, and an unreadable file."""
    folder = write_photos(module_path / "photos", range(5), "cat", "owl")
    write_photos(folder, range(1), "else")
    (folder / "cat/broken [old].png").write_bytes(b"no picture")
    return folder


def test_terminal_page_and_the_function_have_the_same_values(
    model: str, image_folder: Path, tmp_path: Path, capsys: CaptureFixture
) -> None:
    """The unreadable file is named."""
    page = tmp_path / "page.html"
    found = inspect_tokens(model, image_folder, output=page, num_images=1)
    printed, errors = capsys.readouterr()
    assert errors.count("WARNING") == 1
    assert "skipped an image" in errors
    assert "broken [old].png" in errors

    text = page.read_text()
    for effect in found.effects:
        assert f"log loss {effect['content']['loss_change']:+.3f} (" in text
    assert found.fade_in == {"register 2": approx(0.031)}
    assert "<td>0.03</td>" in text
    assert "faded in to 0.03," in printed
    assert str(image_folder) not in text
    assert model not in text  # local folders are not in the page


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_table_has_the_numbers_of_each_token_and_group(
    suffix: str, model: str, image_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / f"tokens.{suffix}"
    found = inspect_tokens(model, image_folder, output=file, layers=(1, 2))
    table = getattr(pd, f"read_{suffix}")(file)
    assert set(table["verdict"]) == {"not shown"}  # of eleven photos
    for row, effect in zip(table.to_dict("records"), found.effects, strict=True):
        assert row["group"] == effect["group"]
        assert row["hidden_loss_change"] == approx(effect["hidden"]["loss_change"])
    with raises_one_line("layers 2 to 9", "1 to 2"):
        inspect_tokens(model, image_folder, output=file, layers=(2, 9))


def test_the_name_of_a_task_is_no_formula_in_a_table(
    model: str, image_folder: Path, tmp_path: Path
) -> None:
    found = inspect_tokens(model, image_folder, output=tmp_path / "tokens.csv")
    effects = [effect | {"output": "=2+5"} for effect in found.effects]
    write_tables(tmp_path / "tokens.csv", replace(found, effects=effects))
    assert set(pd.read_csv(tmp_path / "tokens.csv")["output"]) == {"'=2+5"}


def test_the_page_names_the_commit_of_a_model_on_the_hub(
    model: str,
    image_folder: Path,
    hub: LocalHub,
    tmp_path: Path,
    capsys: CaptureFixture,
) -> None:
    commit = hub.create("ann/pets", files=read_files(Path(model))).branches["main"]
    page = tmp_path / "new/report.html"
    flags = [image_folder / "owl", "--output", page, "--num-images", 1]

    assert run_in_process("inspect_tokens.py", "--model", "ann/pets@main", *flags) == 0
    assert run_in_process("inspect_tokens.py", "--model", "ann/pets@v2", *flags) == 1
    assert "v2" in capsys.readouterr().err

    text = page.read_text()
    assert f"<code>{commit}</code>" in text
    assert str(tmp_path) not in text
    assert "ann/pets" in text


def test_unusable_inputs_are_one_line_errors_and_write_nothing(
    model: str, image_folder: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    for file in (tmp_path / "missing.png", image_folder / "cat/broken [old].png"):
        with raises_one_line(file.name):
            inspect_tokens(model, file, output=page)
    with raises_one_line("cat, dog, owl"):
        inspect_tokens(model, dataset="digits", output=page)
    assert not page.exists()

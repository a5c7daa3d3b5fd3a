"""scripts/studies/class_token.py on a tiny encoder, whose classes are told apart by every token."""

from pathlib import Path

import pytest
from helpers.photo_folders import write_unequal_photos
from helpers.scripts_in_process import run_in_process
from helpers.tiny_models import build_tiny_config, save_with_processor

from modeling_vitcls import ViTCLSModel


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_page_has_the_accuracy_of_each_token_on_the_test_photos(tmp_path: Path) -> None:
    save_with_processor(ViTCLSModel(build_tiny_config()), tmp_path / "encoder")
    for split in ("train", "test"):
        write_unequal_photos(tmp_path / "photos" / split)

    status = run_in_process(
        "studies/class_token.py",
        *("--encoder", tmp_path / "encoder"),
        *("--photos", tmp_path / "photos"),
        *("--output", tmp_path / "study"),
        *("--layers", 2),
        *("--seeds", 0),
    )

    assert status == 0
    row = (tmp_path / "study" / "README.md").read_text().splitlines()[-1]
    assert row.split(" | ")[:4] == ["| 2", "100.0%", "100.0%", "100.0%"]

"""scripts/study_class_token.py on a tiny encoder, whose classes are told apart by every token."""

from pathlib import Path

import numpy as np
import pytest
from helpers.scripts_in_process import run_in_process
from helpers.tiny_models import build_tiny_config, save_with_processor
from PIL import Image

from modeling_vitcls import ViTCLSModel


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_page_has_the_accuracy_of_each_token_on_the_test_photos(tmp_path: Path) -> None:
    save_with_processor(ViTCLSModel(build_tiny_config()), tmp_path / "encoder")
    write_dark_and_bright_photos(tmp_path / "photos")

    status = run_in_process(
        "study_class_token.py",
        *("--encoder", tmp_path / "encoder"),
        *("--photos", tmp_path / "photos"),
        *("--output", tmp_path / "study"),
        *("--layers", 2),
        *("--seeds", 0),
    )

    assert status == 0
    row = (tmp_path / "study" / "README.md").read_text().splitlines()[-1]
    assert row.split(" | ")[:4] == ["| 2", "100.0%", "100.0%", "100.0%"]


def write_dark_and_bright_photos(folder: Path) -> None:
    """Write six training and two test photos of each class."""
    for split, number in (("train", 6), ("test", 2)):
        for name, level in (("dark", 20), ("bright", 200)):
            (folder / split / name).mkdir(parents=True)
            for index in range(number):
                noise = np.random.default_rng([level, index, number]).integers(0, 40, (8, 8, 3))
                image = Image.fromarray((level + noise).astype(np.uint8))
                image.save(folder / split / name / f"{index}.png")

"""The images of a model card, compared with the model and the results."""

from pathlib import Path

import numpy as np
from helpers.tiny_models import build_tiny_config
from PIL import Image

from modeling_vitcls.publishing.card_images import write_card_images


def test_each_task_has_a_matrix_unless_no_image_was_counted(tmp_path: Path) -> None:
    config = build_tiny_config(num_cls_tokens=3, tasks={"age": 2, "kind": 60, "x": 2})
    results = {
        "age_confusion_matrix": [[3, 1], [0, 0]],  # there are no images of the second class
        "kind_confusion_matrix": np.eye(60, dtype=int).tolist(),
        "x_confusion_matrix": [[0, 0], [0, 0]],
    }
    (tmp_path / "images").mkdir()
    for name in ("mine.png", "attention.png", "confusion_matrix_x.png"):
        (tmp_path / "images" / name).write_bytes(b"of an earlier run")
    write_card_images(tmp_path, config, results)
    names = {file.name for file in (tmp_path / "images").iterdir()}

    assert names == {"mine.png", "confusion_matrix_age.png", "confusion_matrix_kind.png"}
    assert Image.open(tmp_path / "images" / "confusion_matrix_age.png").format == "PNG"

    write_card_images(tmp_path / "new", build_tiny_config(), {})
    assert not (tmp_path / "new").exists()


def test_the_sheet_of_a_photo_is_an_image_of_the_card(tmp_path: Path) -> None:
    sheet = Image.new("RGB", (30, 20), "red")
    write_card_images(tmp_path, build_tiny_config(), {}, sheet)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "images" / "attention.png")), sheet)

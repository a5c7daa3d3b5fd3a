"""Images of `vitcls inspect`: photographs, or a dataset with labels as indices of the model."""

from pathlib import Path
from typing import Any

import numpy as np
from helpers.photo_folders import write_photos
from helpers.tiny_models import build_tiny_config, save_with_processor
from PIL import Image

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.analysis.inspect_tokens import open_images
from modeling_vitcls.analysis.options import InspectOptions
from modeling_vitcls.data.evaluation_data import EvaluationData
from modeling_vitcls.data.labels import UNLABELED, get_label_space
from modeling_vitcls.hub.model_folder import ModelFolder


DIGITS = [str(digit) for digit in range(10)]


def open_for(folder: Path, names: list[str], **fields: Any) -> EvaluationData:
    """Open the images for a classifier of these classes."""
    config = build_tiny_config(id2label=dict(enumerate(names)), num_labels=len(names))
    model = save_with_processor(ViTCLSForImageClassification(config), folder / names[0])
    options = InspectOptions(model=str(model), **fields)
    return open_images(options, get_label_space(config), ModelFolder(model))


def test_paths_are_photographs_in_their_order(tmp_path: Path) -> None:
    """They have no labels, whatever their folders are called."""
    folder = write_photos(tmp_path / "photos", range(2), "dog", "cat")
    paths = (str(folder), str(folder / "cat/1.png"))
    found = open_for(tmp_path, ["dog", "cat"], paths=paths)
    assert found.label_space == UNLABELED
    assert found.images.labels == [None] * 5
    assert found.description == "photos, 1.png"
    for index, name in enumerate(["cat/0.png", "cat/1.png", "dog/0.png"]):
        assert np.array_equal(
            np.asarray(found.images.images[index]), np.asarray(Image.open(folder / name))
        )


def test_labels_of_a_dataset_are_the_indices_of_the_model(tmp_path: Path) -> None:
    """The model has the classes in another order."""
    found, other = (
        open_for(tmp_path, names, dataset="digits").images.labels
        for names in (DIGITS, DIGITS[1:] + DIGITS[:1])
    )
    assert len(found) == 1797
    assert list(other) == [(label - 1) % 10 for label in found]

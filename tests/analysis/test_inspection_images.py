"""Images of `vitcls inspect`: their names, and labels as indices of the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.photo_folders import write_photos
from helpers.tiny_models import TASKS, build_tiny_config
from PIL import Image

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)
from modeling_vitcls.analysis.inspection_images import InspectionImages, open_images
from modeling_vitcls.analysis.model_utils import is_classifier
from modeling_vitcls.analysis.options import InspectOptions
from modeling_vitcls.data.labels import UNLABELED, get_label_space


CLASSES = ["dog", "owl", "cat"]
DIGITS = [str(digit) for digit in range(10)]


def build_named_classifier(names: list[str], **fields: Any) -> ViTCLSForImageClassification:
    config = build_tiny_config(id2label=dict(enumerate(names)), num_labels=len(names), **fields)
    return ViTCLSForImageClassification(config)


def open_for(model: Any, **fields: Any) -> InspectionImages:
    label_space = get_label_space(model.config) if is_classifier(model) else UNLABELED
    return open_images(InspectOptions(model="model", **fields), label_space)


def open_paths(model: Any, *paths: Path) -> InspectionImages:
    return open_for(model, paths=tuple(map(str, paths)))


def test_folder_names_are_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without a class has unknown labels. Images are in the order of the paths."""
    folder = write_photos(tmp_path / "photos", range(2), "dog", "cat", "else")
    found = open_paths(build_named_classifier(CLASSES), folder, folder / "cat" / "1.png")
    assert found.names == ["0.png", "1.png"] * 3 + ["1.png"]
    assert found.labels == [2, 2, 0, 0, None, None, 2]
    assert found.source == "photos, 1.png"
    for index, name in enumerate(["cat/0.png", "cat/1.png", "dog/0.png"]):
        assert np.array_equal(
            np.asarray(found.images[index]), np.asarray(Image.open(folder / name))
        )
    assert open_paths(build_named_classifier(CLASSES), folder / "else").labels is None
    monkeypatch.chdir(folder / "cat")
    here = open_paths(build_named_classifier(CLASSES), Path())
    assert here.labels == [2, 2]
    assert here.source == "cat"


def test_folder_names_are_labels_of_single_label_classifiers_only(tmp_path: Path) -> None:
    folder = write_photos(tmp_path, range(1), *CLASSES)
    several = build_named_classifier(CLASSES, problem_type="multi_label_classification")
    tasks = ViTCLSForMultiTaskClassification(build_tiny_config(num_cls_tokens=2, tasks=TASKS))
    for model in (several, tasks, ViTCLSModel(build_tiny_config())):
        assert open_paths(model, folder).labels is None


def test_labels_of_a_dataset_are_the_indices_of_the_model() -> None:
    """The model has the classes in another order."""
    found, other = (
        open_for(build_named_classifier(names), dataset="digits")
        for names in (DIGITS, DIGITS[1:] + DIGITS[:1])
    )
    assert found.labels is not None
    assert other.labels is not None
    assert list(other.labels) == [(label - 1) % 10 for label in found.labels]
    assert found.names[:2] == ["digits 0", "digits 1"]
    assert len(found.names) == len(found.images) == len(found.labels)
    assert len(found.images) == 1797

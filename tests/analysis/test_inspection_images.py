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
from modeling_vitcls.analysis.inspect_tokens import open_images
from modeling_vitcls.analysis.options import InspectOptions
from modeling_vitcls.analysis.token_use import find_token_use
from modeling_vitcls.data.evaluation_data import EvaluationData
from modeling_vitcls.data.labels import UNLABELED, get_label_space


CLASSES = ["dog", "owl", "cat"]
DIGITS = [str(digit) for digit in range(10)]


def build_named_classifier(names: list[str], **fields: Any) -> ViTCLSForImageClassification:
    config = build_tiny_config(id2label=dict(enumerate(names)), num_labels=len(names), **fields)
    return ViTCLSForImageClassification(config)


def open_for(model: Any, **fields: Any) -> EvaluationData:
    label_space = get_label_space(model.config) if find_token_use(model).has_head else UNLABELED
    return open_images(InspectOptions(model="model", **fields), label_space)


def open_paths(model: Any, *paths: Path) -> EvaluationData:
    return open_for(model, paths=tuple(map(str, paths)))


def test_folder_names_are_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without a class has unknown labels. Images are in the order of the paths."""
    folder = write_photos(tmp_path / "photos", range(2), "dog", "cat", "else")
    found = open_paths(build_named_classifier(CLASSES), folder, folder / "cat" / "1.png")
    assert found.images.labels == [2, 2, 0, 0, None, None, 2]
    assert found.description == "photos, 1.png"
    for index, name in enumerate(["cat/0.png", "cat/1.png", "dog/0.png"]):
        assert np.array_equal(
            np.asarray(found.images.images[index]), np.asarray(Image.open(folder / name))
        )
    monkeypatch.chdir(folder / "cat")
    here = open_paths(build_named_classifier(CLASSES), Path())
    assert here.images.labels == [2, 2]
    assert here.description == "cat"


def test_folder_names_are_labels_of_single_label_classifiers_only(tmp_path: Path) -> None:
    folder = write_photos(tmp_path, range(1), *CLASSES)
    several = build_named_classifier(CLASSES, problem_type="multi_label_classification")
    tasks = ViTCLSForMultiTaskClassification(build_tiny_config(num_cls_tokens=2, tasks=TASKS))
    for model in (several, tasks, ViTCLSModel(build_tiny_config())):
        found = open_paths(model, folder)
        assert found.label_space == UNLABELED
        assert found.images.labels == [None] * 3


def test_labels_of_a_dataset_are_the_indices_of_the_model() -> None:
    """The model has the classes in another order."""
    found, other = (
        open_for(build_named_classifier(names), dataset="digits").images.labels
        for names in (DIGITS, DIGITS[1:] + DIGITS[:1])
    )
    assert len(found) == 1797
    assert list(other) == [(label - 1) % 10 for label in found]

"""Images of an inspection: names, labels and descriptions of files and datasets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.photo_folders import write_photos
from helpers.tiny_models import TASKS, build_tiny_config, raises_one_line
from PIL import Image
from sklearn.datasets import load_digits

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSForMultiTaskClassification, ViTCLSModel
from modeling_vitcls.analysis.inspection_inputs import InspectionImages, open_images
from modeling_vitcls.heads_vitcls import IGNORED_LABEL
from modeling_vitcls.options import InspectOptions


CLASSES = ["dog", "owl", "cat"]
DIGITS = [str(digit) for digit in range(10)]


def build_classifier(names: list[str], **fields: Any) -> ViTCLSForImageClassification:
    config = build_tiny_config(id2label=dict(enumerate(names)), num_labels=len(names), **fields)
    return ViTCLSForImageClassification(config)


def open_paths(model: Any, *paths: Path) -> InspectionImages:
    return open_images(InspectOptions("model", tuple(map(str, paths))), model)


def open_digits(model: Any, **fields: Any) -> InspectionImages:
    return open_images(InspectOptions("model", dataset="digits", **fields), model)


def test_folder_names_are_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without a class has unknown labels. Images are in the order of the paths."""
    folder = write_photos(tmp_path / "photos", range(2), "dog", "cat", "else")
    found = open_paths(build_classifier(CLASSES), folder, folder / "cat" / "1.png")
    assert found.names == ["0.png", "1.png"] * 3 + ["1.png"]
    assert found.labels == [2, 2, 0, 0, IGNORED_LABEL, IGNORED_LABEL, 2]
    assert found.source == "photos, 1.png"
    for index, name in enumerate(["cat/0.png", "cat/1.png", "dog/0.png"]):
        assert np.array_equal(np.asarray(found.images[index]), np.asarray(Image.open(folder / name)))
    assert open_paths(build_classifier(CLASSES), folder / "else").labels is None
    monkeypatch.chdir(folder / "cat")
    here = open_paths(build_classifier(CLASSES), Path())
    assert (here.labels, here.source) == ([2, 2], "cat")


def test_folder_names_are_labels_of_single_label_classifiers_only(tmp_path: Path) -> None:
    folder = write_photos(tmp_path, range(1), *CLASSES)
    several = build_classifier(CLASSES, problem_type="multi_label_classification")
    tasks = ViTCLSForMultiTaskClassification(build_tiny_config(num_cls_tokens=2, tasks=TASKS))
    for model in (several, tasks, ViTCLSModel(build_tiny_config())):
        assert open_paths(model, folder).labels is None


def test_urls_are_unchanged() -> None:
    """Images are downloaded only when they are read."""
    url = "https://example.org/owl/1.png?size=2"
    found = open_images(InspectOptions("model", (url,)), build_classifier(CLASSES))
    assert (found.names, found.source, found.labels) == ([url], url, [1])


def test_missing_images_are_named(tmp_path: Path) -> None:
    with raises_one_line(str(tmp_path / "missing.png"), "does not exist"):
        open_paths(build_classifier(CLASSES), tmp_path / "missing.png")


def test_labels_of_a_dataset_are_the_indices_of_the_model() -> None:
    """The model has the classes in another order. Both select the same held-out images."""
    found, other = open_digits(build_classifier(DIGITS)), open_digits(build_classifier(DIGITS[::-1]))
    assert found.labels is not None and other.labels is not None
    assert set(found.labels) == set(range(10))
    assert list(other.labels) == [9 - label for label in found.labels]
    assert found.names[:2] == ["digits 0", "digits 1"] and len(found.names) == len(found.images) == len(found.labels)
    assert found.source == "digits, split test" and len(found.images) < 1797


def test_an_encoder_reads_all_images_of_the_only_split() -> None:
    """The description names the split that is read."""
    found = open_digits(ViTCLSModel(build_tiny_config()))
    assert found.labels is None and len(found.images) == len(found.names) == 1797
    assert found.source == "digits, split train"
    first = np.asarray(found.images[0].convert("L"))
    assert np.array_equal(first, (load_digits().images[0] * (255 / 16)).round())


def test_an_encoder_reads_the_selected_split(tmp_path: Path) -> None:
    for split, numbers in {"train": range(3), "test": range(3, 5)}.items():
        write_photos(tmp_path / "photos" / split, numbers)
    encoder = ViTCLSModel(build_tiny_config())
    for split, count in ((None, 4), ("test", 4), ("train", 6)):
        found = open_images(InspectOptions("model", dataset=str(tmp_path / "photos"), split=split), encoder)
        assert (len(found.images), found.source) == (count, f"photos, split {split or 'test'}")
    with raises_one_line("no split 'nothing'", "train"):
        open_images(InspectOptions("model", dataset=str(tmp_path / "photos"), split="nothing"), encoder)


def test_an_encoder_requires_no_labels(tmp_path: Path) -> None:
    write_photos(tmp_path, range(2), "dog")
    (tmp_path / "photos.csv").write_text("image\ndog/1.png\ndog/0.png\n")
    options = InspectOptions("model", dataset=str(tmp_path / "photos.csv"))
    found = open_images(options, ViTCLSModel(build_tiny_config()))
    assert len(found.images) == 2 and found.labels is None
    assert np.array_equal(np.asarray(found.images[0]), np.asarray(Image.open(tmp_path / "dog" / "1.png")))


def test_columns_of_a_dataset(tmp_path: Path) -> None:
    """One image of the only split is held out."""
    write_photos(tmp_path, range(2), "dog")
    (tmp_path / "list.csv").write_text("name,photo,animals\na.png,dog/1.png,owl|cat\nb.png,dog/0.png,dog\n")
    columns: dict[str, Any] = {"image_column": "photo", "label_column": ("animals",), "label_separator": "|"}
    model = build_classifier(CLASSES, problem_type="multi_label_classification")
    for split, label, file in (("train", [0, 1, 1], "1.png"), ("test", [1, 0, 0], "0.png")):
        found = open_images(InspectOptions("model", dataset=str(tmp_path / "list.csv"), split=split, **columns), model)
        assert found.labels is not None and [list(values) for values in found.labels] == [label]
        assert np.array_equal(np.asarray(found.images[0]), np.asarray(Image.open(tmp_path / "dog" / file)))


@pytest.mark.parametrize("has_labels", [False, True])
def test_some_images_are_selected_at_regular_intervals(has_labels: bool) -> None:
    images = [Image.new("L", (1, 1), value) for value in range(9)]
    labels = [10 * value for value in range(9)] if has_labels else None
    found = InspectionImages(images, [f"image {value}" for value in range(9)], labels, "a test")
    arguments = found.build_arguments(2, 3)
    assert arguments["names"] == ["image 1", "image 4", "image 7"] and arguments["num_shown"] == 2
    assert [arguments["images"][index].getpixel((0, 0)) for index in range(3)] == [1, 4, 7]
    assert arguments["labels"] == ([10, 40, 70] if has_labels else None)

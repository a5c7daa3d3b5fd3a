"""The wrong predictions of a run in the report and the card, from predictions.parquet."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.model_folders import write_predictions, write_results, write_run_folder
from helpers.tiny_models import build_tiny_config, save_with_processor

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.data.images import DatasetImages, LabeledImages
from modeling_vitcls.data.labels import OneLabel
from modeling_vitcls.data.splits import TrainingData
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.inference.per_image import read_predictions
from modeling_vitcls.publishing.wrong_photos import (
    draw_wrong_photos,
    find_photos,
    summarize_predictions,
)


NAMES = ["dusk", "noon", "x"]
NO_IMAGES = LabeledImages(DatasetImages.from_list([]), [])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a run with 400 predictions; the logits contain noise."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 400)
    logits = generator.normal(size=(400, 3)) + 2 * np.eye(3)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    columns = {
        "index": range(400),
        "image": [f"dusk/photo {index}.jpg" for index in range(400)],
        "label": [NAMES[label] for label in labels],
        "prediction": [NAMES[index] for index in logits.argmax(axis=1)],
        "probabilities": list(probabilities),
        "loss": -np.log(probabilities[range(400), labels]),
    }
    target = write_run_folder(tmp_path / "mine")
    write_predictions(target, pd.DataFrame(columns))
    return target


def build_data(held_out: LabeledImages, train: LabeledImages = NO_IMAGES) -> TrainingData:
    """Build the data of a run with images in memory."""
    label_space = OneLabel({"label": NAMES})
    return TrainingData(
        name="skies",
        label_space=label_space,
        train_split="train",
        train=train,
        held_out=held_out,
        held_out_name="test",
        held_out_split="test",
    )


def test_the_headline_says_what_the_result_of_a_rare_class_is_worth(folder: Path) -> None:
    classes = [
        {"name": "dusk", "images": 20, "recall": 1.0},
        {"name": "x", "images": 3, "recall": 0.0},
    ]
    results = {"split": "cross-validation", "accuracy": 0.869565, "num_images": 23}
    results |= {"accuracy_interval": [0.678, 0.955], "per_class": classes}
    write_results(folder, results | {"balanced_accuracy": 0.5, "macro_f1": 0.465})
    rows = read_predictions(ModelFolder(folder)).head(23)
    rows = rows.assign(label=["dusk"] * 20 + ["x"] * 3, prediction="dusk")
    summary = summarize_predictions(ModelFolder(folder), rows)
    assert summary["headline"] == (
        "20 of 23 right (95%: 68 to 96%) in cross-validation, no better than always saying dusk: "
        "87%; x is most often taken for dusk (3 of 3)"
    )
    assert "balanced accuracy 50.0%" in summary["classes"]
    assert "lowest recall 0.0% (x)" in summary["classes"]


def test_the_wrong_images_with_the_largest_losses_come_first(folder: Path) -> None:
    rows = read_predictions(ModelFolder(folder))
    wrong = rows[rows["label"] != rows["prediction"]].sort_values("loss")
    shown = [row["image"] for row in summarize_predictions(ModelFolder(folder), rows)["wrong"]]
    assert shown == wrong["image"].tolist()[:-13:-1]


def test_a_wrong_image_stands_above_its_nearest_training_images(folder: Path) -> None:
    pixels = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8)
    files = [{"path": None, "bytes": b"P5 8 8 255\n" + each.tobytes()} for each in pixels]
    train = LabeledImages(DatasetImages.from_list(files), [0, 1, 2])
    names = train.images.get_names()
    rows = read_predictions(ModelFolder(folder))
    rows = rows.assign(nearest_images=[[names[2], names[0]]] * len(rows))
    photos = find_photos(build_data(NO_IMAGES, train))
    wrong = summarize_predictions(ModelFolder(folder), rows)["wrong"]
    nearest = draw_wrong_photos(wrong, photos, NAMES, bit_depth=16)[0]["nearest"]
    assert [image["label"] for image in nearest] == [NAMES[2], NAMES[0]]
    assert np.array_equal(np.asarray(nearest[0]["picture"].convert("L")), pixels[2])


def test_a_name_of_several_images_is_not_found() -> None:
    train = LabeledImages(DatasetImages.from_list(["same.png", "same.png"]), [0, 1])
    assert find_photos(build_data(NO_IMAGES, train)) == {}


@pytest.mark.parametrize("kind", ["several labels", "no images"])
def test_predictions_of_other_kinds_are_not_read(kind: str, folder: Path) -> None:
    few = pd.read_parquet(folder / "predictions.parquet").head(10)
    rows = {
        "several labels": few.assign(label=[["dusk"]] * 10),
        "no images": few.head(0),
    }
    write_predictions(folder, rows[kind])
    assert read_predictions(ModelFolder(folder)) is None


def test_predictions_before_the_weights_were_replaced_are_not_read(folder: Path) -> None:
    save_with_processor(
        ViTCLSForImageClassification(build_tiny_config(num_register_tokens=1)), folder
    )
    write_results(folder)  # of the new weights
    assert read_predictions(ModelFolder(folder)) is None

"""The held-out images of a run in the report and the card, from predictions.parquet."""

from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pandas as pd
import pytest
from helpers.model_folders import write_predictions, write_results, write_run_folder
from helpers.tiny_models import build_tiny_config, save_with_processor
from PIL import Image

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.data.images import ArrayImages, LabeledImages
from modeling_vitcls.data.labels import LabelSpace
from modeling_vitcls.data.splits import TrainingData
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.publishing.held_out_predictions import (
    describe_predictions,
    find_images,
)


NAMES = ["dusk", "noon", "x"]
NO_IMAGES = LabeledImages(ArrayImages(np.zeros((0, 8, 8), np.uint8)), [])


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
    calibration = {"temperature": 0.651, "num_images": 180, "calibration_error_before": 0.0871}
    target = write_run_folder(
        tmp_path / "mine", {"calibration": calibration, "calibration_error": 0.0123}
    )
    write_predictions(target, pd.DataFrame(columns))
    return target


def build_data(held_out: LabeledImages, train: LabeledImages = NO_IMAGES) -> TrainingData:
    """Return the data of a run with images in memory."""
    label_space = LabelSpace("single_label_classification", {"label": NAMES})
    return TrainingData(
        name="skies",
        label_space=label_space,
        train_split="train",
        train=train,
        held_out=held_out,
        held_out_name="test",
        held_out_split="test",
    )


def test_wrong_images_are_counted(folder: Path) -> None:
    rows = pd.read_parquet(folder / "predictions.parquet")
    wrong = rows[rows["label"] != rows["prediction"]].sort_values("loss")
    found = describe_predictions(ModelFolder(folder))
    assert found["num_wrong"] == len(wrong) > 12 == len(found["wrong"])
    assert found["num_images"] == 400
    assert found["calibration"]["num_images"] == 180
    assert found["num_confident_errors"] == sum(
        max(values) > 0.9 for values in wrong["probabilities"]
    )
    assert [row["image"] for row in found["wrong"]] == wrong["image"].tolist()[:-13:-1]


def test_wrong_images_are_found_by_their_names_in_any_split(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (400, 20, 30)).astype(np.uint8)
    images = ArrayImages(pixels)
    rows = pd.read_parquet(folder / "predictions.parquet")
    write_predictions(folder, rows.assign(image=images.get_names()))
    held_out, train = (
        LabeledImages(images.select(part), [0] * len(part))
        for part in (range(100), range(100, 399))
    )
    found = describe_predictions(ModelFolder(folder), find_images(build_data(held_out, train)))
    last = images.get_names()[399]  # the dataset has changed
    for row in found["wrong"]:
        assert (row["url"] is None) == (row["image"] == last)
        if row["url"]:
            assert Image.open(urlopen(row["url"])).size == (30, 20)


def test_a_wrong_image_stands_above_its_nearest_training_images(folder: Path) -> None:
    pixels = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8)
    train = LabeledImages(ArrayImages(pixels), [0, 1, 2])
    names = train.images.get_names()
    rows = pd.read_parquet(folder / "predictions.parquet")
    write_predictions(folder, rows.assign(nearest_images=[[names[2], names[0]]] * len(rows)))
    found = describe_predictions(ModelFolder(folder), find_images(build_data(NO_IMAGES, train)))
    nearest = found["wrong"][0]["nearest"]
    assert [image["label"] for image in nearest] == [NAMES[2], NAMES[0]]
    shown = np.asarray(Image.open(urlopen(nearest[0]["url"])).resize((8, 8)).convert("L"))
    assert np.abs(shown - pixels[2].astype(float)).mean() < 8


def test_a_name_of_several_training_images_is_not_shown(folder: Path) -> None:
    train = LabeledImages(ArrayImages(np.zeros((2, 8, 8), np.uint8)), [0, 1])
    rows = pd.read_parquet(folder / "predictions.parquet")
    write_predictions(folder, rows.assign(nearest_images=[train.images.get_names()] * len(rows)))
    found = describe_predictions(ModelFolder(folder), find_images(build_data(NO_IMAGES, train)))
    assert found["wrong"][0]["nearest"] == []


def test_predictions_of_other_weights_or_kinds_are_not_shown(folder: Path) -> None:
    few = pd.read_parquet(folder / "predictions.parquet").head(10)
    write_predictions(folder, few)
    assert describe_predictions(ModelFolder(folder)) is not None

    # several labels per image, no images, and a file of another program
    for rows in (few.assign(label=[["dusk"]] * 10), few.head(0), few.drop(columns="loss")):
        write_predictions(folder, rows)
        assert describe_predictions(ModelFolder(folder)) is None
    write_predictions(folder, few)
    save_with_processor(
        ViTCLSForImageClassification(build_tiny_config(num_register_tokens=1)), folder
    )
    assert describe_predictions(ModelFolder(folder)) is None


def test_predictions_before_the_weights_were_replaced_are_not_shown(folder: Path) -> None:
    save_with_processor(
        ViTCLSForImageClassification(build_tiny_config(num_register_tokens=1)), folder
    )
    write_results(folder)  # of the new weights
    assert describe_predictions(ModelFolder(folder)) is None

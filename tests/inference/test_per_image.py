"""One row per evaluated image, compared with the model, and with two processes."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.digits_models import train_digits_model
from helpers.evaluation_worker import (
    CLASSES,
    UNREADABLE,
    build_classifier,
    build_evaluator,
    build_labeled_images,
)
from helpers.tiny_models import save_both
from sklearn.metrics import log_loss

from modeling_vitcls import ViTCLSImageProcessor, evaluate
from modeling_vitcls.data.images import LabeledImages
from modeling_vitcls.inference.per_image import write_predictions
from modeling_vitcls.runtime.distributed import build_accelerator


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model that was trained on digits."""
    target = tmp_path_factory.mktemp("models") / "digits"
    names = {index: str(index) for index in range(10)}
    processor = ViTCLSImageProcessor(
        size=8, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    )
    return save_both(train_digits_model(epochs=4, id2label=names), target, processor)


def test_rows_equal_the_metrics_of_the_same_evaluation(folder: Path, tmp_path: Path) -> None:
    results = evaluate(folder, "digits", per_image=tmp_path / "rows.parquet")
    rows = pd.read_parquet(tmp_path / "rows.parquet")
    assert len(rows) == results["num_images"]
    assert (rows["label"] == rows["prediction"]).mean() == pytest.approx(
        results["accuracy"], abs=1e-6
    )
    assert rows["loss"].mean() == pytest.approx(results["loss"], abs=1e-5)

    probabilities = np.stack(rows["probabilities"])
    names = sorted(rows["label"].unique())
    assert log_loss(rows["label"], probabilities, labels=names) == pytest.approx(
        results["loss"], abs=1e-5
    )
    assert rows["image"].is_unique
    assert rows["index"].tolist() == list(range(len(rows)))


@pytest.mark.usefixtures("fresh_accelerate")
def test_rows_keep_the_index_of_their_image(tmp_path: Path) -> None:
    """Unreadable images and images without a label have no row, but keep their index."""
    pictures = build_labeled_images("single", unreadable=UNREADABLE)
    labels = [None if index < 3 else label for index, label in enumerate(pictures.labels)]
    images = LabeledImages(pictures.images, labels)
    rows = [3, 4, 6, 7, 8, 9, 10]
    evaluator = build_evaluator("single", build_accelerator(), images)
    predictions = evaluator.predict(build_classifier("single"))
    write_predictions(tmp_path / "rows.parquet", predictions, None)
    table = pd.read_parquet(tmp_path / "rows.parquet")

    assert table["index"].tolist() == rows
    assert table["label"].tolist() == [CLASSES[labels[index]] for index in rows]

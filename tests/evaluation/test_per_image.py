"""One row per evaluated image, compared with the model, and with two processes."""

import numpy as np
import pytest
from helpers.evaluation_worker import (
    CLASSES,
    UNREADABLE,
    build_classifier,
    build_evaluator,
    build_labeled_images,
)
from sklearn.metrics import log_loss

from modeling_vitcls.data.images import LabeledImages
from modeling_vitcls.evaluation.evaluator import build_rows
from modeling_vitcls.runtime.distributed import build_accelerator


def test_rows_equal_the_metrics_of_the_same_evaluation() -> None:
    evaluator = build_evaluator("single", build_accelerator())
    predictions = evaluator.predict(build_classifier("single"))
    rows = build_rows(predictions)
    metrics = predictions.metrics
    assert len(rows) == metrics["num_images"]
    accuracy = (rows["label"] == rows["prediction"]).mean()
    assert accuracy == pytest.approx(metrics["accuracy"], abs=1e-6)
    assert rows["loss"].mean() == pytest.approx(metrics["loss"], abs=1e-5)
    probabilities = np.stack(rows["probabilities"])
    loss = log_loss(rows["label"], probabilities, labels=CLASSES)
    assert loss == pytest.approx(metrics["loss"], abs=1e-5)
    assert rows["image"].is_unique
    assert rows["index"].tolist() == list(range(len(rows)))


def test_rows_keep_the_index_of_their_image() -> None:
    """Unreadable images and images without a label have no row, but keep their index."""
    pictures = build_labeled_images("single", unreadable=UNREADABLE)
    labels = [None if index < 3 else label for index, label in enumerate(pictures.labels)]
    images = LabeledImages(pictures.images, labels)
    rows = [3, 4, 6, 7, 8, 9, 10]
    evaluator = build_evaluator("single", build_accelerator(), images)
    predictions = evaluator.predict(build_classifier("single"))
    table = build_rows(predictions)

    assert table["index"].tolist() == rows
    assert table["label"].tolist() == [CLASSES[labels[index]] for index in rows]

"""One row per evaluated image; test_calibration.py compares rows with the metrics."""

from helpers.evaluation_worker import (
    CLASSES,
    UNREADABLE,
    build_classifier,
    build_evaluator,
    build_labeled_images,
)

from modeling_vitcls.data.images import LabeledImages
from modeling_vitcls.evaluation.evaluator import build_rows
from modeling_vitcls.runtime.distributed import build_accelerator


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

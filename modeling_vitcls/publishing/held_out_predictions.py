"""What predictions.parquet contains about the held-out images of a run, for the report and the card.

These results exist only for classifiers with one label per image.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..analysis.maps import resize_with_region, to_upright_rgb
from ..analysis.report import encode_data_url
from ..data.labels import get_label_space
from ..hub.model_files import PREDICTIONS_FILE
from ..hub.model_folder import ModelFolder, warn_once
from ..inference.confidence import measure_prediction_sets
from ..inference.per_image import read_weights_hash


COVERAGE = 0.9  # probability with which a prediction set contains the true label
MAX_WRONG_IMAGES = 12  # maximum number of wrong images in the report
THUMBNAIL_SIDE = 240  # longer side of a wrong image in the report, in pixels


def describe_predictions(
    folder: ModelFolder, images: Sequence[Image.Image] | None = None
) -> dict[str, Any] | None:
    """Return what the report says about the predictions of held-out images.

    That is a headline, the wrong images, the prediction sets of each class, and the calibration;
    None if the folder has no predictions of these weights.

    Args:
        folder: The folder of a run.
        images: The held-out images, for thumbnails of the images with the highest losses.
    """
    import pandas as pd

    config = folder.config
    file = folder.path / PREDICTIONS_FILE
    if not folder.results or not file.is_file() or config is None:
        return None
    try:
        if read_weights_hash(file) != folder.weights_sha256:
            warn_once(f"ignoring {file}, because it contains the predictions of other weights")
            return None
        rows = pd.read_parquet(
            file, columns=["index", "image", "label", "prediction", "probabilities", "loss"]
        )
    except (OSError, ValueError):  # pyarrow's errors are subclasses
        warn_once(
            f"ignoring {file}, because it is not readable. Write it again with `vitcls evaluate --per-image`"
        )
        return None
    if not len(rows) or not isinstance(rows["label"][0], str):
        return None
    rows["confidence"] = rows["probabilities"].map(max)
    wrong = rows[rows["label"] != rows["prediction"]].sort_values("loss", ascending=False)
    wrong_rows = wrong.head(MAX_WRONG_IMAGES)[
        ["index", "image", "label", "prediction", "confidence"]
    ].to_dict("records")
    for row in wrong_rows:
        if images is None:
            break
        try:
            thumbnail, _ = resize_with_region(
                to_upright_rgb(images[row["index"]]), None, THUMBNAIL_SIDE, 1
            )
        except (IndexError, ValueError):  # the dataset has changed, or the image is unreadable
            continue
        row["url"] = encode_data_url(thumbnail)
    names = get_label_space(config).names
    targets = np.array([names.index(label) for label in rows["label"]])
    return {
        "headline": describe_accuracy(rows),
        "num_images": len(rows),
        "num_wrong": len(wrong),
        "num_confident_errors": int((wrong["confidence"] > COVERAGE).sum()),
        "wrong": wrong_rows,
        "calibration": folder.results.get("calibration"),
        "coverage": COVERAGE,
        "sets": measure_prediction_sets(np.stack(rows["probabilities"]), targets, names, COVERAGE),
    }


def describe_accuracy(rows: Any) -> str:
    """Return the accuracy in one sentence, with the most frequent confusion if it happened more than once.

    `rows` are the rows of predictions.parquet.
    """
    num_images = len(rows)
    wrong = rows[rows["label"] != rows["prediction"]]
    if not len(wrong):
        return f"All {num_images:,} held-out images are right"
    percentage = f"{1 - len(wrong) / num_images:.1%}".replace(".0%", "%")
    sentence = f"{percentage} of {num_images:,} held-out images are right"
    confusions = wrong.groupby(["label", "prediction"], observed=True)["loss"].agg(["size", "sum"])
    (label, prediction), most = next(
        confusions.sort_values(["size", "sum"], ascending=False).iterrows()
    )
    if most["size"] > 1:
        num_of_label = int((rows["label"] == label).sum())
        sentence += f"; {label} is most often taken for {prediction} ({int(most['size'])} of {num_of_label:,})"
    return sentence

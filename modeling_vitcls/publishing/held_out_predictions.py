"""What predictions.parquet says about the held-out images of a run, for report and card.

These results exist only for classifiers with one label per image.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from ..analysis.maps import resize_with_region, to_upright_rgb
from ..analysis.report import encode_data_url
from ..data.images import LabeledImages
from ..data.splits import TrainingData
from ..hub.model_files import PREDICTIONS_FILE
from ..hub.model_folder import ModelFolder, warn_once
from ..inference.per_image import read_weights_hash


MIN_CONFIDENT = 0.9  # probability above which a wrong prediction is a confident one
MAX_WRONG_IMAGES = 12  # maximum number of wrong images in the report
THUMBNAIL_SIDE = 240  # longer side of a wrong image in the report, in pixels
NEAREST_SIDE = 120  # longer side of a nearest training image


def describe_predictions(
    folder: ModelFolder, data: TrainingData | None = None
) -> dict[str, Any] | None:
    """Return what the report says about the predictions of held-out images.

    That is a headline, the wrong images, and the calibration; None if the folder has no predictions of these weights.

    Args:
        folder: The folder of a run.
        data: Its data, for thumbnails of the images with the highest losses and of their nearest
            training images.
    """
    import pandas as pd

    file = folder.path / PREDICTIONS_FILE
    if not folder.results or not file.is_file() or folder.config is None:
        return None

    try:
        if read_weights_hash(file) != folder.weights_sha256:
            warn_once(f"ignoring {file}, because it contains the predictions of other weights")
            return None
        columns = ["index", "image", "label", "prediction", "probabilities", "loss"]
        if "nearest_images" in pq.read_schema(file).names:
            columns.append("nearest_images")
        rows = pd.read_parquet(file, columns=columns)
    except (OSError, ValueError):  # pyarrow's errors are subclasses
        warn_once(
            f"ignoring {file}, because it is not readable. Write it again with `vitcls evaluate "
            "--per-image`"
        )
        return None
    if not len(rows) or not isinstance(rows["label"][0], str):
        return None

    rows["confidence"] = rows["probabilities"].map(max)
    wrong = rows[rows["label"] != rows["prediction"]].sort_values("loss", ascending=False)
    shown = wrong.head(MAX_WRONG_IMAGES)
    columns = ["index", "image", "label", "prediction", "confidence"]
    wrong_rows = shown[columns].assign(url=None, nearest=None).to_dict("records")
    if data is not None:
        for row in wrong_rows:
            row["url"] = draw_thumbnail(data.held_out.images, row["index"], THUMBNAIL_SIDE)
        if "nearest_images" in shown:
            add_nearest_images(wrong_rows, list(shown["nearest_images"]), data)

    is_trained = (
        folder.results.get("steps") and folder.results.get("selection", {}).get("step") != 0
    )
    return {
        "headline": describe_accuracy(rows),
        "is_trained": bool(is_trained),  # whether the weights are not those of the frozen model
        "num_images": len(rows),
        "num_wrong": len(wrong),
        "num_confident_errors": int((wrong["confidence"] > MIN_CONFIDENT).sum()),
        "wrong": wrong_rows,
        "calibration": folder.results.get("calibration"),
        "min_confident": MIN_CONFIDENT,
    }


def draw_thumbnail(images: Sequence[Image.Image], index: int, side: int) -> str | None:
    """Return a small image as a data URL.

    Return None if the dataset has changed, or the image is unreadable.
    """
    try:
        image = to_upright_rgb(images[index])
    except (IndexError, ValueError):
        return None
    thumbnail, _ = resize_with_region(image, None, side, 1)
    return encode_data_url(thumbnail)


def add_nearest_images(
    rows: list[dict[str, Any]], nearest_names: list[Sequence[str]], data: TrainingData
) -> None:
    """Add the nearest training images to the rows of wrong predictions.

    Args:
        rows: The rows, which get the thumbnails, names and labels.
        nearest_names: Names of the nearest training images of each row.
        data: The data of the run. The nearest images may be selection images, to which a frozen
            model is fitted, too.
    """
    class_names = data.label_space.names
    images_by_name: dict[str, list[tuple[LabeledImages, int]]] = defaultdict(list)
    for images in (data.train, data.selection):
        if isinstance(images, LabeledImages):
            for index, name in enumerate(images.images.get_names()):
                images_by_name[name].append((images, index))

    for row, names in zip(rows, nearest_names, strict=True):
        row["nearest"] = []
        for name in names:
            found = images_by_name[name]
            if len(found) != 1:  # the dataset has changed, or its names are ambiguous
                continue
            images, index = found[0]
            row["nearest"].append(
                {
                    "image": name,
                    "label": class_names[images.labels[index]],
                    "url": draw_thumbnail(images.images, index, NEAREST_SIDE),
                }
            )


def describe_accuracy(rows: Any) -> str:
    """Return the accuracy and the most frequent confusion in one sentence.

    A confusion that happened once is omitted. `rows` are the rows of predictions.parquet.
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
        sentence += (
            f"; {label} is most often taken for {prediction} ({int(most['size'])} of "
            f"{num_of_label:,})"
        )
    return sentence

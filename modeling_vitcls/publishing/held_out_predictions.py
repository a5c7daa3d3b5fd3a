"""What predictions.parquet says about the held-out images of a run, for report and card.

    rows = read_predictions(folder)                   one row per image, None without predictions
    describe_predictions(folder, find_images(data))   headline, wrong images, calibration

These results exist only for classifiers with one label per image. The images of the rows are found
in the data of the run by their names.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from ..analysis.maps import to_upright_rgb
from ..analysis.report import encode_data_url
from ..data.images import LabeledImages
from ..data.labels import get_label_space
from ..data.splits import TrainingData
from ..hub.model_files import PREDICTIONS_FILE
from ..hub.model_folder import ModelFolder, warn_once
from ..inference.per_image import read_weights_hash


MIN_CONFIDENT = 0.9  # probability above which a wrong prediction is a confident one
MAX_WRONG_IMAGES = 12  # maximum number of wrong images in the report
THUMBNAIL_SIDE = 240  # longer side of a wrong image in the report, in pixels
NEAREST_SIDE = 120  # longer side of a nearest training image


class FoundImage(NamedTuple):
    """An image of the data of a run: the images of a split, and its position there."""

    images: LabeledImages
    position: int


def find_images(data: TrainingData) -> dict[str, FoundImage]:
    """Return the images of a run by name, without names that several images have."""
    found: dict[str, list[FoundImage]] = {}
    for images in (data.held_out, data.train, data.selection):
        if isinstance(images, LabeledImages):
            for index, name in enumerate(images.images.get_names()):
                found.setdefault(name, []).append(FoundImage(images, index))
    return {name: places[0] for name, places in found.items() if len(places) == 1}


def read_predictions(folder: ModelFolder) -> Any:
    """Return one row per image of predictions.parquet, a pandas DataFrame with `confidence`.

    Return None if the folder has no predictions of these weights, or the images do not have exactly
    one label.
    """
    import pandas as pd

    file = folder.path / PREDICTIONS_FILE
    if not folder.results or not file.is_file() or folder.config is None:
        return None

    try:
        if read_weights_hash(file) != folder.weights_sha256:
            warn_once(f"ignoring {file}, because it contains the predictions of other weights")
            return None
        columns = ["image", "label", "prediction", "probabilities", "loss"]
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
    return rows.assign(confidence=rows["probabilities"].map(max))


def describe_predictions(
    folder: ModelFolder, images: Mapping[str, FoundImage] | None = None
) -> dict[str, Any] | None:
    """Return what the report says about the predictions of held-out images.

    That is a headline, the wrong images, and the calibration; None without predictions.

    Args:
        folder: The folder of a run.
        images: Its images by name, for thumbnails of the images with the highest losses and of
            their nearest training images.
    """
    rows = read_predictions(folder)
    if rows is None:
        return None
    wrong = rows[rows["label"] != rows["prediction"]].sort_values("loss", ascending=False)
    shown = wrong.head(MAX_WRONG_IMAGES)
    columns = ["image", "label", "prediction", "confidence"]
    wrong_rows = shown[columns].assign(url=None, nearest=None).to_dict("records")
    bit_depth = folder.load_processor().bit_depth if folder.has_processor else 16
    for row, names in zip(wrong_rows, shown.get("nearest_images", [()] * len(shown)), strict=True):
        row["url"] = draw_thumbnail(images or {}, row["image"], THUMBNAIL_SIDE, bit_depth)
        row["nearest"] = describe_nearest_images(images or {}, names, folder, bit_depth)

    is_cross_validated = folder.results.get("split") == "cross-validation"
    estimate = folder.results["accuracy"] if is_cross_validated else None
    is_trained = (
        folder.results.get("steps") and folder.results.get("selection", {}).get("step") != 0
    )
    return {
        "headline": describe_accuracy(rows, estimate, bool(is_trained)),
        "is_cross_validated": is_cross_validated,
        "is_trained": bool(is_trained),  # whether the weights are not those of the frozen model
        "images_name": describe_predicted_images(is_cross_validated, bool(is_trained)),
        "num_images": len(rows),
        "num_wrong": len(wrong),
        "num_confident_errors": int((wrong["confidence"] > MIN_CONFIDENT).sum()),
        "wrong": wrong_rows,
        "calibration": folder.results.get("calibration"),
        "min_confident": MIN_CONFIDENT,
    }


def draw_thumbnail(
    images: Mapping[str, FoundImage], name: str, side: int, bit_depth: int
) -> str | None:
    """Return a small image as a data URL.

    16-bit images use `bit_depth` bits.

    Return None if the dataset has changed, or the image is unreadable.
    """
    if name not in images:
        return None
    found = images[name]
    try:
        image = to_upright_rgb(found.images.images[found.position], bit_depth)
    except ValueError:
        return None
    image.thumbnail((side, side))
    return encode_data_url(image)


def describe_nearest_images(
    images: Mapping[str, FoundImage], names: Sequence[str], folder: ModelFolder, bit_depth: int
) -> list[dict[str, Any]]:
    """Return the names, labels and thumbnails of the nearest training images that are found."""
    class_names = get_label_space(folder.config).names
    nearest = []
    for name in names:
        if name in images:
            found = images[name]
            label = class_names[found.images.labels[found.position]]
            url = draw_thumbnail(images, name, NEAREST_SIDE, bit_depth)
            nearest.append({"image": name, "label": label, "url": url})
    return nearest


def describe_predicted_images(is_cross_validated: bool, is_trained: bool) -> str:
    """Return what the predicted images are, for a heading."""
    if not is_cross_validated:
        return "Held-out images"
    text = "Training images, each predicted by a classifier of other images"
    return f"{text}, before fine-tuning" if is_trained else text


def describe_accuracy(
    rows: Any, estimate: float | None = None, is_before_training: bool = False
) -> str:
    """Return the accuracy and the most frequent confusion in one sentence.

    A confusion that happened once is omitted. `rows` are the rows of predictions.parquet, and
    `estimate` is the accuracy for new images if these are training images; if `is_before_training`
    is set, that of the frozen model.
    """
    num_images = len(rows)
    wrong = rows[rows["label"] != rows["prediction"]]
    if not len(wrong) and estimate is None:
        return f"All {num_images:,} held-out images are right"

    percentage = f"{1 - len(wrong) / num_images:.1%}".replace(".0%", "%")
    sentence = f"{percentage} of {num_images:,} held-out images are right"
    if estimate is not None:
        sentence = f"About {estimate:.1%} of new images are right"
        if is_before_training:
            sentence += " before fine-tuning"

    if not len(wrong):
        return sentence

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

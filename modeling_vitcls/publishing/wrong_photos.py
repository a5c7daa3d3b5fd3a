"""The wrong predictions of a run for its report and its card, from predictions.parquet.

    rows = read_predictions(folder)                 one row per image, None without predictions
    summary = summarize_predictions(folder, rows)   headline, counts, calibration, and the wrong
                                                    images with the largest losses
    draw_wrong_photos(summary["wrong"], find_photos(data), ...)      the same, with pictures

These results exist only for classifiers with one label per image. The images of the rows are found
in the data of the run by their names.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from PIL import Image

from ..analysis.inspection import select_images
from ..analysis.maps import to_upright_rgb
from ..analysis.report import encode_data_url
from ..data.images import LabeledImages
from ..data.splits import TrainingData
from ..hub.model_files import PREDICTIONS_FILE
from ..hub.model_folder import ModelFolder
from ..inference.per_image import read_weights_hash
from ..runtime.errors import warn_on_first_process
from ..training.outcome import list_measurements
from ..training.run_results import describe_classes


MAX_WRONG_IMAGES = 12
THUMBNAIL_SIDE = 240  # Longer side of a wrong image, in pixels
NEAREST_SIDE = 120  # Longer side of a nearest training image

Photos = Mapping[str, tuple[LabeledImages, int]]  # Name -> images of a split, and position there
ChosenPhotos = list[tuple[Image.Image, dict[str, Any]]]  # Images and the texts next to them


def find_photos(data: TrainingData) -> Photos:
    """Find the images of a run by name, without names that several images have."""
    found: dict[str, list[tuple[LabeledImages, int]]] = {}
    for images in (data.held_out, data.train, data.selection):
        if isinstance(images, LabeledImages):
            for index, name in enumerate(images.images.get_names()):
                found.setdefault(name, []).append((images, index))
    # A name that two images have would show the wrong photo, so neither is shown.
    return {name: places[0] for name, places in found.items() if len(places) == 1}


def read_predictions(folder: ModelFolder) -> Any:
    """Read predictions.parquet: a pandas DataFrame with one row per image, and `confidence`.

    The result is None if the folder has no predictions of these weights, or the images do not have
    exactly one label.
    """
    file = folder.path / PREDICTIONS_FILE
    if not folder.results or not file.is_file() or folder.config is None:
        return None
    try:
        # A model that was trained again makes other mistakes than those in the file.
        if read_weights_hash(file) != folder.weights_sha256:
            warn_on_first_process(
                f"ignoring {file}, because it contains the predictions of other weights"
            )
            return None
        columns = ["image", "label", "prediction", "probabilities", "loss"]
        if "nearest_images" in pq.read_schema(file).names:
            columns.append("nearest_images")
        rows = pd.read_parquet(file, columns=columns)
    except (OSError, ValueError):  # The errors of pyarrow are subclasses
        warn_on_first_process(
            f"ignoring {file}, because it is not readable. Write it again with `vitcls evaluate "
            "--per-image`"
        )
        return None
    # Several labels of an image are a list, of which some may be right and others wrong.
    if not len(rows) or not isinstance(rows["label"][0], str):
        return None
    return rows.assign(confidence=rows["probabilities"].map(max))


def choose_photos(rows: Any, photos: Photos, count: int) -> ChosenPhotos:
    """Choose the most instructive images of all predictions of a run, with their texts."""
    rows = rows[rows["image"].isin(photos.keys())]
    selected = select_images(
        rows["confidence"].tolist(),
        (rows["label"] != rows["prediction"]).tolist(),
        rows["label"].tolist(),
        count,
    )
    chosen = []
    for row, kind in zip(rows.iloc[list(selected)].itertuples(), selected.values(), strict=True):
        images, index = photos[row.image]
        texts = {"name": row.image, "truth": row.label, "predicted": row.prediction, "kind": kind}
        chosen.append((images.images[index], texts))
    return chosen


def summarize_predictions(folder: ModelFolder, rows: Any) -> dict[str, Any]:
    """Summarize the rows of `read_predictions` for the card and the report."""
    wrong = rows[rows["label"] != rows["prediction"]]
    # These rows also chose a frozen classifier, so their accuracy is too high. The results have a
    # corrected one.
    results = folder.results
    num_seen = results.get("num_images_of_encoder", 0)
    (result,) = list_measurements({"": results}, ("accuracy",), seen_by_encoder=num_seen)
    is_cross_validated = results.get("split") == "cross-validation"
    images = "in cross-validation" if is_cross_validated else f"on {len(rows):,} held-out images"
    sentence = f"{result.format_value().capitalize()} {images}"
    shares = rows["label"].value_counts(normalize=True)
    if result.value <= round(shares.iloc[0], 6):
        sentence += f", no better than always saying {shares.index[0]}: {shares.iloc[0]:.0%}"

    confusions = wrong.value_counts(["label", "prediction"])
    if len(confusions) and confusions.iloc[0] > 1:
        label, prediction = confusions.index[0]
        num_of_label = (rows["label"] == label).sum()
        sentence += (
            f"; {label} is most often taken for {prediction} ({confusions.iloc[0]} of "
            f"{num_of_label:,})"
        )
    return {
        "headline": sentence,
        "classes": describe_classes(results, shares.iloc[0] / shares.iloc[-1]),
        "is_cross_validated": is_cross_validated,
        "num_images": len(rows),
        "num_wrong": len(wrong),
        "calibration": results.get("calibration"),
        "wrong": wrong.nlargest(MAX_WRONG_IMAGES, "loss").to_dict("records"),
        "calibration_error": results.get("calibration_error"),
    }


def draw_wrong_photos(
    rows: Sequence[dict[str, Any]], photos: Photos, class_names: Sequence[str], bit_depth: int
) -> list[dict[str, Any]]:
    """Add thumbnails of wrong images and of their nearest training images, as far as they are found.

    16-bit images use `bit_depth` bits.
    """

    def draw(name: str, side: int) -> str | None:
        if name not in photos:  # The dataset has changed since
            return None
        images, index = photos[name]
        try:
            image = to_upright_rgb(images.images[index], bit_depth)
        except ValueError:  # The image cannot be read
            return None
        image.thumbnail((side, side))
        return encode_data_url(image)

    drawn = []
    for row in rows:
        nearest = []
        for name in row.get("nearest_images", ()):
            if name in photos:
                images, index = photos[name]
                label = class_names[images.labels[index]]
                nearest.append({"image": name, "label": label, "url": draw(name, NEAREST_SIDE)})
        drawn.append(row | {"url": draw(row["image"], THUMBNAIL_SIDE), "nearest": nearest})
    return drawn

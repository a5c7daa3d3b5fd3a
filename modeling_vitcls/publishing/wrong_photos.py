"""The wrong predictions of a run or an addition for its report, from predictions.parquet.

    summary = summarize_predictions(measured, results, rows)    result, record, counts, and the wrong images
                                                                with the largest losses
    draw_wrong_photos(summary["wrong"], find_photos(data), ...)      the same, with the images

All of them that may have a wrong label are on a page of their own (labels_page.py).
These results exist only for classifiers with one label per image. `read_predictions`
(evaluation/evaluator.py) makes the rows; their images are found in the data of the run by name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ..analysis.inspection import select_images
from ..analysis.maps import to_upright_rgb
from ..data.images import LabeledImages
from ..frozen.findings import PAGE, describe_findings
from ..inference.stated_result import Measurement, describe_classes


MAX_WRONG_IMAGES = 6  # As many fit on the first screen
THUMBNAIL_SIDE = 240  # Longer side of a wrong image, in pixels
NEAREST_SIDE = 120  # Longer side of a nearest training image

Photos = Mapping[str, tuple[LabeledImages, int]]  # Name -> images of a split, and position there
ChosenPhotos = list[tuple[Image.Image, dict[str, Any]]]  # Images and the texts next to them


def find_photos(*parts: Any) -> Photos:
    """Find the images of a run by name, without names that several images have."""
    found: dict[str, list[tuple[LabeledImages, int]]] = {}
    for images in parts:
        if isinstance(images, LabeledImages):
            for index, name in enumerate(images.images.get_names()):
                found.setdefault(name, []).append((images, index))
    # A name that two images have would show the wrong photo, so neither is shown.
    return {name: places[0] for name, places in found.items() if len(places) == 1}


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


def summarize_predictions(
    measured: Measurement, results: dict[str, Any], rows: Any
) -> dict[str, Any]:
    """Summarize the rows of `read_predictions`.

    Args:
        measured: the result. Rows that also chose a frozen classifier have a higher accuracy.
        results: of the run, or the record of an addition.
        rows: the rows.
    """
    wrong = rows[rows["label"] != rows["prediction"]]
    sizes = rows["label"].value_counts()
    frozen = results.get("frozen", results)  # An addition is nothing but a frozen classifier
    return {
        "measured": measured,
        "record": results,
        "classes": describe_classes(results, sizes.iloc[0] / sizes.iloc[-1]),
        "pairs": frozen.get("scenes", {}).get("pairs", []),
        "findings": describe_findings(frozen.get("findings", {}), PAGE),
        "num_images": len(rows),
        "num_wrong": len(wrong),
        "num_questions": 0,
        "wrong": wrong.nlargest(MAX_WRONG_IMAGES, "loss").to_dict("records"),
    }


def draw_wrong_photos(
    rows: Sequence[dict[str, Any]], photos: Photos, class_names: Sequence[str], bit_depth: int
) -> list[dict[str, Any]]:
    """Draw the wrong photos, each with its nearest training images.

    16-bit images use `bit_depth` bits.
    """

    def draw(name: str, side: int) -> Image.Image | None:
        if name not in photos:  # The dataset has changed since
            return None
        images, index = photos[name]
        try:
            image = to_upright_rgb(images.images[index], bit_depth)
        except ValueError:  # The image cannot be read
            return None
        image.thumbnail((side, side))
        return image

    drawn = []
    for row in rows:
        nearest = []
        for name in row.get("nearest_images", ()):
            if name in photos:
                images, index = photos[name]
                label = class_names[images.labels[index]]
                nearest.append({"image": name, "label": label, "picture": draw(name, NEAREST_SIDE)})
        drawn.append(row | {"picture": draw(row["image"], THUMBNAIL_SIDE), "nearest": nearest})
    return drawn


def draw_pictures(predictions: dict[str, Any], *arguments: Any) -> dict[str, Any]:
    """Draw the wrong photos of a summary and the pairs, each as a photo with two nearest ones.

    The other arguments are as in `draw_wrong_photos`.
    """
    pairs = [{"image": pair[0], "nearest_images": pair} for pair in predictions["pairs"]]
    return {
        name: draw_wrong_photos(rows, *arguments)
        for name, rows in (("wrong", predictions["wrong"]), ("pairs", pairs))
    }

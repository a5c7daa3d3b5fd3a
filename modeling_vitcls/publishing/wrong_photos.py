"""The wrong predictions of a run or an addition for its report, from predictions.parquet.

    summary = summarize_predictions(measured, results, rows)    result, record, counts, and the wrong images
                                                                with the largest losses
    draw_pictures(summary, find_photos(data), ...)              these, and pairs of one scene, with pictures

These results exist only for classifiers with one label per image. `read_predictions`
(evaluation/evaluator.py) makes the rows; their images are found in the data of the run by name.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from PIL import Image

from ..analysis.inspection import select_images
from ..analysis.maps import to_upright_rgb
from ..data.images import LabeledImages
from ..frozen.findings import PAGE, describe_findings
from ..inference.stated_result import Measurement, describe_classes


MAX_WRONG_IMAGES = 6  # As many fit on the first screen
PICTURE_SIDE = 448  # Longer side of a photo, in pixels: a hundred of them are at most 8 MB

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
    """Choose the most instructive images of all predictions of a run: one of each kind, up to `count`."""
    rows = rows[rows["image"].isin(photos.keys())]
    is_wrong = rows["label"] != rows["prediction"]
    selected = select_images(
        rows["confidence"].tolist(),
        is_wrong.tolist(),
        rows["label"].tolist(),
        min(count, 2 + is_wrong.any()),
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
        "wrong": wrong.nlargest(MAX_WRONG_IMAGES, "loss").to_dict("records"),
        "doubtful": [],  # For the page of labels (labels_page.py)
    }


def draw_photo(image: Image.Image, bit_depth: int) -> Image.Image:
    """Draw a whole photo as RGB, upright and small. 16-bit images use `bit_depth` bits."""
    picture = to_upright_rgb(image, bit_depth)
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return picture


def draw_pictures(
    predictions: dict[str, Any], photos: Photos, class_names: Sequence[str], bit_depth: int
) -> dict[str, Any]:
    """Draw the wrong and the doubtful photos, and the pairs of a summary. 16-bit images use `bit_depth` bits.

    Photos that are not in the dataset any more or cannot be read have no picture.
    """

    def draw(name: str) -> dict[str, Any]:
        label = picture = None
        if name in photos:
            images, index = photos[name]
            label = class_names[images.labels[index]]
            with suppress(ValueError):
                picture = draw_photo(images.images[index], bit_depth)
        return {"image": name, "label": label, "picture": picture}

    return {
        "pairs": [list(map(draw, pair)) for pair in predictions["pairs"]],
        **{
            name: [draw(row["image"]) | row for row in predictions[name]]
            for name in ("wrong", "doubtful")
        },
    }

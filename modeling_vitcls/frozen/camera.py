"""Can the classifier recognize the camera instead of the object?

    files of the photos -> camera, format, size and so on -> a tree predicts the label from one of them

A shirt from a scanner and a t-shirt from a phone differ by more than the clothes, and no held-out photo
shows it. The properties are read from the headers of the files.
"""

import io
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageCms
from scipy.stats import binomtest
from sklearn.model_selection import KFold, cross_val_score
from sklearn.tree import DecisionTreeClassifier

from ..data.images import open_encoded_image
from ..data.splits import TrainingData
from ..model.image_processing_vitcls import get_image_formats
from ..runtime.files import replace_control_characters
from .heads import FrozenHead
from .linear_probe import NUM_FOLDS


FOLDER = "folder above the class"  # A table may name files in scans/shirt and phone/t-shirt
# The first of equally good ones is named.
PROPERTIES = "camera", "software", "color profile", "file format", "size", FOLDER
MAX_PHOTOS = 2000  # Number of files that are read
MIN_PHOTOS = 3  # Mean number of a class; with fewer, hardly any is in the folds that train
MAX_CHANCE = 0.001  # That one of the properties predicts as many photos as it does by chance
# A value is of a label if its part of the photos of this label is as much larger than of other labels.
MIN_DIFFERENCE = 0.5


def measure_camera(data: TrainingData, head: FrozenHead) -> dict[str, Any] | None:
    """Measure which property of the files predicts the label best.

    Args:
        data: the images of the run.
        head: the classifier.

    Returns:
        The property, the number of photos whose label it predicts in cross-validation, of how many,
        and by chance, and for each label the value that is most its own, with the difference of its
        share of the photos with this label and with others. None for several labels per image, few
        photos, and files without differences.
    """
    features = head.features
    # One photo of each group: shots of a scene are from one camera, and would count several times.
    rows = np.unique(features.groups, return_index=True)[1]
    rows = rows[:: 1 + len(rows) // MAX_PHOTOS]  # The classes are often in order
    if features.labels.ndim > 1 or len(rows) < MIN_PHOTOS * len(head.labels.names):
        return None
    names = np.take(head.labels.names, features.labels[rows])
    table = pd.DataFrame(
        [
            read_properties(data.train.images, place)
            for place in np.searchsorted(data.train_indices, features.indices[rows])
        ]
    )
    table[FOLDER] = [
        file.rpartition(f"/{name}/")[0]
        for file, name in zip(features.names[rows], names, strict=True)
    ]
    table = table.loc[:, table.nunique() > 1]
    if table.empty or len({*names}) == 1:  # A label differs from no other one
        return None
    tree = DecisionTreeClassifier(random_state=0)
    folds = KFold(NUM_FOLDS, shuffle=True, random_state=0)
    scores = [
        cross_val_score(tree, pd.get_dummies(table[name]), names, cv=folds).mean() for name in table
    ]
    best = table.columns[np.argmax(scores)]
    largest = pd.Series(names).value_counts(normalize=True).max()
    shares = pd.crosstab(names, table[best], normalize="index")  # [labels, values]
    differences = shares - (shares.sum() - shares) / (len(shares) - 1)
    return {
        "property": best,
        "num_photos": len(names),
        "num_right": round(max(scores) * len(names)),
        "largest_class": float(largest),
        "num_properties": len(scores),
        "values": differences.idxmax(axis=1).to_dict(),
        "differences": differences.max(axis=1).to_dict(),
    }


def describe_camera(record: dict[str, Any]) -> str | None:
    """Name the property of the files that predicts the label better than the largest class, or None."""
    test = binomtest(record["num_right"], record["num_photos"], record["largest_class"], "greater")
    texts = [
        f"{name} is {replace_control_characters(value) or 'unknown'}"
        for name, value in record["values"].items()
        if record["differences"][name] >= MIN_DIFFERENCE
    ]
    if not texts or test.pvalue * record["num_properties"] > MAX_CHANCE:
        return None
    return (
        f"{', '.join(texts)}: the classifier may recognize the {record['property']}. Add photos of each "
        f"class with each {record['property']}"
    )


def read_properties(images: Any, index: int) -> dict[str, str]:
    """Read the properties of the file of an image; "" for those that it does not state."""
    found = dict.fromkeys(PROPERTIES, "")
    with (
        suppress(Exception),  # An image in memory has no file
        open_encoded_image(images.get_encoded_image(index)) as stream,
        Image.open(stream, formats=get_image_formats()) as image,
    ):
        found["file format"] = str(image.format)
        found["size"] = f"{image.width} x {image.height}"
        if profile := image.info.get("icc_profile"):
            found["color profile"] = ImageCms.getProfileDescription(io.BytesIO(profile)).strip()
        exif = image.getexif()
        # Cameras fill the fields of EXIF with zeros.
        make, model, found["software"] = (
            str(exif.get(tag, "")).strip("\0 ")[:60] for tag in (271, 272, 305)
        )
        found["camera"] = model or make
    return found

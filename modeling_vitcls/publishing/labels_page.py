"""The page on which a person says what photos show: one file that needs no server and sends nothing.

    photos that a classifier disputes ─┐
                                       ├─ write_labels_page ─ clicks ─ answers.csv (data/answers.py)
    photos that are drawn at random ───┘

Photos that nobody disputes are mixed in, and not marked before they are answered: they say how many labels
are wrong elsewhere. The page asks before it shows a label or what the model says. Whoever believes the
model instead of the photo makes labels worse, and the accuracy that is stated better.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..analysis.pages import render
from ..data.answers import CONTRADICTED, RANDOM
from ..data.splits_table import get_keys
from ..runtime.files import write_text
from .wrong_photos import Photos


MAX_DOUBTFUL = 60  # With 30 wrong labels among 300, a second page of 60 finds few more


def choose_doubtful(rows: pd.DataFrame, photos: Photos) -> list[dict[str, Any]]:
    """Choose the photos of a run whose labels are doubtful, and a third as many of the others.

    Doubtful are photos of one scene with two labels, and those whose label a classifier contradicts that
    was not fitted to them, the largest loss first. Copies and shots of a scene are asked about once,
    and answered photos not again.

    Args:
        rows: of `read_predictions`.
        photos: the images of the run by name.
    """
    rows = rows[rows["image"].isin(photos)]
    places = [photos[name] for name in rows["image"]]
    rows = rows.assign(
        checksum=[f"{get_keys(images)[index]:016x}" for images, index in places],
        is_divided=rows.groupby("group")["label"].transform("nunique") > 1,
    )
    # The order of checksums is a random one
    rows = rows.loc[[images.chosen is None or not images.chosen[index] for images, index in places]]
    rows = rows.sort_values("checksum")
    is_doubtful = rows["is_divided"] | (rows["label"] != rows["prediction"])
    doubtful = rows[is_doubtful].sort_values(["is_divided", "loss"], ascending=False)
    doubtful = doubtful.drop_duplicates(["group", "label"])[:MAX_DOUBTFUL]
    others = rows[~is_doubtful][: round(len(doubtful) / 3)]
    parts = [doubtful.assign(chosen=CONTRADICTED), others.assign(chosen=RANDOM)]
    return pd.concat(parts).to_dict("records")


def write_labels_page(
    file: Path, photos: Sequence[Mapping[str, Any]], class_names: Sequence[str]
) -> None:
    """Write the page, which mixes the photos; those of one reason keep their order.

    Args:
        file: path of the HTML file.
        photos: `checksum`, `image`, `picture`, `label` ("" without one), `prediction` and `chosen` of each.
        class_names: possible answers, besides none of them.

    Raises:
        OSError: if the file cannot be written.
    """
    text = render("labels.html.j2", questions=photos, class_names=class_names)
    write_text(file, text)
    print(f"labels    {file}: a page for answers about {len(photos):,} photos")

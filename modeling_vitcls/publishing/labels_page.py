"""The page on which a person says what photos show: one file that needs no server and sends nothing.

    photos that a classifier disputes ─┐
                                       ├─ mix ─ write_labels_page ─ clicks ─ answers.csv (data/answers.py)
    photos that are drawn at random ───┘

Photos that nobody disputes are mixed in, and not marked before they are answered: they say how many labels
are wrong elsewhere. The page asks before it shows a label or what the model says. Whoever believes the
model instead of the photo makes labels worse, and the accuracy that is stated better.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from PIL import Image

from ..analysis.maps import to_upright_rgb
from ..analysis.pages import encode_data_url, render
from ..data.answers import CONTRADICTED, RANDOM
from ..data.sampling import draw_numbers
from ..data.splits_table import get_keys
from ..runtime.files import escape_csv_cell, write_atomically
from .wrong_photos import Photos


PHOTO_SIDE = 512  # Longer side of a photo, in pixels
MAX_URL_LENGTH = 80_000  # Of a photo: a hundred of them are at most 8 MB
SMALLER = 0.75  # Factor of the side of a photo that is longer

Item = TypeVar("Item")


MAX_CONTRADICTED = 60  # With 30 wrong labels among 300, a second page of 60 finds few more
RANDOM_PART = 1 / 3  # Number of the photos that are drawn at random, compared with the others


@dataclass(frozen=True)
class Question:
    """A photo on the page.

    Attributes:
        checksum: of its content, by which its answer is found.
        image: its name in the file of answers; the page does not show it.
        picture: the photo as a data URL (`draw_photo`).
        before: its label, or "" without one.
        answer: what the model says.
        chosen: why it is on the page: contradicted, unsure, unknown or random.
    """

    checksum: str
    image: str
    picture: str
    before: str
    answer: str
    chosen: str


def choose_questions(
    rows: pd.DataFrame, photos: Photos, pairs: Sequence[Sequence[str]], bit_depth: int
) -> list[Question]:
    """Choose the photos of a run whose labels are doubtful, and others at random.

    Doubtful are photos of one scene with two labels, and those whose label a classifier contradicts that
    was not fitted to them, the largest loss first. Copies and shots of a scene are asked about once,
    and answered photos not again.

    Args:
        rows: of `read_predictions`.
        photos: the images of the run by name.
        pairs: names of photos of one scene.
        bit_depth: number of bits that 16-bit images use.
    """
    rows = rows[rows["image"].isin(photos.keys())].copy()
    places = [photos[name] for name in rows["image"]]
    keys = np.array([get_keys(images)[index] for images, index in places], np.uint64)
    rows["checksum"] = [f"{key:016x}" for key in keys]
    is_new = [images.chosen is None or not images.chosen[index] for images, index in places]
    labels = dict(zip(rows["image"], rows["label"], strict=True))
    divided = {
        name for pair in pairs if len({labels.get(each) for each in pair}) > 1 for name in pair
    }
    rows["is_divided"] = rows["image"].isin(divided)
    rows["number"] = draw_numbers(keys, 3)
    rows = rows[is_new]
    is_doubtful = rows["is_divided"] | (rows["label"] != rows["prediction"])
    doubtful = rows[is_doubtful].sort_values(["is_divided", "loss"], ascending=False)
    doubtful = doubtful.drop_duplicates(["group", "label"])[:MAX_CONTRADICTED]
    others = rows[~is_doubtful].sort_values("number").drop_duplicates("group")
    others = others[: round(RANDOM_PART * len(doubtful))]

    def read(row: Any) -> Image.Image:
        images, index = photos[row.image]
        return images.images[index]

    kinds = {CONTRADICTED: doubtful, RANDOM: others}
    return mix(*(ask(table, chosen, read, bit_depth) for chosen, table in kinds.items()))


def ask(
    table: pd.DataFrame, chosen: str, read: Callable[[Any], Image.Image], bit_depth: int
) -> list[Question]:
    """Ask about photos: rows with checksum, image, label and prediction. Unreadable ones are left out."""
    questions = []
    for row in table.itertuples():
        with suppress(ValueError):
            picture = draw_photo(to_upright_rgb(read(row), bit_depth))
            values = (row.checksum, row.image, picture, row.label, row.prediction, chosen)
            questions.append(Question(*values))
    return questions


def draw_photo(image: Image.Image) -> str:
    """Draw a whole photo as a data URL of limited length. The image is RGB, and becomes smaller."""
    image.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    while len(url := encode_data_url(image)) > MAX_URL_LENGTH:
        image.thumbnail((image.width * SMALLER, image.height * SMALLER))
    return url


def mix(items: Sequence[Item], others: Sequence[Item]) -> list[Item]:
    """Put other items among the items, at places drawn at random; each kind keeps its order."""
    places = np.random.default_rng(0).permutation(len(items) + len(others))
    is_other = places < len(others)
    sources = {False: iter(items), True: iter(others)}
    return [next(sources[each]) for each in is_other.tolist()]


def write_labels_page(
    file: Path, questions: Sequence[Question], class_names: Sequence[str]
) -> None:
    """Write the page.

    Args:
        file: path of the HTML file.
        questions: the photos in their order.
        class_names: possible answers, besides none of them.

    Raises:
        OSError: if the file cannot be written.
    """
    rows = [{**vars(each), "picture": None} for each in questions]
    texts = {
        *class_names,
        *(each.image for each in questions),
        *(each.before for each in questions),
    }
    # The same photos and classes are the same questions, so a page that is written again knows its answers.
    content = [*class_names, *(each.checksum for each in questions)]
    data = {
        "key": f"vitcls answers {hashlib.sha256(repr(content).encode()).hexdigest()[:16]}",
        "questions": rows,
        "spelled": [
            (text, cell) for text in sorted(texts) if (cell := escape_csv_cell(text)) != text
        ],
    }
    text = render(
        "labels.html.j2",
        questions=questions,
        class_names=class_names,
        data=data,
    )
    with write_atomically(file) as temporary_file:
        temporary_file.write_text(text, encoding="utf-8")

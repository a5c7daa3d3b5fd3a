"""The page on which a person says what photos show: one file that needs no server and sends nothing.

    photos that a classifier disputes ─┐
                                       ├─ mix ─ write_labels_page ─ clicks ─ answers.csv (data/answers.py)
    photos that are drawn at random ───┘

Photos that nobody disputes are mixed in, and not marked before they are answered: they say how many labels
are wrong elsewhere. The page asks before it shows a label or what the model says. Whoever believes the
model instead of the photo makes labels worse, and the accuracy that is stated better.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from ..analysis.pages import encode_data_url, render
from ..runtime.files import escape_csv_cell, write_atomically


PHOTO_SIDE = 512  # Longer side of a photo, in pixels
MAX_URL_LENGTH = 80_000  # Of a photo: a hundred of them are at most 8 MB
SMALLER = 0.75  # Factor of the side of a photo that is longer

Item = TypeVar("Item")


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
    file: Path, questions: Sequence[Question], class_names: Sequence[str], command: str
) -> None:
    """Write the page.

    Args:
        file: path of the HTML file.
        questions: the photos in their order.
        class_names: possible answers, besides none of them.
        command: what reads the answers, to be typed.

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
        command=command,
        data=data,
    )
    with write_atomically(file) as temporary_file:
        temporary_file.write_text(text, encoding="utf-8")

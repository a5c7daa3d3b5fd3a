"""Labels that a person gave on a page of photos (publishing/labels_page.py): the files of `--answers`.

    checksum    of the content of a photo, so a renamed or moved photo is found
    image       its name, for people. Where it contradicts the checksum, the table was damaged
    label       what the photo shows; empty: none of the classes
    before      its label before, if it had one
    chosen      why a page asked: contradicted, unsure, unknown, or random
    time        of the answer. The latest answer about a photo counts

A table that `predict` has written is read the same way; with a column `source`, only the labels of a
person are answers. A photo that a model chose because it was unsure trains a model, but does not measure
it: such photos are harder than others.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ..runtime.errors import format_name_list
from ..runtime.files import escape_csv_cell
from .cells import normalize_name
from .images import LabeledImages
from .labels import LabelSpace, OneLabel
from .tables import read_table


COLUMNS = ["checksum", "image", "label", "before", "chosen", "time"]
RANDOM = "random"
CONTRADICTED = "contradicted"
CHANGED = "contradicted, changed"  # How `LabeledImages.chosen` has those whose label was changed
HARD = ("unsure", "unknown")  # Reasons to ask about photos that are harder than others
PERSON = "person"  # In the column `source`
TIME = re.compile(r"\d{4}-\d\d-\d\dT")  # Times that sort as text; those of spreadsheets do not


def read_answers(files: Sequence[str]) -> pd.DataFrame:
    """Read files of answers: the latest answer about each photo, by its checksum.

    Raises:
        ValueError: if a file has other columns or damaged checksums, or if one cannot tell which of two
            answers is the latest.
    """
    parts = []
    for file in files:
        path = Path(file)
        if path.suffix.lower() == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = read_table(path, path.parent).to_pandas()
        if missing := sorted({"checksum", "label"} - {*table.columns}):
            raise ValueError(
                f"{file} has no column {missing[0]!r}. Pass a file that a page has saved, or a table with "
                "the columns checksum and label"
            )
        if "source" in table:
            table = table[table["source"] == PERSON]
        table = table.reindex(columns=COLUMNS, fill_value="").astype(object)
        table = table.where(table.notna(), "").astype(str)
        is_damaged = ~table["checksum"].str.fullmatch("[0-9a-f]{16}")
        if is_damaged.any():
            raise ValueError(
                f"{file}, row {is_damaged.argmax() + 1}: the checksum {table['checksum'][is_damaged].iloc[0]!r} is "
                "damaged, as by a spreadsheet that took it for a number. Copy it from the file that the page has "
                "saved, or remove the row"
            )
        parts.append(table)
    answers = pd.concat(parts)
    answers["time"] = answers["time"].str.replace(" ", "T")
    answers = answers.sort_values("time", kind="stable")
    is_timed = answers["time"].str.match(TIME)
    labels = answers.groupby("checksum")["label"].transform("nunique")
    if (unclear := answers[(labels > 1) & ~is_timed]).size:
        raise ValueError(
            f"{format_name_list(files)}: {unclear['image'].iloc[0] or unclear['checksum'].iloc[0]} has several "
            "answers, and their times do not tell which is the latest. Remove the others"
        )
    return answers.drop_duplicates("checksum", keep="last").set_index("checksum", drop=False)


def find_counted(chosen: np.ndarray | None) -> np.ndarray | None:
    """Find the photos [N] that measure a model: not those that it found hard; None for all of them."""
    return None if chosen is None else ~np.isin(chosen, HARD)


@dataclass(frozen=True)
class Answered:
    """Images with the labels that a person gave them.

    Attributes:
        images: by split, with keys and `chosen`; without those of none of the classes.
        others: those of none of the classes, by split.
        text: a line that counts the answers.
    """

    images: dict[str, LabeledImages]
    others: dict[str, LabeledImages]
    text: str


def apply_answers(
    parts: Mapping[str, LabeledImages], label_space: LabelSpace, answers: pd.DataFrame, dataset: str
) -> Answered:
    """Give photos the labels that a person gave them, whatever the dataset says.

    Args:
        parts: images by split, of which some may have no label.
        label_space: of their labels, one per image.
        answers: of `read_answers`.
        dataset: name of the dataset in messages.

    Raises:
        ValueError: if an image has several labels, if an answer is no class, if a name contradicts a
            checksum, or if no answer is about these photos.
    """
    if not isinstance(label_space, OneLabel):
        raise ValueError(
            f"`answers` requires one label per image, but the labels of {dataset} are {label_space.kind}. "
            "Remove `answers`"
        )
    kinds: dict[str, str] = {}  # Checksum -> what its answer has done
    images = {}
    others = {}
    for split, part in parts.items():
        keys = part.images.compute_content_keys()
        checksums = [f"{key:016x}" for key in keys.tolist()]
        check_names(dict(zip(part.images.get_names(), checksums, strict=True)), answers)
        labels = list(part.labels)
        chosen = np.full(len(part), "", object)
        is_other = np.zeros(len(part), bool)
        for index, checksum in enumerate(checksums):
            if checksum not in answers.index:
                continue
            answer = answers.loc[checksum]
            label = find_class(answer, label_space.names)
            kind = "new" if labels[index] is None else "changed"
            if label is None:
                kind = "none"
            elif label == labels[index]:
                kind = "confirmed"
            kinds.setdefault(checksum, kind)
            labels[index] = label
            is_other[index] = label is None
            chosen[index] = answer["chosen"]
            if answer["chosen"] == CONTRADICTED and answer["label"] != answer["before"]:
                chosen[index] = CHANGED
        answered = replace(part, labels=labels, keys=keys, chosen=chosen)
        images[split], others[split] = answered.divide(is_other)
    if not kinds:
        raise ValueError(
            f"none of the {len(answers):,} answers is about a photo of {dataset}. Set `dataset` to the photos "
            "that the page has shown: a photo that was edited since is another one"
        )
    counts = Counter(kinds.values())
    text = (
        f"{counts['changed']:,} labels changed, {counts['confirmed']:,} confirmed, {counts['new']:,} photos without "
        f"a label got one, {counts['none']:,} show none of the classes"
    )
    known = answers.loc[list(kinds)]
    drawn = known[(known["chosen"] == RANDOM) & (known["before"] != "")]
    if len(drawn):
        num_changed = (drawn["label"] != drawn["before"]).sum()
        text += f"; of {len(drawn):,} that no classifier disputed, {num_changed:,} were changed"
    if num_absent := len(answers) - len(kinds):
        text += f"; {num_absent:,} are about photos that are not here"
    return Answered(images, others, text)


def find_class(answer: pd.Series, names: Sequence[str]) -> int | None:
    """Find the class of an answer among the names of all; None for none of them.

    Raise ValueError if the answer is another name.
    """
    if not answer["label"]:
        return None
    spelled = [escape_csv_cell(normalize_name(name)) for name in names]
    text = escape_csv_cell(normalize_name(answer["label"]))
    if text not in spelled:
        raise ValueError(
            f"the answer about {answer['image'] or answer['checksum']} is {answer['label']!r}, but the classes are "
            f"{format_name_list(names, 20)}. Correct it, or train a model with photos of this class"
        )
    return spelled.index(text)


def check_names(checksums: Mapping[str, str], answers: pd.DataFrame) -> None:
    """Raise ValueError if an answer has the checksum of a photo, and the name of another one.

    Then a column was sorted alone. Names may begin with the folder of the dataset, or with another one
    after it was moved.

    Args:
        checksums: of the photos, by name.
        answers: of `read_answers`.
    """
    known = answers[answers.index.isin(checksums.values())]
    for checksum, name in known["image"].items():
        folders = name.split("/")
        ends = ("/".join(folders[start:]) for start in range(len(folders)))
        other = next((checksums[end] for end in ends if end in checksums), checksum)
        if (
            other != checksum and not name.isdecimal()
        ):  # An image without a file is named by its row
            raise ValueError(
                f"the answer about {name} has the checksum {checksum} of another photo, as after a column was "
                "sorted alone. Pass the file that the page has saved or, if photos have exchanged their names, remove "
                "the column image: only the checksum counts then"
            )

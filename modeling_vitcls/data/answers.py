"""Labels that a person gave on a page of photos (publishing/labels_page.py): the files of `--answers`.

    checksum    of the content of a photo, so a renamed or moved photo is found
    image       its name, for people
    label       what the photo shows; empty: none of the classes
    before      its label before, if it had one
    chosen      why a page asked: contradicted, unsure, unknown, or random
    time        of the answer. The latest answer about a photo counts

A photo that a page has shown because a model was unsure about it trains a model, but does not measure it:
in three rounds of a collection, the interval of all photos contained the accuracy on others in 6 of 36
cases, and the interval without such photos in 36.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from ..runtime.errors import format_name_list
from .images import LabeledImages
from .labels import LabelSpace, OneLabel
from .tables import read_table


RANDOM = "random"
CONTRADICTED = "contradicted"
HARD = ("unsure", "unknown")  # Photos that were shown for these reasons are harder than others
BELIEVED = "believed"  # Name of the line that says why there is no estimate
MIN_DISPUTED = 10
# Part of the contradicted labels that are changed, from which a person believes the classifier. With a tenth of the
# labels wrong, 43 % of 60 are; with three tenths, 82 %.
BELIEVED_PART = 0.95


def read_answers(files: Sequence[str]) -> pd.DataFrame:
    """Read files of answers: `label` and `chosen` of the latest answer about each photo, by its checksum.

    Raise ValueError if a file has other columns.
    """
    tables = []
    for file in map(Path, files):
        table = read_table(file, file.parent).to_pandas()
        if missing := {"checksum", "label", "chosen", "time"}.difference(table):
            raise ValueError(
                f"{file} has no column {sorted(missing)[0]}. Set `answers` to a file that a page has saved"
            )
        tables.append(table)
    answers = pd.concat(tables).fillna("").sort_values("time", kind="stable")
    return answers.drop_duplicates("checksum", keep="last").set_index("checksum")


def apply_answers(
    parts: Mapping[str, LabeledImages], label_space: LabelSpace, answers: pd.DataFrame
) -> tuple[dict[str, LabeledImages], dict[str, str]]:
    """Give photos the labels that a person gave them, whatever the dataset says.

    Args:
        parts: images by split, of which some may have no label.
        label_space: of their labels, one per image.
        answers: of `read_answers`.

    Returns:
        The images, of which those that show no class have no label; and lines: one that counts the answers
        and, if the person believes the model, one that says why the result of a run means nothing.

    Raises:
        ValueError: if an image has several labels, or an answer is no class.
    """
    if label_space.kind != OneLabel.kind:
        raise ValueError("`answers` requires one label per image. Remove it, or set `label_column`")
    classes: Any = {"": None} | {name: index for index, name in enumerate(label_space.names)}
    answered = {}
    tables = []
    for split, part in parts.items():
        keys = part.images.compute_content_keys()
        rows = answers.reindex([f"{key:016x}" for key in keys.tolist()])
        rows["own"] = [label_space.format(label) or "" for label in part.labels]
        names = rows["label"].fillna(rows["own"])
        if unknown := {*names} - classes.keys():
            raise ValueError(
                f"`answers` has the labels {format_name_list(sorted(unknown))}, but the classes are "
                f"{format_name_list(label_space.names, 20)}. Correct them, or add photos of these classes"
            )
        answered[split] = replace(
            part,
            labels=[classes[name] for name in names],
            keys=keys,
            chosen=rows["chosen"].fillna("").to_numpy(),
        )
        tables.append(rows.dropna(subset="label"))

    table = pd.concat(tables)
    labels, own = table["label"], table["own"]
    text = (
        f"{((own != '') & (labels != '') & (labels != own)).sum():,} labels changed, "
        f"{((own != '') & (labels == own)).sum():,} confirmed, "
        f"{((own == '') & (labels != '')).sum():,} photos without a label got one, "
        f"{(labels == '').sum():,} show none of the classes; "
        f"{len(answers.index.difference(table.index)):,} answers are about other photos"
    )
    known = table[own != ""]
    is_changed = known["label"] != known["own"]
    drawn, disputed = (is_changed[known["chosen"] == kind] for kind in (RANDOM, CONTRADICTED))
    if len(drawn):
        text += (
            f"; of {len(drawn):,} labels of photos drawn at random, {drawn.sum():,} were changed"
        )
    facts = {"answers": text}
    if len(disputed) >= MIN_DISPUTED and disputed.mean() >= BELIEVED_PART:
        # Of 300 photos, 30 wrong labels became 48, the estimate rose from 69 to 89 %, and the accuracy on others
        # fell from 86 to 84 %.
        facts[BELIEVED] = (
            f"{disputed.sum():,} of {len(disputed):,} labels that a classifier contradicted were changed, and "
            "whoever believes it makes it look better than it is. Answer by what the photos show, or evaluate "
            "photos that nobody has corrected"
        )
    return answered, facts

"""Labels that a person gave on a page of photos (publishing/labels_page.py): the files of `--answers`.

    checksum    of the content of a photo (16 hexadecimal digits), so a renamed or moved photo is found
    image       its name, for people
    label       what the photo shows; empty: none of the classes
    before      its label before, if it had one
    chosen      why a page asked: contradicted, unsure, unknown, or random; empty: not known
    time        of the answer, UTC unless it names a time zone. The latest answer about a photo counts

A photo that a page has shown because a model was unsure about it trains a model, but does not measure it:
in three rounds of a collection, the interval of all photos contained the accuracy on others in 6 of 36
cases, and the interval without such photos in 36.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from ..runtime.errors import format_name_list, warn_on_first_process
from .cells import fold_name, normalize_name
from .images import HARD, LabeledImages
from .labels import LabelSpace, OneLabel
from .tables import read_table


RANDOM = "random"
CONTRADICTED = "contradicted"
BELIEVED = "believed"  # Name of the line that says why there is no estimate
MIN_DISPUTED = 10
# Part of the contradicted labels that are changed, from which a person believes the classifier. With a tenth of the
# labels wrong, 43 % of 60 are; with three tenths, 82 %.
BELIEVED_PART = 0.95
REASONS = ("", RANDOM, CONTRADICTED, *HARD)
NO_PHOTOS = (
    "WARNING: no answer of `answers` is about a photo of the data. Pass the photos of the page, with their content "
    "as it was, or remove `answers`"
)


def read_answers(files: Sequence[str]) -> pd.DataFrame:
    """Read files of answers: the latest answer about each photo, by its checksum.

    Spreadsheets may have changed the files: upper and lower case of columns, checksums and reasons is the
    same, and so are times in any format. Labels have the Unicode form of tables (NFC).

    Raises:
        ValueError: if a file has other columns; if a row has no checksum, or another reason or time, such
            as after a spreadsheet has turned a checksum into a number; or if it is not clear which of
            two answers is the later one.
    """
    answers = pd.concat(map(read_file, files), ignore_index=True)
    latest = find_latest(answers, day_first=True)
    is_disputed = answers.groupby("checksum")["label"].transform("nunique") > 1
    if not is_disputed.any():
        return latest

    disputed = answers[is_disputed]
    names = disputed.drop_duplicates("checksum")["image"].tolist()
    if (disputed["time"] == "").any():
        name = disputed["image"][disputed["time"] == ""].iloc[0]
        raise ValueError(
            f"`answers` has different labels of {name}, of which one has no time. Add it, or remove one of them"
        )
    other = find_latest(answers, day_first=False)
    if (is_unclear := latest["label"] != other["label"]).any():
        first = latest[is_unclear].iloc[0]
        raise ValueError(
            f"`answers` has different labels of {first['image']}, and it is not clear which is the later one: "
            f"{first['time']} is one of two days. Write the day as 2026-12-31"
        )
    warn_on_first_process(
        f"WARNING: `answers` has different labels of {len(names):,} photos, and the later one counts: "
        f"{format_name_list(names)}"
    )
    return latest


def read_file(file: str) -> pd.DataFrame:
    """Read one file of answers, and check its cells."""
    path = Path(file)
    table = read_table(path, path.parent).to_pandas().fillna("").astype(str)
    table.columns = table.columns.str.lower()
    if missing := {"checksum", "label", "chosen", "time"}.difference(table):
        raise ValueError(
            f"{file} has no column {sorted(missing)[0]}. Set `answers` to a file that a page has saved"
        )
    if "image" not in table:
        table["image"] = table["checksum"]
    table["file"] = file  # Photos of one page were drawn together
    table["time"] = table["time"].str.strip()
    table["checksum"] = table["checksum"].str.strip().str.lower()
    table["chosen"] = table["chosen"].str.strip().str.lower()
    # A blank behind a label is invisible in a spreadsheet
    table["label"] = table["label"].map(normalize_name).str.rstrip()

    has_time = parse_times(table["time"], day_first=True).notna()
    checks = {
        "checksum": (table["checksum"].str.fullmatch("[0-9a-f]{16}"), "16 hexadecimal digits"),
        "label": (~table["label"].str.contains("\0", regex=False), "text"),
        "chosen": (table["chosen"].isin(REASONS), f"empty or one of {', '.join(REASONS[1:])}"),
        "time": ((table["time"] == "") | has_time, "a time"),
    }
    for column, (is_valid, requirement) in checks.items():
        if not is_valid.all():
            row = (~is_valid).argmax()
            raise ValueError(
                f"{file}: row {row} ({table['image'][row]:.60}) has the {column} "
                f"{table[column][row]!r:.60}, which is not {requirement}. Correct it, or save the file again "
                "from the page; a spreadsheet may change texts that look like numbers"
            )
    return table


def find_latest(answers: pd.DataFrame, day_first: bool) -> pd.DataFrame:
    """Find the latest answer about each photo, in the order of checksums; of one time, the last one."""
    order = parse_times(answers["time"], day_first).sort_values(kind="stable").index
    latest = answers.loc[order].drop_duplicates("checksum", keep="last")
    return latest.set_index("checksum").sort_index()


def parse_times(texts: pd.Series, day_first: bool) -> pd.Series:
    """Parse times in any format, in UTC; those that cannot be parsed are missing (NaT).

    Args:
        texts: as a page writes them (ISO 8601), or a spreadsheet.
        day_first: whether 9/12/2026 is a day of December.
    """
    times = pd.to_datetime(texts, format="ISO8601", utc=True, errors="coerce")
    others = texts[times.isna()]
    parsed = pd.to_datetime(others, format="mixed", dayfirst=day_first, utc=True, errors="coerce")
    return times.fillna(parsed)


def match_classes(labels: pd.Series, class_names: Sequence[str]) -> pd.Series:
    """Spell labels as the classes: with their Unicode form, and blanks around them."""
    names = {normalize_name(name).strip(): name for name in class_names}
    return labels.map(
        lambda label: label if label in class_names else names.get(label.strip(), label)
    )


def format_unknown_labels(labels: Collection[str], class_names: Sequence[str]) -> str:
    """Name labels that are no classes, and how they differ from a class that looks alike."""
    alike = {fold_name(name): name for name in class_names}
    names = []
    for label in sorted(labels):
        similar = alike.get(fold_name(label))
        names.append(label if similar is None else f"{label!a} (the class is {similar!a})")
    return format_name_list(names)


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
    answers = answers.assign(label=match_classes(answers["label"], ["", *label_space.names]))
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
                f"`answers` has the labels {format_unknown_labels(unknown, label_space.names)}, but the classes are "
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
    if table.empty:
        warn_on_first_process(NO_PHOTOS)
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

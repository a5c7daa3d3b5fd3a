"""What the cells of a label column say: the names of the classes, and those of each image.

    cell                                                      label names (`name_items`)
    text, a number, a truth value                             its spelling: 001, 1 (also for 1.0), True
    the index of a `ClassLabel`                               the name that its split declares
    a list, text like ["a", "b"], text with a separator       one for each item
    a list with 0 or 1 for each class                         the classes that have a 1

The classes are declared by the dataset, set by --label-names, or the sorted distinct names, in this
order of precedence. Each split may declare them in an order of its own.
"""

import ast
import math
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any

from ..runtime.errors import warn_on_first_process


MIN_JOINED_LABELS = 3  # number of classes with the same separator that look like several labels

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
BITS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


def read_label_names(
    cells: Mapping[str, list[Any]],
    declared: Mapping[str, Sequence[str]],
    where: str,
    separator: str | None,
    label_names: Sequence[str] | None,
) -> tuple[list[str], dict[str, list[list[str] | None]], bool]:
    """Read the classes of a column, the label names of each image, and whether cells are lists.

    What the cells contain is decided for all splits together, because a short one could mislead.

    Args:
        cells: cells of the column by split.
        declared: names of the classes that each split declares; empty if there are none.
        where: name of the column in messages.
        separator: separator of several labels in one text.
        label_names: names of all classes, if the dataset does not declare them.
    """
    classes = list(dict.fromkeys(chain(*declared.values())))
    is_declared = bool(classes)
    if is_declared and label_names is not None and list(label_names) != classes:
        raise ValueError(
            f"{where} declares the labels {', '.join(map(repr, classes[:20]))}, so `label_names` "
            "has no effect. Remove `label_names`"
        )
    classes = classes or list(label_names or ())

    # Large tables repeat few cells, so each is read once. By spelling, because 1 and True are the
    # same key of a dict, and lists are none.
    rows = {split: list(map(repr, values)) for split, values in cells.items()}
    distinct = dict(zip(chain(*rows.values()), chain(*cells.values()), strict=True))
    items = {spelling: split_labels(cell, separator) for spelling, cell in distinct.items()}
    for spelling, labels in items.items():
        if any(isinstance(label, list | dict) for label in labels):
            raise ValueError(
                f"{where} has no class labels, but values such as {spelling:.60}. Set `label_column`"
            )
    has_lists = separator is not None or any(items[each] != [distinct[each]] for each in distinct)
    has_vectors = has_lists and separator is None and are_vectors(items.values(), classes, where)

    names = {}
    for split, spellings in rows.items():
        own_classes = declared[split] or classes
        found = name_items(items, own_classes, is_declared, has_vectors)
        names[split] = [found[spelling] for spelling in spellings]
    labeled = filter(None, chain(*names.values()))
    ordered = classes or sort_spellings({*chain(*labeled)}, where, has_lists)
    classes = list(dict.fromkeys(map(normalize_name, ordered)))
    warn_about_similar_classes(where, classes)
    if separator is not None or not has_lists:
        warn_about_separator(where, classes)
    return classes, names, has_lists


def are_vectors(lists: Collection[list[Any]], classes: Sequence[str], where: str) -> bool:
    """Tell whether lists have one place for each class, with 0 or 1.

    Raise ValueError if they have, but the classes of these places are not known.
    """
    filled = [items for items in lists if items not in ([None], [""])]
    lengths = set(map(len, filled))
    if len(lengths - {1}) != 1 or len(lengths) > 1:
        return False
    if any(get_bit(item) is None for item in chain(*filled)):
        return False
    (length,) = lengths
    if length != len(classes):
        raise ValueError(
            f"{where} has {length} places with 0 or 1 in each value. Set `label_names` to the "
            f"{length} names of these classes, in this order"
            f"{f', not {len(classes)}' if classes else ''}"
        )
    return True


def name_items(
    items_by_cell: Mapping[str, list[Any]],
    classes: Sequence[str],
    is_declared: bool,
    has_vectors: bool,
) -> dict[str, list[str] | None]:
    """Name the labels of each cell; None for a cell without a label.

    Args:
        items_by_cell: the items of each cell (`split_labels`).
        classes: names that this split declares or the user has given; empty if there are none.
        is_declared: whether numbers are always indices of `classes`. If the user gives the names,
            numbers are indices unless one of the names is a number itself.
        has_vectors: whether lists have one place for each of `classes`, with 0 or 1.
    """
    name_by_index: dict[str, str] = {}
    # If names are numbers, a cell with 3 is the name "3", and not the class with this index.
    if is_declared or not any(name.removeprefix("-").isdecimal() for name in classes):
        name_by_index = {str(index): name for index, name in enumerate(classes)}

    found: dict[str, list[str] | None] = {}
    for cell, items in items_by_cell.items():
        if has_vectors and len(items) == len(classes):
            found[cell] = [name for name, item in zip(classes, items, strict=True) if get_bit(item)]
            continue
        names = [
            name_by_index.get(text, f"index {text}" if is_declared else text)
            for item in items
            if (text := spell_label(item)) is not None
            and not (is_declared and text == "-1")  # a missing label
        ]
        # an empty list says that the image has none of the labels
        found[cell] = names if names or not items else None
    return found


def get_bit(value: Any) -> bool | None:
    """Read 0 or 1, false or true, also as text, as a truth value; None for other values."""
    return BITS.get(str(value).lower())


def sort_spellings(spellings: set[str], where: str, has_lists: bool) -> list[str]:
    """Sort the different labels of a column; numbers by value. Raise ValueError if they are none."""
    are_numbers = all(map(NUMBER.fullmatch, spellings))
    if are_numbers and not all(float(text).is_integer() for text in spellings):
        raise ValueError(
            f"{where} has decimal numbers, which are no class labels. Set `label_column` to "
            "another column, or `label_names` to these numbers"
        )
    if not has_lists and spellings and all(text[0] + text[-1] == "[]" for text in spellings):
        raise ValueError(
            f"{where} has labels that look like lists, such as {min(spellings)!r:.60}, but cannot "
            'be read. Write them as JSON, such as ["cat", "dog"], or as text with `label_separator`'
        )
    # Numbers by value, or class 10 would come before class 2.
    return sorted(
        spellings,
        key=lambda text: (int(text) if text.removeprefix("-").isdecimal() else math.inf, text),
    )


def warn_about_similar_classes(where: str, names: Sequence[str]) -> None:
    """Log a warning about classes whose names differ only in case, white space or invisible characters."""
    groups: dict[str, list[str]] = {}
    for name in names:
        visible = "".join(each for each in name if unicodedata.category(each) != "Cf")
        key = " ".join(unicodedata.normalize("NFKC", visible).split()).casefold()
        groups.setdefault(key, []).append(name)
    alike = [" and ".join(map(ascii, group)) for group in groups.values() if len(group) > 1]
    if alike:
        warn_on_first_process(
            f"WARNING: {where} has separate classes that differ only in case, white space or "
            f"invisible characters: {', '.join(alike[:10])}. Give each class one name"
        )


def warn_about_separator(where: str, names: Sequence[str]) -> None:
    """Log a warning if several classes look like lists of labels: `red|round`, `green|round`."""
    for separator in "|;":
        joined = [name for name in names if separator in name]
        if len(joined) >= MIN_JOINED_LABELS:
            warn_on_first_process(
                f"WARNING: {where} has {len(joined)} classes such as {joined[0]!r}. If these are "
                f"several labels of an image, set `label_separator={separator!r}` "
                f"(--label-separator '{separator}')"
            )


def split_labels(value: Any, separator: str | None) -> list[Any]:
    """Split one value into its labels.

    They are the items of a list, the text between separators, or the value itself.
    """
    items = value if isinstance(value, list) else parse_list(value)
    if items is not None:
        return items
    if separator is None or not isinstance(value, str):
        return [value]
    return [label.strip() for label in value.split(separator)]  # empty text is a missing label


def parse_list(value: Any) -> list[Any] | None:
    """Parse a text such as `["a", "b"]` as a list; None for another value."""
    if not isinstance(value, str) or not (value.startswith("[") and value.endswith("]")):
        return None
    try:
        return list(ast.literal_eval(value))
    except (ValueError, SyntaxError, TypeError):
        return None


def spell_label(value: Any) -> str | None:
    """Spell a label as its file does, so that 001 stays 001; None for a missing label.

    Whole numbers have no decimal point; truth values are True and False.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if str(value).strip() else None


def normalize_name(name: str) -> str:
    """Make names comparable (Unicode form NFC): macOS and Windows write é in two ways."""
    return unicodedata.normalize("NFC", name)

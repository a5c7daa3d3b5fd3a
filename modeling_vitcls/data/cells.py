"""What the cells of a label column say: the names of the classes, and the classes of each image.

    cell                                                      label names (`name_items`)
    text, a number, a truth value                             its spelling: 001, 1 (also for 1.0), True
    the index of a `ClassLabel`                               the name that its split declares
    a list, text like ["a", "b"], text with a separator       one for each item
    a list with 0 or 1 for each class                         the classes that have a 1

The classes are declared by the dataset, set by --label-names, or the sorted distinct names, in this
order of precedence. Each split may declare them in an order of its own.

A cell that says nothing certain is an error with its row, or a line that says how it was read.
"""

import ast
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

from ..runtime.errors import format_name_list, warn_on_first_process


# Characters between several labels of one text, and how much more often than whole cells the parts
# between them must occur. A comma is also within names: "tench, Tinca tinca".
SEPARATORS = {"|": 1.0, ";": 1.0, "\n": 1.0, ",": 1.5}
CERTAIN_SEPARATORS = ("|", ";", "\n")
ASKED_SEPARATORS = ("/", "+", "&")  # No text is read with them
MIN_REPEATS = 1.5  # The same for words between blanks, which are also in names: "golden retriever"
NO_SEPARATOR = "none"  # The value of `label_separator` that says: each text is one label
MAX_NUMBERS = 50  # Different numbers with gaps between them; more look like a measurement
MIN_VECTORS = 0.9  # Share of the lists that have one length, from which they are vectors
# Fields that are the label of an object: Label Studio's choices, and a name next to its number
LABEL_FIELDS = ("choices", "name", "label")

NUMBER = re.compile(r"[+-]?(\d+[.,]?\d*|[.,]\d+)(e[+-]?\d+)?", re.IGNORECASE)
MEASURED = re.compile(rf"[€$£]? ?({NUMBER.pattern}) ?([%€$£°]|[a-zµ]{{1,3}})?", re.IGNORECASE)
WHOLE = re.compile(r"[+-]?\d+(\.0+)?")
IN_BRACKETS = re.compile(r"\s*\[.*\]\s*", re.DOTALL)
BITS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
MISSING_WORDS = frozenset("nan na n/a none null unknown unlabeled ? -".split())
MISSING_NUMBERS = ("-1", "-100")  # Missing labels in datasets with class indices


class LabelColumn:
    """The cells of a label column.

    Large tables repeat few cells, so each different one is read once. Their `repr` is the key,
    because 1 and True are the same key of a dict, and lists cannot be keys.
    """

    def __init__(
        self, dataset: str, name: str, cells: Mapping[str, Sequence[Any]], is_folder: bool
    ) -> None:
        self.name = name
        self.is_folder = is_folder
        self.where = f"{dataset}: {'the class folders' if is_folder else f'the column {name!r}'}"
        self.rows = {split: list(map(repr, values)) for split, values in cells.items()}
        values = dict(zip(chain(*self.rows.values()), chain(*cells.values()), strict=True))
        labels = {cell: read_object(value) for cell, value in values.items()}
        # Missing labels are left out.
        self.values = {cell: each for cell, each in labels.items() if spell_label(each) is not None}
        known = self.values.values()
        if all(isinstance(each, str) and WHOLE.fullmatch(each) for each in known):
            # pandas writes 1 as 1.0 if a cell of the column is empty
            whole = {cell: each.partition(".")[0] for cell, each in self.values.items()}
            self.values |= {cell: each for cell, each in whole.items() if each in known}
        self.counts = Counter(cell for cell in chain(*self.rows.values()) if cell in self.values)

    def name_row(self, cell: str) -> str:
        """Name the column and the first row that has a cell."""
        split, rows = next(each for each in self.rows.items() if cell in each[1])
        return f"{self.where}, split {split!r}: row {rows.index(cell)} has {cell:.60}"


def read_label_names(
    column: LabelColumn,
    declared: Mapping[str, Sequence[str]],
    separator: str | None,
    label_names: Sequence[str] | None,
) -> tuple[list[str], dict[str, list[list[str] | None]], bool]:
    """Read the classes of a column, the label names of each image, and whether cells are lists.

    What the cells contain is decided for all splits together, because a short one could mislead.

    Args:
        column: the cells.
        declared: names of the classes that each split declares; empty if there are none.
        separator: separator of several labels in one text; NO_SEPARATOR: each is surely one label.
        label_names: names of all classes, if the dataset does not declare them.
    """
    where = column.where
    own_names = list(dict.fromkeys(map(normalize_name, chain(*declared.values()))))
    classes = list(map(normalize_name, label_names or own_names))
    if own_names and classes != own_names:
        raise ValueError(
            f"{where}: the labels are declared, {', '.join(map(repr, own_names[:20]))}, so `label_names` "
            "has no effect. Remove `label_names`"
        )
    if len({*classes}) < len(classes):
        raise ValueError(f"`label_names={label_names}` has a name twice. Give each class its own")

    items = {cell: split_labels(value, separator) for cell, value in column.values.items()}
    is_split = separator not in (None, NO_SEPARATOR)
    has_lists = check_items(column, items) or is_split
    has_vectors = not is_split and are_vectors(column, items, classes, bool(own_names))
    names = {}
    for split, cells in column.rows.items():
        own_classes = declared[split]
        found = name_items(items, own_classes or classes, bool(own_classes), has_vectors)
        names[split] = [found.get(cell) for cell in cells]

    rows = filter(None, chain.from_iterable(names.values()))
    found_names = sorted({*map(normalize_name, chain.from_iterable(rows))})
    if label_names and (unused := set(classes).difference(found_names)):
        warn_on_first_process(
            f"WARNING: {where}: no image has a label of {format_name_list(sorted(unused))}. Check the "
            "spelling; numbers are counted from 0"
        )
    if not classes:
        if odd := [name for name in found_names if name.strip().lower() in MISSING_WORDS]:
            warn_on_first_process(
                f"WARNING: {where} has the class {odd[0]!r}. If it means that an image has no label, "
                "leave these cells empty"
            )
        if found_names and all(map(NUMBER.fullmatch, found_names)):
            check_numbers(where, found_names, has_lists)
        elif separator != NO_SEPARATOR:
            warn_about_joined_names(where, found_names)
        classes = sort_names(found_names)
    warn_about_similar_names(where, classes)
    return classes, names, has_lists


def sort_names(names: Iterable[str]) -> list[str]:
    """Sort names of classes, numbers by their value: by their spelling, 10 would come before 2."""
    return sorted(
        sorted(names),
        key=lambda text: int(text) if text.removeprefix("-").isdecimal() else math.inf,
    )


def find_separator(column: LabelColumn, label_names: Sequence[str] | None) -> str | None:
    """Find the separator of several labels in one text: its parts repeat more often than the texts.

    `label_names` are the names of all classes, if they are known.
    """
    texts = {
        value: column.counts[cell]
        for cell, value in column.values.items()
        if isinstance(value, str) and parse_list(value) is None
    }
    if all(map(MEASURED.fullmatch, texts)):  # 1,5 and 99,00 € are numbers in many countries
        return None
    for separator, factor in SEPARATORS.items():
        joined = [text for text in texts if separator in text and text not in (label_names or ())]
        parts: Counter[str] = Counter()
        for text, count in texts.items():
            parts.update(dict.fromkeys(filter(None, split_labels(text, separator)), count))
        if (
            joined
            and parts
            and parts.total() / len(parts) > factor * sum(texts.values()) / len(texts)
        ):
            warn_on_first_process(
                f"{column.where} has several labels in texts such as {joined[0]!r:.60}: read as "
                f"{len(parts):,} labels separated by {separator!r}. If each text is one label, set "
                f"`label_separator={NO_SEPARATOR!r}`"
            )
            return separator
    return None if label_names else find_blanks(column, texts)


def find_blanks(column: LabelColumn, texts: Mapping[str, int]) -> str | None:
    """Find several labels between blanks: numbers are read as such, and a line asks about words.

    Names of several words, such as `Quercus robur` or `golden retriever`, repeat few of their words. Tags
    repeat most, or have one at different places: `haze primary`, `clear agriculture primary`.

    Args:
        column: the cells.
        texts: how often each different text occurs.
    """
    parts = {text: list(filter(None, text.split(" "))) for text in texts}
    lengths = {len(each) for each in parts.values()}
    counts: Counter[str] = Counter()
    places: dict[str, set[int]] = {}
    for text, words in parts.items():
        counts.update(dict.fromkeys(words, texts[text]))
        for place, word in enumerate(words):
            places.setdefault(word, set()).add(place)
    if column.is_folder or max(lengths, default=0) < 2:
        return None

    repeats = counts.total() / len(counts) / (sum(texts.values()) / len(texts))
    example = next(text for text, words in parts.items() if len(words) > 1)
    if repeats > 1 and all(map(str.isdecimal, counts)):
        warn_on_first_process(
            f"{column.where} has several labels in texts such as {example!r:.60}: read as {len(counts):,} "
            f"labels separated by ' '. If each text is one label, set `label_separator={NO_SEPARATOR!r}`"
        )
        return " "
    are_moved = len(lengths) > 1 and any(len(each) > 1 for each in places.values())
    if repeats > MIN_REPEATS and (len(counts) < len(texts) or are_moved):
        warn_on_first_process(
            f"WARNING: {column.where} has {len(texts):,} classes of {len(counts):,} words, such as "
            f"{example!r:.60}. If these are several labels of an image, set `label_column` to this column and "
            "`label_separator=' '`"
        )
    return None


def check_items(column: LabelColumn, items: Mapping[str, list[Any]]) -> bool:
    """Tell whether cells are lists.

    Raise ValueError for a cell that is no label, or text that looks like a list but is none.
    """
    for cell, labels in items.items():
        if fields := next((list(label) for label in labels if isinstance(label, dict)), None):
            raise ValueError(
                f"{column.where} has objects such as {cell:.60}, and it is not clear which field is "
                f"the label. Set `label_column` to one of the fields ({format_name_list(fields)}), such "
                f"as `label_column='{column.name}.{fields[0]}'`"
            )
        if any(isinstance(label, list) for label in labels):
            raise ValueError(
                f"{column.where} has no class labels, but values such as {cell:.60}. Set "
                "`label_column`"
            )
    texts = [cell for cell, labels in items.items() if labels == [column.values[cell]]]
    unread = [cell for cell in texts if IN_BRACKETS.fullmatch(str(column.values[cell]))]
    if unread and (len(texts) < len(items) or len(unread) == len(texts)):
        raise ValueError(
            f"{column.name_row(unread[0])}, which looks like a list but cannot be read. Write it "
            'as JSON, such as ["cat", "dog"], or as text with `label_separator`'
        )
    return len(texts) < len(items)


def are_vectors(
    column: LabelColumn,
    items: Mapping[str, list[Any]],
    classes: Sequence[str],
    is_declared: bool,
) -> bool:
    """Tell whether lists have one place for each class, with 0 or 1, and are no class indices.

    Then most of them have one length, and almost all do or one of them repeats a number, which
    indices do not. If the dataset declares the classes (`ClassLabel`), its numbers are indices, unless
    one is repeated. Raise ValueError if the classes are not known, or if a row has another length.
    """
    vectors = {cell: list(map(get_bit, labels)) for cell, labels in items.items()}
    lengths: Counter[int] = Counter()
    for cell, bits in vectors.items():
        if len(bits) > 1 and None not in bits:
            lengths[len(bits)] += column.counts[cell]
    length, number = lengths.most_common(1)[0] if lengths else (0, 0)
    is_repeated = any(len(set(bits)) < len(bits) == length for bits in vectors.values())
    if is_declared and not is_repeated:
        return False
    min_share = 0.5 if is_repeated else MIN_VECTORS
    if number <= min_share * column.counts.total():
        return False

    if length != len(classes):
        raise ValueError(
            f"{column.where} has {length} places with 0 or 1 in each value. Set `label_names` to "
            f"the {length} names of these classes, in this order"
        )
    for cell, bits in vectors.items():
        if len(bits) != length or None in bits:
            raise ValueError(
                f"{column.name_row(cell)}, but other rows have a 0 or 1 for each of the {length} "
                "classes. Correct this row"
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
            and not (is_declared and text in MISSING_NUMBERS)
        ]
        # An empty list says that the image has none of the labels
        found[cell] = names if names or not items else None
    return found


def get_bit(value: Any) -> bool | None:
    """Read 0 or 1, false or true, also as text, as a truth value; None for other values."""
    return BITS.get(str(value).lower())


def check_numbers(where: str, names: Collection[str], has_lists: bool) -> None:
    """Raise ValueError for numbers that measure something; warn about numbers that may be no classes."""
    numbers = [float(name.replace(",", ".")) for name in names]
    decimals = [name for name, number in zip(names, numbers, strict=True) if number % 1]
    longest = max(decimals or names, key=len)
    measurement = f"numbers such as {longest}: this looks like a measurement; vitcls trains classes"
    if decimals:
        raise ValueError(
            f"{where} has decimal {measurement}. Set `label_column` to another column, write classes such "
            "as low and high, or set `label_names` to these numbers if it is the only label column"
        )
    if not has_lists and max(numbers) - min(numbers) >= len(names) > MAX_NUMBERS:
        warn_on_first_process(
            f"WARNING: {where} has {len(names):,} different {measurement}. If it is one, set "
            "`label_column` to another column"
        )
    missing = [
        name
        for name, number in zip(names, numbers, strict=True)
        if f"{number:g}" in MISSING_NUMBERS
    ]
    if missing:
        warn_on_first_process(
            f"WARNING: {where} has the class {missing[0]}. If it means that an image has no label, leave "
            "these cells empty; if it means that it does not have this one, write 0"
        )


def warn_about_joined_names(where: str, names: Sequence[str]) -> None:
    """Log a warning about classes that look like several labels: `red|round`, `green|round`.

    Commas are also in names such as `tench, Tinca tinca`, and a slash in `n/a`: each part must be in another
    class, too.
    """
    for separator in (*SEPARATORS, *ASKED_SEPARATORS):
        joined = [name for name in names if separator in name]
        if separator not in CERTAIN_SEPARATORS:
            counts = Counter(part for name in names for part in split_labels(name, separator))
            joined = [
                name
                for name in joined
                if all(counts[part] > 1 for part in split_labels(name, separator))
            ]
        if not joined:
            continue
        warn_on_first_process(
            f"WARNING: {where} has {len(joined):,} classes such as {joined[0]!r:.60}. If these are "
            f"several labels of an image, set `label_column` to this column and "
            f"`label_separator={separator!r}`"
        )


def warn_about_similar_names(where: str, names: Sequence[str]) -> None:
    """Log a warning about names that differ only in case, white space or invisible characters."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(fold_name(name), []).append(name)
    alike = [" and ".join(map(ascii, group)) for group in groups.values() if len(group) > 1]
    if alike:
        warn_on_first_process(
            f"WARNING: {where}: separate names differ only in case, white space or invisible "
            f"characters: {', '.join(alike[:10])}. Merge them, or give each class or group one name"
        )


def split_labels(value: Any, separator: str | None) -> list[Any]:
    """Split one value into its labels.

    They are the items of a list, the text between separators, or the value itself.
    """
    items = parse_list(value)
    if items is not None:
        return list(map(read_object, items))
    if separator in (None, NO_SEPARATOR) or not isinstance(value, str):
        return [value]
    return [label.strip() for label in value.split(separator)]  # Empty text is a missing label


def read_object(value: Any) -> Any:
    """Read the label in an object, such as {"id": 3, "name": "dog"}, which may be text in a CSV file.

    Other values are returned unchanged, and so are objects in which no field is surely the label.
    """
    found = parse_text(value)
    if not isinstance(found, dict) or value == "{}":
        return value
    if not any(each is not None for each in found.values()):
        return None
    return next((found[name] for name in LABEL_FIELDS if found.get(name) is not None), found)


def parse_list(value: Any) -> list[Any] | None:
    """Read a list, also from text such as `["a", "b"]` or Python's `('a', 'b')`; None for others."""
    found = parse_text(value)
    return list(found) if isinstance(found, list | tuple | set) else None


def parse_text(value: Any) -> Any:
    """Parse text of a list or an object, in JSON or as Python prints it; other values stay."""
    text = value.strip() if isinstance(value, str) else ""
    # Python joins texts without a comma between them, as in NumPy's ['a' 'b'].
    if text[:1] + text[-1:] not in ("[]", "()", "{}") or re.search(r"""['"]\s+['"]""", text):
        return value
    for parse in (json.loads, ast.literal_eval):
        # The last two are about thousands of brackets
        with suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return parse(text)
    return value


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


def fold_name(name: str) -> str:
    """Reduce a name to what a person sees: without case, white space and invisible characters."""
    visible = "".join(each for each in name if unicodedata.category(each) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", visible).split()).casefold()

"""Text tables on this machine, read into memory as they are written.

    .csv, .tsv    every cell is text: 001, 1e3, true, NA and null stay as they are; an empty cell is a missing value
    .jsonl, .ndjson    values keep their JSON type; a column with values of several types is text

There is no cache, so a table is never older than its file. The separator of a CSV file (comma,
semicolon, tab or bar) is the most frequent one in its header; lines before the header may be
comments (`#`) or `sep=;`.
"""

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..model.field_checks_vitcls import open_regular_file
from ..runtime.errors import format_error, format_name_list, warn_on_first_process
from .cells import normalize_name, spell_label
from .images import ADDRESS, resolve_path


SEPARATORS = ",;\t|"
MAX_COLUMNS = 10_000  # Each costs a millisecond in `datasets`, so 30,000 take half a minute
FILE_NAME_COLUMNS = {
    "file_name",
    "filename",
}  # Names that are no labels; they show where the header is
# Blank lines and comments before the header, and the line in which spreadsheets name the separator
PREAMBLE = re.compile(r'(?:[ \t]*(?:#.*)?\n)*(?:"?sep=(?P<separator>.)"?\n)?')
# Cells of rows below the header in exports of EcoTaxa, QIIME 2, Orange and databases: the types of the columns
# (or the line of a Markdown table), and then their roles
COLUMN_TYPE = re.compile(
    r"\[[tf]\]|#q2:types|str(ing)?|text|(var|n|nvar)?char2?(\(\d+\))?|u?int(eger|8|16|32|64)?|bigint|smallint|"
    r"float(32|64)?|double( precision)?|real|decimal|number|numeric(al)?|bool(ean)?|categor(y|ical)|continuous|"
    r"discrete|date|time|datetime|timestamp|object|path|file|image|url|uri|[cds]|:?-{2,}:?",
    re.IGNORECASE,
)
COLUMN_ROLE = re.compile("|class|meta|ignore|[cim]", re.IGNORECASE)
QUOTE_OF_FORMULA = "^'(?='*[=+@-])"  # `predict` writes it before a text that spreadsheets would run


def read_table(file: Path, folder: Path) -> Any:
    """Read a table in a folder as a `datasets.Dataset` in memory.

    Raise ValueError if the file is not a table of its type.
    """
    import datasets
    import pyarrow

    text = read_table_text(file)
    if not text.strip():
        columns: dict[str, list[Any]] = {}
    elif file.suffix.lower() in (".jsonl", ".ndjson"):
        columns = read_json_lines(file, text)
    else:
        columns = read_csv(file, text)
    if not any(columns.values()):
        raise ValueError(f"{file} is empty. Add rows with images")
    subfolder = file.parent.relative_to(folder)
    for column in FILE_NAME_COLUMNS & columns.keys() if subfolder.parts else ():
        names = [name and str(subfolder / str(name)) for name in columns[column]]
        # `datasets` reads the names of `file_name` as relative to the table. Other columns may be either
        if column == "file_name" or any(name and (folder / name).is_file() for name in names):
            columns[column] = names
    arrays = {normalize_name(name): build_column(values) for name, values in columns.items()}
    return datasets.Dataset(pyarrow.table(arrays))


def read_table_text(file: Path) -> str:
    """Read a text file as spreadsheets write it: UTF-8 or UTF-16, with any line ends."""
    with open_regular_file(file) as stream:
        content = stream.read()
    try:
        text = content.decode(json.detect_encoding(content))
    except UnicodeDecodeError:
        raise ValueError(
            f"{file} is not encoded as UTF-8. Save it as UTF-8, such as with the file type 'CSV "
            "UTF-8' of a spreadsheet"
        ) from None
    return re.sub("\r\n?", "\n", text).removeprefix("\ufeff")


def read_csv(file: Path, text: str) -> dict[str, list[str]]:
    """Read the columns of a CSV file. Columns without a name, such as an index, are left out.

    Raise ValueError if there is no header, there are too many columns, a row has more fields, or the quotes do
    not match.
    """
    import pandas

    preamble = PREAMBLE.match(text)
    assert preamble is not None, "the pattern matches any text"
    header, _, rows = text[preamble.end() :].partition("\n")
    second = rows.partition("\n")[0]
    first_fields, second_fields = map(split_fields, (header, second))
    is_title = len(first_fields) == 1 < len(second_fields)
    if is_title or FILE_NAME_COLUMNS & {*second_fields} - {*first_fields}:
        raise ValueError(
            f"{file}: the line {header.strip()!r} is no header, unlike the next one. Remove it, or write # "
            "at its start"
        )
    # A header of one column has no separator; `max` then returns the first, the comma.
    separator = preamble["separator"] or max(SEPARATORS, key=header.count)
    check_width(file, 1 + header.count(separator))
    # Some programs add separators at the end of a line
    rows = re.sub(rf"([ \t]*{re.escape(separator)})+[ \t]*$", "", rows, flags=re.MULTILINE)
    try:
        table = pandas.read_csv(
            io.StringIO(f"{preamble.group()}{header}\n{rows}"),
            sep=separator,
            skiprows=preamble.group().count("\n"),
            header=None,
            skipinitialspace=f"{separator} " in header,  # As people type a table
            dtype=str,
            keep_default_na=False,
        ).fillna("")  # Rows with fewer fields than the header
    except ValueError as error:
        raise ValueError(
            f"{file}: {format_error(error)} (fields are separated by {separator!r}). Check the quotes, "
            "which are required around fields that contain the separator"
        ) from error

    table = drop_types(file, table.replace(QUOTE_OF_FORMULA, "", regex=True))
    names = table.iloc[0].str.strip()
    columns = {column: name for column, name in names.items() if name}
    is_repeated = (table.iloc[1:] == table.iloc[0]).all(axis=1)
    if is_repeated.any():
        raise ValueError(
            f"{file}: row {is_repeated.argmax()} repeats the header, as in joined tables. Remove it"
        )
    if len(set(columns.values())) < len(columns):
        raise ValueError(
            f"{file} has two columns with the same name: {', '.join(columns.values())}"
        )
    for name in columns.values():
        if is_file_name(name, file.parent):
            comment = preamble.group().rstrip("\n").rpartition("\n")[2]
            if comment.startswith("#"):
                raise ValueError(
                    f"{file} has no header: the line {comment!r} is a comment, because it begins with #. "
                    "Remove # from the header"
                )
            raise ValueError(
                f"{file} has no header: its first line names the file {name!r}. Put a line with the "
                f"names of the columns above it, such as file_name{separator}label"
            )
    return {name: table[column][1:].tolist() for column, name in columns.items()}


def is_file_name(name: str, folder: Path) -> bool:
    """Tell whether the name of a column is that of a file, or an address of an image."""
    if ADDRESS.match(name):
        return bool(re.search(r"\.[a-z]{3,4}$", name, re.IGNORECASE))
    return "." in name and os.path.isfile(resolve_path(folder, name))  # noqa: PTH113  # False for long names


def drop_types(file: Path, table: Any) -> Any:
    """Drop the rows below the header that name the types and the roles of the columns, with a line.

    Args:
        file: the table's, for the line.
        table: texts; the first row is the header.
    """
    cells = table.iloc[1:3].map(str.strip).to_numpy().tolist()
    patterns = (COLUMN_TYPE, COLUMN_ROLE)
    number = 0
    for row, pattern in zip(cells, patterns, strict=False):
        if not all(map(pattern.fullmatch, row)) or not any(row):
            break
        number += 1
    # A letter may be a label: the file names of a table are no types, and a single column says too little
    if not number or table.shape[1] == 1 or len(table) <= 1 + number:
        return table
    warn_on_first_process(
        f"{file}: skipped the row below the header, which names the types of the columns: "
        f"{format_name_list(cells[0])}"
    )
    return table.drop(index=table.index[1 : 1 + number])


def split_fields(line: str) -> list[str]:
    """Split a line into the fields that have a text, with the separator that gives most of them."""
    line = line[: csv.field_size_limit()]  # A photo in base64 may be longer
    rows = (next(csv.reader([line], delimiter=each), []) for each in SEPARATORS)
    return max(([field.strip() for field in row if field.strip()] for row in rows), key=len)


def read_json_lines(file: Path, text: str) -> dict[str, list[Any]]:
    """Read the columns of a file with one JSON object per line."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}: not valid JSON: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"{file} does not have one JSON object per line. Write lines such as "
            '{"file_name": "1.jpg", "label": "cat"}'
        )
    names = dict.fromkeys(name for row in rows for name in row)
    check_width(file, len(names))
    return {name: [row.get(name) for row in rows] for name in names}


def check_width(file: Path, num_columns: int) -> None:
    """Raise ValueError if a table has more columns than are read."""
    if num_columns > MAX_COLUMNS:
        raise ValueError(
            f"{file} has {num_columns:,} columns, but at most {MAX_COLUMNS:,} are read. Keep those that name "
            "images, labels and groups"
        )


def build_column(values: Sequence[Any]) -> Any:
    """Build an Arrow array from the values of a column; of text if they have several types."""
    import pyarrow

    # `isinstance(True, int)` is true, but a column with true and 1 is text, so the types are
    # compared.
    types = {type(value) for value in values if value is not None}
    if len(types) <= 1 or types == {int, float}:
        try:
            return pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError):  # Lists with several types, large numbers
            pass
    texts = [
        json.dumps(value) if isinstance(value, list | dict) else spell_label(value)
        for value in values
    ]
    return pyarrow.array(texts, pyarrow.string())

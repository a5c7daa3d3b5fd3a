"""The HTML report: one self-contained page about predictions and special tokens, without a script.

The rows of its tables are also written as numbers (`write_tables`).

inspection, photos = inspect_images(model, processor, images, batch_size=8)
write_page(Path("report.html"), "my model", inspection, photos)

inspection.py      measurements of many images, and photos
sheet.py           the sheet of each photo
report.html.j2     text and tables (pages.py)
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from ..evaluation.token_effects import EFFECT_TITLES, describe_change, name_group
from ..runtime.files import write_atomically
from ..version import __version__
from .inspection import Inspection
from .pages import render
from .sheet import ShownPhoto


def write_page(
    file: Path,
    title: str,
    inspection: Inspection,
    photos: Sequence[ShownPhoto] = (),
    source: str | None = None,
    commit: str | None = None,
    predictions: Mapping[str, Any] | None = None,
    tables: Mapping[str, Sequence[Mapping[str, str]]] | None = None,
    tokens: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write the report of an inspection atomically.

    Args:
        file: path of the HTML file.
        title: name of the model.
        inspection: measurements of many images (`inspect_images`).
        photos: photos to show.
        source: description of the images.
        commit: Hub commit of the model, if it is from the Hub.
        predictions: result and record, metrics of unequal classes, and wrong images
            (publishing/wrong_photos.py).
        tables: rows of each table of metrics or classes, by title (inference/stated_result.py).
        tokens: what a run has measured of its tokens (`tokens` of results.json).

    Raises:
        OSError: if the file cannot be written.
    """
    run_records = [{"token": name_group(name), **each} for name, each in (tokens or {}).items()]
    text = render(
        "report.html.j2",
        title=title,
        source=source,
        commit=commit,
        version=__version__,
        date=datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        inspection=inspection,
        photos=photos,
        predictions=predictions,
        tables=tables or {},
        effects=list_effects(inspection.effect_records or run_records),
        layers=build_layer_table(inspection),
    )
    with write_atomically(file) as partial_file:
        partial_file.write_text(text, encoding="utf-8")


def list_effects(records: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Format the table of effects, for the page and the terminal, with gates if the model has any.

    Args:
        records: `Inspection.effect_records`, or what a run has measured of its groups.
    """
    records = list(records)
    rows = []
    for record in records:
        row = {"token": record["token"]}
        if any(each.get("gate") is not None for each in records):
            row["gate"] = "–" if record["gate"] is None else f"{record['gate']:.3f}"
        row |= {"output": record.get("output") or "predictions", "verdict": record["verdict"]}
        for name, title in EFFECT_TITLES.items():
            if name in record:
                row[title] = describe_change(record[name], record["num_images"])
            elif any(name in each for each in records):
                row[title] = "–"
        rows.append(row)
    return rows


def build_layer_table(inspection: Inspection) -> dict[str, Any]:
    """Build the heat map of the layers: column titles, and rows of (text, share of the largest value)."""
    groups = list(dict.fromkeys(row["group"] for row in inspection.layer_rows))
    titles = {
        "norm": "norm",
        "attention_received": "attention received",
        "outlier_share": "outliers",
        "similarity": "similarity",
    }
    columns = [
        [row[name] for row in inspection.layer_rows if row["group"] == group]
        for name in titles
        for group in groups
    ]
    formats = ["{:.3g}", "{:.2g} ×", "{:.1%}", "{:.2f}"]
    cells = []
    for index, values in enumerate(columns):
        largest = max(values) or 1
        text = formats[index // len(groups)]
        cells.append([(text.format(value), max(value, 0) / largest) for value in values])
    return {
        "titles": list(titles.values()),
        "groups": groups,
        "rows": list(zip(*cells, strict=True)),
    }


# Tables -------------------------------------------------------------------------------------------


def write_tables(file: Path, inspection: Inspection) -> Path:
    """Write the effects of tokens to a CSV or Parquet file, and the layers to a second one beside it.

    Returns:
        The second file: FILE-layers.

    Raises:
        OSError: if a file cannot be written.
    """
    rows = pd.json_normalize(inspection.effect_records, sep="_")
    if rows.empty:
        rows = pd.DataFrame(columns=["token", "group", "output", "verdict"])
    layers = file.with_stem(f"{file.stem}-layers")
    for path, table in ((file, rows), (layers, pd.DataFrame(inspection.layer_rows))):
        with write_atomically(path) as partial_file:
            if file.suffix == ".csv":
                table.to_csv(partial_file, index=False)
            else:
                table.to_parquet(partial_file, index=False)
    return layers

"""The HTML report: one self-contained page about predictions and special tokens, without a script.

inspection, photos = inspect_images(model, processor, images, batch_size=8)
write_page(Path("report.html"), "my model", inspection, photos)

inspection.py      measurements of many images, and photos
sheet.py           the sheet of each photo
report.html.j2     text and tables (pages.py)
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from ..evaluation.token_effects import EFFECT_TITLES, describe_change
from ..inference.outputs import WRITERS
from ..runtime.files import write_atomically, write_text
from ..version import __version__
from .inspection import Inspection
from .pages import render
from .photo import OUTLIER_RATIO
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

    Raises:
        OSError: if the file cannot be written.
    """
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
        titles=EFFECT_TITLES,
        describe_change=describe_change,
        outlier_ratio=f"{OUTLIER_RATIO:g}",
    )
    write_text(file, text)


def write_tables(file: Path, inspection: Inspection) -> None:
    """Write the effects as numbers to a CSV or Parquet file, and the layers to FILE-layers in the same folder.

    Raises:
        OSError: if a file cannot be written.
    """
    columns = ["token", "group", "output", "verdict"]
    effects = pd.json_normalize(inspection.effects, sep="_")
    tables = {
        file: pd.DataFrame(columns=columns) if effects.empty else effects,
        file.with_stem(f"{file.stem}-layers"): inspection.layers.reset_index(),
    }
    write = WRITERS[file.suffix.lower()]
    for target, frame in tables.items():
        table = pa.Table.from_pandas(frame, preserve_index=False)
        with write_atomically(target) as partial_file:
            write([table], table.schema, partial_file)

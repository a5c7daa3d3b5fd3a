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

from ..inference.intervals import compute_proportion_interval
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
        effects=list_effects(inspection),
    )
    with write_atomically(file) as partial_file:
        partial_file.write_text(text, encoding="utf-8")


def list_effects(inspection: Inspection) -> list[dict[str, str]]:
    """Format the table of effects, for the page and the terminal, with gates if the model has any."""
    rows = []
    for token, output, effect in inspection.effects:
        changed = without = "–"
        if effect.changed is not None:
            num_changed = round(effect.changed * effect.num_images)
            low, high = compute_proportion_interval(num_changed, effect.num_images)
            changed = f"{effect.changed:.0%} ({low:.0%} to {high:.0%})"
        if effect.accuracies is not None and effect.drop is not None:
            low, high = effect.drop
            without = "{:.0%} to {:.0%} right".format(*effect.accuracies)
            if effect.changed:  # Otherwise, the interval has no width
                without += f" ({100 * low:.0f} to {100 * high:.0f} points lost)"
        low, high = effect.interval
        row = {"token": token}
        if inspection.gates:
            gate = inspection.gates.get(token)
            row["gate"] = "–" if gate is None else f"{gate:.3f}"
        rows.append(
            row
            | {
                "output": output or "predictions",
                "changed predictions": changed,
                "without it": without,
                "effect (95% interval)": f"{effect.size:.2g} ({low:.2g} to {high:.2g})",
                "limit": "–" if effect.limit is None else f"{effect.limit:.2g}",
                "than a random token": effect.comparison,
            }
        )
    return rows

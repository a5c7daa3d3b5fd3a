"""The HTML report: one self-contained page about predictions and special tokens, without a script.

inspection, photos = inspect_images(model, processor, images, batch_size=8)
write_page("report.html", "my model", inspection, photos)

inspection.py      measurements of many images, and photos
sheet.py           the sheet of each photo
report.html.j2     text and tables
page.css           style of every page
"""

import base64
import io
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from ..inference.stated_result import format_percent
from ..runtime.files import write_atomically
from ..version import __version__
from .inspection import Inspection
from .maps import draw_region, overlay, to_picture
from .sheet import ShownPhoto


TEMPLATE_FOLDER = Path(__file__).parent
NUM_LARGE_WRONG_IMAGES = 6  # As many fit on the first screen
THUMBNAIL_SIDE = 200  # Longer side of the images next to the name of a photo, in pixels
MAX_EXACT_SIDE = 96  # Images with longer sides are compressed with a loss
# Kinds of photos (`select_images`) and their names in the report.
KINDS = {"wrong": "wrong prediction", "uncertain": "least confident", "typical": "typical"}


def write_page(
    file: str | Path,
    title: str,
    inspection: Inspection,
    photos: Sequence[ShownPhoto] = (),
    source: str | None = None,
    commit: str | None = None,
    predictions: Mapping[str, Any] | None = None,
    class_tables: Mapping[str, Sequence[Mapping[str, str]]] | None = None,
) -> None:
    """Write the report of an inspection atomically.

    Args:
        file: path of the HTML file.
        title: name of the model.
        inspection: measurements of many images (`inspect_images`).
        photos: photos to show.
        source: description of the images.
        commit: Hub commit of the model, if it is from the Hub.
        predictions: headline, metrics of unequal classes, wrong images and calibration
            (publishing/wrong_photos.py).
        class_tables: rows of each table of classes, by title (inference/metric_tables.py).

    Raises:
        OSError: if the file cannot be written.
    """
    # Names of classes and files come from other people's data, so they are escaped. A misspelled
    # name in a template is an error and not an empty place.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_url"] = encode_data_url
    environment.filters["percent"] = format_percent
    text = environment.get_template("report.html.j2").render(
        style=Markup((TEMPLATE_FOLDER / "page.css").read_text(encoding="utf-8")),
        title=title,
        source=source,
        commit=commit,
        version=__version__,
        date=datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        inspection=inspection,
        photos=[build_photo_row(photo) for photo in photos],
        predictions=predictions,
        class_tables=class_tables or {},
        effects=list_effects(inspection),
        num_large=NUM_LARGE_WRONG_IMAGES,
    )
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(Path(file)) as partial_file:
        partial_file.write_text(text, encoding="utf-8")


# The page -----------------------------------------------------------------------------------------


def build_photo_row(photo: ShownPhoto) -> dict[str, Any]:
    """Build the images of a photo, and the texts next to them.

    The images show what the model sees, what decides or what the first token reads,
    and the features of the patches; the last one is the sheet.
    """
    measurements = photo.measurements
    visible_part = draw_region(measurements.image, measurements.visible_region, THUMBNAIL_SIDE)
    map_name = measurements.name_attention()
    if measurements.attributions:
        map_name = "what the prediction loses without each part"
    features = to_picture(measurements.colors[measurements.patch_layer - 1].numpy())
    pictures = {
        "what the model sees": visible_part,
        map_name: overlay(visible_part, *measurements.main_map),
        "patch features": features.resize(visible_part.size, Image.Resampling.NEAREST),
    }
    return {
        "name": photo.name,
        "caption": photo.caption,
        "kind": KINDS.get(photo.kind or ""),
        "pictures": pictures,
        "has_map": bool(measurements.attributions),
        "sheet": photo.sheet,
    }


def list_effects(inspection: Inspection) -> list[dict[str, str]]:
    """Format the table of effects, for the page and the terminal, with gates if the model has any."""
    rows = []
    for token, output, effect in inspection.effects:
        changed = without = "–"
        if effect.changed is not None and effect.changed_interval is not None:
            low, high = effect.changed_interval
            changed = f"{effect.changed:.0%} ({low:.0%} to {high:.0%})"
        if effect.accuracies is not None and effect.drop is not None:
            low, high = effect.drop
            without = "{:.0%} to {:.0%} right".format(*effect.accuracies)
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


def encode_data_url(image: Image.Image) -> str:
    """Encode an image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "webp", quality=80, lossless=max(image.size) <= MAX_EXACT_SIDE)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"

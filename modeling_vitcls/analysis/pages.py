"""HTML from the templates of this folder.

    report.html.j2      the report (report.py)
    look.html.j2        the sheet of one photo, for `vitcls look`
    demo.html.j2        the same as a part of the page of `vitcls demo`
    labels.html.j2      the page on which a person says what photos show (publishing/labels_page.py)

The first three show sheet.html.j2 in the style of sheet.css; page.css is the style of the pages. Only
the last one has a script.
"""

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from ..inference.stated_result import format_percent


MAX_EXACT_SIDE = 96  # Pictures with longer sides are photos, which JPEG compresses with a loss


def render(template: str, **values: Any) -> str:
    """Render a template of this folder."""
    # Names of classes and files come from other people's data, so they are escaped. A misspelled
    # name in a template is an error and not an empty place.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_url"] = encode_data_url
    environment.filters["percent"] = format_percent
    return environment.get_template(template).render(values)


def encode_data_url(picture: Image.Image) -> str:
    """Encode a picture as a data URL: maps exactly, with one pixel for each patch, photos as JPEG."""
    kind = "png" if max(picture.size) <= MAX_EXACT_SIDE else "jpeg"
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"

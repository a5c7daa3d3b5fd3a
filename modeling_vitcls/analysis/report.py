"""The HTML report: one self-contained page about the special tokens of a model, without a script.

inspection = inspect_model(model, processor, images)
photos = [measure_shown_photo(model, processor, images[0], "cat.jpg")]
write_page("report.html", inspection, photos)

inspection.py      measurements of many images
sheet.py           the sheet of each photo
figures.py         the curve and the histogram, embedded as SVG
report.html.j2     text and tables
page.css           style of every page
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from markupsafe import Markup
from PIL import Image

from ..hub.loading import get_cached_commit
from ..hub.local_paths import get_title
from ..runtime.files import write_atomically
from ..version import __version__
from .diagnosis import Verdict
from .figures import plot_entropy, plot_norm_histogram, render_svg, shorten_text
from .inspection import Inspection
from .maps import draw_region, overlay
from .photo import PhotoMeasurements, measure_photo
from .sheet import draw_sheet
from .verdict_texts import describe_verdict


TEMPLATE_FOLDER = Path(__file__).parent
NUM_LARGE_WRONG_IMAGES = 6  # number of wrong images on the first screen
MAX_FILE_NAME = 24  # maximum length of a file name under an image, in characters
THUMBNAIL_SIDE = 200  # longer side of the pictures of a photo beside its name, in pixels
MAX_EXACT_SIDE = 96  # maximum length of the longer side of an image that is stored without loss
# symbols distinguish ratings without color
SIGNS = {"good": "✓", "bad": "✕", "doubtful": "≈", "neutral": "○"}
# Kinds of photos (`select_images`) and their names in the report.
KINDS = {"wrong": "wrong prediction", "uncertain": "least confident", "typical": "typical"}


@dataclass(frozen=True)
class ShownPhoto:
    """A photo that the report shows.

    Attributes:
        name: name of the photo.
        measurements: what its sheet is drawn from.
        truth: true label as text; None if unknown.
        predicted: predicted label as text. Default: the prediction of the measurements.
        kind: reason why the photo is shown, one of KINDS; None without a reason.
    """

    name: str
    measurements: PhotoMeasurements
    truth: str | None = None
    predicted: str | None = None
    kind: str | None = None

    @property
    def caption(self) -> str:
        """Return the true and the predicted labels, or the name of the photo."""
        predicted = self.predicted or ", ".join(
            prediction.labels[0][0]
            for prediction in self.measurements.predictions
            if prediction.labels
        )
        if self.truth and predicted:
            return f"{self.truth} → {predicted}"
        return predicted or shorten_name(self.name)


def measure_shown_photo(
    model: Any, processor: Any, image: Image.Image, name: str, **texts: str | None
) -> ShownPhoto:
    """Measure a photo for the report; `texts` are the texts of `ShownPhoto`."""
    return ShownPhoto(name, measure_photo(model, processor, image), **texts)


def write_page(
    file: str | Path,
    inspection: Inspection,
    photos: Sequence[ShownPhoto] = (),
    title: str | None = None,
    source: str | None = None,
    predictions: Mapping[str, Any] | None = None,
) -> None:
    """Write the report of an inspection (`inspect_model`) atomically.

    Args:
        file: path of the HTML file.
        inspection: measurements of many images.
        photos: photos to show.
        title: name of the model. Default: name of the folder or Hub id that the model was loaded
            from.
        source: description of the images.
        predictions: headline, wrong images and calibration
            (publishing/held_out_predictions.py).

    Raises:
        OSError: if the file cannot be written.
    """
    config = inspection.config
    title = title or get_title(config.name_or_path) or inspection.model_class
    shown_verdicts, other_verdicts = sort_verdicts(inspection)
    text = render_page(
        "report.html.j2",
        title=title,
        source=source,
        commit=get_commit(config),
        version=__version__,
        date=datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        inspection=inspection,
        findings=inspection.findings,
        shown_verdicts=shown_verdicts,
        other_verdicts=other_verdicts,
        photos=[build_photo_row(photo, title) for photo in photos],
        predictions=predictions,
        effects=build_effect_rows(inspection.verdicts),
        figures=build_figures(inspection),
        num_large=NUM_LARGE_WRONG_IMAGES,
        shorten=shorten_name,
        signs=SIGNS,
        describe=describe_verdict,
    )
    write_text(file, text)


def render_page(template: str, **values: Any) -> str:
    """Return a page of this folder as HTML, in the style of every page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup((TEMPLATE_FOLDER / "page.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, **values)


def write_json_values(file: str | Path, inspection: Inspection, model: str) -> None:
    """Write the values of an inspection as JSON, with the name and commit of the model.

    Numbers that are not finite become null.

    Raises:
        OSError: if the file cannot be written.
    """
    commit = get_commit(inspection.config)
    values = {"model": model, "commit": commit, "version": __version__} | build_json_values(
        inspection
    )
    text = json.dumps(values, default=torch.Tensor.tolist)
    write_text(
        file, json.dumps(json.loads(text, parse_constant=lambda constant: None), indent=1) + "\n"
    )


def write_text(file: str | Path, text: str) -> None:
    """Write a text file atomically. Create the parent folder if necessary."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(Path(file)) as partial_file:
        partial_file.write_text(text, encoding="utf-8")


# The page -----------------------------------------------------------------------------------------


def build_photo_row(photo: ShownPhoto, title: str) -> dict[str, Any]:
    """Return the pictures of a photo as data URLs, and the texts beside them.

    The pictures are what the model sees, the attention of the first token, and the features of the
    patches; and the sheet.
    """
    measurements = photo.measurements
    layer = measurements.token_layers[0]
    attention = measurements.maps[layer - 1, :, 0].mean(dim=0)  # [gh, gw]
    visible_part = draw_region(measurements.image, measurements.visible_region, THUMBNAIL_SIDE)
    colors = measurements.colors[measurements.patch_layer - 1].numpy()
    features = Image.fromarray((colors * 255).round().astype(np.uint8))
    pictures = {
        photo.name: visible_part,
        f"attention of {measurements.token_names[0]}": overlay(visible_part, attention),
        "patch features": features.resize(visible_part.size, Image.Resampling.NEAREST),
    }
    sheet = draw_sheet(measurements, f"{title} · {shorten_name(photo.name)}")
    return {
        "name": photo.name,
        "caption": photo.caption,
        "kind": KINDS.get(photo.kind or ""),
        "pictures": {name: encode_data_url(picture) for name, picture in pictures.items()},
        "sheet": encode_data_url(sheet),
    }


def shorten_name(name: str) -> str:
    """Return the last part of the name of an image, shortened to MAX_FILE_NAME characters."""
    return shorten_text(name.rpartition("/")[2], MAX_FILE_NAME)


def sort_verdicts(inspection: Inspection) -> tuple[list[Verdict], list[Verdict]]:
    """Return the verdicts for the first screen, and the others, which would surprise nobody.

    A token has a verdict on the first screen if there are several tokens or something is wrong with
    it; the patches only if something is wrong.
    """
    has_several_tokens = inspection.config.token_layout.num_prefix_tokens > 1
    shown: list[Verdict] = []
    others: list[Verdict] = []
    for verdict in (*inspection.verdicts, inspection.patches):
        is_wrong = verdict.rating in ("bad", "doubtful")
        is_shown = is_wrong or (has_several_tokens and verdict is not inspection.patches)
        (shown if is_shown else others).append(verdict)
    return shown, others


def build_effect_rows(verdicts: Sequence[Verdict]) -> list[dict[str, str]]:
    """Return one row for the effect of replacing each token on each output.

    A dot marks the effect that decided the outcome.
    """
    rows = []
    for verdict in verdicts:
        for name, effect in verdict.numbers.get("effects", {}).items():
            row = {"token": verdict.token, "output": name or "predictions"}
            if name == verdict.numbers["decided_by"]:
                row["output"] += " •"

            row["changed predictions"] = "–"
            if effect["changed"] is not None:
                low, high = effect["changed_interval"]
                changed = f"{effect['changed']:.1%} ({low:.1%} to {high:.1%})"
                row["changed predictions"] = changed

            row["effect (95% interval)"] = "{:.2g} ({:.2g} to {:.2g})".format(
                effect["size"], *effect["interval"]
            )
            row["limit"] = "no test" if effect["limit"] is None else f"{effect['limit']:.2g}"
            rows.append(row)
    return rows


def build_figures(inspection: Inspection) -> list[Markup]:
    """Return the figures of the page as SVG."""
    config = inspection.config
    findings = inspection.findings
    figures = [plot_norm_histogram(config, findings, inspection.patches.numbers["layer"])]
    if config.token_layout.num_prefix_tokens:
        figures.insert(0, plot_entropy(config, findings))
    return [Markup(render_svg(figure)) for figure in figures]


def get_commit(config: Any) -> str | None:
    """Return the Hub commit that a model was loaded from, or None if the commit is unknown."""
    return getattr(config, "_commit_hash", None) or get_cached_commit(config.name_or_path)


def encode_data_url(image: Image.Image) -> str:
    """Return an image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "webp", quality=80, lossless=max(image.size) <= MAX_EXACT_SIDE)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# Values for programs ------------------------------------------------------------------------------


def build_json_values(inspection: Inspection) -> dict[str, Any]:
    """Return all verdicts with the measured values, and the findings.

    Mean states and norms of single patches are omitted. `tokens` are the special tokens, then the
    groups of several tokens; `effects` contains all values by output (`Effect`), and `decided_by`
    names the output that decided the outcome.
    """
    omitted_names = ("mean_states", "patch_ratios")
    findings = {
        name: value
        for name, value in vars(inspection.findings).items()
        if name not in omitted_names
    }

    def build_record(verdict: Verdict) -> dict[str, Any]:
        return {
            "token": verdict.token,
            "word": verdict.headline,
            "rating": verdict.rating,
            "reason": describe_verdict(verdict),
            "outcome": verdict.outcome,
            "faults": list(verdict.faults),
            **verdict.numbers,
        }

    return {
        "diagnosis": inspection.summary,
        "tokens": list(map(build_record, inspection.verdicts)),
        "patches": build_record(inspection.patches),
        "num_ablation_images": inspection.num_ablation_images,
        "findings": findings,
        "num_unreadable": inspection.num_unreadable,
    }

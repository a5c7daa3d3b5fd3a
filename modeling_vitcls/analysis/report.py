"""The HTML report: one self-contained page about the special tokens of a model.

    write_report("report.html", model, processor, images)   # inspects the model and writes the report

    inspection = inspect_model(model, processor, images)    # the same report in two steps
    write_page("report.html", inspection)

    inspection.py      measurements
    figures.py         figures, embedded as SVG
    report_data.py     values and maps for the script
    report.html.j2     text and tables
    report.css         style
    report_maps.js     draws maps of layers and heads over images

The page does not load any other files.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import torch
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from PIL import Image

from ..files import write_atomically
from ..hub.loading import get_cached_commit
from ..token_names import get_token_names, get_token_names_by_group
from ..version import __version__
from .diagnosis import Verdict
from .figures import (
    describe_head,
    plot_curve,
    plot_map_checks,
    plot_norm_histogram,
    plot_norms,
    render_svg,
)
from .image_report import IMAGE_KINDS, ImageReport
from .inspection import Inspection, inspect_model
from .maps import count_used_layers, is_used_by_head, overlay, resize_with_region
from .report_data import build_json_values, build_page_data, encode_data_url


TEMPLATE_FOLDER = Path(__file__).parent
NUM_OVERVIEW_IMAGES = 6  # number of images on the first screen
OVERVIEW_SIDE = 160  # longer side of an image on the first screen, in pixels
MAX_OVERVIEW_TOKENS = 8  # maximum number of tokens per image on the first screen
SIGNS = {"good": "✓", "bad": "✕", "doubtful": "≈", "neutral": "○"}  # symbols distinguish ratings without color


def write_report(
    file: str | Path,
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    *,
    title: str | None = None,
    source: str | None = None,
    **arguments: Any,
) -> Inspection:
    """Inspect a model, write the report atomically, and return the measurements.

    Args:
        file: path of the HTML file.
        model, processor, images: see `inspect_model`.
        title, source: see `write_page`.
        arguments: other arguments of `inspect_model`.

    Raises:
        TypeError: if `arguments` contains a name that is not an argument of `inspect_model`.
        ValueError: if no image can be read, or the hidden states of the model are not finite.
        OSError: if the file cannot be written.
    """
    inspection = inspect_model(model, processor, images, **arguments)
    write_page(file, inspection, title, source)
    return inspection


def write_page(
    file: str | Path,
    inspection: Inspection,
    title: str | None = None,
    source: str | None = None,
    predictions: Mapping[str, Any] | None = None,
) -> None:
    """Write the report of an inspection (`inspect_model`) atomically.

    Args:
        file: path of the HTML file.
        title: name of the model. Default: name of the folder or Hub id that the model was loaded from.
        source: description of the images.
        predictions: wrong images, prediction sets and calibration (publishing/held_out_predictions.py).

    Raises:
        OSError: if the file cannot be written.
    """
    write_text(file, render_page(inspection, title, source, predictions))


def write_json_values(file: str | Path, inspection: Inspection, title: str | None = None) -> None:
    """Write the values of an inspection as JSON (`build_json_values`), with the name and commit of the model.

    Raises:
        OSError: if the file cannot be written.
    """
    config = inspection.config
    provenance = {
        "model": title or get_model_name(config.name_or_path),
        "commit": get_commit(config),
        "version": __version__,
    }
    write_text(file, json.dumps(provenance | build_json_values(inspection), indent=1, allow_nan=False) + "\n")


def write_text(file: str | Path, text: str) -> None:
    """Write a text file atomically. Create the parent folder if necessary."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(Path(file)) as partial_file:
        partial_file.write_text(text, encoding="utf-8")


# The page ------------------------------------------------------------------------------------------------------------


def render_page(
    inspection: Inspection, title: str | None, source: str | None, predictions: Mapping[str, Any] | None
) -> str:
    """Return the HTML text of the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    config = inspection.config
    groups = get_token_names_by_group(config) | {"patches": ["patches"]}
    return environment.get_template("report.html.j2").render(
        title=title or get_model_name(config.name_or_path) or inspection.model_class,
        source=source,
        commit=get_commit(config),
        version=__version__,
        date=datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        read_by=describe_head(config),
        inspection=inspection,
        findings=inspection.findings,
        other_verdicts=[*inspection.tasks, inspection.heads, inspection.patches],
        layout={
            group: [
                (name, inspection.has_head and is_used_by_head(config, group, index))
                for index, name in enumerate(names)
            ]
            for group, names in groups.items()
            if names
        },
        overview=build_overview(inspection),
        predictions=predictions,
        effects=build_effect_rows(inspection.verdicts),
        figures=build_figures(inspection),
        image_kinds=IMAGE_KINDS,
        signs=SIGNS,
        data=htmlsafe_json_dumps(build_page_data(inspection), allow_nan=False, separators=(",", ":")),
        style=Markup((TEMPLATE_FOLDER / "report.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATE_FOLDER / "report_maps.js").read_text(encoding="utf-8")),
    )


def iterate_overview(
    inspection: Inspection, num_images: int
) -> Iterator[tuple[ImageReport, str, dict[str, torch.Tensor]]]:
    """Yield the first images with a caption, and the attention map [gh, gw] of each special token in the last layer in
    which this attention is used, averaged over heads."""
    *used_layers, _ = count_used_layers(inspection.config, inspection.has_head)
    layers = torch.tensor(used_layers, dtype=torch.long).sub(1).clamp(min=0)  # [S]
    names = get_token_names(inspection.config)[:MAX_OVERVIEW_TOKENS]
    for report in inspection.image_reports[:num_images]:
        maps = report.attention.mean(dim=1)[layers, torch.arange(len(layers))]  # [S, gh, gw]
        labels = [label for prediction in report.predictions for label, _ in prediction.labels[:1]]
        caption = f"{report.truth} → {', '.join(labels)}" if report.truth and labels else ", ".join(labels)
        yield report, caption, dict(zip(names, maps, strict=False))


def build_overview(inspection: Inspection) -> list[dict[str, Any]]:
    """Return the images of the first screen and the attention of each special token as data URLs."""
    rows = []
    for report, caption, maps in iterate_overview(inspection, NUM_OVERVIEW_IMAGES):
        sides = {"max_side": OVERVIEW_SIDE, "min_side": OVERVIEW_SIDE}
        pictures = [
            {"name": name, "url": encode_data_url(overlay(report.image, values, report.visible_region, **sides))}
            for name, values in maps.items()
        ]
        image, _ = resize_with_region(report.image, None, OVERVIEW_SIDE, OVERVIEW_SIDE)
        rows.append({"name": report.name, "caption": caption, "url": encode_data_url(image), "maps": pictures})
    return rows


def build_effect_rows(verdicts: Sequence[Verdict]) -> list[dict[str, str]]:
    """Return one row for the effect of each ablation of each token on each output. A dot marks the effect that decided
    the outcome."""
    rows = []
    for verdict in verdicts:
        decided_by = verdict.numbers.get("decided_by", {})
        for kind, term in (("information", "replaced with mean"), ("presence", "hidden")):
            for name, effect in verdict.numbers.get(kind, {}).items():
                row = {"token": verdict.token, "ablation": term + (f", {name}" if name else "")}
                if (decided_by["ablation"], decided_by["output"]) == (kind, name):
                    row["ablation"] += " •"
                row["changed predictions"] = "–"
                if effect["changed"] is not None:
                    low, high = effect["changed_interval"]
                    row["changed predictions"] = f"{effect['changed']:.1%} ({low:.1%} to {high:.1%})"
                row["effect (95% interval)"] = "{:.2g} ({:.2g} to {:.2g})".format(effect["size"], *effect["interval"])
                row["limit"] = "no test" if effect["limit"] is None else f"{effect['limit']:.2g}"
                rows.append(row)
    return rows


def build_figures(inspection: Inspection) -> list[Markup]:
    """Return the figures of the page as SVG."""
    config, findings = inspection.config, inspection.findings
    figures = [plot_curve(config, findings, "patch_distance"), plot_norms(config, findings)]
    figures.append(plot_norm_histogram(config, findings, inspection.patches.layer))
    if config.token_layout.num_prefix_tokens:
        curves = [plot_curve(config, findings, name) for name in ("entropy", "received", "variation")]
        figures = [*curves, *figures]
    if inspection.map_checks:
        figures.append(plot_map_checks(inspection.map_checks))
    return [Markup(render_svg(figure)) for figure in figures]


def get_model_name(source: str) -> str:
    """Return the name of a folder without its path, or the id of a model on the Hub."""
    if get_cached_commit(source) is not None:  # Hub cache folder: models--NAMESPACE--NAME/snapshots/COMMIT
        return Path(source).parents[1].name.removeprefix("models--").replace("--", "/")
    return Path(source).resolve().name if source and Path(source).is_dir() else source


def get_commit(config: Any) -> str | None:
    """Return the Hub commit that a model was loaded from, or None if the commit is unknown."""
    return getattr(config, "_commit_hash", None) or get_cached_commit(config.name_or_path)

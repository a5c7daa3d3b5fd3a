"""The report: one page, of one file, that shows what the special tokens of a model do.

    from modeling_vitcls.analysis import inspect_model, write_page, write_report
    write_report("report.html", model, processor, pictures)         # or, where what was found serves for more:
    write_page("report.html", inspect_model(model, processor, pictures))

    inspection.py      measures
    report_data.py     packs figures and maps
    report.html.j2     words and tables; with report.css
    report_page.js     shared by the other two
    report_maps.js     paints maps over pictures
    report_charts.js   draws curves, histograms and similarities

The page loads nothing. It follows the reader's choice of light or dark.
"""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from ..hub.loading import commit_of
from ..version import __version__
from .ablation import Effect
from .diagnosis import MANY_OUTLIERS, counted
from .figures import GROUP_COLOURS, is_read, reader
from .image_report import Reading
from .inspection import Inspection, inspect_model
from .maps import names_by_group, token_names
from .patch_sizes import PatchSizeRow, in_words, patch_size_sentences
from .report_data import page_data, raw_figures
from .test_time_registers import OUTLIER_RATIO


FOLDER = Path(__file__).parent
MOST_GRIDS = 3  # that the head names
SCRIPTS = ("report_page.js", "report_maps.js", "report_charts.js")  # in this order

# Verdict and what it means -> its sign: words and signs say without colour what colours say.
SIGNS = {
    ("learned", "good"): "✓",
    ("in use", "neutral"): "•",
    ("not moved", "neutral"): "•",
    ("not moved", "bad"): "✕",
    ("same for all images", "bad"): "✕",
    ("collapsed", "bad"): "≡",
    ("ignored by the head", "doubtful"): "∅",
    ("not judged", "neutral"): "?",
}


def write_report(
    file: str | Path,
    model: Any,
    processor: Any,
    pictures: Sequence[Image.Image],
    *,
    title: str | None = None,
    source: str | None = None,
    **measured: Any,
) -> Inspection:
    """Inspect a model, and write the page: whole or not at all. Returns what was found.

    Args:
        file: the page, .html.
        model, processor, pictures: see `inspect_model`.
        title, source: see `write_page`.
        measured: any other argument of `inspect_model`, by its name.

    Raises:
        TypeError: for an argument that `inspect_model` does not have.
        ValueError: if there is no picture that can be read, or the model's states are not finite.
        OSError: if the page cannot be written.
    """
    inspection = inspect_model(model, processor, pictures, **measured)
    write_page(file, inspection, title, source)
    return inspection


def write_page(file: str | Path, inspection: Inspection, title: str | None = None, source: str | None = None) -> None:
    """Write the page of what was found (`inspect_model`): whole or not at all.

    Args:
        file: the page, .html.
        title: what to call the model. Default: where it was loaded from.
        source: of the images, in words.

    Raises:
        OSError: if it cannot be written.
    """
    write_whole(Path(file), page(inspection, facts(inspection, title, source)))


def write_figures(file: str | Path, inspection: Inspection, title: str | None = None) -> None:
    """Write what was found as JSON, for programs: `raw_figures`, and which model it was.

    Raises:
        OSError: if it cannot be written.
    """
    config = inspection.config
    about = {"model": title or named_after(config.name_or_path), "commit": commit(config), "version": __version__}
    write_whole(Path(file), json.dumps(about | raw_figures(inspection), indent=1, allow_nan=False) + "\n")


def write_whole(file: Path, text: str) -> None:
    """A text file, whole or not at all; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


# The page ------------------------------------------------------------------------------------------------------------


def page(inspection: Inspection, about: dict[str, Any]) -> str:
    """The whole page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        about=about,
        inspection=inspection,
        findings=inspection.findings,
        effects=effects_by_name(inspection),
        patch_sizes=patch_size_table(inspection.patch_sizes),
        layout=drawn_layout(inspection.config, about["has_head"]),
        signs=SIGNS,
        counted=counted,
        outlier_ratio=OUTLIER_RATIO,
        many_outliers=MANY_OUTLIERS,
        data=script_safe(page_data(inspection)),
        style=part("report.css"),
        scripts=[part(name) for name in SCRIPTS],
    )


def effects_by_name(inspection: Inspection) -> list[tuple[str, Effect]]:
    """Of each token, by what people call it; none without a classifier."""
    if inspection.effects is None:
        return []
    return list(zip(token_names(inspection.config), inspection.effects.values(), strict=True))


def part(name: str) -> Markup:
    """A file that goes into the page as it is."""
    return Markup((FOLDER / name).read_text(encoding="utf-8"))


def script_safe(values: Any) -> Markup:
    """JSON that can stand in a script element, whatever the pictures are called."""
    text = json.dumps(values, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def facts(inspection: Inspection, title: str | None, source: str | None) -> dict[str, Any]:
    """What the head of the page says."""
    config = inspection.config
    grids = sorted({grid_of(reading) for reading in inspection.readings}) or [config.grid_size]
    counts = sorted(rows * columns for rows, columns in grids)
    return {
        "title": title or named_after(config.name_or_path) or inspection.model_class,
        "class": inspection.model_class,
        "commit": commit(config),
        "version": __version__,
        "date": datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        "source": source,
        "num_parameters": inspection.num_parameters,
        "has_head": inspection.has_head,
        "read_by": reader(config),
        "num_patches": f"{counts[0]} to {counts[-1]}" if counts[0] < counts[-1] else f"{counts[0]}",
        "grid": ", ".join(f"{rows} × {columns}" for rows, columns in grids) if len(grids) <= MOST_GRIDS else None,
        "patch": config.patch_height_width,
    }


def grid_of(reading: Reading) -> tuple[int, int]:
    """Rows and columns of patches of a picture, which the image processor decides."""
    return reading.attention.shape[-2], reading.attention.shape[-1]


def named_after(source: str) -> str:
    """The last part of a folder's path, which is nobody else's; the id of a model on the Hub."""
    if commit_of(source) is not None:  # a folder of the Hub's cache: models--NAMESPACE--NAME/snapshots/COMMIT
        return Path(source).parents[1].name.removeprefix("models--").replace("--", "/")
    return Path(source).resolve().name if source and Path(source).is_dir() else source


def commit(config: Any) -> str | None:
    """The commit on the Hub that a model was loaded from, where that is known."""
    return getattr(config, "_commit_hash", None) or commit_of(config.name_or_path)


def drawn_layout(config: Any, has_head: bool) -> list[dict[str, Any]]:
    """The groups of the sequence that have tokens: name, names of the tokens, and which of them the head reads."""
    return [
        {
            "group": group,
            "colour": GROUP_COLOURS[group],
            "tokens": [
                {"name": name, "is_read": has_head and is_read(config, group, place)}
                for place, name in enumerate(names)
            ],
        }
        for group, names in [*names_by_group(config).items(), ("patches", ["patches"])]
        if names
    ]


# Patch sizes ---------------------------------------------------------------------------------------------------------

# Heading -> what a row has there; empty where it is not known.
PATCH_SIZE_COLUMNS: dict[str, Callable[[PatchSizeRow], str]] = {
    "patch": lambda row: in_words(row.patch_size) + (" (the model's own)" if row.is_native else ""),
    "tokens": lambda row: f"{row.sequence_length:,}",
    "GFLOPs per image": lambda row: f"{row.gflops:.3g}",
    "ms per image": lambda row: f"{row.milliseconds:.3g}",
    "accuracy": lambda row: "" if row.accuracy is None else f"{row.accuracy:.1%}",
    "same answers": lambda row: "" if row.agreement is None else f"{row.agreement:.1%}",
}


def patch_size_table(rows: Sequence[PatchSizeRow]) -> dict[str, Any]:
    """`header`, `rows` of text, and `sentences`; columns of which nothing is known are left out."""
    if not rows:
        return {"header": [], "rows": [], "sentences": []}
    columns = {name: [text(row) for row in rows] for name, text in PATCH_SIZE_COLUMNS.items()}
    columns = {name: texts for name, texts in columns.items() if any(texts)}
    return {
        "header": list(columns),
        "rows": [list(row) for row in zip(*columns.values(), strict=True)],
        "sentences": patch_size_sentences(rows),
    }

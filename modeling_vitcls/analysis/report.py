"""The HTML report: one self-contained page about the special tokens of a model.

    write_report("report.html", model, processor, images)   # inspects the model and writes the report

    inspection = inspect_model(model, processor, images)    # the same report in two steps
    write_page("report.html", inspection)

    inspection.py      measurements
    report_data.py     values and maps for the scripts
    report.html.j2     text and tables
    report.css         style
    report_page.js     code shared by the other two scripts
    report_maps.js     draws maps over images
    report_charts.js   draws curves, histograms and similarities

The page does not load any other files and follows the browser's light or dark color scheme.
"""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from PIL import Image

from ..files import write_atomically
from ..hub.loading import get_cached_commit
from ..token_names import get_token_names_by_group
from ..version import __version__
from .ablation import Ablation
from .diagnosis import ABLATION_TERMS, describe_changed_predictions
from .effects import AblationEffect
from .figures import describe_head
from .image_report import IMAGE_KINDS
from .inspection import Inspection, inspect_model
from .maps import is_used_by_head
from .patch_sizes import PatchSizeRow, describe_patch_sizes, format_patch_size
from .report_data import build_json_values, build_page_data
from .test_time_registers import OUTLIER_RATIO


TEMPLATE_FOLDER = Path(__file__).parent
MAX_GRIDS = 3  # maximum number of patch grids listed in the page header
SCRIPTS = ("report_page.js", "report_maps.js", "report_charts.js")  # scripts in loading order

# Symbol for each (verdict, rating) pair, so that verdicts can be distinguished without color.
VERDICT_SYMBOLS = {
    ("effect beyond the null", "good"): "✓",
    ("effect beyond the null", "neutral"): "•",
    ("no measurable effect", "neutral"): "○",
    ("harmful", "bad"): "✕",
    ("norm too large", "bad"): "✕",
    ("not moved", "neutral"): "•",
    ("not moved", "bad"): "✕",
    ("same for all images", "bad"): "✕",
    ("cut off from the patches", "bad"): "✕",
    ("collapsed", "bad"): "≡",
    ("equal attention", "doubtful"): "≈",
    ("not judged", "neutral"): "?",
    ("artifacts", "bad"): "✕",
    ("no artifacts", "good"): "✓",
}


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


def write_page(file: str | Path, inspection: Inspection, title: str | None = None, source: str | None = None) -> None:
    """Write the report of an inspection (`inspect_model`) atomically.

    Args:
        file: path of the HTML file.
        title: name of the model. Default: name of the folder or Hub id that the model was loaded from.
        source: description of the images.

    Raises:
        OSError: if the file cannot be written.
    """
    write_text(file, render_page(inspection, build_page_header(inspection, title, source)))


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


def render_page(inspection: Inspection, page_header: dict[str, Any]) -> str:
    """Return the HTML text of the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        about=page_header,
        inspection=inspection,
        findings=inspection.findings,
        effects=build_effect_table(inspection),
        patch_sizes=build_patch_size_table(inspection.patch_sizes),
        image_kinds=IMAGE_KINDS,
        layout=build_layout(inspection.config, inspection.has_head),
        signs=VERDICT_SYMBOLS,
        outlier_ratio=OUTLIER_RATIO,
        data=htmlsafe_json_dumps(build_page_data(inspection), allow_nan=False, separators=(",", ":")),
        style=Markup((TEMPLATE_FOLDER / "report.css").read_text(encoding="utf-8")),
        scripts=[Markup((TEMPLATE_FOLDER / name).read_text(encoding="utf-8")) for name in SCRIPTS],
    )


def build_effect_table(inspection: Inspection) -> dict[str, Any]:
    """Return the `header` and `rows` of a table with the effects and null distributions of all ablations."""
    rows = []
    verdicts = [*inspection.verdicts, *inspection.group_verdicts]
    for key, verdict in zip(inspection.ablations["information"], verdicts, strict=True):
        for kind, ablations in inspection.ablations.items():
            term = ABLATION_TERMS[kind].format("its mean" if "[" in key else "their means")
            row = {"token": verdict.token, "ablation": f"{kind}: {term}"}
            rows.append(row | format_effect(ablations[key]))
    return {"header": list(rows[0]) if rows else [], "rows": [list(row.values()) for row in rows]}


def format_effect(ablation: Ablation) -> dict[str, str]:
    """Return a dict that maps column headers of the table to the values of an ablation as text."""
    effect = ablation.effect
    columns: dict[str, str] = {}
    if isinstance(effect, AblationEffect):
        columns["changed predictions"] = describe_changed_predictions(effect)
        columns["logit change / standard deviation over images"] = f"{effect.logit_change:.2g}"
    else:
        columns |= {f"cosine distance, {name}": f"{value:.2g}" for name, value in effect.cosine_change.items()}
        if effect.knn_agreement is not None:
            columns["same nearest neighbors"] = f"{effect.knn_agreement:.0%}"
    low, high = effect.interval
    columns["95% interval"] = f"{low:.2g} to {high:.2g}"
    null_effects = {"random patches": ablation.patch_effects, "random tokens": ablation.redrawn_effects}
    for name, sizes in null_effects.items():
        columns[f"null: {name}"] = f"{min(sizes):.2g} to {max(sizes):.2g}" if sizes else ""
    if isinstance(effect, AblationEffect) and effect.accuracy_change is not None:
        columns["accuracy change, percentage points"] = f"{effect.accuracy_change * 100:+.1f}"
    return columns


def build_page_header(inspection: Inspection, title: str | None, source: str | None) -> dict[str, Any]:
    """Return the values of the page header."""
    config = inspection.config
    shapes = {report.rollout.shape for report in inspection.image_reports}  # {(S, gh, gw)}
    grids = sorted((rows, columns) for _, rows, columns in shapes) or [config.grid_size]
    num_patches = sorted({rows * columns for rows, columns in grids})
    return {
        "title": title or get_model_name(config.name_or_path) or inspection.model_class,
        "commit": get_commit(config),
        "version": __version__,
        "date": datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        "source": source,
        "read_by": describe_head(config),
        "num_patches": f"{num_patches[0]} to {num_patches[-1]}" if len(num_patches) > 1 else f"{num_patches[0]}",
        "grid": ", ".join(f"{rows} × {columns}" for rows, columns in grids) if len(grids) <= MAX_GRIDS else None,
    }


def get_model_name(source: str) -> str:
    """Return the name of a folder without its path, or the id of a model on the Hub."""
    if get_cached_commit(source) is not None:  # Hub cache folder: models--NAMESPACE--NAME/snapshots/COMMIT
        return Path(source).parents[1].name.removeprefix("models--").replace("--", "/")
    return Path(source).resolve().name if source and Path(source).is_dir() else source


def get_commit(config: Any) -> str | None:
    """Return the Hub commit that a model was loaded from, or None if the commit is unknown."""
    return getattr(config, "_commit_hash", None) or get_cached_commit(config.name_or_path)


def build_layout(config: Any, has_head: bool) -> dict[str, list[tuple[str, bool]]]:
    """Return the tokens of each nonempty group as (name, whether the head uses the token) pairs."""
    groups = get_token_names_by_group(config) | {"patches": ["patches"]}
    return {
        group: [(name, has_head and is_used_by_head(config, group, index)) for index, name in enumerate(names)]
        for group, names in groups.items()
        if names
    }


# Patch sizes ---------------------------------------------------------------------------------------------------------

# Column headers, and functions that return the text of a cell, or an empty string if the value is unknown.
PATCH_SIZE_COLUMNS: dict[str, Callable[[PatchSizeRow], str]] = {
    "patch": lambda row: format_patch_size(row.patch_size) + (" (the model's own)" if row.is_native else ""),
    "tokens": lambda row: f"{row.sequence_length:,}",
    "GFLOPs per image": lambda row: f"{row.gflops:.3g}",
    "ms per image": lambda row: f"{row.milliseconds:.3g}",
    "accuracy": lambda row: "" if row.accuracy is None else f"{row.accuracy:.1%}",
    "same predictions": lambda row: "" if row.agreement is None else f"{row.agreement:.1%}",
}


def build_patch_size_table(rows: Sequence[PatchSizeRow]) -> dict[str, Any]:
    """Return the `header` and `rows` of a table of patch sizes, and `sentences` about the patch sizes. Columns without
    known values are omitted."""
    columns = {name: [format_cell(row) for row in rows] for name, format_cell in PATCH_SIZE_COLUMNS.items()}
    columns = {name: texts for name, texts in columns.items() if any(texts)}
    return {
        "header": list(columns),
        "rows": [list(row) for row in zip(*columns.values(), strict=True)],
        "sentences": describe_patch_sizes(rows) if rows else [],
    }

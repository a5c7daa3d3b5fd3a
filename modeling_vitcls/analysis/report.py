"""The HTML report: one self-contained page about the special tokens of a model.

    write_page("report.html", inspect_model(model, processor, images))

    inspection.py      measurements
    figures.py         figures, embedded as SVG
    report.html.j2     text and tables
    report.css         style
    report_maps.js     draws maps of layers and heads over images

The page does not load any other files. A map is stored as one byte per patch, which encodes the
square root of (value / maximum of the map). This encoding keeps a page with thousands of maps small
and is precise for weak attention.
"""

import base64
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from matplotlib import colormaps
from PIL import Image

from ..hub.loading import get_cached_commit
from ..hub.local_paths import get_title
from ..inference.token_names import get_token_names
from ..runtime.files import write_atomically
from ..version import __version__
from .ablation import get_token_keys
from .diagnosis import Verdict
from .figures import plot_curve, plot_norm_histogram, plot_norms, render_svg, shorten_text
from .image_report import IMAGE_KINDS, ImageReport, compute_patch_colors
from .inspection import Inspection
from .maps import (
    COLORMAP,
    MIN_SCALE,
    draw_patch_colors,
    get_head_names,
    overlay,
    resize_with_region,
)
from .verdict_texts import describe_verdict


TEMPLATE_FOLDER = Path(__file__).parent
NUM_OVERVIEW_IMAGES = 6  # number of images on the first screen
NUM_LARGE_WRONG_IMAGES = 6  # number of wrong images on the first screen
MAX_FILE_NAME = 24  # maximum length of a file name under an image, in characters
OVERVIEW_SIDE = 160  # longer side of an image on the first screen, in pixels
MAX_OVERVIEW_TOKENS = 8  # maximum number of tokens per image on the first screen
# Maximum total size, in bytes, of the per-head attention maps, before base64 encoding (which adds a
# third). The maps of individual heads are omitted for the last images if the maps of all images
# would exceed the limit.
MAX_MAP_BYTES = 11 * 2**20
MAX_IMAGE_SIDE = 640  # maximum length of the longer side of an image in the page, in pixels
MAX_PNG_SIDE = 96  # maximum length of the longer side of an image that is stored as PNG, in pixels
# symbols distinguish ratings without color
SIGNS = {"good": "✓", "bad": "✕", "doubtful": "≈", "neutral": "○"}


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
        title: name of the model. Default: name of the folder or Hub id that the model was loaded
            from.
        source: description of the images.
        predictions: headline, wrong images and calibration
            (publishing/held_out_predictions.py).

    Raises:
        OSError: if the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    config = inspection.config
    shown_verdicts, other_verdicts = sort_verdicts(inspection)
    text = environment.get_template("report.html.j2").render(
        title=title or get_title(config.name_or_path) or inspection.model_class,
        source=source,
        commit=get_commit(config),
        version=__version__,
        date=datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        inspection=inspection,
        findings=inspection.findings,
        shown_verdicts=shown_verdicts,
        other_verdicts=other_verdicts,
        overview=build_overview(inspection),
        predictions=predictions,
        effects=build_effect_rows(inspection.verdicts),
        figures=build_figures(inspection),
        image_kinds=IMAGE_KINDS,
        first_token=next(iter(get_token_names(config)), None),
        is_cropped=any(map(is_cropped, inspection.image_reports[:NUM_OVERVIEW_IMAGES])),
        has_unused_maps=min(inspection.use.num_layers) < config.num_hidden_layers,
        num_large=NUM_LARGE_WRONG_IMAGES,
        shorten=lambda name: shorten_text(name.rpartition("/")[2], MAX_FILE_NAME),
        signs=SIGNS,
        describe=describe_verdict,
        data=htmlsafe_json_dumps(
            build_page_data(inspection), allow_nan=False, separators=(",", ":")
        ),
        style=Markup((TEMPLATE_FOLDER / "report.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATE_FOLDER / "report_maps.js").read_text(encoding="utf-8")),
    )
    write_text(file, text)


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


def iterate_overview(
    inspection: Inspection, num_images: int
) -> Iterator[tuple[ImageReport, str, dict[str, torch.Tensor]]]:
    """Yield the first images with a caption and the attention map [gh, gw] of each special token.

    The attention is that of the last layer in which it is used, averaged over heads.
    """
    *used_layers, _ = inspection.use.num_layers
    layers = torch.tensor(used_layers, dtype=torch.long).sub(1).clamp(min=0)  # [S]
    names = get_token_names(inspection.config)[:MAX_OVERVIEW_TOKENS]
    for report in inspection.image_reports[:num_images]:
        maps = report.attention.mean(dim=1)[layers, torch.arange(len(layers))]  # [S, gh, gw]
        labels = [label for prediction in report.predictions for label, _ in prediction.labels[:1]]
        caption = ", ".join(labels)
        if report.truth and labels:
            caption = f"{report.truth} → {caption}"
        yield report, caption, dict(zip(names, maps, strict=False))


def is_cropped(report: ImageReport) -> bool:
    """Return whether the model receives only a part of the image."""
    left, top, right, bottom = report.visible_region
    width, height = report.image.size
    return left > 0 or top > 0 or right < width or bottom < height


def build_overview(inspection: Inspection) -> list[dict[str, Any]]:
    """Return the images of the first screen, and their maps as data URLs.

    The maps are the attention of each special token, and the patch features as colors.
    """
    rows: list[dict[str, Any]] = []
    reports = inspection.image_reports[:NUM_OVERVIEW_IMAGES]
    if not reports:
        return rows

    last_layer = max(inspection.use.num_layers[-1], 1) - 1
    patch_colors = compute_patch_colors([report.features[last_layer] for report in reports])
    overview = iterate_overview(inspection, NUM_OVERVIEW_IMAGES)
    for (report, caption, maps), colors in zip(overview, patch_colors, strict=True):
        sides = {"max_side": OVERVIEW_SIDE, "min_side": OVERVIEW_SIDE}
        overlays = [
            {
                "name": name,
                "url": encode_data_url(
                    overlay(report.image, values, report.visible_region, **sides)
                ),
            }
            for name, values in maps.items()
        ]

        color_image = draw_patch_colors(report.image, colors, report.visible_region, OVERVIEW_SIDE)
        overlays.append({"name": "patch features", "url": encode_data_url(color_image)})
        image, _ = resize_with_region(report.image, None, OVERVIEW_SIDE, OVERVIEW_SIDE)

        rows.append(
            {
                "name": report.name,
                "caption": caption,
                "url": encode_data_url(image),
                "maps": overlays,
            }
        )
    return rows


def sort_verdicts(inspection: Inspection) -> tuple[list[Verdict], list[Verdict]]:
    """Return the verdicts for the first screen, and the others, which would surprise nobody.

    A token has a verdict on the first screen if there are several tokens or something is wrong with
    it; everything else only if something is wrong."""
    has_several_tokens = inspection.config.token_layout.num_prefix_tokens > 1
    shown = [
        verdict
        for verdict in inspection.verdicts
        if has_several_tokens or verdict.rating in ("bad", "doubtful")
    ]
    others = [verdict for verdict in inspection.verdicts if verdict not in shown]
    is_wrong = inspection.patches.rating in ("bad", "doubtful")
    (shown if is_wrong else others).append(inspection.patches)
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
    histogram = plot_norm_histogram(config, findings, inspection.patches.numbers["layer"])
    figures = [plot_norms(config, findings), histogram]
    if config.token_layout.num_prefix_tokens:
        curves = [plot_curve(config, findings, name) for name in ("entropy", "variation")]
        figures = [*curves, *figures]
    return [Markup(render_svg(figure)) for figure in figures]


def get_commit(config: Any) -> str | None:
    """Return the Hub commit that a model was loaded from, or None if the commit is unknown."""
    return getattr(config, "_commit_hash", None) or get_cached_commit(config.name_or_path)


# Values and maps for the script of the page -------------------------------------------------------


def build_page_data(inspection: Inspection) -> dict[str, Any]:
    """Return all values that the script of the page reads."""
    reports = inspection.image_reports
    config = inspection.config
    num_images_with_heads = count_images_with_heads(reports)
    *num_used_layers, num_used_patch_layers = inspection.use.num_layers
    groups = [key.partition("[")[0] for key in get_token_keys(config.token_layout)]

    color_table = (colormaps[COLORMAP](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    features_by_layer = zip(*(report.features for report in reports), strict=True)
    # colors of each layer and image
    patch_colors = [compute_patch_colors(layer) for layer in features_by_layer]

    tokens = [
        {"name": name, "group": group, "used": num_layers}
        for name, group, num_layers in zip(
            get_token_names(config), groups, num_used_layers, strict=True
        )
    ]
    images = []
    for index, report in enumerate(reports):
        colors = torch.stack([layer[index] for layer in patch_colors])  # [L, gh, gw, 3]
        images.append(build_image_data(report, colors, index < num_images_with_heads))

    return {
        "tokens": tokens,
        "layers": config.num_hidden_layers,
        "patch_layers": num_used_patch_layers,
        "heads": get_head_names(config) if num_images_with_heads else [],
        "colors": color_table.tobytes().hex(),
        "min_scale": MIN_SCALE,
        "images": images,
    }


def count_images_with_heads(image_reports: list[ImageReport]) -> int:
    """Return the number of leading images whose maps of all heads fit in MAX_MAP_BYTES."""
    cumulative_sizes = itertools.accumulate(report.attention.numel() for report in image_reports)
    return sum(size <= MAX_MAP_BYTES for size in cumulative_sizes)


def build_image_data(
    report: ImageReport, colors: torch.Tensor, has_head_maps: bool
) -> dict[str, Any]:
    """Return the values of one image.

    `colors` are the patch colors [L, gh, gw, 3]. Attention maps are in the order [layer, mean and
    heads, token].
    """
    width, height = report.image.size
    mean = report.attention.mean(dim=1, keepdim=True)  # [L, 1, S, gh, gw]
    attention = torch.cat([mean, report.attention], dim=1) if has_head_maps else mean
    left, top, right, bottom = report.visible_region

    return {
        "name": report.name,
        "width": width,
        "height": height,
        "url": encode_data_url(report.image),
        "visible_region": [left / width, top / height, right / width, bottom / height],
        "grid": list(attention.shape[-2:]),
        "attention": pack_maps(attention),
        "num_heads": report.attention.shape[1] if has_head_maps else 0,
        "attribution": pack_maps(torch.stack(report.attributions)) if report.attributions else None,
        "attributed": [
            ": ".join(filter(None, (prediction.task, prediction.top_label)))
            for prediction in report.predictions
        ],
        "patch_colors": encode_base64((colors * 255).round().to(torch.uint8)),
    }


def encode_data_url(image: Image.Image) -> str:
    """Return an image as a data URL. An image larger than MAX_IMAGE_SIDE is scaled down."""
    thumbnail = image.copy()
    buffer = io.BytesIO()
    thumbnail.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    file_type = "png" if max(thumbnail.size) <= MAX_PNG_SIDE else "jpeg"
    thumbnail.save(buffer, file_type, quality=85)
    return f"data:image/{file_type};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def pack_maps(maps: torch.Tensor) -> dict[str, str]:
    """Encode nonnegative maps [..., gh, gw] in base64.

    The result has `values` (one byte per patch), and the `largest` value and `sum` of each map. The
    value of a patch is (byte / 255)² times the largest value of the map.
    """
    maps = maps.double()
    maxima = maps.amax(dim=(-2, -1), keepdim=True)  # [..., 1, 1]
    return {
        "values": encode_base64(
            ((maps / maxima.clamp(min=1e-30)).sqrt() * 255).round().to(torch.uint8)
        ),
        "largest": encode_base64(maxima.float()),
        "sum": encode_base64(maps.sum(dim=(-2, -1)).float()),
    }


def encode_base64(values: torch.Tensor) -> str:
    """Return the bytes of a tensor in base64, in little-endian order as in browsers."""
    array = values.contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


# Values for programs ------------------------------------------------------------------------------


def build_json_values(inspection: Inspection) -> dict[str, Any]:
    """Return all verdicts with the measured values, and the findings.

    Mean states and norms of single patches are omitted. `tokens` are the special tokens, then the
    groups of several tokens; `effects` contains all values by output (`Effect`), and `decided_by`
    names the output that decided the outcome.
    """
    omitted_names = ("mean_states", "patch_norms", "patch_ratios")
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

"""An inspection as JSON values, for the scripts of the page (`build_page_data`) and for other programs
(`build_json_values`).

A map is stored as one byte per patch, which encodes the square root of (value / maximum of the map). This encoding
keeps a page with thousands of maps small and is precise for weak attention.
"""

import base64
import dataclasses
import io
import itertools
import math
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image

from ..token_names import get_token_names
from .ablation import get_token_keys
from .diagnosis import Verdict
from .figures_of_states import compute_norm_histogram
from .image_report import ImageReport
from .inspection import Inspection
from .map_checks import FRACTIONS
from .maps import COLORMAP, MIN_SCALE, count_used_layers, get_head_names
from .patch_features import NUM_COMPONENTS, compress_patch_features, compute_patch_colors
from .token_statistics import Findings


# Maximum total sizes, in bytes, of the per-head attention maps and of the compressed patch features, before base64
# encoding (which adds a third). The maps or features of the last images are omitted if those of all images would
# exceed the limit.
MAX_MAP_BYTES, MAX_FEATURE_BYTES = 11 * 2**20, 6 * 2**20
MAX_IMAGE_SIDE = 640  # maximum length of the longer side of an image in the page, in pixels
MAX_PNG_SIDE = 96  # maximum length of the longer side of an image that is stored as PNG, in pixels
NORM_QUANTILES = {"low": 0.05, "median": 0.5, "high": 0.95, "largest": 1.0}  # quantiles of the patch norms


def build_page_data(inspection: Inspection) -> dict[str, Any]:
    """Return all values that the scripts of the page read."""
    reports = inspection.image_reports
    num_images_with_heads = count_images_with_heads(reports)
    patch_colors, components = build_patch_data(reports)
    config, findings = inspection.config, inspection.findings
    *num_used_layers, num_used_patch_layers = count_used_layers(config, inspection.has_head)
    groups = [key.partition("[")[0] for key in get_token_keys(config.token_layout)]
    color_table = (colormaps[COLORMAP](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    histograms = [compute_norm_histogram(config, findings, layer) for layer in range(len(findings.patch_norms))]
    return {
        "tokens": [
            {"name": name, "group": group, "read": num_layers}
            for name, group, num_layers in zip(get_token_names(config), groups, num_used_layers, strict=True)
        ],
        "layers": len(findings.entropy),
        "patches_read": num_used_patch_layers,
        "heads": get_head_names(config) if num_images_with_heads else [],
        "colors": color_table.tobytes().hex(),
        "min_scale": MIN_SCALE,
        "components": components,
        "images": [
            build_image_data(report, has_head_maps=index < num_images_with_heads) | patch_colors[index]
            for index, report in enumerate(reports)
        ],
        "curves": build_curves(findings),
        "histograms": round_values([dataclasses.asdict(histogram) for histogram in histograms]),
        "map_checks": round_values({name: dataclasses.asdict(check) for name, check in inspection.map_checks.items()}),
        "check_fractions": FRACTIONS,
    }


# Images and their maps ---------------------------------------------------------------------------------------------


def count_images_with_heads(image_reports: list[ImageReport]) -> int:
    """Return the number of leading images whose per-head attention maps fit in MAX_MAP_BYTES in total."""
    cumulative_sizes = itertools.accumulate(report.attention.numel() for report in image_reports)
    return sum(size <= MAX_MAP_BYTES for size in cumulative_sizes)


def build_patch_data(image_reports: list[ImageReport]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the patch colors and features of each image, and the scale and offset of the features in each layer.

    "colors" are the RGBA values of all patches and of the foreground patches, for all layers. "features" are the
    compressed features of all layers (`PatchComponents`), or None for the last images if the features of all images
    exceed MAX_FEATURE_BYTES.
    """
    features_by_layer = list(zip(*(report.features for report in image_reports), strict=True))
    colors = [
        [compute_patch_colors(layer, foreground_only) for layer in features_by_layer]
        for foreground_only in (False, True)
    ]
    images: list[dict[str, Any]] = [
        {"colors": [encode_base64(torch.stack([to_rgba(layer[index]) for layer in layers])) for layers in colors]}
        for index in range(len(image_reports))
    ]
    sizes = itertools.accumulate(report.features[..., 0].numel() * NUM_COMPONENTS for report in image_reports)
    num_compressed = sum(size <= MAX_FEATURE_BYTES for size in sizes)
    components = [compress_patch_features(layer[:num_compressed]) for layer in features_by_layer if num_compressed]
    for index, image in enumerate(images):
        image["features"] = None
        if index < num_compressed:
            image["features"] = encode_base64(torch.stack([layer.values[index] for layer in components]))
    return images, [{"scale": round_values(layer.scale), "offset": layer.offset} for layer in components]


def to_rgba(colors: torch.Tensor) -> torch.Tensor:
    """Return colors [gh, gw, 3] from 0 to 1 as [gh, gw, 4] bytes; the background (NaN) is transparent."""
    alpha = (~colors.isnan().any(dim=-1, keepdim=True)).float()
    return (torch.cat([colors.nan_to_num(), alpha], dim=-1) * 255).round().to(torch.uint8)


def build_image_data(report: ImageReport, has_head_maps: bool) -> dict[str, Any]:
    """Return the values of one image, with attention maps in the order [layer, mean and heads, token]."""
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
        "rollout": pack_maps(report.rollout),
        "num_heads": report.attention.shape[1] if has_head_maps else 0,
        "attribution": pack_maps(torch.stack(report.attributions)) if report.attributions else None,
        "attributed": [
            ": ".join(filter(None, (prediction.task, prediction.top_label))) for prediction in report.predictions
        ],
    }


def encode_data_url(image: Image.Image) -> str:
    """Return an image as a data URL. An image larger than MAX_IMAGE_SIDE is scaled down."""
    thumbnail, buffer = image.copy(), io.BytesIO()
    thumbnail.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    file_type = "png" if max(thumbnail.size) <= MAX_PNG_SIDE else "jpeg"
    thumbnail.save(buffer, file_type, quality=85)
    return f"data:image/{file_type};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def pack_maps(maps: torch.Tensor) -> dict[str, str]:
    """Encode nonnegative maps [..., gh, gw] in base64: `values` (one byte per patch), and the `largest` value and
    `sum` of each map. The value of a patch is (byte / 255)² times the largest value of the map."""
    maps = maps.double()
    maxima = maps.amax(dim=(-2, -1), keepdim=True)
    return {
        "values": encode_base64(((maps / maxima.clamp(min=1e-30)).sqrt() * 255).round().to(torch.uint8)),
        "largest": encode_base64(maxima.float()),
        "sum": encode_base64(maps.sum(dim=(-2, -1)).float()),
    }


def encode_base64(values: torch.Tensor) -> str:
    """Return the bytes of a tensor in base64, in little-endian order as in browsers."""
    array = values.contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


# Figures over depth --------------------------------------------------------------------------------------------------


def build_curves(findings: Findings) -> dict[str, Any]:
    """Return the curves over layers (mean, minimum and maximum over heads) and the baselines of uniform attention."""
    curves = {
        "uniform": findings.uniform | {"received": math.exp(-findings.uniform["entropy"])},  # 1 / N
        "uniform_by_token": findings.uniform_by_token,
        "entropy": summarize_heads(findings.entropy),
        "spread": summarize_heads(findings.spread),
        "received": summarize_heads(findings.received),
        "patch_distance": summarize_heads(findings.patch_distance.unsqueeze(-1)),
        "mass": findings.attention_fractions.mean(dim=1).permute(1, 2, 0),  # [S, 4, L]
        "between_tokens": findings.between_tokens,  # [L + 1, S, S]
        "across_layers": findings.across_layers,  # [S, L + 1, L + 1]
        "to_patches": findings.to_patches.T,  # [S, L + 1]
        "variation": findings.variation.T,
        "token_norms": findings.token_norms.T,
        "patch_norms": compute_norm_quantiles(findings),
        "outliers": findings.outliers,
        "outliers_without_registers": findings.outliers_without_registers,
    }
    return round_values(curves)


def summarize_heads(values: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Return the mean, minimum and maximum over heads of values [L, H, S], as tensors [L] for each token."""
    token_values = values.unbind(dim=-1)  # [L, H] each
    return [{"mean": row.mean(dim=1), "low": row.amin(dim=1), "high": row.amax(dim=1)} for row in token_values]


def compute_norm_quantiles(findings: Findings) -> dict[str, torch.Tensor]:
    """Return the NORM_QUANTILES of the patch norms after each layer, as one tensor [L + 1] per quantile."""
    norms = findings.patch_norms.float()
    return {name: norms.quantile(level, dim=1) for name, level in NORM_QUANTILES.items()}


def round_values(values: Any) -> Any:
    """Convert tensors in nested dicts and lists to lists, round numbers to five significant digits, and replace
    non-finite numbers with None."""
    if isinstance(values, torch.Tensor):
        return round_values(values.tolist())
    if isinstance(values, dict):
        return {name: round_values(value) for name, value in values.items()}
    if isinstance(values, list):
        return [round_values(value) for value in values]
    if isinstance(values, float):
        return float(f"{values:.5g}") if math.isfinite(values) else None
    return values


# For programs --------------------------------------------------------------------------------------------------------


def build_json_values(inspection: Inspection) -> dict[str, Any]:
    """Return all statements with the measured values, and the findings. Mean states are omitted, and patch norms are
    summarized by quantiles."""
    omitted_names = ("mean_states", "patch_norms", "patch_ratios", "patch_ratios_without_registers")
    findings = {name: value for name, value in vars(inspection.findings).items() if name not in omitted_names}
    effects = inspection.effects
    values = {
        "diagnosis": inspection.summary,
        "tokens": build_statements(inspection.verdicts),
        "groups": build_statements(inspection.group_verdicts),
        "patches": build_patch_statement(inspection),
        "num_null_images": inspection.num_null_images,
        "verdicts": [
            {"token": verdict.token, "word": verdict.word, "meaning": verdict.rating, "reason": verdict.reason}
            for verdict in inspection.verdicts
        ],
        "artifacts": inspection.patches.reason,
        "depth": inspection.depth,
        "map_checks": {
            name: {"statement": check.describe(name), "is_faithful": check.is_faithful} | dataclasses.asdict(check)
            for name, check in inspection.map_checks.items()
        },
        "accuracy": inspection.accuracy,
        "effects": {key: dataclasses.asdict(effect) for key, effect in effects.items()} if effects else effects,
        "findings": findings | {"patch_norms": compute_norm_quantiles(inspection.findings)},
        "patch_sizes": [dataclasses.asdict(row) for row in inspection.patch_sizes],
        "pictures": [
            {
                "name": report.name,
                "truth": report.truth,
                "answers": [
                    {"task": prediction.task, "labels": [list(label) for label in prediction.labels]}
                    for prediction in report.predictions
                ],
            }
            for report in inspection.image_reports
        ],
        "num_broken": inspection.num_unreadable,
    }
    return round_values(values)


def build_statements(verdicts: list[Verdict]) -> list[dict[str, Any]]:
    """Return the verdicts with the measured values.

    `effect` is the effect of replacing the token with its mean: the logit change in standard deviations over images,
    or the largest cosine distance between the features of an encoder before and after the replacement. `interval` is
    the 95% confidence interval of the effect. `null` contains the smallest effect in the null distributions and the
    largest of their limits. "information" and "presence" contain all values of the respective ablation.
    """
    return [
        {
            "token": verdict.token,
            "diagnosis": verdict.word,
            "meaning": verdict.rating,
            "statement": verdict.reason,
            **verdict.numbers,
        }
        for verdict in verdicts
    ]


def build_patch_statement(inspection: Inspection) -> dict[str, Any]:
    """Return the diagnosis of the patches with the measured values, and the norm histogram of the diagnosed layer."""
    values = dataclasses.asdict(inspection.patches)
    histogram = compute_norm_histogram(inspection.config, inspection.findings, inspection.patches.layer)
    return {
        "diagnosis": values.pop("word"),
        "meaning": values.pop("rating"),
        "statement": values.pop("reason"),
        **values,
        "histogram": dataclasses.asdict(histogram),
    }

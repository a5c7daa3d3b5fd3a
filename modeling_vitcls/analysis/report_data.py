"""An inspection as JSON values, for the script of the page (`build_page_data`) and for other programs
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
from .image_report import ImageReport
from .inspection import Inspection
from .maps import COLORMAP, MIN_SCALE, count_used_layers, get_head_names
from .patch_features import compute_patch_colors


# Maximum total size, in bytes, of the per-head attention maps, before base64 encoding (which adds a third). The maps
# of individual heads are omitted for the last images if the maps of all images would exceed the limit.
MAX_MAP_BYTES = 11 * 2**20
MAX_IMAGE_SIDE = 640  # maximum length of the longer side of an image in the page, in pixels
MAX_PNG_SIDE = 96  # maximum length of the longer side of an image that is stored as PNG, in pixels
NORM_QUANTILES = {"low": 0.05, "median": 0.5, "high": 0.95, "largest": 1.0}  # quantiles of the patch norms


def build_page_data(inspection: Inspection) -> dict[str, Any]:
    """Return all values that the script of the page reads."""
    reports, config = inspection.image_reports, inspection.config
    num_images_with_heads = count_images_with_heads(reports)
    *num_used_layers, num_used_patch_layers = count_used_layers(config, inspection.has_head)
    groups = [key.partition("[")[0] for key in get_token_keys(config.token_layout)]
    color_table = (colormaps[COLORMAP](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    features_by_layer = zip(*(report.features for report in reports), strict=True)
    patch_colors = [compute_patch_colors(layer) for layer in features_by_layer]  # colors of each layer and image
    return {
        "tokens": [
            {"name": name, "group": group, "used": num_layers}
            for name, group, num_layers in zip(get_token_names(config), groups, num_used_layers, strict=True)
        ],
        "layers": config.num_hidden_layers,
        "patch_layers": num_used_patch_layers,
        "heads": get_head_names(config) if num_images_with_heads else [],
        "colors": color_table.tobytes().hex(),
        "min_scale": MIN_SCALE,
        "images": [
            build_image_data(
                report, torch.stack([layer[index] for layer in patch_colors]), index < num_images_with_heads
            )
            for index, report in enumerate(reports)
        ],
    }


def count_images_with_heads(image_reports: list[ImageReport]) -> int:
    """Return the number of leading images whose per-head attention maps fit in MAX_MAP_BYTES in total."""
    cumulative_sizes = itertools.accumulate(report.attention.numel() for report in image_reports)
    return sum(size <= MAX_MAP_BYTES for size in cumulative_sizes)


def build_image_data(report: ImageReport, colors: torch.Tensor, has_head_maps: bool) -> dict[str, Any]:
    """Return the values of one image, with patch colors [L, gh, gw, 3] and attention maps in the order [layer, mean
    and heads, token]."""
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
        "patch_colors": encode_base64((colors * 255).round().to(torch.uint8)),
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


# For programs --------------------------------------------------------------------------------------------------------


def build_json_values(inspection: Inspection) -> dict[str, Any]:
    """Return all verdicts with the measured values, and the findings. Mean states are omitted, and patch norms are
    summarized by quantiles. `tokens` are the special tokens, then the groups of several tokens; "information" and
    "presence" contain all values of an ablation by output (`Effect`), and `decided_by` names the effect that decided
    the outcome."""
    omitted_names = ("mean_states", "patch_norms", "patch_ratios", "patch_ratios_without_registers")
    findings = {name: value for name, value in vars(inspection.findings).items() if name not in omitted_names}
    norms = inspection.findings.patch_norms.float()
    verdicts = {"tokens": inspection.verdicts, "tasks": inspection.tasks, "heads": [inspection.heads]}
    values = {
        "diagnosis": inspection.summary,
        **{
            name: [
                {"token": each.token, "word": each.word, "rating": each.rating, "reason": each.reason, **each.numbers}
                for each in group
            ]
            for name, group in verdicts.items()
        },
        "patches": dataclasses.asdict(inspection.patches),
        "num_ablation_images": inspection.num_ablation_images,
        "map_checks": {
            name: {"statement": check.describe(name), "is_faithful": check.is_faithful} | dataclasses.asdict(check)
            for name, check in inspection.map_checks.items()
        },
        "findings": findings
        | {"patch_norms": {name: norms.quantile(level, dim=1) for name, level in NORM_QUANTILES.items()}},
        "images": [
            {
                "name": report.name,
                "truth": report.truth,
                "predictions": [
                    {"task": prediction.task, "labels": [list(label) for label in prediction.labels]}
                    for prediction in report.predictions
                ],
            }
            for report in inspection.image_reports
        ],
        "num_unreadable": inspection.num_unreadable,
    }
    return round_values(values)


def round_values(values: Any) -> Any:
    """Convert tensors in nested dicts and lists to lists, round numbers to five significant digits, and replace
    non-finite numbers with None."""
    if isinstance(values, torch.Tensor):
        return round_values(values.tolist())
    if isinstance(values, dict):
        return {name: round_values(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [round_values(value) for value in values]
    if isinstance(values, float):
        return float(f"{values:.5g}") if math.isfinite(values) else None
    return values

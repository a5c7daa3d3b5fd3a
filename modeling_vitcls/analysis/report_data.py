"""An inspection as plain values: for the scripts of the page (`page_data`), and for programs (`raw_figures`).

Maps are one byte per patch, the square root of their share of the map's largest value, so that a page of thousands of
maps stays small and weak attention keeps its steps; the page paints them. Words and tables are in report.html.j2.
"""

import base64
import dataclasses
import io
import math
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image

from .ablation import token_keys
from .diagnosis import MANY_OUTLIERS
from .figures_of_states import norm_histogram
from .image_report import Reading
from .inspection import Inspection
from .maps import COLOURMAP, EVEN, token_names
from .token_statistics import Findings


MOST_MAP_BYTES = 11 * 2**20  # of all pictures; beyond it single heads are left out. In base64 a third more
PICTURE_SIDE = 640  # pixels of the longer side of a picture in the page
LOSSLESS_SIDE = 96  # up to which a picture is stored as PNG
QUANTILES = {"low": 0.05, "median": 0.5, "high": 0.95, "largest": 1.0}  # of the patches' norms


def page_data(inspection: Inspection) -> dict[str, Any]:
    """All that the page's scripts read, as JSON knows it."""
    with_heads = has_room_for_heads(inspection.readings)
    return {
        "tokens": tokens(inspection.config),
        "layers": len(inspection.findings.entropy),
        "heads": head_names(inspection.config) if with_heads else [],
        "colours": "".join(f"{value:02x}" for value in colour_table().flatten()),
        "even": EVEN,
        "pictures": [picture_data(reading, with_heads) for reading in inspection.readings],
        "curves": curves(inspection.findings),
        "histograms": histograms(inspection),
    }


def tokens(config: Any) -> list[dict[str, str]]:
    """Name and group of each special token."""
    keys = token_keys(config.token_layout)
    return [
        {"name": name, "group": key.partition("[")[0]} for name, key in zip(token_names(config), keys, strict=True)
    ]


def head_names(config: Any) -> list[str]:
    """The attention maps of a layer; differential attention has two per head."""
    heads = [f"head {number}" for number in range(1, config.num_attention_heads + 1)]
    if config.attention_type == "differential":
        return [f"{head}, {which} map" for head in heads for which in ("first", "second")]
    return heads


def colour_table() -> np.ndarray:
    """The 256 colours of `COLOURMAP`, [256, 3] `uint8`, as `maps.overlay` has them."""
    return (colormaps[COLOURMAP](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


# Pictures and their maps ---------------------------------------------------------------------------------------------


def has_room_for_heads(readings: list[Reading]) -> bool:
    """Whether the maps of single heads fit into the page."""
    return sum(reading.attention.numel() for reading in readings) <= MOST_MAP_BYTES


def picture_data(reading: Reading, with_heads: bool) -> dict[str, Any]:
    """A picture, and its maps in the order [layer, mean and heads, token]."""
    width, height = reading.picture.size
    mean = reading.attention.mean(dim=1, keepdim=True)  # [L, 1, S, gh, gw]
    attention = torch.cat([mean, reading.attention], dim=1) if with_heads else mean
    left, top, right, bottom = reading.seen
    attributed = [f"{answer.task}: {answer.first}" if answer.task else answer.first for answer in reading.answers]
    return {
        "name": reading.name,
        "width": width,
        "height": height,
        "image": data_url(reading.picture),
        "seen": [left / width, top / height, right / width, bottom / height],
        "grid": list(attention.shape[-2:]),
        "attention": packed(attention),
        "rollout": packed(reading.rollout),
        "attribution": packed(torch.stack(reading.attributions)) if reading.attributions else None,
        "attributed": attributed,
    }


def data_url(picture: Image.Image) -> str:
    """A picture as text, made smaller where it is large."""
    small = picture.copy()
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    file = io.BytesIO()
    kind = "png" if max(small.size) <= LOSSLESS_SIDE else "jpeg"
    small.save(file, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def packed(maps: torch.Tensor) -> dict[str, str]:
    """Maps [..., gh, gw] of values from 0 on -> `values`, a byte per patch, and of each map `largest` and `sum`.

    A value is (byte / 255)² times the map's largest.
    """
    maps = maps.double()
    largest = maps.amax(dim=(-2, -1), keepdim=True)
    shares = maps / largest.clamp(min=1e-30)
    return {
        "values": encoded((shares.sqrt() * 255).round().to(torch.uint8)),
        "largest": encoded(largest.float()),
        "sum": encoded(maps.sum(dim=(-2, -1)).float()),
    }


def encoded(values: torch.Tensor) -> str:
    """The bytes of a tensor in base64; numbers are little-endian, as in every browser."""
    array = values.contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


# Figures over depth --------------------------------------------------------------------------------------------------


def curves(findings: Findings) -> dict[str, Any]:
    """Series over layers: of the heads their mean, least and most; and the uniform baselines."""
    return {
        "uniform": rounded(findings.uniform | {"received": math.exp(-findings.uniform["entropy"])}),  # 1 / N
        "uniform_by_token": rounded(findings.uniform_by_token),
        "entropy": over_heads(findings.entropy),
        "spread": over_heads(findings.spread),
        "received": over_heads(findings.received),
        "patch_distance": over_heads(findings.patch_distance.unsqueeze(-1)),
        "mass": rounded(findings.mass.mean(dim=1).permute(1, 2, 0)),  # [S, 4, L]
        "between_tokens": rounded(findings.between_tokens),  # [L + 1, S, S]
        "across_layers": rounded(findings.across_layers),  # [S, L + 1, L + 1]
        "to_patches": rounded(findings.to_patches.T),  # [S, L + 1]
        "variation": rounded(findings.variation.T),
        "token_norms": rounded(findings.token_norms.T),
        "patch_norms": patch_norms(findings),
        "outliers": rounded(findings.outliers),
        "outliers_without_registers": rounded(findings.outliers_without_registers),
        "many_outliers": MANY_OUTLIERS,
    }


def over_heads(figures: torch.Tensor) -> list[dict[str, list[float]]]:
    """[L, H, S] -> for each token mean, low and high [L]."""
    return [
        {
            "mean": rounded(token.mean(dim=1)),
            "low": rounded(token.amin(dim=1)),
            "high": rounded(token.amax(dim=1)),
        }
        for token in figures.unbind(dim=-1)
    ]


def patch_norms(findings: Findings) -> dict[str, list[float]]:
    """QUANTILES of the patches' norms, [L + 1] each."""
    levels = torch.tensor(list(QUANTILES.values()))
    found = findings.patch_norms.float().quantile(levels, dim=1)  # [4, L + 1]
    return dict(zip(QUANTILES, rounded(found), strict=True))


def histograms(inspection: Inspection) -> list[dict[str, Any]]:
    """Of the patches' norms after the embeddings and each layer: counts, edges, and where outliers begin."""
    layers = range(len(inspection.findings.patch_norms))
    found = [norm_histogram(inspection.config, inspection.findings, layer) for layer in layers]
    return rounded([dataclasses.asdict(one) for one in found])


def rounded(values: Any) -> Any:
    """Tensors as nested lists, numbers with five digits, None for what is not finite; dicts and lists all through."""
    if isinstance(values, torch.Tensor):
        return rounded(values.tolist())
    if isinstance(values, dict):
        return {name: rounded(value) for name, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    if isinstance(values, float):
        return float(f"{values:.5g}") if math.isfinite(values) else None
    return values


# For programs --------------------------------------------------------------------------------------------------------


def raw_figures(inspection: Inspection) -> dict[str, Any]:
    """Findings, effects and verdicts, as JSON knows them; of states and patches' norms only what is shown of them."""
    findings = {
        item.name: getattr(inspection.findings, item.name)
        for item in dataclasses.fields(inspection.findings)
        if item.name not in ("mean_states", "patch_norms")
    }
    effects = inspection.effects
    return rounded(
        {
            "tokens": token_names(inspection.config),
            "verdicts": [dataclasses.asdict(verdict) for verdict in inspection.verdicts],
            "artifacts": inspection.artifacts,
            "depth": inspection.depth,
            "accuracy": inspection.accuracy,
            "effects": None if effects is None else {key: dataclasses.asdict(one) for key, one in effects.items()},
            "findings": findings | {"patch_norms": patch_norms(inspection.findings)},
            "patch_sizes": [dataclasses.asdict(row) for row in inspection.patch_sizes],
            "pictures": [
                {
                    "name": reading.name,
                    "truth": reading.truth,
                    "answers": [
                        {"task": answer.task, "labels": [list(label) for label in answer.labels]}
                        for answer in reading.answers
                    ],
                }
                for reading in inspection.readings
            ],
            "num_broken": inspection.num_broken,
        }
    )

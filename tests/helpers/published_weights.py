"""Random weights of published checkpoints, and models of timm that compute with them.

build_timm_vit(...)            DINO, DINOv2, DeiT, MAE, ...; by default, two layers
resample_positions(...)        the same model for another grid, with its authors' positions
build_dinov3_weights(...)      DINOv3
"""

import copy
import re
from collections.abc import Callable
from typing import Any

import timm
import torch

from scripts.tools.random_weights import randomize_weights


Weights = dict[str, torch.Tensor]
Resample = Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]
PATCH, GRID, LABELS, NEURONS = 8, 4, 7, 96


def build_timm_vit(name: str, width: int = 192, **options: Any) -> Any:
    """Build a timm model with random weights for GRID x GRID patches, by default an encoder.

    timm's names of the weights are those of most authors.
    """
    sizes = {"img_size": GRID * PATCH, "patch_size": PATCH, "embed_dim": width, "depth": 2}
    sizes |= {"mlp_ratio": (NEURONS + 0.5) / width}  # timm rounds down
    heads = {"num_heads": width // 64, "num_classes": 0}
    return randomize_weights(timm.create_model(name, **sizes | heads | options))


def resample_positions(source: Any, grid: tuple[int, int], resample: Resample) -> Any:
    """Return a model for another grid, whose positions [1, D, rows, columns] are resampled."""
    resized = copy.deepcopy(source)
    resized.set_input_size(img_size=[PATCH * side for side in grid])
    num_special = source.pos_embed.shape[1] - GRID**2
    special, patches = source.pos_embed.split([num_special, GRID**2], dim=1)
    maps = resample(patches.mT.unflatten(2, (GRID, GRID)), grid)
    resized.pos_embed.data = torch.cat([special, maps.flatten(2).mT], dim=1)
    return resized


def rename(weights: Weights, names: dict[str, str]) -> Weights:
    """Replace patterns in the names of weights."""
    renamed = {}
    for name, weight in weights.items():
        for pattern, new in names.items():
            name = re.sub(pattern, new, name)
        renamed[name] = weight
    return renamed


def build_dinov3_weights(is_gated: bool = False, has_bias: bool = True) -> Weights:
    """Return the weights of a DINOv3 model of width 384, with periods rounded to bfloat16."""
    size = "small_plus" if is_gated else "small"
    model = build_timm_vit(f"vit_{size}_patch16_dinov3{'_qkvb' * has_bias}", width=384)
    names = {"reg_token": "storage_tokens", r"gamma_(\d)": r"ls\1.gamma"}
    if is_gated:
        names |= {"fc1_g": "w1", "fc1_x": "w2", "fc2": "w3"}
    weights = rename(model.state_dict(), names)
    for attention in ("blocks.0.attn", "blocks.1.attn") if has_bias else ():
        queries, values = (weights.pop(f"{attention}.{name}_bias") for name in "qv")
        weights[f"{attention}.qkv.bias"] = torch.cat([queries, torch.ones(384), values])
        mask = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(384)
        weights[f"{attention}.qkv.bias_mask"] = mask
    return weights | {
        "mask_token": torch.ones(1, 384),
        "local_cls_norm.weight": torch.ones(384),
        "rope_embed.periods": (100.0 ** (torch.arange(16) / 16)).bfloat16(),
    }

"""Random weights of published checkpoints, and the authors' forward passes.

    build_vit_weights(...)         DINO, DINOv2, DeiT, MAE, ...; by default, two layers
    build_dinov3_weights(...)      DINOv3
    run_authors_vit(...)           tokens after the last norm, written as in the authors' code

The forward passes use neither timm nor this package.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional


Weights = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]
Resample = Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]
PATCH, GRID, LABELS, NEURONS = 8, 4, 7, 96
HEAD_SIZE = 64  # width of one head in the published models


def fill(shapes: Shapes) -> Weights:
    """Return random values that keep activations close to 1, in every parameter."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        is_scale = len(shape) == 1 and any(part in name for part in ("weight", "gamma", "scale"))
        std = 0.2 if len(shape) == 1 else 0.5
        if len(shape) > 1 and name.endswith(("weight", "kernel")):
            std = math.prod(shape[1:] if name.endswith("weight") else shape[:-1]) ** -0.5
        weights[name] = std * torch.randn(shape, generator=generator) + is_scale
    return weights


def build_vit_shapes(
    num_positions: int,
    scales: str = "",
    width: int = 192,
    depth: int = 2,
    mlp: str = "plain",
    extra: Shapes | None = None,
) -> Shapes:
    """Return the shapes of an encoder with a CLS token.

    Without positions, it has no position embeddings. `scales` is the name of LayerScale, such as
    `ls{}.gamma`.
    """
    mlps: dict[str, Shapes] = {
        "plain": {"mlp.fc1": (NEURONS, width), "mlp.fc2": (width, NEURONS)},
        "fused": {"mlp.w12": (2 * NEURONS, width), "mlp.w3": (width, NEURONS)},
        "gated": {
            "mlp.w1": (NEURONS, width),
            "mlp.w2": (NEURONS, width),
            "mlp.w3": (width, NEURONS),
        },
    }
    layers: dict[str, tuple[int, ...]] = {"norm1": (width,), "norm2": (width,)}
    layers |= {"attn.qkv": (3 * width, width), "attn.proj": (width, width)} | mlps[mlp]
    shapes: Shapes = {"pos_embed": (1, num_positions, width)} if num_positions else {}
    shapes |= {"cls_token": (1, 1, width), "patch_embed.proj.weight": (width, 3, PATCH, PATCH)}
    shapes |= {"patch_embed.proj.bias": (width,), "norm.weight": (width,), "norm.bias": (width,)}
    for index in range(depth):
        for name, shape in layers.items():
            shapes[f"blocks.{index}.{name}.weight"] = shape
            shapes[f"blocks.{index}.{name}.bias"] = shape[:1]
        for number in (1, 2) if scales else ():
            shapes[f"blocks.{index}.{scales.format(number)}"] = (width,)
    return shapes | (extra or {})


def build_vit_weights(num_prefix_positions: int = 1, scales: str = "", **arguments: Any) -> Weights:
    """Return the weights of an encoder."""
    return fill(build_vit_shapes(num_prefix_positions + GRID**2, scales, **arguments))


def build_dinov3_weights(mlp: str = "plain", bias: bool = True) -> Weights:
    """Return the weights of a DINOv3 model of width 384, with periods rounded to bfloat16."""
    extra: Shapes = {
        "storage_tokens": (1, 4, 384),
        "mask_token": (1, 384),
        "local_cls_norm.weight": (384,),
    }
    weights = fill(build_vit_shapes(0, "ls{}.gamma", 384, mlp=mlp, extra=extra))
    for name in [name for name in weights if name.endswith("qkv.bias")]:
        weights[f"{name}_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(384)
        if not bias:
            del weights[name], weights[f"{name}_mask"]
    return weights | {"rope_embed.periods": (100.0 ** (torch.arange(16) / 16)).bfloat16()}


@torch.no_grad()
def run_authors_vit(
    weights: Weights, images: torch.Tensor, resample: Resample | None = None
) -> torch.Tensor:
    """Return the normalized tokens [B, N, D] of DINO, DINOv2, DeiT, DeiT III or MAE.

    `resample` maps position embeddings [1, D, rows, columns] to the patch grid of the images.
    """
    kernel, bias = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
    width = len(bias)
    maps = functional.conv2d(images, kernel, bias, kernel.shape[2:])
    grid = maps.shape[-2:]
    tokens = maps.flatten(2).transpose(1, 2)
    prefix = [
        weights[name].expand(len(images), -1, -1)
        for name in ("cls_token", "dist_token")
        if name in weights
    ]
    positions = weights["pos_embed"]
    num_prefix = positions.shape[1] - GRID**2
    position_maps = positions[:, num_prefix:].transpose(1, 2).unflatten(2, (GRID, GRID))
    if tuple(grid) != (GRID, GRID):
        assert resample is not None
        position_maps = resample(position_maps, tuple(grid))  # type: ignore[arg-type]
    tokens = torch.cat([*prefix, tokens + position_maps.flatten(2).transpose(1, 2)], dim=1)
    tokens[:, :num_prefix] += positions[:, :num_prefix]
    if "register_tokens" in weights:
        registers = weights["register_tokens"].expand(len(images), -1, -1)
        tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)

    def norm(name: str) -> torch.Tensor:
        return functional.layer_norm(
            tokens, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6
        )

    def linear(name: str, values: torch.Tensor) -> torch.Tensor:
        return functional.linear(values, weights[f"{name}.weight"], weights[f"{name}.bias"])

    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    for index in range(depth):
        block = f"blocks.{index}"
        attention_scale, mlp_scale = (
            weights.get(
                f"{block}.ls{n}.gamma", weights.get(f"{block}.gamma_{n}", torch.ones(width))
            )
            for n in (1, 2)
        )
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1")).unflatten(2, (3, -1, HEAD_SIZE))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attention = functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + attention_scale * linear(
            f"{block}.attn.proj", attention.transpose(1, 2).flatten(2)
        )
        if f"{block}.mlp.w12.weight" in weights:
            gate, hidden = linear(f"{block}.mlp.w12", norm(f"{block}.norm2")).chunk(2, dim=-1)
            output = linear(f"{block}.mlp.w3", functional.silu(gate) * hidden)
        else:
            output = linear(
                f"{block}.mlp.fc2",
                functional.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2"))),
            )
        tokens = tokens + mlp_scale * output
    return norm("norm") if "norm.weight" in weights else tokens

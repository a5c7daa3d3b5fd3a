"""Random weights of published checkpoints, and the authors' forward passes.

    build_vit_weights(...)         DINO, DINOv2, DeiT, MAE, TIPS, ...; by default, two layers
    build_dinov3_weights(...)      DINOv3
    build_flax_weights(...)        big_vision and google-research/vision_transformer
    run_authors_vit(...)           tokens after the last norm, written as in the authors' code
    run_big_vision(...)            the same for Flax arrays

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
    """Return the normalized tokens [B, N, D] of DINO, DINOv2, DeiT, DeiT III, MAE, I-JEPA or TIPS.

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


FLAX_WIDTH, FLAX_HEADS = 48, 4


# Indices of attention, second norm and MLP in the names of a block.
VISION_TRANSFORMER_INDICES = (1, 2, 3)
BIG_VISION_INDICES = (0, 1, 0)


def build_flax_weights(num_positions: int, is_earlier: bool = False) -> Weights:
    """Return Flax arrays of big_vision, or of the earlier google-research/vision_transformer."""
    attention, second_norm, mlp = VISION_TRANSFORMER_INDICES if is_earlier else BIG_VISION_INDICES
    positions = "Transformer/posembed_input/pos_embedding" if is_earlier else "pos_embedding"
    width = FLAX_WIDTH
    shapes: Shapes = {
        "embedding/kernel": (PATCH, PATCH, 3, width),
        "embedding/bias": (width,),
        positions: (1, num_positions, width),
        "head/kernel": (width, LABELS),
        "head/bias": (LABELS,),
        **build_flax_norm("Transformer/encoder_norm"),
    }
    for index in range(2):
        block = f"Transformer/encoderblock_{index}"
        shapes |= build_flax_norm(f"{block}/LayerNorm_0") | build_flax_norm(
            f"{block}/LayerNorm_{second_norm}"
        )
        shapes |= build_flax_attention(f"{block}/MultiHeadDotProductAttention_{attention}")
        shapes |= build_flax_mlp(f"{block}/MlpBlock_{mlp}")
    return fill(shapes)


def build_map_head() -> Weights:
    """Return the arrays of SigLIP's attention pooling."""
    shapes = {"MAPHead_0/probe": (1, 1, FLAX_WIDTH)} | build_flax_norm("MAPHead_0/LayerNorm_0")
    shapes |= build_flax_attention("MAPHead_0/MultiHeadDotProductAttention_0") | build_flax_mlp(
        "MAPHead_0/MlpBlock_0"
    )
    return fill(shapes)


def build_flax_norm(name: str) -> Shapes:
    return {f"{name}/scale": (FLAX_WIDTH,), f"{name}/bias": (FLAX_WIDTH,)}


def build_flax_attention(name: str) -> Shapes:
    heads = (FLAX_HEADS, FLAX_WIDTH // FLAX_HEADS)
    shapes: Shapes = {f"{name}/out/kernel": (*heads, FLAX_WIDTH), f"{name}/out/bias": (FLAX_WIDTH,)}
    for part in ("query", "key", "value"):
        shapes |= {f"{name}/{part}/kernel": (FLAX_WIDTH, *heads), f"{name}/{part}/bias": heads}
    return shapes


def build_flax_mlp(name: str) -> Shapes:
    first = {f"{name}/Dense_0/kernel": (FLAX_WIDTH, NEURONS), f"{name}/Dense_0/bias": (NEURONS,)}
    return first | {
        f"{name}/Dense_1/kernel": (NEURONS, FLAX_WIDTH),
        f"{name}/Dense_1/bias": (FLAX_WIDTH,),
    }


@torch.no_grad()
def run_big_vision(weights: Weights, images: torch.Tensor) -> torch.Tensor:
    """Return the logits [B, labels] of big_vision's ViT, for each of its poolings."""

    def norm(name: str, values: torch.Tensor) -> torch.Tensor:
        scale, bias = weights[f"{name}/scale"], weights[f"{name}/bias"]
        return functional.layer_norm(values, (FLAX_WIDTH,), scale, bias, eps=1e-6)

    def attend(name: str, queries: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            torch.einsum("bnd,dhe->bhne", inputs, weights[f"{name}/{part}/kernel"])
            + weights[f"{name}/{part}/bias"][:, None]
            for part, inputs in (("query", queries), ("key", values), ("value", values))
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return (
            torch.einsum("bhne,hed->bnd", mixed, weights[f"{name}/out/kernel"])
            + weights[f"{name}/out/bias"]
        )

    def run_mlp(name: str, values: torch.Tensor) -> torch.Tensor:
        hidden = values @ weights[f"{name}/Dense_0/kernel"] + weights[f"{name}/Dense_0/bias"]
        hidden = functional.gelu(hidden, approximate="tanh")  # the default of flax.linen.gelu
        return hidden @ weights[f"{name}/Dense_1/kernel"] + weights[f"{name}/Dense_1/bias"]

    kernel = weights["embedding/kernel"].permute(3, 2, 0, 1)
    maps = functional.conv2d(images, kernel, weights["embedding/bias"], kernel.shape[2:])
    tokens = maps.flatten(2).transpose(1, 2)
    if "pos_embedding" in weights:
        tokens = tokens + weights["pos_embedding"]
    if "cls" in weights:
        tokens = torch.cat([weights["cls"].expand(len(images), -1, -1), tokens], dim=1)
    if "Transformer/posembed_input/pos_embedding" in weights:
        tokens = tokens + weights["Transformer/posembed_input/pos_embedding"]
    is_earlier = any("MlpBlock_3" in name for name in weights)
    attention, second_norm, mlp = VISION_TRANSFORMER_INDICES if is_earlier else BIG_VISION_INDICES
    for index in range(2):
        block = f"Transformer/encoderblock_{index}"
        inputs = norm(f"{block}/LayerNorm_0", tokens)
        tokens = tokens + attend(
            f"{block}/MultiHeadDotProductAttention_{attention}", inputs, inputs
        )
        tokens = tokens + run_mlp(
            f"{block}/MlpBlock_{mlp}", norm(f"{block}/LayerNorm_{second_norm}", tokens)
        )
    tokens = norm("Transformer/encoder_norm", tokens)
    if "MAPHead_0/probe" in weights:
        probe = weights["MAPHead_0/probe"].expand(len(images), -1, -1)
        pooled = attend("MAPHead_0/MultiHeadDotProductAttention_0", probe, tokens)
        pooled = (pooled + run_mlp("MAPHead_0/MlpBlock_0", norm("MAPHead_0/LayerNorm_0", pooled)))[
            :, 0
        ]
    else:
        pooled = tokens[:, 0] if "cls" in weights else tokens.mean(dim=1)
    return pooled @ weights["head/kernel"] + weights["head/bias"]

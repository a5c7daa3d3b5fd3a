"""big_vision's .npz checkpoints, and those of google-research/vision_transformer before it: names, shapes, settings.

Their arrays are those of Flax: dense kernels are [in, out], those of attention [D, heads, head_dim], the patch kernel
[height, width, C, D]. Names have slashes. How they are read from a file is in from_state_dict.py.
"""

import math
import re
from typing import Any

import torch

from ..configuration_vitcls import ViTCLSConfig
from .weight_rules import POSITIONS, ConversionError, Rule, split_positions


Fields = dict[str, Any]
Weights = dict[str, torch.Tensor]

# Where the image model is: on its own, in a two-tower model (SigLIP), with its optimiser.
PREFIXES = ("params/img/", "params/", "opt/target/img/", "opt/target/", "img/")


def dense(tensor: torch.Tensor, config: ViTCLSConfig) -> list[torch.Tensor]:
    """A kernel [in, out] -> weight [out, in]."""
    return [tensor.T]


def into_heads(tensor: torch.Tensor, config: ViTCLSConfig) -> list[torch.Tensor]:
    """A kernel [D, heads, head_dim] -> weight [heads * head_dim, D]."""
    return [tensor.flatten(1).T]


def out_of_heads(tensor: torch.Tensor, config: ViTCLSConfig) -> list[torch.Tensor]:
    """A kernel [heads, head_dim, D] -> weight [D, heads * head_dim]."""
    return [tensor.flatten(0, 1).T]


def flat(tensor: torch.Tensor, config: ViTCLSConfig) -> list[torch.Tensor]:
    """A bias [heads, head_dim] -> [heads * head_dim]."""
    return [tensor.flatten()]


def convolution(tensor: torch.Tensor, config: ViTCLSConfig) -> list[torch.Tensor]:
    """A kernel [height, width, C, D] -> weight [D, C, height, width]."""
    return [tensor.permute(3, 2, 0, 1)]


def attention_rules(theirs: str, ours: str) -> list[Rule]:
    """Query, key, value and output projections."""
    return [
        rule
        for name, letter in (("query", "q"), ("key", "k"), ("value", "v"))
        for rule in (
            Rule(f"{theirs}/{name}/kernel", f"{ours}.{letter}_proj.weight", into_heads),
            Rule(f"{theirs}/{name}/bias", f"{ours}.{letter}_proj.bias", flat),
        )
    ] + [
        Rule(f"{theirs}/out/kernel", f"{ours}.o_proj.weight", out_of_heads),
        Rule(f"{theirs}/out/bias", f"{ours}.o_proj.bias"),
    ]


def norm_rules(theirs: str, ours: str) -> list[Rule]:
    """Scale and bias of a LayerNorm."""
    return [Rule(f"{theirs}/scale", f"{ours}.weight"), Rule(f"{theirs}/bias", f"{ours}.bias")]


def dense_rules(theirs: str, ours: str) -> list[Rule]:
    """Kernel and bias of a dense layer."""
    return [Rule(f"{theirs}/kernel", f"{ours}.weight", dense), Rule(f"{theirs}/bias", f"{ours}.bias")]


BLOCK = "Transformer/encoderblock_{i}"

# `{n}` is the position of a module within its block, which differs between the two projects.
RULES = [
    Rule("cls", "embeddings.cls_token"),
    Rule("embedding/kernel", "embeddings.patch_embeddings.projection.weight", convolution),
    Rule("embedding/bias", "embeddings.patch_embeddings.projection.bias"),
    Rule("pos_embedding", POSITIONS, split_positions, axis=1),
    Rule("Transformer/posembed_input/pos_embedding", POSITIONS, split_positions, axis=1),
    *norm_rules(f"{BLOCK}/LayerNorm_0", "layers.{i}.layernorm_before"),
    *attention_rules(f"{BLOCK}/MultiHeadDotProductAttention_{{n}}", "layers.{i}.attention"),
    *norm_rules(f"{BLOCK}/LayerNorm_{{n}}", "layers.{i}.layernorm_after"),
    *dense_rules(f"{BLOCK}/MlpBlock_{{n}}/Dense_0", "layers.{i}.mlp.fc1"),
    *dense_rules(f"{BLOCK}/MlpBlock_{{n}}/Dense_1", "layers.{i}.mlp.fc2"),
    *norm_rules("Transformer/encoder_norm", "layernorm"),
    Rule("MAPHead_0/probe", "pooler.probe"),
    *attention_rules("MAPHead_0/MultiHeadDotProductAttention_0", "pooler"),
    *norm_rules("MAPHead_0/LayerNorm_0", "pooler.transform.layernorm"),
    *dense_rules("MAPHead_0/MlpBlock_0/Dense_0", "pooler.transform.fc1"),
    *dense_rules("MAPHead_0/MlpBlock_0/Dense_1", "pooler.transform.fc2"),
    *dense_rules("pre_logits", "pooler.dense"),
    *dense_rules("head", "classifier"),
]


def prepare_big_vision(weights: Weights) -> Weights:
    """Take the image model out, under short names, and number the blocks where they are stacked in one array."""
    prefix = next((prefix for prefix in PREFIXES if f"{prefix}embedding/kernel" in weights), "")
    prepared: Weights = {}
    for name, part in weights.items():
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix)
        if name.startswith("Transformer/encoderblock/"):
            for index, layer in enumerate(part):
                prepared[name.replace("encoderblock", f"encoderblock_{index}", 1)] = layer
        else:
            prepared[name] = part
    return prepared


def read_big_vision(weights: Weights) -> Fields:
    """Sizes, pooling and settings. `nn.gelu` of Flax is the tanh approximation."""
    if "embedding/kernel" not in weights:
        raise ConversionError(f"no embedding/kernel among the weights ({', '.join(list(weights)[:4])}, ...)")
    patch_height, patch_width, channels, width = weights["embedding/kernel"].shape
    blocks = [int(found[1]) for name in weights if (found := re.match(r"Transformer/encoderblock_(\d+)/", name))]
    first = {name.removeprefix("Transformer/encoderblock_0/"): part for name, part in weights.items()}
    query = next((part for name, part in first.items() if re.fullmatch(r"MultiHead\w+/query/kernel", name)), None)
    mlp = next((part for name, part in first.items() if re.fullmatch(r"MlpBlock_\d/Dense_0/kernel", name)), None)
    if query is None or mlp is None:
        raise ConversionError("no Transformer/encoderblock_0 with attention and MLP among the weights")
    return {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": [patch_height, patch_width],
        "num_hidden_layers": max(blocks) + 1,
        "num_attention_heads": query.shape[1],
        "intermediate_size": mlp.shape[1],
        "hidden_act": "gelu_pytorch_tanh",
        "num_cls_tokens": int("cls" in weights),
        **read_positions(weights, (patch_height, patch_width)),
        **read_pooling(weights),
    }


def read_positions(weights: Weights, patch_size: tuple[int, int]) -> Fields:
    """big_vision positions the patches alone, or fixes them; the earlier project positions the CLS token too."""
    fields: Fields = {"position_interpolation": "bilinear"}
    if "Transformer/posembed_input/pos_embedding" in weights:
        count = weights["Transformer/posembed_input/pos_embedding"].shape[1] - int("cls" in weights)
        fields["position_embedding_tokens"] = "cls" if "cls" in weights else "patches"
    elif "pos_embedding" in weights:
        count = weights["pos_embedding"].numel() // weights["pos_embedding"].shape[-1]
        fields["position_embedding_tokens"] = "patches"
    else:
        raise ConversionError("no positions among the weights: the fixed ones of big_vision are not ours")
    side = math.isqrt(count)
    image_size = [side * patch for patch in patch_size] if side * side == count else None
    return {**fields, "image_size": image_size}


def read_pooling(weights: Weights) -> Fields:
    """The head: of the CLS token, a learned query (MAP) or the mean, with or without a layer before the classifier."""
    fields: Fields = {"pooling": "cls" if "cls" in weights else "mean"}
    if "MAPHead_0/probe" in weights:
        fields["pooling"] = "attention"
        fields["attention_pool_intermediate_size"] = weights["MAPHead_0/MlpBlock_0/Dense_0/kernel"].shape[1]
    if "pre_logits/kernel" in weights:
        fields["pooled_activation"] = "tanh"
    if "head/kernel" in weights:
        fields["num_labels"] = weights["head/kernel"].shape[1]
    return fields

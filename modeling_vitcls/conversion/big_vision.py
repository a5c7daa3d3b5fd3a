"""Rules and configuration for .npz checkpoints of big_vision and its predecessor google-research/vision_transformer.

The arrays have the layout of Flax: dense kernels are [in, out], attention kernels [D, heads, head_dim], and the patch
kernel [height, width, C, D]. Parts of names are separated by slashes.
"""

import math
import re
from collections.abc import Sequence

import torch

from ..configuration_vitcls import ViTCLSConfig
from .weight_rules import POSITIONS, ConversionError, Fields, Rule, Weights, split_positions


# Prefixes of the image model: in a two-tower model (SigLIP), as the only model, or next to the optimizer state.
PREFIXES = ("params/img/", "params/", "opt/target/img/", "opt/target/", "img/")


def transpose_kernel(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """Convert a kernel [in, out] to a weight [out, in]."""
    return [tensor.T]


def convert_qkv_kernel(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """Convert a kernel [D, heads, head_dim] to a weight [heads * head_dim, D]."""
    return [tensor.flatten(1).T]


def convert_output_kernel(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """Convert a kernel [heads, head_dim, D] to a weight [D, heads * head_dim]."""
    return [tensor.flatten(0, 1).T]


def flatten_bias(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """Flatten a bias [heads, head_dim] to [heads * head_dim]."""
    return [tensor.flatten()]


def convert_patch_kernel(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """Convert a kernel [height, width, C, D] to a weight [D, C, height, width]."""
    return [tensor.permute(3, 2, 0, 1)]


def build_attention_rules(source: str, target: str) -> list[Rule]:
    """Build the rules for query, key, value and output projections."""
    return [
        rule
        for name, letter in (("query", "q"), ("key", "k"), ("value", "v"))
        for rule in (
            Rule(f"{source}/{name}/kernel", f"{target}.{letter}_proj.weight", convert_qkv_kernel),
            Rule(f"{source}/{name}/bias", f"{target}.{letter}_proj.bias", flatten_bias),
        )
    ] + [
        Rule(f"{source}/out/kernel", f"{target}.o_proj.weight", convert_output_kernel),
        Rule(f"{source}/out/bias", f"{target}.o_proj.bias"),
    ]


def build_norm_rules(source: str, target: str) -> list[Rule]:
    """Build the rules for scale and bias of a LayerNorm."""
    return [Rule(f"{source}/scale", f"{target}.weight"), Rule(f"{source}/bias", f"{target}.bias")]


def build_dense_rules(source: str, target: str) -> list[Rule]:
    """Build the rules for kernel and bias of a dense layer."""
    return [Rule(f"{source}/kernel", f"{target}.weight", transpose_kernel), Rule(f"{source}/bias", f"{target}.bias")]


BLOCK = "Transformer/encoderblock_{i}"

# `{n}` is the index of a module in its block, which differs between the two projects.
BIG_VISION_RULES = [
    Rule("cls", "embeddings.cls_token"),
    Rule("embedding/kernel", "embeddings.patch_embeddings.projection.weight", convert_patch_kernel),
    Rule("embedding/bias", "embeddings.patch_embeddings.projection.bias"),
    Rule("pos_embedding", POSITIONS, split_positions, axis=1),
    Rule("Transformer/posembed_input/pos_embedding", POSITIONS, split_positions, axis=1),
    *build_norm_rules(f"{BLOCK}/LayerNorm_0", "layers.{i}.layernorm_before"),
    *build_attention_rules(f"{BLOCK}/MultiHeadDotProductAttention_{{n}}", "layers.{i}.attention"),
    *build_norm_rules(f"{BLOCK}/LayerNorm_{{n}}", "layers.{i}.layernorm_after"),
    *build_dense_rules(f"{BLOCK}/MlpBlock_{{n}}/Dense_0", "layers.{i}.mlp.fc1"),
    *build_dense_rules(f"{BLOCK}/MlpBlock_{{n}}/Dense_1", "layers.{i}.mlp.fc2"),
    *build_norm_rules("Transformer/encoder_norm", "layernorm"),
    Rule("MAPHead_0/probe", "pooler.probe"),
    *build_attention_rules("MAPHead_0/MultiHeadDotProductAttention_0", "pooler"),
    *build_norm_rules("MAPHead_0/LayerNorm_0", "pooler.transform.layernorm"),
    *build_dense_rules("MAPHead_0/MlpBlock_0/Dense_0", "pooler.transform.fc1"),
    *build_dense_rules("MAPHead_0/MlpBlock_0/Dense_1", "pooler.transform.fc2"),
    *build_dense_rules("pre_logits", "pooler.dense"),
    *build_dense_rules("head", "classifier"),
]


def prepare_big_vision(weights: Weights) -> Weights:
    """Return the weights of the image model without prefix, and split arrays in which all blocks are stacked."""
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
    """Return the fields of a big_vision model. `nn.gelu` of Flax is the tanh approximation."""
    if "embedding/kernel" not in weights:
        raise ConversionError(
            f"big_vision requires the weight embedding/kernel, but the weights are {', '.join(list(weights)[:4])}, ..."
        )
    patch_height, patch_width, channels, width = weights["embedding/kernel"].shape
    blocks = [int(match[1]) for name in weights if (match := re.match(r"Transformer/encoderblock_(\d+)/", name))]
    first_block = {name.removeprefix("Transformer/encoderblock_0/"): part for name, part in weights.items()}
    query = next(
        (part for name, part in first_block.items() if re.fullmatch(r"MultiHead\w+/query/kernel", name)), None
    )
    mlp = next((part for name, part in first_block.items() if re.fullmatch(r"MlpBlock_\d/Dense_0/kernel", name)), None)
    if query is None or mlp is None:
        raise ConversionError(
            "big_vision requires attention and MLP weights in Transformer/encoderblock_0, but there are none"
        )
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
    """Return the fields of learned positions: of patches in big_vision, also of the CLS token in its predecessor."""
    fields: Fields = {"position_interpolation": "bilinear"}
    if "Transformer/posembed_input/pos_embedding" in weights:
        count = weights["Transformer/posembed_input/pos_embedding"].shape[1] - int("cls" in weights)
        fields["position_embedding_tokens"] = "cls" if "cls" in weights else "patches"
    elif "pos_embedding" in weights:
        count = weights["pos_embedding"].numel() // weights["pos_embedding"].shape[-1]
        fields["position_embedding_tokens"] = "patches"
    else:
        raise ConversionError(
            "the weights contain no positions. ViTCLS does not support the fixed positions of big_vision"
        )
    side = math.isqrt(count)
    image_size = [side * patch for patch in patch_size] if side * side == count else None
    return {**fields, "image_size": image_size}


def read_pooling(weights: Weights) -> Fields:
    """Return the pooling (CLS token, attention or mean), the dense layer before the classifier, and the labels."""
    fields: Fields = {"pooling": "cls" if "cls" in weights else "mean"}
    if "MAPHead_0/probe" in weights:
        fields["pooling"] = "attention"
        fields["attention_pool_intermediate_size"] = weights["MAPHead_0/MlpBlock_0/Dense_0/kernel"].shape[1]
    if "pre_logits/kernel" in weights:
        fields["pooled_activation"] = "tanh"
    if "head/kernel" in weights:
        fields["num_labels"] = weights["head/kernel"].shape[1]
    return fields

"""Convert published state dicts: DINO, iBOT, MSN, DINOv2, DINOv3, DeiT, MAE, I-JEPA, and big_vision.

    weights = torch.load("dinov2_vits14_reg4_pretrain.pth", weights_only=True)
    model = convert_state_dict(weights, family="dinov2")

    weights = dict(np.load("ViT-B_16.npz"))
    model = convert_state_dict(weights, family="big_vision")

A state dict has no configuration. Values that cannot be inferred from the weight shapes (number of heads, eps,
resampling of position embeddings) are taken from the authors' code and set by the `read_*_fields` function of each
family.

big_vision and its predecessor google-research/vision_transformer use the Flax layout: dense kernels are [in, out],
attention kernels [D, heads, head_dim], and the patch kernel [height, width, C, D]. Array names contain slashes instead
of dots.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..configuration_vitcls import ViTCLSConfig
from ..errors import format_error
from ..files import replace_control_characters
from ..modeling_vitcls import ViTCLSPreTrainedModel
from .from_timm import BLOCK_RULES, GATED_MLP_NAMES, MLP_RULES, STEM_RULES, build_head_rules
from .weight_rules import (
    POSITIONS,
    ClassifierChoice,
    ConversionError,
    Fields,
    Rule,
    Weights,
    build_model,
    convert_weights,
    reshape_token,
    split_halves,
    split_positions,
)


@dataclass(frozen=True)
class StateDictFamily:
    """Functions and rules that convert the checkpoints of one family."""

    read_fields: Callable[[Weights], Fields]  # returns fields of `ViTCLSConfig` for the prepared weights
    rules: Sequence[Rule]  # rules for the prepared weights
    prepare_weights: Callable[[Weights], Weights] = dict  # prepares the published weights for the rules


def convert_state_dict(
    weights: Mapping[str, Any],
    family: str,
    *,
    drop: Sequence[str] = (),
    classifier: ClassifierChoice = "keep",
    num_labels: int | None = None,
    **fields: Any,
) -> ViTCLSPreTrainedModel:
    """Convert a published state dict, including the classifier if there is one, to a model in eval mode.

    Args:
        weights: Mapping from names to tensors or arrays, as published, optionally nested as `{"model": ...}`.
        family: `"dinov2"`, `"dinov3"`, `"deit"` (also DeiT III), `"dino"`, `"ibot"`, `"msn"`, `"mae"`, `"ijepa"` or
            `"big_vision"`. A DINOv2 state dict with `linear_head.weight` and `linear_head.bias` becomes a classifier.
        drop: Name prefixes of weights to ignore, such as `("decoder", "mask_token")` for a full MAE checkpoint.
        classifier: "keep" keeps the classifier of the source, "new" creates a new classifier, and "drop" removes the
            classifier and returns a `ViTCLSModel`.
        num_labels: Number of labels of a new classifier.
        fields: Fields of `ViTCLSConfig` whose values differ from those of the published models (`num_attention_heads`
            for other widths, `image_size` for a non-square patch grid), or labels (`id2label`). With
            `rope_periods=None`, the periods of DINOv3 are computed in float32, as in timm and transformers, and the
            stored periods are ignored.

    Raises:
        ConversionError: If the family is unknown, the weights do not belong to the family, or a field is not set and
            cannot be inferred from the weights.
    """
    if family not in FAMILIES:
        raise ConversionError(f"family={family!r} is unknown. Use one of {', '.join(FAMILIES)}")
    state_dict_family = FAMILIES[family]
    if not isinstance(weights, Mapping):
        raise ConversionError(f"weights must be a state dict, but the type is {type(weights).__name__}")
    arrays = {replace_control_characters(str(name)): array for name, array in weights.get("model", weights).items()}
    tensors = {name: convert_to_tensor(name, arrays[name]) for name in arrays if not name.startswith(tuple(drop))}
    try:
        tensors = state_dict_family.prepare_weights(tensors)
        fields = state_dict_family.read_fields(tensors) | fields
        for name in ("num_attention_heads", "image_size"):
            if fields[name] is None:
                raise ConversionError(f"{name} cannot be inferred from the weights. Set {name}=...")
        config = ViTCLSConfig(**fields)
        return build_model(config, convert_weights(tensors, state_dict_family.rules, config), classifier, num_labels)
    except (LookupError, RuntimeError) as error:  # raised for an unexpected number of dimensions
        raise ConversionError(f"the weight shapes do not match the family {family}: {format_error(error)}") from error


def drop_key_bias(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """Split a fused bias [3 * D] into query, key and value biases. The key bias is zero and becomes an empty tensor,
    which is skipped."""
    query, _, value = tensor.chunk(3)
    return [query, tensor.new_empty(0), value]


# Rules for the parameter names that these families share with timm.
VIT_RULES = [*STEM_RULES, *BLOCK_RULES, *build_head_rules("pooler"), *MLP_RULES["Mlp"]]

DINO_RULES = [Rule("masked_embed", "embeddings.mask_token", reshape_token), *VIT_RULES]

DINOV2_RULES = [
    Rule("register_tokens", "embeddings.register_tokens"),
    Rule("linear_head.{rest}", "classifier.{rest}"),
    Rule("mask_token", "embeddings.mask_token", reshape_token),
    Rule("blocks.{i}.mlp.w12.{rest}", GATED_MLP_NAMES, split_halves),
    Rule("blocks.{i}.mlp.w3.{rest}", "layers.{i}.mlp.down_proj.{rest}"),
    *VIT_RULES,
]

DINOV3_RULES = [
    Rule("storage_tokens", "embeddings.register_tokens"),
    Rule("mask_token", "embeddings.mask_token", reshape_token),
    Rule("rope_embed.periods", []),  # stored in the field `rope_periods`
    Rule("local_cls_norm.{rest}", []),  # norm for local crops in pre-training
    Rule(
        "blocks.{i}.attn.qkv.bias", [f"layers.{{i}}.attention.{letter}_proj.bias" for letter in "qkv"], drop_key_bias
    ),
    Rule("blocks.{i}.mlp.w1.{rest}", "layers.{i}.mlp.gate_proj.{rest}"),
    Rule("blocks.{i}.mlp.w2.{rest}", "layers.{i}.mlp.up_proj.{rest}"),
    Rule("blocks.{i}.mlp.w3.{rest}", "layers.{i}.mlp.down_proj.{rest}"),
    *VIT_RULES,
]


def build_attention_rules(source_prefix: str, target_prefix: str) -> list[Rule]:
    """Build the rules for query, key, value and output projections; the output kernel is [heads, head_dim, D]."""
    return [
        *build_dense_rules(f"{source_prefix}/query", f"{target_prefix}.q_proj"),
        *build_dense_rules(f"{source_prefix}/key", f"{target_prefix}.k_proj"),
        *build_dense_rules(f"{source_prefix}/value", f"{target_prefix}.v_proj"),
        Rule(
            f"{source_prefix}/out/kernel",
            f"{target_prefix}.o_proj.weight",
            lambda kernel, config: [kernel.flatten(0, 1).T],
        ),
        Rule(f"{source_prefix}/out/bias", f"{target_prefix}.o_proj.bias"),
    ]


def build_norm_rules(source_prefix: str, target_prefix: str) -> list[Rule]:
    """Build the rules for the scale and bias of a LayerNorm."""
    return [
        Rule(f"{source_prefix}/scale", f"{target_prefix}.weight"),
        Rule(f"{source_prefix}/bias", f"{target_prefix}.bias"),
    ]


def build_dense_rules(source_prefix: str, target_prefix: str) -> list[Rule]:
    """Build the rules for a kernel [in, out] or [in, heads, head_dim] and its bias."""
    return [
        Rule(f"{source_prefix}/kernel", f"{target_prefix}.weight", lambda kernel, config: [kernel.flatten(1).T]),
        Rule(f"{source_prefix}/bias", f"{target_prefix}.bias", lambda bias, config: [bias.flatten()]),
    ]


BLOCK_PREFIX = "Transformer/encoderblock_{i}"

# `{n}` is the index of a module in a block; indices differ between big_vision and google-research/vision_transformer.
BIG_VISION_RULES = [
    Rule("cls", "embeddings.cls_token"),
    Rule(
        "embedding/kernel",
        "embeddings.patch_embeddings.projection.weight",
        lambda kernel, config: [kernel.permute(3, 2, 0, 1)],
    ),
    Rule("embedding/bias", "embeddings.patch_embeddings.projection.bias"),
    Rule("pos_embedding", POSITIONS, split_positions),
    Rule("Transformer/posembed_input/pos_embedding", POSITIONS, split_positions),
    *build_norm_rules(f"{BLOCK_PREFIX}/LayerNorm_0", "layers.{i}.layernorm_before"),
    *build_attention_rules(f"{BLOCK_PREFIX}/MultiHeadDotProductAttention_{{n}}", "layers.{i}.attention"),
    *build_norm_rules(f"{BLOCK_PREFIX}/LayerNorm_{{n}}", "layers.{i}.layernorm_after"),
    *build_dense_rules(f"{BLOCK_PREFIX}/MlpBlock_{{n}}/Dense_0", "layers.{i}.mlp.fc1"),
    *build_dense_rules(f"{BLOCK_PREFIX}/MlpBlock_{{n}}/Dense_1", "layers.{i}.mlp.fc2"),
    *build_norm_rules("Transformer/encoder_norm", "layernorm"),
    Rule("MAPHead_0/probe", "pooler.probe"),
    *build_attention_rules("MAPHead_0/MultiHeadDotProductAttention_0", "pooler"),
    *build_norm_rules("MAPHead_0/LayerNorm_0", "pooler.transform.layernorm"),
    *build_dense_rules("MAPHead_0/MlpBlock_0/Dense_0", "pooler.transform.fc1"),
    *build_dense_rules("MAPHead_0/MlpBlock_0/Dense_1", "pooler.transform.fc2"),
    *build_dense_rules("pre_logits", "pooler.dense"),
    *build_dense_rules("head", "classifier"),
]


def remove_chunk_indices(weights: Weights) -> Weights:
    """Rename `blocks.CHUNK.BLOCK` of larger DINOv2 models to `blocks.BLOCK`."""
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): weight for name, weight in weights.items()}


def prepare_dinov3_weights(weights: Weights) -> Weights:
    """Apply the bias masks, and check that the keys have no bias. Raise ConversionError if a check fails."""
    prepared_weights = {name: weight for name, weight in weights.items() if not name.endswith("bias_mask")}
    for name in [name for name in prepared_weights if name.endswith("attn.qkv.bias")]:
        bias_mask = weights.get(f"{name}_mask")
        if bias_mask is not None:
            if not torch.isin(bias_mask, bias_mask.new_tensor([0, 1])).all():
                raise ConversionError(f"{name}_mask contains values other than 0 and 1")
            prepared_weights[name] = prepared_weights[name] * bias_mask
        if prepared_weights[name].chunk(3)[1].any():
            raise ConversionError(f"{name} contains nonzero key biases, but DINOv3 has no key biases")
    return prepared_weights


def read_vit_fields(weights: Weights, width_to_num_heads: Mapping[int, int]) -> Fields:
    """Return the fields inferred from the weights. `width_to_num_heads` maps each width to the number of heads."""
    width, channels, patch_height, patch_width = get_weight(weights, "patch_embed.proj.weight").shape
    blocks = {int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d{1,9})\.", name))}
    if blocks != set(range(len(blocks))):
        missing_index = next(index for index in range(len(blocks)) if index not in blocks)
        raise ConversionError(f"the weights contain blocks up to {max(blocks)}, but no block {missing_index}")
    fields: Fields = {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": [patch_height, patch_width],
        "num_hidden_layers": len(blocks),
        "num_attention_heads": width_to_num_heads.get(width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "use_mask_token": "mask_token" in weights,
    }
    if "blocks.0.mlp.w3.weight" in weights:
        fields |= {"mlp_type": "swiglu", "intermediate_size": weights["blocks.0.mlp.w3.weight"].shape[1]}
    else:
        fields["intermediate_size"] = get_weight(weights, "blocks.0.mlp.fc1.weight").shape[0]
    if "blocks.0.ls1.gamma" in weights or "blocks.0.gamma_1" in weights:
        fields["layer_scale_init_value"] = 1.0
    if "head.weight" in weights:
        fields["num_labels"] = len(weights["head.weight"])
    return fields


def read_position_fields(weights: Weights, num_special_tokens: int) -> Fields:
    """Return `position_embedding_tokens` and `image_size` for position embeddings [1, N, D]. `image_size` is None if
    the patch grid is not square."""
    num_positions = get_weight(weights, "pos_embed").shape[1]
    patch_height, patch_width = weights["patch_embed.proj.weight"].shape[-2:]
    for num_prefix_tokens, position_embedding_tokens in (
        (num_special_tokens, "cls" if num_special_tokens == 1 else "all"),
        (0, "patches"),
    ):
        grid_side = math.isqrt(num_positions - num_prefix_tokens)
        if grid_side * grid_side == num_positions - num_prefix_tokens:
            image_size = [grid_side * patch_height, grid_side * patch_width]
            return {"position_embedding_tokens": position_embedding_tokens, "image_size": image_size}
    return {"image_size": None}


def read_dinov2_fields(weights: Weights) -> Fields:
    """Return the fields of DINOv2 (arXiv 2304.07193), with or without registers (arXiv 2309.16588).

    The published linear classifiers use the CLS token and the mean of the patches.
    """
    registers = weights.get("register_tokens")
    head_weight, width = weights.get("linear_head.weight"), get_weight(weights, "patch_embed.proj.weight").shape[0]
    if head_weight is not None and head_weight.shape[-1] != 2 * width:
        raise ConversionError(
            f"the linear classifier of DINOv2 uses {head_weight.shape[-1] // width - 1} layers, but only classifiers "
            "on the last layer are supported. Use the one-layer classifier (linear_head instead of linear4_head)"
        )
    resampling_fields: Fields = {"position_offset": 0.1} if registers is None else {"position_antialias": True}
    return {
        **read_vit_fields(weights, {384: 6, 768: 12, 1024: 16, 1536: 24}),
        **read_position_fields(weights, num_special_tokens=1),
        **resampling_fields,
        **({} if head_weight is None else {"num_labels": len(head_weight), "pooling": "cls_mean"}),
        "num_register_tokens": 0 if registers is None else registers.shape[1],
    }


def read_dinov3_fields(weights: Weights) -> Fields:
    """Return the fields of DINOv3 (arXiv 2508.10104). The authors' code uses the stored rotary periods in bfloat16."""
    periods = weights.get("rope_embed.periods")
    fields = read_vit_fields(weights, {384: 6, 768: 12, 1024: 16, 1280: 20, 4096: 32})
    return fields | {
        "image_size": 16 * fields["patch_size"][0],
        "key_bias": False,
        "num_register_tokens": get_weight(weights, "storage_tokens").shape[1],
        "position_embedding_type": "rope_2d",
        "rope_periods": None if periods is None else periods.float().tolist(),
        "layer_norm_eps": 1e-5,
    }


def read_deit_fields(weights: Weights) -> Fields:
    """Return the fields of DeiT (arXiv 2012.12877), DeiT III (arXiv 2204.07118) and MSN (arXiv 2204.07141)."""
    special_token_names = [name for name in ("cls_token", "dist_token") if name in weights]
    return {
        **read_vit_fields(weights, {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16}),
        **read_position_fields(weights, num_special_tokens=len(special_token_names)),
        "num_distillation_tokens": special_token_names.count("dist_token"),
    }


def read_dino_fields(weights: Weights) -> Fields:
    """Return the configuration fields for DINO (arXiv 2104.14294) and iBOT (arXiv 2111.07832), which interpolate
    position embeddings with an offset."""
    return read_deit_fields(weights) | {"position_offset": 0.1, "use_mask_token": "masked_embed" in weights}


def read_ijepa_fields(weights: Weights) -> Fields:
    """Return the fields of I-JEPA (arXiv 2301.08243), which has no CLS token."""
    return {
        **read_vit_fields(weights, {768: 12, 1024: 16, 1280: 16, 1408: 16}),
        **read_position_fields(weights, num_special_tokens=0),
        "num_cls_tokens": 0,
        "position_embedding_tokens": "patches",
        "pooling": "mean",
    }


def read_mae_fields(weights: Weights) -> Fields:
    """Return the fields of MAE (arXiv 2111.06377), pre-trained or fine-tuned. The fixed position embeddings of MAE
    become learned position embeddings."""
    has_mean_pooling = "fc_norm.weight" in weights
    return {
        **read_vit_fields(weights, {768: 12, 1024: 16, 1280: 16}),
        **read_position_fields(weights, num_special_tokens=1),
        "final_norm": not has_mean_pooling,
        "pooled_norm": has_mean_pooling,
        "pooling": "mean" if has_mean_pooling else "cls",
    }


def prepare_big_vision_weights(weights: Weights) -> Weights:
    """Strip the prefix of the image model from the weight names, and split arrays of stacked blocks."""
    # Prefixes in two-tower models (SigLIP), in standalone image models, and in files with optimizer state.
    prefixes = ("params/img/", "params/", "opt/target/img/", "opt/target/", "img/")
    prefix = next((prefix for prefix in prefixes if f"{prefix}embedding/kernel" in weights), "")
    weights = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    for name in [name for name in weights if name.startswith("Transformer/encoderblock/")]:
        for index, layer in enumerate(weights.pop(name)):
            weights[name.replace("encoderblock", f"encoderblock_{index}", 1)] = layer
    return weights


def read_big_vision_fields(weights: Weights) -> Fields:
    """Return the fields of a big_vision model. Flax's `nn.gelu` is the tanh approximation."""
    patch_height, patch_width, channels, width = get_weight(weights, "embedding/kernel").shape
    blocks = [int(match[1]) for name in weights if (match := re.match(r"Transformer/encoderblock_(\d+)/", name))]
    patterns = (
        r"Transformer/encoderblock_0/MultiHead\w+/query/kernel",
        r"Transformer/encoderblock_0/MlpBlock_\d/Dense_0/kernel",
    )
    query_kernel, mlp_kernel = (
        next((weight for name, weight in weights.items() if re.fullmatch(pattern, name)), None) for pattern in patterns
    )
    if query_kernel is None or mlp_kernel is None:
        raise ConversionError(
            "big_vision requires attention and MLP weights in Transformer/encoderblock_0, but the weights are missing"
        )
    return {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": [patch_height, patch_width],
        "num_hidden_layers": max(blocks) + 1,
        "num_attention_heads": query_kernel.shape[1],
        "intermediate_size": mlp_kernel.shape[1],
        "hidden_act": "gelu_pytorch_tanh",
        "num_cls_tokens": int("cls" in weights),
        **read_big_vision_position_fields(weights, (patch_height, patch_width)),
        **read_big_vision_pooling_fields(weights),
    }


def read_big_vision_position_fields(weights: Weights, patch_size: tuple[int, int]) -> Fields:
    """Return the fields of learned position embeddings. Only big_vision's predecessor has a CLS position embedding."""
    fields: Fields = {"position_interpolation": "bilinear"}
    if "Transformer/posembed_input/pos_embedding" in weights:
        num_positions = weights["Transformer/posembed_input/pos_embedding"].shape[1] - int("cls" in weights)
        fields["position_embedding_tokens"] = "cls" if "cls" in weights else "patches"
    elif "pos_embedding" in weights:
        num_positions = weights["pos_embedding"].numel() // weights["pos_embedding"].shape[-1]
        fields["position_embedding_tokens"] = "patches"
    else:
        raise ConversionError(
            "the weights contain no position embeddings. The fixed position embeddings of big_vision are not supported"
        )
    grid_side = math.isqrt(num_positions)
    image_size = [grid_side * length for length in patch_size] if grid_side * grid_side == num_positions else None
    return {**fields, "image_size": image_size}


def read_big_vision_pooling_fields(weights: Weights) -> Fields:
    """Return the fields of the pooling method (CLS token, attention or mean) and of the layers after pooling."""
    fields: Fields = {"pooling": "cls" if "cls" in weights else "mean"}
    if "MAPHead_0/probe" in weights:
        fields["pooling"] = "attention"
        fields["attention_pool_intermediate_size"] = weights["MAPHead_0/MlpBlock_0/Dense_0/kernel"].shape[1]
    if "pre_logits/kernel" in weights:
        fields["pooled_activation"] = "tanh"
    if "head/kernel" in weights:
        fields["num_labels"] = weights["head/kernel"].shape[1]
    return fields


def convert_to_tensor(name: str, array: Any) -> torch.Tensor:
    """Convert an array to a tensor. Raise ConversionError if torch does not support the values."""
    try:
        return torch.as_tensor(array)
    except (TypeError, ValueError, RuntimeError):
        raise ConversionError(
            f"{name} is not an array of numbers with a supported dtype. Convert the array to float32"
        ) from None


def get_weight(weights: Weights, name: str) -> torch.Tensor:
    """Return a weight of the state dict. Raise ConversionError if the weight is missing."""
    if name not in weights:
        example_names = ", ".join(list(weights)[:4])
        raise ConversionError(
            f"the family requires the weight {name}, but it is missing from the state dict, which contains "
            f"{example_names}, ... Set `family` to a different family"
        )
    return weights[name]


FAMILIES = {
    "dinov2": StateDictFamily(read_dinov2_fields, DINOV2_RULES, remove_chunk_indices),
    "dinov3": StateDictFamily(read_dinov3_fields, DINOV3_RULES, prepare_dinov3_weights),
    "deit": StateDictFamily(read_deit_fields, VIT_RULES),
    "dino": StateDictFamily(read_dino_fields, DINO_RULES),
    "ibot": StateDictFamily(read_dino_fields, DINO_RULES),
    "msn": StateDictFamily(read_deit_fields, VIT_RULES),
    "mae": StateDictFamily(read_mae_fields, VIT_RULES),
    "ijepa": StateDictFamily(read_ijepa_fields, VIT_RULES),
    "big_vision": StateDictFamily(read_big_vision_fields, BIG_VISION_RULES, prepare_big_vision_weights),
}

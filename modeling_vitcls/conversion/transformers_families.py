"""Rules for the parameter names and configurations of plain ViTs in transformers.

The classes of each family are listed in from_transformers.py. If transformers renamed a parameter
between versions, both names are listed. Dropout and drop path rates are copied, but this package
and transformers may apply dropout to different activations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from ..model.configuration_vitcls import ViTCLSConfig
from .weight_rules import (
    LAYER_SCALES,
    POSITIONS,
    ConversionError,
    Fields,
    Rule,
    Weights,
    append_ones,
    append_zero_bias,
    repeat_kv,
    reshape_token,
    simplify_size,
    split_positions,
)


@dataclass(frozen=True)
class TransformersFamily:
    """Rules for the weights and configuration of one architecture."""

    # Function (configuration, weights) that returns fields of `ViTCLSConfig`
    read_fields: Callable[[Any, Weights], Fields]
    # Rules for encoder weights that take precedence over `COMMON_RULES`
    family_rules: Sequence[Rule] = ()
    # Fields of `ViTCLSConfig` that are the same for all models
    fields: Fields = field(default_factory=dict)
    # Function that prepares the weights for the rules, for example by merging several weights
    prepare_weights: Callable[[Weights], Weights] = dict
    # Whether transformers resamples the position embeddings as a square grid
    has_square_grid: bool = False

    def read_all_fields(self, config: Any, weights: Weights) -> Fields:
        """Read the fields of `ViTCLSConfig`, or raise ConversionError."""
        if self.has_square_grid and not isinstance(
            round_to_patches(config.image_size, config.patch_size), int
        ):
            raise ConversionError(
                f"image_size={config.image_size} is not square, but transformers resamples the "
                f"position embeddings of {type(config).__name__} as a square grid"
            )
        return self.read_fields(config, weights) | self.fields

    @property
    def rules(self) -> list[Rule]:
        """Rules for the weights of the encoder."""
        return [*self.family_rules, *COMMON_RULES]


COMMON_RULES = [
    Rule("embeddings.class_embedding", "embeddings.cls_token", reshape_token),
    Rule("embeddings.mask_token", "embeddings.mask_token", reshape_token),
    Rule("embeddings.position_embedding(s|.weight)?", POSITIONS, split_positions, axis=1),
    Rule(
        "embeddings.patch_(embed|embedding|embeddings|projection)(.projection)?.{rest}",
        "embeddings.patch_embeddings.projection.{rest}",
    ),
    Rule("embeddings.rms_norm.{rest}", "embeddings.patch_embeddings.norm.{rest}"),
    Rule("embeddings.{rest}", "embeddings.{rest}"),
    # The name is misspelled in CLIP's checkpoints.
    Rule("pre_layrnorm.{rest}", "embeddings.norm.{rest}"),
    Rule("{stack}.{i}.(norm1|layer_norm1|rms_norm1).{rest}", "layers.{i}.layernorm_before.{rest}"),
    Rule("{stack}.{i}.(norm2|layer_norm2|rms_norm2).{rest}", "layers.{i}.layernorm_after.{rest}"),
    Rule(  # query, key, value
        r"{stack}.{i}.attention.attention.(?P<x>[qkv])\w+.{rest}",
        "layers.{i}.attention.{x}_proj.{rest}",
    ),
    Rule(
        "{stack}.{i}.(attention|self_attn).(output.dense|out_proj|projection_layer).{rest}",
        "layers.{i}.attention.o_proj.{rest}",
    ),
    Rule("{stack}.{i}.self_attn.{rest}", "layers.{i}.attention.{rest}"),
    Rule("{stack}.{i}.intermediate.dense.{rest}", "layers.{i}.mlp.fc1.{rest}"),
    Rule("{stack}.{i}.output.dense.{rest}", "layers.{i}.mlp.fc2.{rest}"),
    Rule(
        "{stack}.{i}.mlp.weights_in.{rest}",
        ["layers.{i}.mlp.gate_proj.{rest}", "layers.{i}.mlp.up_proj.{rest}"],
    ),
    Rule("{stack}.{i}.mlp.weights_out.{rest}", "layers.{i}.mlp.down_proj.{rest}"),
    Rule("{stack}.{i}.ffn.{rest}", "layers.{i}.mlp.{rest}"),
    Rule("{stack}.{i}.lambda_{n}", "layers.{i}.layer_scale{n}.lambda1"),
    Rule("{stack}.{i}.{rest}", "layers.{i}.{rest}"),
    Rule("(layernorm|norm|rms_norm).{rest}", "layernorm.{rest}"),
    Rule("pooler.{rest}", "pooler.{rest}"),
]


# Field of transformers configurations -> field of ViTCLSConfig with the same meaning.
FIELD_NAMES = {
    name: name
    for name in (
        "hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
        "layer_norm_eps qkv_bias query_bias key_bias value_bias mlp_bias patch_size num_channels "
        "num_register_tokens rope_theta hidden_dropout_prob attention_probs_dropout_prob "
        "drop_path_rate initializer_range"
    ).split()
} | {
    "attention_dropout": "attention_probs_dropout_prob",
    "attention_bias": "qkv_bias",
    "head_dim": "attention_head_size",
    "layer_scale_init_value": "layer_scale_init_value",
    "layerscale_value": "layer_scale_init_value",
    "n_cls_tokens": "num_cls_tokens",
    "num_cls_tokens": "num_cls_tokens",
    "num_registers": "num_register_tokens",
    "proj_bias": "projection_bias",
    "rms_norm_eps": "layer_norm_eps",
    "use_qk_norm": "qk_norm",
}


def read_common_fields(config: Any, weights: Weights) -> Fields:
    """Read the fields that most families share."""
    fields = {
        target: getattr(config, name)
        for name, target in FIELD_NAMES.items()
        if hasattr(config, name)
    }

    if hasattr(config, "image_size"):
        fields["image_size"] = round_to_patches(config.image_size, config.patch_size)

    if hasattr(config, "mlp_ratio"):  # DINOv2 and families with the same layers
        is_gated = getattr(config, "use_swiglu_ffn", False)
        fields["mlp_type"] = "swiglu" if is_gated else "mlp"
        fields["intermediate_size"] = compute_dinov2_mlp_size(
            config.hidden_size, config.mlp_ratio, is_gated
        )
    if hasattr(config, "use_gated_mlp"):  # DINOv3 and Sapiens2
        fields["mlp_type"] = get_glu_type(config) if config.use_gated_mlp else "mlp"

    if "pooler.dense.weight" in weights:  # ViT and DeiT; a dense layer on the CLS token
        fields["pooled_activation"] = config.pooler_act
    if hasattr(config, "use_absolute_position_embeddings"):  # BEiT and InternViT
        fields["position_embedding_type"] = (
            "learned" if config.use_absolute_position_embeddings else "none"
        )
        fields["pooling"] = "mean" if config.use_mean_pooling else "cls"
        fields["final_norm"] = not config.use_mean_pooling
    return fields | {"use_mask_token": "embeddings.mask_token" in weights}


def read_label_fields(config: Any) -> Fields:
    """Read the label names and the problem type in the configuration of the source."""
    label_fields = {
        "id2label": config.id2label,
        "label2id": config.label2id,
        "problem_type": config.problem_type,
    }
    return {name: value for name, value in label_fields.items() if value is not None}


def compute_dinov2_mlp_size(hidden_size: int, ratio: float, is_gated: bool) -> int:
    """Compute the hidden size of DINOv2's MLP.

    A gated MLP has about as many parameters as a plain MLP.
    """
    width = int(hidden_size * ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if is_gated else width


def round_to_patches(image_size: Any, patch_size: Any) -> int | list[int]:
    """Round an image size in pixels down to whole patches.

    For example, 384 becomes 378 for 14-pixel patches.
    """
    pairs = ((size, size) if isinstance(size, int) else size for size in (image_size, patch_size))
    height, width = (pixels // patch * patch for pixels, patch in zip(*pairs, strict=True))
    return simplify_size(height, width)


def get_glu_type(config: Any) -> str:
    """Find the `mlp_type` of a gated MLP."""
    return "swiglu" if config.hidden_act in ("silu", "swish") else "glu"


# ViT (arXiv 2010.11929), DeiT (2012.12877; a distillation token with a position embedding), ViTMSN
# (2204.07141), ViTMAE (2111.06377), I-JEPA (2301.08243), Pixio.


def read_ijepa_fields(config: Any, weights: Weights) -> Fields:
    """Read the fields of I-JEPA, which has no special tokens.

    The classifier uses the mean of the patches.
    """
    if "pooler.dense.weight" in weights:
        raise ConversionError(
            "the pooler of IJepaModel uses the first patch instead of a CLS token. Load the model "
            "with add_pooling_layer=False"
        )
    return read_common_fields(config, weights) | {"pooling": "mean"}


# DINOv2 (arXiv 2304.07193), DINOv2 with registers (2309.16588), TIPSv2 (2604.12012). Unlike the
# authors' code, transformers resamples position embeddings without an offset.


# DINOv3 (arXiv 2508.10104). The plain MLP has the parameter names of a gated MLP without the gate.
DINOV3_RULES = [
    Rule(
        f"model.layer.{{i}}.mlp.{name}.{{rest}}",
        [f"layers.{{i}}.mlp.{plain_name}.{{rest}}", f"layers.{{i}}.mlp.{name}.{{rest}}"],
        lambda tensor, config: (
            [tensor, tensor[:0]] if config.mlp_type == "mlp" else [tensor[:0], tensor]
        ),
    )
    for name, plain_name in (("up_proj", "fc1"), ("down_proj", "fc2"))
]


# Sapiens2 (arXiv 2604.21681): DINOv3 with RMS norms, grouped-query attention, and LayerScale after
# attention only.
SAPIENS2_RULES = [
    Rule(
        "model.layer.{i}.attention.(?P<kv>[kv])_proj.{rest}",
        "layers.{i}.attention.{kv}_proj.{rest}",
        repeat_kv,
    ),
    Rule("model.layer.{i}.layer_scale1.lambda1", LAYER_SCALES, append_ones),
    *DINOV3_RULES,
]


# CLIP (arXiv 2103.00020; with a norm before the first layer and a norm on the pooled output),
# MetaCLIP 2 (2507.22062), SigLIP (2303.15343), SigLIP 2 (2502.14786).


SIGLIP_RULES = [
    Rule("post_layernorm.{rest}", "layernorm.{rest}"),
    Rule("head.probe", "pooler.probe"),
    Rule("head.attention.in_proj_{rest}", [f"pooler.{x}_proj.{{rest}}" for x in "qkv"]),
    Rule("head.attention.out_proj.{rest}", "pooler.o_proj.{rest}"),
    Rule("head.layernorm.{rest}", "pooler.transform.layernorm.{rest}"),
    Rule("head.mlp.{rest}", "pooler.transform.{rest}"),
]


def read_siglip_fields(config: Any, weights: Weights) -> Fields:
    """Read the fields of SigLIP, which has no special tokens.

    A model with a head uses attention pooling.

    The converted SigLIP 2 expects images instead of flattened patches.
    """
    fields = read_common_fields(config, weights) | {
        "pooling": "attention" if "head.probe" in weights else "mean"
    }
    if hasattr(config, "num_patches"):  # SigLIP 2
        fields["image_size"] = isqrt(config.num_patches) * config.patch_size
    return fields


SIGLIP2_RULES = [
    Rule(  # [D, height * width * C] -> [D, C, height, width]
        "embeddings.patch_embedding.weight",
        "embeddings.patch_embeddings.projection.weight",
        lambda weight, config: [
            weight.unflatten(1, (*config.patch_height_width, config.num_channels)).permute(
                0, 3, 1, 2
            )
        ],
    ),
    *SIGLIP_RULES,
]


# InternViT (arXiv 2312.14238), which is part of InternVL and Qianfan-OCR.


def add_identity_projection(tensor: Tensor, config: ViTCLSConfig) -> Sequence[Tensor]:
    """Replace a missing query projection with the identity and a zero bias, after the probe."""
    identity = torch.eye(config.hidden_size, dtype=tensor.dtype, device=tensor.device)
    return [tensor, identity, identity.new_zeros(config.hidden_size)]


# AIMv2 (arXiv 2411.14402).
AIMV2_RULES = [
    Rule(
        "head.cls_token",
        ["pooler.probe", "pooler.q_proj.weight", "pooler.q_proj.bias"],
        add_identity_projection,
    ),
    Rule(
        "head.(?P<kv>[kv])_proj.weight",
        ["pooler.{kv}_proj.weight", "pooler.{kv}_proj.bias"],
        lambda tensor, config: (
            [tensor, tensor[:0]] if config.qkv_bias else append_zero_bias(tensor, config)
        ),
    ),
    Rule("head.output_proj.{rest}", "pooler.o_proj.{rest}"),
    Rule("head.{rest}", "pooler.{rest}"),
]


def read_aimv2_fields(config: Any, weights: Weights) -> Fields:
    """Read the fields of AIMv2.

    It has RMS norms (also after the patch embedding), gated MLPs and no special tokens.
    """
    return read_common_fields(config, weights) | {
        "position_embedding_type": "sincos_2d" if config.is_native else "learned",
        "norm_type": "rmsnorm",
        "patch_norm": True,
        "projection_bias": config.qkv_bias,
        "mlp_type": get_glu_type(config),
        "pooling": "attention" if config.use_head else "mean",
        "attention_pool_mlp": False,
    }


# BEiT (arXiv 2106.08254), data2vec (2202.03555).
BEIT_RULES = [Rule("relative_position_bias.tables", "relative_position_bias.tables")]


def read_beit_fields(config: Any, weights: Weights) -> Fields:
    """Read the fields of BEiT: a relative position bias, position embeddings, or both."""
    bias_type = "shared" if config.use_shared_relative_position_bias else "none"
    if config.use_relative_position_bias:
        bias_type = "layer"
    has_layer_scale = config.layer_scale_init_value > 0
    return read_common_fields(config, weights) | {
        "key_bias": False,
        "layer_scale_init_value": config.layer_scale_init_value if has_layer_scale else None,
        "relative_position_bias": bias_type,
        "pooled_norm": "pooler.layernorm.weight" in weights,
    }


def stack_position_biases(weights: Weights) -> Weights:
    """Stack the relative position biases of the layers, each with the shared one added, if any."""
    tables = {
        name: table
        for name, table in weights.items()
        if name.endswith("relative_position_bias_table")
    }
    if not tables:
        return weights

    shared_prefixes = ("shared_position_bias.", "encoder.relative_position_bias.")
    shared = [table for name, table in tables.items() if name.startswith(shared_prefixes)]
    layers = [table for name, table in tables.items() if not name.startswith(shared_prefixes)]
    if shared and layers:
        layers = [table + shared[0] for table in layers]

    other_weights = {name: weight for name, weight in weights.items() if name not in tables}
    return other_weights | {"relative_position_bias.tables": torch.stack(layers or shared)}


# RADIO (arXiv 2312.06709).
RADIO_RULES = [
    Rule(  # [D, C * height * width] -> [D, C, height, width]
        "embeddings.patch_projection.weight",
        "embeddings.patch_embeddings.projection.weight",
        lambda weight, config: [
            weight.unflatten(1, (config.num_channels, *config.patch_height_width))
        ],
    ),
    Rule(
        "embeddings.cls_register_token",
        ["embeddings.cls_token", "embeddings.register_tokens"],
        lambda tokens, config: [
            tokens[None, config.token_layout.cls],
            tokens[None, config.token_layout.registers],
        ],
    ),
    Rule("summary_idxs", []),
]


def read_radio_fields(config: Any, weights: Weights) -> Fields:
    """Read the fields of RADIO.

    It concatenates CLS tokens, and crops position embeddings to the image size.
    """
    return read_common_fields(config, weights) | {
        "image_size": round_to_patches(config.max_img_size, config.patch_size),
        "cls_pooling": "concat",
        "pooled_cls_tokens": weights["summary_idxs"].tolist(),
        "position_embedding_tokens": "patches",
        "position_interpolation": "crop",
        "patch_bias": "input_conditioner.norm_mean" in weights,
        "final_norm": False,
    }


def fold_pixel_normalization(weights: Weights) -> Weights:
    """Fold the pixel normalization, (x - mean) / std, into the patch projection in float64."""
    if "input_conditioner.norm_mean" not in weights:  # The user has removed the input conditioner
        return weights

    folded_weights = dict(weights)
    mean = folded_weights.pop("input_conditioner.norm_mean").double().flatten()  # [C]
    std = folded_weights.pop("input_conditioner.norm_std").double().flatten()  # [C]
    weight = weights["embeddings.patch_projection.weight"]  # [D, C * height * width]
    kernel = weight.double().unflatten(1, (len(mean), -1)) / std[:, None]  # [D, C, height * width]
    bias = -(kernel * mean[:, None]).sum(dim=(1, 2))  # [D]
    return folded_weights | {
        "embeddings.patch_projection.weight": kernel.flatten(1).to(weight.dtype),
        "embeddings.patch_projection.bias": bias.to(weight.dtype),
    }


NO_SPECIAL_TOKENS: Fields = {"num_cls_tokens": 0, "position_embedding_tokens": "patches"}

VIT = TransformersFamily(read_common_fields)
DEIT = TransformersFamily(
    read_common_fields, fields={"num_distillation_tokens": 1, "position_embedding_tokens": "all"}
)
IJEPA = TransformersFamily(read_ijepa_fields, fields=NO_SPECIAL_TOKENS)
PIXIO = TransformersFamily(read_common_fields, fields={"cls_pooling": "mean"}, has_square_grid=True)
DINOV2 = TransformersFamily(read_common_fields, has_square_grid=True)
DINOV2_WITH_REGISTERS = TransformersFamily(
    read_common_fields, fields={"position_antialias": True}, has_square_grid=True
)
TIPSV2 = TransformersFamily(
    read_common_fields,
    fields={"position_antialias": True, "position_interpolation": "bilinear"},
    has_square_grid=True,
)
DINOV3 = TransformersFamily(
    read_common_fields, DINOV3_RULES, {"position_embedding_type": "rope_2d"}
)
SAPIENS2 = TransformersFamily(
    read_common_fields,
    SAPIENS2_RULES,
    {"position_embedding_type": "rope_2d", "norm_type": "rmsnorm"},
)
CLIP = TransformersFamily(
    read_common_fields,
    [Rule("post_layernorm.{rest}", "pooler.layernorm.{rest}")],
    {"patch_bias": False, "pre_norm": True, "final_norm": False},
)
SIGLIP = TransformersFamily(read_siglip_fields, SIGLIP_RULES, NO_SPECIAL_TOKENS)
SIGLIP2 = TransformersFamily(
    read_siglip_fields,
    SIGLIP2_RULES,
    NO_SPECIAL_TOKENS | {"position_interpolation": "bilinear", "position_antialias": True},
)
AIMV2 = TransformersFamily(read_aimv2_fields, AIMV2_RULES, NO_SPECIAL_TOKENS)
BEIT = TransformersFamily(
    read_beit_fields, BEIT_RULES, prepare_weights=stack_position_biases, has_square_grid=True
)
INTERNVL = TransformersFamily(
    lambda config, weights: (
        read_common_fields(config, weights)
        | {"norm_type": "layernorm" if config.norm_type == "layer_norm" else "rmsnorm"}
    ),
    has_square_grid=True,
)
RADIO = TransformersFamily(read_radio_fields, RADIO_RULES, prepare_weights=fold_pixel_normalization)

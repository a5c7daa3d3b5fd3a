"""transformers' plain ViTs, family by family: their parameter names -> ours, their configuration -> our fields.

Which class belongs to which family, and what its head reads, is in from_transformers.py. Where transformers has
renamed parameters between versions, both names are listed. Dropout and drop path are taken over, but act where ours
do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch

from ..configuration_vitcls import ViTCLSConfig
from .weight_rules import POSITIONS, ConversionError, Rule, in_thirds, split_positions


Weights = Mapping[str, torch.Tensor]
Settings = dict[str, Any]


def unchanged(weights: Weights) -> Weights:
    """For families whose rules need no preparation."""
    return weights


@dataclass(frozen=True)
class Family:
    """How one architecture becomes ours.

    `settings` reads its configuration, and the names of its weights, into fields of `ViTCLSConfig`. `prepare` rewrites
    its weights where several of them make one of ours.
    """

    rules: Sequence[Rule]
    settings: Callable[[Any, Weights], Settings]
    prepare: Callable[[Weights], Weights] = unchanged


# What has the same name and meaning in their configurations and ours.
SAME_FIELDS = (
    "hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act layer_norm_eps qkv_bias "
    "patch_size num_channels hidden_dropout_prob attention_probs_dropout_prob drop_path_rate initializer_range"
).split()


def common(config: Any, weights: Weights) -> Settings:
    """The fields that most families share."""
    settings = {name: getattr(config, name) for name in SAME_FIELDS if hasattr(config, name)}
    if hasattr(config, "attention_dropout"):
        settings["attention_probs_dropout_prob"] = config.attention_dropout
    if hasattr(config, "image_size"):
        settings["image_size"] = whole_patches(config.image_size, config.patch_size)
    return settings | {
        "attention_head_size": getattr(config, "head_dim", None),
        "use_mask_token": "embeddings.mask_token" in weights,
    }


def whole_patches(image_size: Any, patch_size: Any) -> int | list[int]:
    """The pixels that patches cover: SigLIP's 384 hold 27 patches of 14, which makes 378."""
    pairs = ((size, size) if isinstance(size, int) else size for size in (image_size, patch_size))
    return as_size([pixels // patch * patch for pixels, patch in zip(*pairs, strict=True)])


def as_size(pair: Sequence[int]) -> int | list[int]:
    """[height, width], as one number for a square."""
    height, width = pair
    return height if height == width else [height, width]


def require_square(config: Any) -> None:
    """Refuse rectangles where transformers reads the positions of one as those of a square."""
    if not isinstance(whole_patches(config.image_size, config.patch_size), int):
        raise ConversionError(
            f"image_size={config.image_size}: transformers resamples the positions of {type(config).__name__} as "
            "those of a square grid, which this is not"
        )


def as_token(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """[D] or [1, D] -> [1, 1, D]."""
    return [tensor.reshape(1, 1, -1)]


# ViT (arXiv 2010.11929), DeiT (2012.12877), ViTMSN (2204.07141), ViTMAE (2111.06377), I-JEPA (2301.08243), Pixio.
# Our layers carry their names.
VIT_RULES = [
    Rule("embeddings.position_embeddings", POSITIONS, split_positions, axis=1),
    Rule("embeddings.{rest}", "embeddings.{rest}"),
    Rule("layers.{i}.{rest}", "layers.{i}.{rest}"),
    Rule("layernorm.{rest}", "layernorm.{rest}"),
    Rule("pooler.dense.{rest}", "pooler.dense.{rest}"),
]


def vit(config: Any, weights: Weights) -> Settings:
    """The base models of ViT and DeiT pool by a dense layer on the CLS token, where they have a pooler."""
    settings = common(config, weights)
    if "pooler.dense.weight" in weights:
        if config.pooler_output_size != config.hidden_size:
            raise ConversionError(
                f"pooler_output_size={config.pooler_output_size}: a pooler whose width is not hidden_size="
                f"{config.hidden_size} is missing here: load the model with add_pooling_layer=False"
            )
        settings["pooled_activation"] = config.pooler_act
    return settings


def deit(config: Any, weights: Weights) -> Settings:
    """Has a distillation token, with a position."""
    return vit(config, weights) | {"num_distillation_tokens": 1, "position_embedding_tokens": "all"}


def ijepa(config: Any, weights: Weights) -> Settings:
    """Patches alone; its classifier reads their mean."""
    if "pooler.dense.weight" in weights:
        raise ConversionError("IJepaModel with a pooler reads the first patch as if it were a CLS token: leave it out")
    return common(config, weights) | {"num_cls_tokens": 0, "pooling": "mean", "position_embedding_tokens": "patches"}


def pixio(config: Any, weights: Weights) -> Settings:
    """Several CLS tokens, averaged."""
    require_square(config)
    return common(config, weights) | {
        "num_cls_tokens": config.n_cls_tokens,
        "cls_pooling": "mean",
        "intermediate_size": int(config.hidden_size * config.mlp_ratio),
    }


def in_halves(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """A fused gate and up projection -> two."""
    return tensor.chunk(2)


# DINOv2 (arXiv 2304.07193), also with registers (2309.16588), and what its layers were copied to.
DINOV2_LAYER_RULES = [
    Rule("encoder.layer.{i}.norm1.{rest}", "layers.{i}.layernorm_before.{rest}"),
    Rule("encoder.layer.{i}.norm2.{rest}", "layers.{i}.layernorm_after.{rest}"),
    Rule("encoder.layer.{i}.attention.attention.query.{rest}", "layers.{i}.attention.q_proj.{rest}"),
    Rule("encoder.layer.{i}.attention.attention.key.{rest}", "layers.{i}.attention.k_proj.{rest}"),
    Rule("encoder.layer.{i}.attention.attention.value.{rest}", "layers.{i}.attention.v_proj.{rest}"),
    Rule("encoder.layer.{i}.attention.output.dense.{rest}", "layers.{i}.attention.o_proj.{rest}"),
    Rule(
        "encoder.layer.{i}.mlp.weights_in.{rest}",
        ["layers.{i}.mlp.gate_proj.{rest}", "layers.{i}.mlp.up_proj.{rest}"],
        in_halves,
    ),
    Rule("encoder.layer.{i}.mlp.weights_out.{rest}", "layers.{i}.mlp.down_proj.{rest}"),
    Rule("encoder.layer.{i}.{rest}", "layers.{i}.{rest}"),
]
DINOV2_RULES = [
    Rule("embeddings.position_embeddings", POSITIONS, split_positions, axis=1),
    Rule("embeddings.mask_token", "embeddings.mask_token", as_token),
    Rule("embeddings.{rest}", "embeddings.{rest}"),
    *DINOV2_LAYER_RULES,
    Rule("layernorm.{rest}", "layernorm.{rest}"),
]


def dinov2_mlp_width(hidden_size: int, ratio: float, is_gated: bool) -> int:
    """Gated MLPs are narrower, for as many weights."""
    width = int(hidden_size * ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if is_gated else width


def dinov2_layers(config: Any) -> Settings:
    """Width and kind of the MLP, and LayerScale."""
    return {
        "intermediate_size": dinov2_mlp_width(config.hidden_size, config.mlp_ratio, config.use_swiglu_ffn),
        "mlp_type": "swiglu" if config.use_swiglu_ffn else "mlp",
        "layer_scale_init_value": config.layerscale_value,
    }


def dinov2(config: Any, weights: Weights) -> Settings:
    """In transformers, unlike in its own code, positions are resampled without offset."""
    require_square(config)
    return common(config, weights) | dinov2_layers(config)


def dinov2_with_registers(config: Any, weights: Weights) -> Settings:
    """Registers have no positions."""
    return dinov2(config, weights) | {"num_register_tokens": config.num_register_tokens, "position_antialias": True}


def by_mlp_type(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """To the first target for a plain MLP, to the second for a gated one."""
    nothing = tensor[:0]
    return [tensor, nothing] if config.mlp_type == "mlp" else [nothing, tensor]


# DINOv3 (arXiv 2508.10104). Its plain MLP has the names of a gated one without the gate.
DINOV3_RULES = [
    Rule("embeddings.patch_embeddings.{rest}", "embeddings.patch_embeddings.projection.{rest}"),
    Rule("embeddings.{rest}", "embeddings.{rest}"),
    Rule("model.layer.{i}.norm1.{rest}", "layers.{i}.layernorm_before.{rest}"),
    Rule("model.layer.{i}.norm2.{rest}", "layers.{i}.layernorm_after.{rest}"),
    Rule(
        "model.layer.{i}.mlp.up_proj.{rest}",
        ["layers.{i}.mlp.fc1.{rest}", "layers.{i}.mlp.up_proj.{rest}"],
        by_mlp_type,
    ),
    Rule(
        "model.layer.{i}.mlp.down_proj.{rest}",
        ["layers.{i}.mlp.fc2.{rest}", "layers.{i}.mlp.down_proj.{rest}"],
        by_mlp_type,
    ),
    Rule("model.layer.{i}.{rest}", "layers.{i}.{rest}"),
    Rule("norm.{rest}", "layernorm.{rest}"),
]


def dinov3(config: Any, weights: Weights) -> Settings:
    """Rotary positions."""
    return common(config, weights) | {
        "num_register_tokens": config.num_register_tokens,
        "position_embedding_type": "rope_2d",
        "rope_theta": config.rope_theta,
        "query_bias": config.query_bias,
        "key_bias": config.key_bias,
        "value_bias": config.value_bias,
        "projection_bias": config.proj_bias,
        "mlp_bias": config.mlp_bias,
        "mlp_type": gated(config) if config.use_gated_mlp else "mlp",
        "layer_scale_init_value": config.layerscale_value,
    }


def gated(config: Any) -> str:
    """The kind of a gated MLP."""
    return "swiglu" if config.hidden_act in ("silu", "swish") else "glu"


# CLIP (arXiv 2103.00020), MetaCLIP 2 (2507.22062), SigLIP (2303.15343), SigLIP 2 (2502.14786).
CLIP_LAYER_RULES = [
    Rule("encoder.layers.{i}.self_attn.out_proj.{rest}", "layers.{i}.attention.o_proj.{rest}"),
    Rule("encoder.layers.{i}.self_attn.{rest}", "layers.{i}.attention.{rest}"),
    Rule("encoder.layers.{i}.layer_norm1.{rest}", "layers.{i}.layernorm_before.{rest}"),
    Rule("encoder.layers.{i}.layer_norm2.{rest}", "layers.{i}.layernorm_after.{rest}"),
    Rule("encoder.layers.{i}.mlp.{rest}", "layers.{i}.mlp.{rest}"),
]
CLIP_RULES = [
    Rule("embeddings.class_embedding", "embeddings.cls_token", as_token),
    Rule("embeddings.patch_embedding.{rest}", "embeddings.patch_embeddings.projection.{rest}"),
    Rule("embeddings.position_embedding.weight", POSITIONS, split_positions, axis=1),
    Rule("pre_layrnorm.{rest}", "embeddings.norm.{rest}"),
    *CLIP_LAYER_RULES,
    Rule("post_layernorm.{rest}", "pooler.layernorm.{rest}"),
]


def clip(config: Any, weights: Weights) -> Settings:
    """Normalises before the layers, and afterwards only what is pooled."""
    return common(config, weights) | {"patch_bias": False, "pre_norm": True, "final_norm": False}


SIGLIP_RULES = [
    Rule("embeddings.patch_embedding.{rest}", "embeddings.patch_embeddings.projection.{rest}"),
    Rule("embeddings.position_embedding.weight", POSITIONS, split_positions, axis=1),
    *CLIP_LAYER_RULES,
    Rule("post_layernorm.{rest}", "layernorm.{rest}"),
    Rule("head.probe", "pooler.probe"),
    Rule("head.attention.in_proj_{rest}", [f"pooler.{x}_proj.{{rest}}" for x in "qkv"], in_thirds),
    Rule("head.attention.out_proj.{rest}", "pooler.o_proj.{rest}"),
    Rule("head.layernorm.{rest}", "pooler.transform.layernorm.{rest}"),
    Rule("head.mlp.{rest}", "pooler.transform.{rest}"),
]


def siglip(config: Any, weights: Weights) -> Settings:
    """Patches alone, pooled by attention where the model has its head."""
    return common(config, weights) | {
        "num_cls_tokens": 0,
        "position_embedding_tokens": "patches",
        "pooling": "attention" if "head.probe" in weights else "mean",
    }


def as_channels_last_kernel(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """A projection of flattened patches [D, height * width * C] -> [D, C, height, width]."""
    return [tensor.unflatten(1, (*config.patch_height_width, config.num_channels)).permute(0, 3, 1, 2)]


SIGLIP2_RULES = [
    Rule(
        "embeddings.patch_embedding.weight", "embeddings.patch_embeddings.projection.weight", as_channels_last_kernel
    ),
    *SIGLIP_RULES,
]


def siglip2(config: Any, weights: Weights) -> Settings:
    """Takes patches in place of images: ours takes the images that they are cut from."""
    return siglip(config, weights) | {
        "image_size": isqrt(config.num_patches) * config.patch_size,
        "position_interpolation": "bilinear",
        "position_antialias": True,
    }


def as_query(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """A query that is used without a projection -> probe, identity weight, zero bias."""
    identity = torch.eye(config.hidden_size, dtype=tensor.dtype, device=tensor.device)
    return [tensor, identity, identity.new_zeros(config.hidden_size)]


def with_bias(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """A weight -> itself, and a zero bias unless there is one of its own."""
    return [tensor, tensor.new_zeros(0 if config.qkv_bias else len(tensor))]


# AIMv2 (arXiv 2411.14402).
AIMV2_RULES = [
    Rule("embeddings.patch_embed.{rest}", "embeddings.patch_embeddings.projection.{rest}"),
    Rule("embeddings.rms_norm.{rest}", "embeddings.patch_embeddings.norm.{rest}"),
    Rule("embeddings.position_embedding.weight", POSITIONS, split_positions, axis=1),
    Rule("encoder.layers.{i}.attention.out_proj.{rest}", "layers.{i}.attention.o_proj.{rest}"),
    Rule("encoder.layers.{i}.attention.{rest}", "layers.{i}.attention.{rest}"),
    Rule("encoder.layers.{i}.ffn.{rest}", "layers.{i}.mlp.{rest}"),
    Rule("encoder.layers.{i}.rms_norm1.{rest}", "layers.{i}.layernorm_before.{rest}"),
    Rule("encoder.layers.{i}.rms_norm2.{rest}", "layers.{i}.layernorm_after.{rest}"),
    Rule("rms_norm.{rest}", "layernorm.{rest}"),
    Rule("head.cls_token", ["pooler.probe", "pooler.q_proj.weight", "pooler.q_proj.bias"], as_query),
    Rule("head.k_proj.weight", ["pooler.k_proj.weight", "pooler.k_proj.bias"], with_bias),
    Rule("head.v_proj.weight", ["pooler.v_proj.weight", "pooler.v_proj.bias"], with_bias),
    Rule("head.output_proj.{rest}", "pooler.o_proj.{rest}"),
    Rule("head.{rest}", "pooler.{rest}"),
]


def aimv2(config: Any, weights: Weights) -> Settings:
    """Patches alone, RMS norms, also on the embedded patches, and gated MLPs."""
    return common(config, weights) | {
        "num_cls_tokens": 0,
        "position_embedding_type": "sincos_2d" if config.is_native else "learned",
        "position_embedding_tokens": "patches",
        "norm_type": "rmsnorm",
        "layer_norm_eps": config.rms_norm_eps,
        "patch_norm": True,
        "projection_bias": config.qkv_bias,
        "mlp_type": gated(config),
        "mlp_bias": config.mlp_bias,
        "pooling": "attention" if config.use_head else "mean",
        "attention_pool_mlp": False,
    }


# BEiT (arXiv 2106.08254), data2vec (2202.03555).
BEIT_RULES = [
    Rule("embeddings.position_embeddings", POSITIONS, split_positions, axis=1),
    Rule("embeddings.{rest}", "embeddings.{rest}"),
    Rule("layers.{i}.relative_position_bias.relative_position_bias_table", "view.tables[{i}]"),
    Rule("layers.{i}.lambda_1", "layers.{i}.layer_scale1.lambda1"),
    Rule("layers.{i}.lambda_2", "layers.{i}.layer_scale2.lambda1"),
    Rule("layers.{i}.{rest}", "layers.{i}.{rest}"),
    Rule("shared_position_bias.relative_position_bias_table", "view.tables[0]"),
    Rule("layernorm.{rest}", "layernorm.{rest}"),
    Rule("pooler.layernorm.{rest}", "pooler.layernorm.{rest}"),
]
DATA2VEC_RULES = [
    Rule(
        "encoder.layer.{i}.attention.attention.relative_position_bias.relative_position_bias_table",
        "view.tables[{i}]",
    ),
    Rule("encoder.layer.{i}.attention.attention.query.{rest}", "layers.{i}.attention.q_proj.{rest}"),
    Rule("encoder.layer.{i}.attention.attention.key.{rest}", "layers.{i}.attention.k_proj.{rest}"),
    Rule("encoder.layer.{i}.attention.attention.value.{rest}", "layers.{i}.attention.v_proj.{rest}"),
    Rule("encoder.layer.{i}.attention.output.dense.{rest}", "layers.{i}.attention.o_proj.{rest}"),
    Rule("encoder.layer.{i}.intermediate.dense.{rest}", "layers.{i}.mlp.fc1.{rest}"),
    Rule("encoder.layer.{i}.output.dense.{rest}", "layers.{i}.mlp.fc2.{rest}"),
    Rule("encoder.layer.{i}.lambda_1", "layers.{i}.layer_scale1.lambda1"),
    Rule("encoder.layer.{i}.lambda_2", "layers.{i}.layer_scale2.lambda1"),
    Rule("encoder.layer.{i}.{rest}", "layers.{i}.{rest}"),
    Rule("encoder.relative_position_bias.relative_position_bias_table", "view.tables[0]"),
    *BEIT_RULES,
]


def beit(config: Any, weights: Weights) -> Settings:
    """Relative positions as a bias of attention; absolute ones, or both, on request."""
    require_square(config)
    by_layer = "layer" if config.use_relative_position_bias else None
    shared = "shared" if config.use_shared_relative_position_bias else None
    return common(config, weights) | {
        "key_bias": False,
        "layer_scale_init_value": config.layer_scale_init_value if config.layer_scale_init_value > 0 else None,
        "position_embedding_type": "learned" if config.use_absolute_position_embeddings else "none",
        "relative_position_bias": by_layer or shared or "none",
        "pooling": "mean" if config.use_mean_pooling else "cls",
        "final_norm": not config.use_mean_pooling,
        "pooled_norm": "pooler.layernorm.weight" in weights,
    }


def add_shared_bias(weights: Weights) -> Weights:
    """Where layers have a table of their own and a shared one, which act as their sum: add the shared to each."""
    shared = [name for name in weights if is_shared(name)]
    own = [name for name in weights if name.endswith("relative_position_bias_table") and name not in shared]
    if not shared or not own:
        return weights
    summed = {name: weights[name] + weights[shared[0]] for name in own}
    return {name: tensor for name, tensor in weights.items() if name not in shared} | summed


def is_shared(name: str) -> bool:
    """Whether a table is the one of all layers."""
    return name.startswith(("shared_position_bias.", "encoder.relative_position_bias."))


def split_special_tokens(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """CLS and register tokens [n, D] -> [1, CLS, D], [1, registers, D]."""
    layout = config.token_layout
    return [tensor[None, layout.cls], tensor[None, layout.registers]]


def as_kernel(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """A projection of flattened patches [D, C * height * width] -> [D, C, height, width]."""
    return [tensor.unflatten(1, (config.num_channels, *config.patch_height_width))]


# RADIO (arXiv 2312.06709).
RADIO_RULES = [
    Rule("embeddings.patch_projection.weight", "embeddings.patch_embeddings.projection.weight", as_kernel),
    Rule("embeddings.patch_projection.bias", "embeddings.patch_embeddings.projection.bias"),
    Rule("embeddings.position_embedding", POSITIONS, split_positions, axis=1),
    Rule(
        "embeddings.cls_register_token", ["embeddings.cls_token", "embeddings.register_tokens"], split_special_tokens
    ),
    *DINOV2_LAYER_RULES,
    Rule("summary_idxs", []),
]


def radio(config: Any, weights: Weights) -> Settings:
    """Several CLS tokens, of which some are concatenated; positions for the largest image, cut to the actual one."""
    if "embeddings.video_patch_projection.weight" in weights:
        raise ConversionError("video_patch_projection: a second patch projection, for videos, is missing here")
    return (
        common(config, weights)
        | dinov2_layers(config)
        | {
            "image_size": whole_patches(config.max_img_size, config.patch_size),
            "num_cls_tokens": config.num_cls_tokens,
            "num_register_tokens": config.num_registers,
            "cls_pooling": "concat",
            "pooled_cls_tokens": weights["summary_idxs"].tolist(),
            "position_embedding_tokens": "patches",
            "position_interpolation": "crop",
            "patch_bias": "input_conditioner.norm_mean" in weights,
            "final_norm": False,
        }
    )


def fold_conditioner(weights: Weights) -> Weights:
    """Put the normalisation of pixels, (x - mean) / std, into the patch projection; computed in float64."""
    if "input_conditioner.norm_mean" not in weights:  # detached by the user
        return weights
    rest = dict(weights)
    mean = rest.pop("input_conditioner.norm_mean").double().flatten()  # [C]
    std = rest.pop("input_conditioner.norm_std").double().flatten()
    old = weights["embeddings.patch_projection.weight"]  # [D, C * height * width]
    kernel = old.double().unflatten(1, (len(mean), -1)) / std[:, None]  # [D, C, height * width]
    bias = -(kernel * mean[:, None]).sum(dim=(1, 2))  # [D]
    return rest | {
        "embeddings.patch_projection.weight": kernel.flatten(1).to(old.dtype),
        "embeddings.patch_projection.bias": bias.to(old.dtype),
    }


VIT = Family(VIT_RULES, vit)
DEIT = Family(VIT_RULES, deit)
IJEPA = Family(VIT_RULES, ijepa)
PIXIO = Family(VIT_RULES, pixio)
DINOV2 = Family(DINOV2_RULES, dinov2)
DINOV2_WITH_REGISTERS = Family(DINOV2_RULES, dinov2_with_registers)
DINOV3 = Family(DINOV3_RULES, dinov3)
CLIP = Family(CLIP_RULES, clip)
SIGLIP = Family(SIGLIP_RULES, siglip)
SIGLIP2 = Family(SIGLIP2_RULES, siglip2)
AIMV2 = Family(AIMV2_RULES, aimv2)
BEIT = Family(BEIT_RULES, beit, add_shared_bias)
DATA2VEC = Family(DATA2VEC_RULES, beit, add_shared_bias)
RADIO = Family(RADIO_RULES, radio, fold_conditioner)

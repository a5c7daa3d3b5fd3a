"""Convert ViTs from timm.

The classes are `VisionTransformer`, `VisionTransformerDistilled` (DeiT) and `Eva` (EVA, PE, DINOv3,
...).

    model = convert_timm_model(timm.create_model("vit_base_patch16_clip_224.openai", pretrained=True))

timm_modules.py reads the configuration from the modules. This file contains the rules for parameter
names, and exact rewrites that involve several parameters:

    differential attention  the lambda vectors become the weight of the second attention map
    interleaved rotary      channel pairs (0, 1), (2, 3), ... become (0, half), (1, half + 1), ...

The first rewrite keeps timm's parameter names and is applied before the rules, the second one after
them.
"""

import re
from collections.abc import Sequence

from torch import Tensor, nn

from ..model.configuration_vitcls import ViTCLSConfig
from ..model.modeling_vitcls import ViTCLSPreTrainedModel
from .timm_modules import TimmModule, get_class_name, is_present, read_config_fields
from .weight_rules import (
    LAYER_SCALES,
    POSITIONS,
    ConversionError,
    Rule,
    Weights,
    append_ones,
    append_zero_bias,
    build_converted_model,
    convert_weights,
    repeat_kv,
    split_positions,
)


TIMM_CLASSES = ("VisionTransformer", "VisionTransformerDistilled", "Eva")
TIMM_MODULES = ("vision_transformer", "deit", "eva")  # Modules of timm.models with these classes


def convert_timm_model(model: nn.Module) -> ViTCLSPreTrainedModel:
    """Convert a timm ViT as `convert_from_timm` does, without comparing outputs."""
    config, weights = read_timm_model(model)
    return build_converted_model(config, weights, add_pooling_layer=has_pooler(model))


def read_timm_model(model: nn.Module) -> tuple[ViTCLSConfig, Weights]:
    """Read the configuration and the converted weights of a timm ViT.

    Raise ConversionError if the class or a feature is not supported.
    """
    if get_class_name(model) not in TIMM_CLASSES or not type(model).__module__.startswith("timm."):
        hint = f"{model!r}. Set model=timm.create_model({model!r})"
        found = hint if isinstance(model, str) else get_class_name(model)
        raise ConversionError(
            f"the model must be one of {', '.join(TIMM_CLASSES)} of timm, but it is {found}"
        )

    try:
        config = ViTCLSConfig(**read_config_fields(model))
    except ValueError as error:
        raise ConversionError(str(error)) from None
    weights = convert_weights(rewrite_state_dict(model), build_rules(model), config)
    return config, deinterleave_rotary_channels(weights, model, config)


def has_pooler(model: TimmModule) -> bool:
    """Check whether a timm model has one pooled output.

    A model with a distillation token has two.
    """
    return bool(model.global_pool) and getattr(model, "dist_token", None) is None


def rewrite_state_dict(model: TimmModule) -> Weights:
    """Rewrite differential attention, which new names alone do not convert."""
    weights: Weights = model.state_dict()
    for index, block in enumerate(model.blocks):
        # A parallel block is its own attention module
        attention = getattr(block, "attn", block)
        if hasattr(attention, "lambda_q1"):
            prefix = f"blocks.{index}." if attention is block else f"blocks.{index}.attn."
            fold_differential_lambda(weights, prefix, attention.lambda_init)
    return weights


def fold_differential_lambda(weights: Weights, prefix: str, lambda_init: float) -> None:
    """Replace the four lambda vectors with the weight of the second attention map."""
    products = [
        weights.pop(f"{prefix}lambda_q{n}") * weights.pop(f"{prefix}lambda_k{n}") for n in "12"
    ]
    lambda_1, lambda_2 = (product.double().sum().reshape(1) for product in products)
    scale = weights[f"{prefix}sub_norm.weight"]
    lambda_full = lambda_1.exp() - lambda_2.exp() + lambda_init
    weights[f"{prefix}lambda_full"] = lambda_full.to(scale.dtype)
    # timm multiplies by this factor after the norm; here, the weights of the norm contain it.
    weights[f"{prefix}sub_norm.weight"] = scale * (1 - lambda_init)


def deinterleave_rotary_channels(
    weights: Weights, model: TimmModule, config: ViTCLSConfig
) -> Weights:
    """Move the even channels of queries and keys to the front of each head.

    This is for rotary position embeddings that rotate pairs of adjacent channels. The attention
    scores are unchanged.
    """
    if getattr(model, "rope", None) is None or getattr(model.blocks[0].attn, "rotate_half", False):
        return weights
    reordered_weights = dict(weights)
    for name, tensor in weights.items():
        if re.fullmatch(r"layers\.\d+\.attention\.[qk]_(proj|norm)\.(weight|bias)", name):
            pairs = tensor.unflatten(0, (-1, config.head_dim // 2, 2))  # [heads, pairs, 2, ...]
            reordered_weights[name] = pairs.transpose(1, 2).flatten(0, 2)
    return reordered_weights


# Rules for parameter names ------------------------------------------------------------------------


QKV_NAMES = [f"layers.{{i}}.attention.{letter}_proj.{{rest}}" for letter in "qkv"]


def split_mlp_qkv(tensor: Tensor, config: ViTCLSConfig) -> Sequence[Tensor]:
    """Split the input projection [mlp + 3 * D, ...] of a parallel block.

    The parts are the projections of the MLP, the queries, the keys and the values.
    """
    mlp, qkv = tensor.tensor_split([config.intermediate_size])
    return [mlp, *qkv.chunk(3)]


STEM_RULES = [
    Rule("cls_token", "embeddings.cls_token"),
    Rule("dist_token", "embeddings.distillation_token"),
    Rule("reg_token", "embeddings.register_tokens"),
    Rule("pos_embed", POSITIONS, split_positions),
    Rule("patch_embed.proj.{rest}", "embeddings.patch_embeddings.projection.{rest}"),
    Rule("patch_embed.norm.{rest}", "embeddings.patch_embeddings.norm.{rest}"),
    Rule("norm_pre.{rest}", "embeddings.norm.{rest}"),
    Rule("rope.freqs", "rotary_positions.frequencies"),
]

BLOCK_RULES = [
    Rule("blocks.{i}.(norm1|in_norm).{rest}", "layers.{i}.layernorm_before.{rest}"),
    Rule("blocks.{i}.norm2.{rest}", "layers.{i}.layernorm_after.{rest}"),
    Rule("blocks.{i}.attn.qkv.{rest}", QKV_NAMES),
    Rule("blocks.{i}.attn.q_proj.{rest}", "layers.{i}.attention.q_proj.{rest}"),
    Rule("blocks.{i}.attn.{x}_bias", "layers.{i}.attention.{x}_proj.bias"),
    # k_proj, v_proj
    Rule("blocks.{i}.attn.{x}_proj.{rest}", "layers.{i}.attention.{x}_proj.{rest}", repeat_kv),
    Rule("blocks.{i}.(attn.)?sub_norm.{rest}", "layers.{i}.attention.head_norm.{rest}"),
    Rule("blocks.{i}.(attn.proj|attn_out_proj).{rest}", "layers.{i}.attention.o_proj.{rest}"),
    # lambda_full, norm, q_norm, k_norm
    Rule("blocks.{i}.attn.{rest}", "layers.{i}.attention.{rest}"),
    Rule("blocks.{i}.ls{n}.gamma", "layers.{i}.layer_scale{n}.lambda1"),  # VisionTransformer
    Rule("blocks.{i}.gamma_{n}", "layers.{i}.layer_scale{n}.lambda1"),  # Eva
    Rule("blocks.{i}.mlp.fc1_g.{rest}", "layers.{i}.mlp.gate_proj.{rest}"),
    Rule("blocks.{i}.mlp.fc1_x.{rest}", "layers.{i}.mlp.up_proj.{rest}"),
    Rule("blocks.{i}.mlp.norm.{rest}", "layers.{i}.mlp.norm.{rest}"),
]

PARALLEL_RULES = [
    Rule("blocks.{i}.in_proj.{rest}", ["layers.{i}.mlp.fc1.{rest}", *QKV_NAMES], split_mlp_qkv),
    Rule("blocks.{i}.mlp_bias", "layers.{i}.mlp.fc1.bias"),
    Rule("blocks.{i}.{x}_norm.{rest}", "layers.{i}.attention.{x}_norm.{rest}"),  # q_norm, k_norm
    Rule("blocks.{i}.lambda_full", "layers.{i}.attention.lambda_full"),
    Rule("blocks.{i}.mlp_out_proj.{rest}", "layers.{i}.mlp.fc2.{rest}"),
    Rule(
        "blocks.{i}.out_proj.weight",
        ["layers.{i}.attention.o_proj.weight", "layers.{i}.mlp.fc2.weight"],
        lambda tensor, config: tensor.tensor_split([config.hidden_size], dim=1),
    ),
    Rule(
        "blocks.{i}.out_proj.bias",
        ["layers.{i}.attention.o_proj.bias", "layers.{i}.mlp.fc2.bias"],
        append_zero_bias,
    ),
    Rule("blocks.{i}.ls.gamma", "layers.{i}.layer_scale1.lambda1"),
]


HEAD_RULES = [
    Rule("norm.{rest}", "layernorm.{rest}"),
    Rule("fc_norm.{rest}", "pooler.layernorm.{rest}"),
    Rule("head.{rest}", "classifier.{rest}"),
    Rule("head_dist.{rest}", "distillation_classifier.{rest}"),
]


def build_attention_pool_rules(prefix: str) -> list[Rule]:
    """Build the rules of attention pooling. `prefix` is the name of the module in this package."""
    return [
        Rule("attn_pool.latent", f"{prefix}.probe"),
        Rule("attn_pool.q.{rest}", f"{prefix}.q_proj.{{rest}}"),
        Rule("attn_pool.kv.{rest}", [f"{prefix}.k_proj.{{rest}}", f"{prefix}.v_proj.{{rest}}"]),
        Rule("attn_pool.proj.{rest}", f"{prefix}.o_proj.{{rest}}"),
        Rule("attn_pool.norm.{rest}", f"{prefix}.transform.layernorm.{{rest}}"),
        Rule("attn_pool.mlp.{rest}", f"{prefix}.transform.{{rest}}"),
    ]


def build_mlp_rules(mlp: TimmModule) -> list[Rule]:
    """Build the rules of the first and last layer of an MLP.

    `GluMlp` fuses the gate with the first layer. `mlp` is None for a plain MLP that is fused with
    attention or merged from branches.
    """
    if get_class_name(mlp) not in ("GluMlp", "SwiGLU"):
        return [
            Rule(f"blocks.{{i}}.mlp.fc{n}.{{rest}}", f"layers.{{i}}.mlp.fc{n}.{{rest}}")
            for n in (1, 2)
        ]
    gated_names = ["layers.{i}.mlp.gate_proj.{rest}", "layers.{i}.mlp.up_proj.{rest}"]
    return [
        Rule(
            "blocks.{i}.mlp.fc1.{rest}",
            gated_names[:: -1 if getattr(mlp, "gate_last", False) else 1],
        ),
        Rule("blocks.{i}.mlp.fc2.{rest}", "layers.{i}.mlp.down_proj.{rest}"),
    ]


def build_rules(model: TimmModule) -> list[Rule]:
    """Build the weight conversion rules of a timm model."""
    block = model.blocks[0]
    layer_scale_rules = []
    if getattr(block, "gamma_1", None) is not None and block.gamma_2 is None:
        # Only attention has a layer scale.
        layer_scale_rules = [Rule("blocks.{i}.gamma_1", LAYER_SCALES, append_ones)]
    return [
        *STEM_RULES,
        *layer_scale_rules,
        *BLOCK_RULES,
        *PARALLEL_RULES,
        *build_mlp_rules(getattr(block, "mlp", None)),
        *HEAD_RULES,
        *build_attention_pool_rules("pooler.pooler" if is_present(model.fc_norm) else "pooler"),
    ]

"""Rules for the parameter names of timm. The modules are read in timm_modules.py.

Rewrites that involve several parameters are in from_timm.py.
"""

from collections.abc import Sequence

import torch

from ..configuration_vitcls import ViTCLSConfig
from .timm_modules import TimmModule, get_class_name, is_present
from .weight_rules import POSITIONS, Rule, append_zero_bias, split_halves, split_positions, split_qkv


QKV = [f"layers.{{i}}.attention.{letter}_proj.{{rest}}" for letter in "qkv"]
GATED_MLP = ["layers.{i}.mlp.gate_proj.{rest}", "layers.{i}.mlp.up_proj.{rest}"]
LAYER_SCALES = ["layers.{i}.layer_scale1.lambda1", "layers.{i}.layer_scale2.lambda1"]


def split_halves_swapped(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """Split two fused projections [2 * D, ...] into two tensors [D, ...], second half first."""
    return tensor.chunk(2)[::-1]


def repeat_kv(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """Repeat the key or value heads [heads * head_dim, ...] of grouped-query attention for every query head."""
    heads = tensor.unflatten(0, (-1, config.head_dim))
    return [heads.repeat_interleave(config.num_attention_heads // len(heads), dim=0).flatten(0, 1)]


def split_mlp_qkv(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """Split the input projection of a parallel block [mlp + 3 * D, ...] into MLP, query, key and value."""
    mlp, qkv = tensor.tensor_split([config.intermediate_size])
    return [mlp, *qkv.chunk(3)]


def split_attention_mlp(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """Split the output projection of a parallel block [D, D + mlp] into attention and MLP."""
    return tensor.tensor_split([config.hidden_size], dim=1)


def append_unit_scale(tensor: torch.Tensor, config: ViTCLSConfig) -> Sequence[torch.Tensor]:
    """Return the LayerScale of attention, and LayerScale values of 1 for the MLP."""
    return [tensor, torch.ones_like(tensor)]


STEM_RULES = [
    Rule("cls_token", "embeddings.cls_token"),
    Rule("dist_token", "embeddings.distillation_token"),
    Rule("reg_token", "embeddings.register_tokens"),
    Rule("pos_embed", POSITIONS, split_positions, axis=1),
    Rule("patch_embed.proj.{rest}", "embeddings.patch_embeddings.projection.{rest}"),
    Rule("patch_embed.norm.{rest}", "embeddings.patch_embeddings.norm.{rest}"),
    Rule("norm_pre.{rest}", "embeddings.norm.{rest}"),
    Rule("rope.freqs", "rotary_positions.frequencies"),
]

BLOCK_RULES = [
    Rule("blocks.{i}.norm1.{rest}", "layers.{i}.layernorm_before.{rest}"),
    Rule("blocks.{i}.norm2.{rest}", "layers.{i}.layernorm_after.{rest}"),
    Rule("blocks.{i}.attn.qkv.{rest}", QKV, split_qkv),
    Rule("blocks.{i}.attn.q_bias", "layers.{i}.attention.q_proj.bias"),
    Rule("blocks.{i}.attn.v_bias", "layers.{i}.attention.v_proj.bias"),
    Rule("blocks.{i}.attn.q_proj.{rest}", "layers.{i}.attention.q_proj.{rest}"),
    Rule("blocks.{i}.attn.k_proj.{rest}", "layers.{i}.attention.k_proj.{rest}", repeat_kv),
    Rule("blocks.{i}.attn.v_proj.{rest}", "layers.{i}.attention.v_proj.{rest}", repeat_kv),
    Rule("blocks.{i}.attn.q_norm.{rest}", "layers.{i}.attention.q_norm.{rest}"),
    Rule("blocks.{i}.attn.k_norm.{rest}", "layers.{i}.attention.k_norm.{rest}"),
    Rule("blocks.{i}.attn.second_share", "layers.{i}.attention.second_share"),
    Rule("blocks.{i}.attn.sub_norm.{rest}", "layers.{i}.attention.head_norm.{rest}"),
    Rule("blocks.{i}.attn.norm.{rest}", "layers.{i}.attention.norm.{rest}"),
    Rule("blocks.{i}.attn.proj.{rest}", "layers.{i}.attention.o_proj.{rest}"),
    Rule("blocks.{i}.ls{n}.gamma", "layers.{i}.layer_scale{n}.lambda1"),  # VisionTransformer
    Rule("blocks.{i}.gamma_{n}", "layers.{i}.layer_scale{n}.lambda1"),  # Eva
]

PARALLEL_RULES = [
    Rule("blocks.{i}.in_norm.{rest}", "layers.{i}.layernorm_before.{rest}"),
    Rule("blocks.{i}.in_proj.{rest}", ["layers.{i}.mlp.fc1.{rest}", *QKV], split_mlp_qkv),
    Rule("blocks.{i}.mlp_bias", "layers.{i}.mlp.fc1.bias"),
    Rule("blocks.{i}.q_norm.{rest}", "layers.{i}.attention.q_norm.{rest}"),
    Rule("blocks.{i}.k_norm.{rest}", "layers.{i}.attention.k_norm.{rest}"),
    Rule("blocks.{i}.second_share", "layers.{i}.attention.second_share"),
    Rule("blocks.{i}.sub_norm.{rest}", "layers.{i}.attention.head_norm.{rest}"),
    Rule("blocks.{i}.attn_out_proj.{rest}", "layers.{i}.attention.o_proj.{rest}"),
    Rule("blocks.{i}.mlp_out_proj.{rest}", "layers.{i}.mlp.fc2.{rest}"),
    Rule(
        "blocks.{i}.out_proj.weight",
        ["layers.{i}.attention.o_proj.weight", "layers.{i}.mlp.fc2.weight"],
        split_attention_mlp,
        axis=1,
    ),
    Rule(
        "blocks.{i}.out_proj.bias", ["layers.{i}.attention.o_proj.bias", "layers.{i}.mlp.fc2.bias"], append_zero_bias
    ),
    Rule("blocks.{i}.ls.gamma", "layers.{i}.layer_scale1.lambda1"),
]

MLP_NORM = Rule("blocks.{i}.mlp.norm.{rest}", "layers.{i}.mlp.norm.{rest}")
MLP_DOWN = Rule("blocks.{i}.mlp.fc2.{rest}", "layers.{i}.mlp.down_proj.{rest}")
# Rules by the class of the MLP and, if its first layer is fused, by the position of the gate.
MLP_RULES = {
    "Mlp": [
        Rule("blocks.{i}.mlp.fc1.{rest}", "layers.{i}.mlp.fc1.{rest}"),
        Rule("blocks.{i}.mlp.fc2.{rest}", "layers.{i}.mlp.fc2.{rest}"),
        MLP_NORM,
    ],
    "GluMlp, gate first": [Rule("blocks.{i}.mlp.fc1.{rest}", GATED_MLP, split_halves), MLP_DOWN, MLP_NORM],
    "GluMlp, gate last": [Rule("blocks.{i}.mlp.fc1.{rest}", GATED_MLP, split_halves_swapped), MLP_DOWN, MLP_NORM],
    "SwiGLU": [
        Rule("blocks.{i}.mlp.fc1_g.{rest}", "layers.{i}.mlp.gate_proj.{rest}"),
        Rule("blocks.{i}.mlp.fc1_x.{rest}", "layers.{i}.mlp.up_proj.{rest}"),
        MLP_DOWN,
        MLP_NORM,
    ],
}

ATTENTION_SCALE_RULES = [Rule("blocks.{i}.gamma_1", LAYER_SCALES, append_unit_scale)]


def build_head_rules(attention_pool: str) -> list[Rule]:
    """Build the rules for modules after the blocks; `attention_pool` is the name of the attention pooler."""
    return [
        Rule("norm.{rest}", "layernorm.{rest}"),
        Rule("attn_pool.latent", f"{attention_pool}.probe"),
        Rule("attn_pool.q.{rest}", f"{attention_pool}.q_proj.{{rest}}"),
        Rule(
            "attn_pool.kv.{rest}",
            [f"{attention_pool}.k_proj.{{rest}}", f"{attention_pool}.v_proj.{{rest}}"],
            split_halves,
        ),
        Rule("attn_pool.proj.{rest}", f"{attention_pool}.o_proj.{{rest}}"),
        Rule("attn_pool.norm.{rest}", f"{attention_pool}.transform.layernorm.{{rest}}"),
        Rule("attn_pool.mlp.{rest}", f"{attention_pool}.transform.{{rest}}"),
        Rule("fc_norm.{rest}", "pooler.layernorm.{rest}"),
        Rule("head.{rest}", "classifier.{rest}"),
        Rule("head_dist.{rest}", "distillation_classifier.{rest}"),
    ]


def build_rules(model: TimmModule) -> list[Rule]:
    """Build the rules for the modules of a model."""
    block = model.blocks[0]
    pooler = "pooler.pooler" if is_present(model.fc_norm) else "pooler"
    attention_only_scale = getattr(block, "gamma_1", None) is not None and block.gamma_2 is None
    return [
        *STEM_RULES,
        *(ATTENTION_SCALE_RULES if attention_only_scale else []),
        *BLOCK_RULES,
        *PARALLEL_RULES,
        *MLP_RULES[get_mlp_key(getattr(block, "mlp", None))],
        *build_head_rules(pooler),
    ]


def get_mlp_key(mlp: TimmModule) -> str:
    """Return a key of `MLP_RULES`. Blocks that fuse the MLP with attention have a plain MLP."""
    if get_class_name(mlp) == "GluMlp":
        return f"GluMlp, gate {'last' if mlp.gate_last else 'first'}"
    return "Mlp" if mlp is None else get_class_name(mlp)

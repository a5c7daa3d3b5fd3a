"""timm's parameter names -> ours. The modules that the names belong to are read in timm_modules.py.

What needs more than one parameter at a time is rewritten before or after by from_timm.py.
"""

import torch

from ..configuration_vitcls import ViTCLSConfig
from .timm_modules import TimmModule, class_name, is_present
from .weight_rules import POSITIONS, Rule, in_thirds, split_positions


QKV = [f"layers.{{i}}.attention.{letter}_proj.{{rest}}" for letter in "qkv"]
GATED_MLP = ["layers.{i}.mlp.gate_proj.{rest}", "layers.{i}.mlp.up_proj.{rest}"]
LAYER_SCALES = ["layers.{i}.layer_scale1.lambda1", "layers.{i}.layer_scale2.lambda1"]


def in_halves(tensor: torch.Tensor, config: ViTCLSConfig) -> list[torch.Tensor]:
    """Two projections in one, [2 * D, ...] -> two."""
    return list(tensor.chunk(2))


def in_halves_swapped(tensor: torch.Tensor, config: ViTCLSConfig) -> list[torch.Tensor]:
    """As `in_halves`, the second half first."""
    return list(tensor.chunk(2))[::-1]


def for_every_head(tensor: torch.Tensor, config: ViTCLSConfig) -> list[torch.Tensor]:
    """Keys or values [heads * head_dim, ...] of fewer heads (grouped-query attention), repeated for each query."""
    heads = tensor.unflatten(0, (-1, config.head_dim))
    return [heads.repeat_interleave(config.num_attention_heads // len(heads), dim=0).flatten(0, 1)]


def mlp_and_thirds(tensor: torch.Tensor, config: ViTCLSConfig) -> list[torch.Tensor]:
    """The input projection of a parallel block [mlp + 3 * D, ...] -> MLP, query, key, value."""
    mlp, qkv = tensor.tensor_split([config.intermediate_size])
    return [mlp, *qkv.chunk(3)]


def attention_and_mlp(tensor: torch.Tensor, config: ViTCLSConfig) -> list[torch.Tensor]:
    """The output projection of a parallel block [D, D + mlp] -> attention, MLP."""
    return list(tensor.tensor_split([config.hidden_size], dim=1))


def and_zeros(tensor: torch.Tensor, config: ViTCLSConfig) -> list[torch.Tensor]:
    """One bias of a sum is enough."""
    return [tensor, torch.zeros_like(tensor)]


def and_ones(tensor: torch.Tensor, config: ViTCLSConfig) -> list[torch.Tensor]:
    """A LayerScale of attention, and one of the MLP that changes nothing."""
    return [tensor, torch.ones_like(tensor)]


STEM = [
    Rule("cls_token", "embeddings.cls_token"),
    Rule("dist_token", "embeddings.distillation_token"),
    Rule("reg_token", "embeddings.register_tokens"),
    Rule("pos_embed", POSITIONS, split_positions, axis=1),
    Rule("patch_embed.proj.{rest}", "embeddings.patch_embeddings.projection.{rest}"),
    Rule("patch_embed.norm.{rest}", "embeddings.patch_embeddings.norm.{rest}"),
    Rule("norm_pre.{rest}", "embeddings.norm.{rest}"),
    Rule("rope.freqs", "rotary_positions.frequencies"),
]

BLOCKS = [
    Rule("blocks.{i}.norm1.{rest}", "layers.{i}.layernorm_before.{rest}"),
    Rule("blocks.{i}.norm2.{rest}", "layers.{i}.layernorm_after.{rest}"),
    Rule("blocks.{i}.attn.qkv.{rest}", QKV, in_thirds),
    Rule("blocks.{i}.attn.q_bias", "layers.{i}.attention.q_proj.bias"),
    Rule("blocks.{i}.attn.v_bias", "layers.{i}.attention.v_proj.bias"),
    Rule("blocks.{i}.attn.q_proj.{rest}", "layers.{i}.attention.q_proj.{rest}"),
    Rule("blocks.{i}.attn.k_proj.{rest}", "layers.{i}.attention.k_proj.{rest}", for_every_head),
    Rule("blocks.{i}.attn.v_proj.{rest}", "layers.{i}.attention.v_proj.{rest}", for_every_head),
    Rule("blocks.{i}.attn.q_norm.{rest}", "layers.{i}.attention.q_norm.{rest}"),
    Rule("blocks.{i}.attn.k_norm.{rest}", "layers.{i}.attention.k_norm.{rest}"),
    Rule("blocks.{i}.attn.second_share", "layers.{i}.attention.second_share"),
    Rule("blocks.{i}.attn.sub_norm.{rest}", "layers.{i}.attention.head_norm.{rest}"),
    Rule("blocks.{i}.attn.norm.{rest}", "layers.{i}.attention.norm.{rest}"),
    Rule("blocks.{i}.attn.proj.{rest}", "layers.{i}.attention.o_proj.{rest}"),
    Rule("blocks.{i}.ls{n}.gamma", "layers.{i}.layer_scale{n}.lambda1"),  # VisionTransformer
    Rule("blocks.{i}.gamma_{n}", "layers.{i}.layer_scale{n}.lambda1"),  # Eva
]

PARALLEL_BLOCKS = [
    Rule("blocks.{i}.in_norm.{rest}", "layers.{i}.layernorm_before.{rest}"),
    Rule("blocks.{i}.in_proj.{rest}", ["layers.{i}.mlp.fc1.{rest}", *QKV], mlp_and_thirds),
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
        attention_and_mlp,
        axis=1,
    ),
    Rule("blocks.{i}.out_proj.bias", ["layers.{i}.attention.o_proj.bias", "layers.{i}.mlp.fc2.bias"], and_zeros),
    Rule("blocks.{i}.ls.gamma", "layers.{i}.layer_scale1.lambda1"),
]

# By the kind of MLP: its class, and for a packed one where the gate is.
MLPS = {
    "Mlp": [
        Rule("blocks.{i}.mlp.fc1.{rest}", "layers.{i}.mlp.fc1.{rest}"),
        Rule("blocks.{i}.mlp.fc2.{rest}", "layers.{i}.mlp.fc2.{rest}"),
        Rule("blocks.{i}.mlp.norm.{rest}", "layers.{i}.mlp.norm.{rest}"),
    ],
    "GluMlp, gate first": [
        Rule("blocks.{i}.mlp.fc1.{rest}", GATED_MLP, in_halves),
        Rule("blocks.{i}.mlp.fc2.{rest}", "layers.{i}.mlp.down_proj.{rest}"),
        Rule("blocks.{i}.mlp.norm.{rest}", "layers.{i}.mlp.norm.{rest}"),
    ],
    "GluMlp, gate last": [
        Rule("blocks.{i}.mlp.fc1.{rest}", GATED_MLP, in_halves_swapped),
        Rule("blocks.{i}.mlp.fc2.{rest}", "layers.{i}.mlp.down_proj.{rest}"),
        Rule("blocks.{i}.mlp.norm.{rest}", "layers.{i}.mlp.norm.{rest}"),
    ],
    "SwiGLU": [
        Rule("blocks.{i}.mlp.fc1_g.{rest}", "layers.{i}.mlp.gate_proj.{rest}"),
        Rule("blocks.{i}.mlp.fc1_x.{rest}", "layers.{i}.mlp.up_proj.{rest}"),
        Rule("blocks.{i}.mlp.fc2.{rest}", "layers.{i}.mlp.down_proj.{rest}"),
        Rule("blocks.{i}.mlp.norm.{rest}", "layers.{i}.mlp.norm.{rest}"),
    ],
}

ATTENTION_ONLY_LAYER_SCALE = [Rule("blocks.{i}.gamma_1", LAYER_SCALES, and_ones)]


def head_rules(attention_pool: str) -> list[Rule]:
    """Names behind the blocks; `attention_pool` is ours of an attention pooler."""
    return [
        Rule("norm.{rest}", "layernorm.{rest}"),
        Rule("attn_pool.latent", f"{attention_pool}.probe"),
        Rule("attn_pool.q.{rest}", f"{attention_pool}.q_proj.{{rest}}"),
        Rule(
            "attn_pool.kv.{rest}",
            [f"{attention_pool}.k_proj.{{rest}}", f"{attention_pool}.v_proj.{{rest}}"],
            in_halves,
        ),
        Rule("attn_pool.proj.{rest}", f"{attention_pool}.o_proj.{{rest}}"),
        Rule("attn_pool.norm.{rest}", f"{attention_pool}.transform.layernorm.{{rest}}"),
        Rule("attn_pool.mlp.{rest}", f"{attention_pool}.transform.{{rest}}"),
        Rule("fc_norm.{rest}", "pooler.layernorm.{rest}"),
        Rule("head.{rest}", "classifier.{rest}"),
        Rule("head_dist.{rest}", "distillation_classifier.{rest}"),
    ]


def rules_for(model: TimmModule) -> list[Rule]:
    """The rules for this model's modules."""
    block = model.blocks[0]
    pooler = "pooler.pooler" if is_present(model.fc_norm) else "pooler"
    attention_only_scale = getattr(block, "gamma_1", None) is not None and block.gamma_2 is None
    return [
        *STEM,
        *(ATTENTION_ONLY_LAYER_SCALE if attention_only_scale else []),
        *BLOCKS,
        *PARALLEL_BLOCKS,
        *MLPS[kind_of_mlp(getattr(block, "mlp", None))],
        *head_rules(pooler),
    ]


def kind_of_mlp(mlp: TimmModule) -> str:
    """A key of `MLPS`. Blocks that fuse theirs with attention have a plain one."""
    if class_name(mlp) == "GluMlp":
        return f"GluMlp, gate {'last' if mlp.gate_last else 'first'}"
    return "Mlp" if mlp is None else class_name(mlp)

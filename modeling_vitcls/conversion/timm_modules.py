"""timm's modules -> fields of `ViTCLSConfig`.

A model is read from its modules and their shapes, not from its name, so that any `timm.create_model(..., **kwargs)`
converts. Modules are known by the name of their class; timm itself is never imported. What cannot be held exactly is
refused here, by name. How the weights are named is in timm_tables.py.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from .weight_rules import ConversionError


Fields = dict[str, Any]
TimmModule = Any  # a model or layer of timm's, whose attributes no type here describes

NORMS = {"LayerNorm": "layernorm", "RmsNorm": "rmsnorm", "RMSNorm": "rmsnorm"}

ACTIVATIONS = {
    "GELU": "gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "QuickGELU": "quick_gelu",
    "ReLU": "relu",
    "SiLU": "silu",
}

POOLINGS = {"token": "cls", "avg": "mean", "max": "max", "map": "attention"}


def read_model(model: TimmModule) -> Fields:
    """The configuration of a `VisionTransformer`, `VisionTransformerDistilled` or `Eva`.

    Raises:
        ConversionError: for a model that ours cannot hold; it names the feature that is missing.
    """
    blocks = read_blocks(model)
    return {
        **read_image_and_patches(model),
        **read_tokens(model),
        **read_positions(model),
        **read_rotary_positions(model),
        **read_norms(model),
        **blocks,
        "drop_path_rate": read_drop_path_rate(model.blocks[-1]),
        **read_pooling(model, blocks.get("hidden_act")),
        **read_labels(model),
    }


def read_image_and_patches(model: TimmModule) -> Fields:
    """Image, patches and their projection. The image is as large as its whole patches: timm ignores what is beyond."""
    embedding = model.patch_embed
    require(class_name(embedding) == "PatchEmbed", f"patch embedding {class_name(embedding)}")
    require(not embedding.dynamic_img_pad, "dynamic_img_pad, which fills images up to whole patches")
    height, width = embedding.patch_size
    rows, columns = embedding.grid_size
    return {
        "image_size": square_or_pair(rows * height, columns * width),
        "patch_size": square_or_pair(height, width),
        "num_channels": embedding.proj.in_channels,
        "hidden_size": embedding.proj.out_channels,
        "patch_bias": embedding.proj.bias is not None,
        "patch_norm": is_present(embedding.norm),
        "pre_norm": is_present(model.norm_pre),
    }


def read_tokens(model: TimmModule) -> Fields:
    """How many special tokens there are."""
    registers = getattr(model, "reg_token", None)
    distilled = getattr(model, "dist_token", None) is not None
    require(not (distilled and registers is not None), "registers beside a distillation token")
    return {
        "num_cls_tokens": int(model.cls_token is not None),
        "num_distillation_tokens": int(distilled),
        "num_register_tokens": 0 if registers is None else registers.shape[1],
    }


def read_positions(model: TimmModule) -> Fields:
    """Learned positions. timm resamples them bicubically with antialiasing."""
    if model.pos_embed is None:
        return {"position_embedding_type": "none"}
    tokens = read_tokens(model)
    others = tokens["num_distillation_tokens"] + tokens["num_register_tokens"]
    if model.no_embed_class or not (others or tokens["num_cls_tokens"]):
        positioned = "patches"
    else:
        positioned = "all" if others else "cls"
    return {
        "position_embedding_type": "learned",
        "position_embedding_tokens": positioned,
        "position_interpolation": "bicubic",
        "position_antialias": True,
    }


def read_rotary_positions(model: TimmModule) -> Fields:
    """Rotary positions, in place of learned ones or beside them."""
    rope = getattr(model, "rope", None)
    if rope is None:
        return {}
    name = class_name(rope)
    require(name in ROTARY_POSITIONS, f"rotary positions {name}")
    kind = "rope_mixed" if name == "RotaryEmbeddingMixed" else "rope_2d"
    return {
        "position_embedding_type": kind if model.pos_embed is None else f"learned_{kind}",
        "rope_theta": float(rope.temperature or 0),
        "rope_axes": "xy" if rope.grid_indexing == "xy" else "yx",
        **ROTARY_POSITIONS[name](rope),
    }


def read_grid_coordinates(rope: TimmModule) -> Fields:
    """Coordinates in patches (EVA-02, Perception Encoder)."""
    require(not rope.in_pixels and getattr(rope, "grid_type", "index") == "index", "rotary positions in pixels")
    reference = rope.ref_feat_shape
    return {
        "rope_coordinates": "grid",
        "rope_grid_offset": float(rope.grid_offset),
        "rope_reference_grid": None if reference is None else list(reference),
    }


def read_centered_coordinates(rope: TimmModule) -> Fields:
    """Coordinates from -1 to 1 (DINOv3)."""
    require(rope.min_period is None or rope.max_period is None, "rotary positions by shortest and longest period")
    require(rope.normalize_coords == "separate", f"rotary positions with normalize_coords={rope.normalize_coords!r}")
    require(not rope.grid_offset, "an offset of centred rotary positions")
    return {"rope_coordinates": "centered"}


def read_mixed_coordinates(rope: TimmModule) -> Fields:
    """Coordinates in patches, with learned frequencies (RoPE-ViT)."""
    return {"rope_coordinates": "grid"}


ROTARY_POSITIONS: dict[str, Callable[[TimmModule], Fields]] = {
    "RotaryEmbeddingCat": read_grid_coordinates,
    "RotaryEmbeddingDinoV3": read_centered_coordinates,
    "RotaryEmbeddingMixed": read_mixed_coordinates,
}


def read_norms(model: TimmModule) -> Fields:
    """The one kind of norm that the model has, and where it ends with one."""
    norms = {
        (class_name(module), module.eps)
        for name, module in model.named_modules()
        if "Norm" in class_name(module) and hasattr(module, "eps") and not name.endswith(".sub_norm")
    }
    for name, _ in norms:
        require(name in NORMS, f"norm {name}")
    kinds = {(NORMS[name], eps) for name, eps in norms}
    require(len(kinds) == 1, f"norms of different kinds or eps: {', '.join(f'{n} {e}' for n, e in sorted(kinds))}")
    [(kind, eps)] = kinds
    return {
        "norm_type": kind,
        "layer_norm_eps": eps,
        "final_norm": is_present(model.norm),
        "pooled_norm": is_present(model.fc_norm),
    }


def read_blocks(model: TimmModule) -> Fields:
    """Number and make of the blocks, which are all alike but for the number of key and value heads."""
    block = model.blocks[0]
    require(class_name(block) in BLOCKS, f"blocks {class_name(block)}")
    return {"num_hidden_layers": len(model.blocks), **BLOCKS[class_name(block)](block)}


def read_block(block: TimmModule) -> Fields:
    """Attention, then MLP, each on its own norm."""
    return {
        "layer_type": "standard",
        **read_attention(block.attn),
        **read_mlp(block.mlp),
        **read_layer_scale(block),
    }


def read_post_norm_block(block: TimmModule) -> Fields:
    """Norms behind attention and MLP."""
    return {**read_block(block), "layer_type": "post"}


def read_parallel_block(block: TimmModule) -> Fields:
    """Attention and MLP at once on one norm; their projections are fused."""
    output = block.out_proj if block.out_proj is not None else block.attn_out_proj
    require(output.bias is not None, "parallel blocks without biases at their outputs")
    is_differential = hasattr(block, "sub_norm")
    return {
        "layer_type": "parallel",
        "attention_type": "differential" if is_differential else "softmax",
        "num_attention_heads": block.num_heads,
        "intermediate_size": block.in_split[0],
        "hidden_act": read_activation(block.mlp_act),
        "qk_norm": is_present(block.q_norm),
        "qkv_bias": block.in_proj.bias is not None,
        "attention_probs_dropout_prob": block.attn_drop.p,
        **read_layer_scale(block),
    }


def read_branched_block(block: TimmModule) -> Fields:
    """Several attentions at once, then several MLPs at once: one of each, as wide as all (`merge_branches`)."""
    attention, mlp = block.attns[0].attn, block.ffns[0].mlp
    fields = read_attention(attention) | read_mlp(mlp)
    require(fields["attention_type"] == "softmax" and fields["mlp_type"] == "mlp", "gated or differential branches")
    require(not fields["qk_norm"], "norms of queries and keys in parallel branches")
    require(not fields["attention_norm"] and not fields["mlp_norm"], "norms within parallel branches")
    branches = len(block.attns)
    return fields | {
        "layer_type": "standard",
        "num_attention_heads": branches * attention.num_heads,
        "attention_head_size": attention.head_dim,
        "intermediate_size": branches * mlp.fc1.out_features,
        **dict.fromkeys(("qkv_bias", "projection_bias", "mlp_bias"), True),  # norms' biases become theirs
    }


BLOCKS: dict[str, Callable[[TimmModule], Fields]] = {
    "Block": read_block,
    "EvaBlock": read_block,
    "ResPostBlock": read_post_norm_block,
    "EvaBlockPostNorm": read_post_norm_block,
    "ParallelScalingBlock": read_parallel_block,
    "DiffParallelScalingBlock": read_parallel_block,
    "ParallelThingsBlock": read_branched_block,
}


def read_attention(attention: TimmModule) -> Fields:
    """Heads, biases and norms of an attention module."""
    name = class_name(attention)
    require(name in ("Attention", "AttentionRope", "EvaAttention", "DiffAttention"), f"attention {name}")
    require(getattr(attention, "gate", None) is None, "gated attention")
    is_differential = name == "DiffAttention"
    head_dim = attention.head_dim * (2 if is_differential else 1)
    width = attention.proj.out_features
    return {
        "attention_type": "differential" if is_differential else "softmax",
        "num_attention_heads": attention.num_heads,
        "attention_head_size": None if head_dim * attention.num_heads == width else head_dim,
        "qk_norm": is_present(attention.q_norm),
        "attention_norm": is_present(attention.norm),
        "projection_bias": attention.proj.bias is not None,
        "attention_probs_dropout_prob": attention.attn_drop.p,
        **read_input_biases(attention),
    }


def read_input_biases(attention: TimmModule) -> Fields:
    """Which of queries, keys and values have a bias: EVA's keys have none."""
    if getattr(attention, "q_bias", None) is not None:
        biases = {"query_bias": True, "key_bias": False, "value_bias": True}
    elif attention.qkv is None:
        projections = {"query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj}
        biases = {f"{name}_bias": projection.bias is not None for name, projection in projections.items()}
    else:
        return {"qkv_bias": attention.qkv.bias is not None}
    all_alike = len(set(biases.values())) == 1
    return {"qkv_bias": biases["query_bias"]} if all_alike else biases


def read_mlp(mlp: TimmModule) -> Fields:
    """Width, activation, biases and norm of an MLP, plain or gated."""
    name = class_name(mlp)
    require(name in ("Mlp", "GluMlp", "SwiGLU"), f"MLP {name}")
    activation = read_activation(mlp.act)
    require(name == "Mlp" or activation == "silu", f"an MLP gated by {activation}")
    biases = {layer.bias is not None for layer in mlp.children() if isinstance(layer, nn.Linear)}
    require(len(biases) == 1, "an MLP with biases in some of its layers")
    fields = {"mlp_type": "swiglu"} if name != "Mlp" else {"mlp_type": "mlp", "hidden_act": activation}
    return {
        **fields,
        "intermediate_size": mlp.fc2.in_features,
        "mlp_bias": biases.pop(),
        "mlp_norm": is_present(mlp.norm),
    }


def read_layer_scale(block: TimmModule) -> Fields:
    """Start of the learned scale of residual branches. Where the MLP's branch has none, ours becomes ones."""
    scale = getattr(block, "ls1", getattr(block, "ls", None))  # VisionTransformer
    if scale is not None and is_present(scale):
        return {"layer_scale_init_value": float(scale.init_values)}
    has_scale = getattr(block, "gamma_1", None) is not None  # Eva
    return {"layer_scale_init_value": float(block.init_values)} if has_scale else {}


def read_drop_path_rate(last_block: TimmModule) -> float:
    """How often the last block's branches are dropped in training: it has the highest rate."""
    rates = [module.drop_prob for module in last_block.modules() if class_name(module) == "DropPath"]
    return float(max(rates, default=0.0))


def read_pooling(model: TimmModule, hidden_act: str | None) -> Fields:
    """What the head reads."""
    pooling = POOLINGS.get(model.global_pool)
    if not model.global_pool:
        require(not model.num_classes, "a classifier of every token (global_pool='')")
        return {"pooling": "cls" if model.cls_token is not None else "mean"}  # not built: see has_pooler
    require(pooling is not None, f"global_pool={model.global_pool!r}")
    if pooling == "attention":
        return {"pooling": pooling, **read_attention_pool(model, hidden_act)}
    sees_all = getattr(model, "pool_include_prefix", False)
    require(pooling == "cls" or not sees_all, f"{pooling} pooling of special tokens too")
    return {"pooling": pooling}


def read_attention_pool(model: TimmModule, hidden_act: str | None) -> Fields:
    """A learned query: `VisionTransformer` shows it the patches, `Eva` all tokens."""
    pool = model.attn_pool
    require(class_name(pool) == "AttentionPoolLatent", f"pooling {class_name(pool)}")
    require(pool.latent.shape[1] == 1 and pool.pos_embed is None, "several queries or positions in attention pooling")
    require(is_present(pool.q) and not is_present(pool.q_norm), "attention pooling without q_proj or with its norm")
    activation = read_activation(pool.mlp.act)
    require(hidden_act in (activation, None), "attention pooling with an activation of its own")
    return {
        "attention_pool_tokens": "all" if getattr(model, "pool_include_prefix", True) else "patches",
        "attention_pool_heads": pool.num_heads,
        "attention_pool_intermediate_size": pool.mlp.fc1.out_features,
        "hidden_act": activation,
    }


def read_labels(model: TimmModule) -> Fields:
    """Number of classes, and their names where the model knows them."""
    require(class_name(model.head) in ("Linear", "Identity"), f"a head that is {class_name(model.head)}")
    if not model.num_classes:
        return {}
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if names and len(names) == model.num_classes:
        return {"id2label": dict(enumerate(names))}
    return {"num_labels": model.num_classes}


def read_activation(module: TimmModule) -> str:
    """transformers' name of an activation."""
    name = class_name(module)
    require(name in ACTIVATIONS, f"activation {name}")
    if getattr(module, "approximate", "none") == "tanh":
        return ACTIVATIONS["GELUTanh"]
    return ACTIVATIONS[name]


def has_pooler(model: TimmModule) -> bool:
    """Whether the model pools: not with `global_pool=""`, nor does DeiT's pair of tokens become one vector of ours."""
    return bool(model.global_pool) and getattr(model, "dist_token", None) is None


def class_name(module: TimmModule) -> str:
    """Name of the module's class."""
    return type(module).__name__


def is_present(module: TimmModule) -> bool:
    """Whether the module does anything."""
    return module is not None and not isinstance(module, nn.Identity)


def square_or_pair(height: int, width: int) -> int | list[int]:
    """One number for a square."""
    return height if height == width else [height, width]


def require(condition: bool, feature: str) -> None:
    """Refuse a model that has `feature`, unless the condition holds."""
    if not condition:
        raise ConversionError(f"{feature}: ViTCLS has nothing of the kind")

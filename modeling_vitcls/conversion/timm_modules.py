"""Read fields of `ViTCLSConfig` from the modules of a timm model.

The fields come from the modules and the shapes of their parameters, not from the model's name, so
models created with any keyword arguments of `timm.create_model` can be converted. Modules are
identified by their class names, without importing timm. An unsupported feature raises an error that
names the feature. The rules for parameter names are in from_timm.py.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from .weight_rules import ConversionError, Fields, simplify_size


TimmModule = Any  # timm model or layer; timm does not annotate attribute types

NORM_TYPES = {"LayerNorm": "layernorm", "RmsNorm": "rmsnorm", "RMSNorm": "rmsnorm"}

ACTIVATIONS = {
    "GELU": "gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "QuickGELU": "quick_gelu",
    "ReLU": "relu",
    "SiLU": "silu",
}

POOLINGS = {"token": "cls", "avg": "mean", "max": "max", "map": "attention"}


def read_config_fields(model: TimmModule) -> Fields:
    """Read the configuration of a `VisionTransformer`, `VisionTransformerDistilled` or `Eva`."""
    # The other blocks differ only in drop path and the number of key and value heads.
    first_block = model.blocks[0]
    block_class = get_class_name(first_block)
    check_supported(block_class in BLOCK_READERS, f"blocks of class {block_class}")
    block_fields = BLOCK_READERS[block_class](first_block)
    token_counts = read_tokens(model)
    return {
        **read_patch_embedding(model),
        **token_counts,
        **read_positions(model, token_counts),
        **read_rotary_positions(model),
        **read_norms(model),
        **block_fields,
        "num_hidden_layers": len(model.blocks),
        **read_pooling(model, block_fields.get("hidden_act")),
        **read_timm_labels(model),
    }


def read_patch_embedding(model: TimmModule) -> Fields:
    """Read the fields of the patch embedding.

    `image_size` is rounded down to whole patches, because timm ignores the remaining pixels.
    """
    embedding = model.patch_embed
    check_supported(
        get_class_name(embedding) == "PatchEmbed", f"patch embedding {get_class_name(embedding)}"
    )
    check_supported(
        not embedding.dynamic_img_pad, "dynamic_img_pad, which pads images to whole patches"
    )
    height, width = embedding.patch_size
    rows, columns = embedding.grid_size
    return {
        "image_size": simplify_size(rows * height, columns * width),
        "patch_size": simplify_size(height, width),
        "num_channels": embedding.proj.in_channels,
        "hidden_size": embedding.proj.out_channels,
        "patch_bias": embedding.proj.bias is not None,
        "patch_norm": is_present(embedding.norm),
        "pre_norm": is_present(model.norm_pre),
    }


def read_tokens(model: TimmModule) -> Fields:
    """Read the number of special tokens of each type."""
    names = {"cls": "cls_token", "distillation": "dist_token", "register": "reg_token"}
    counts = {}
    for group, name in names.items():
        parameter = getattr(model, name, None)
        counts[f"num_{group}_tokens"] = 0 if parameter is None else parameter.shape[1]
    check_supported(
        not (counts["num_distillation_tokens"] and counts["num_register_tokens"]),
        "registers together with a distillation token",
    )
    return counts


def read_positions(model: TimmModule, token_counts: Fields) -> Fields:
    """Read the fields of learned position embeddings.

    timm resamples them bicubically with antialiasing.
    """
    if model.pos_embed is None:
        return {"position_embedding_type": "none"}
    num_non_cls_tokens = (
        token_counts["num_distillation_tokens"] + token_counts["num_register_tokens"]
    )
    if model.no_embed_class or not (num_non_cls_tokens or token_counts["num_cls_tokens"]):
        position_embedding_tokens = "patches"
    else:
        position_embedding_tokens = "all" if num_non_cls_tokens else "cls"
    return {
        "position_embedding_type": "learned",
        "position_embedding_tokens": position_embedding_tokens,
        "position_interpolation": "bicubic",
        "position_antialias": True,
    }


def read_rotary_positions(model: TimmModule) -> Fields:
    """Read the fields of rotary position embeddings.

    They replace or complement learned position embeddings.
    """
    rope = getattr(model, "rope", None)
    if rope is None:
        return {}

    name = get_class_name(rope)
    check_supported(
        name in ("RotaryEmbeddingCat", "RotaryEmbeddingDinoV3", "RotaryEmbeddingMixed"),
        f"rotary positions of class {name}",
    )

    rope_type = "rope_mixed" if name == "RotaryEmbeddingMixed" else "rope_2d"
    fields = {
        "position_embedding_type": rope_type if model.pos_embed is None else f"learned_{rope_type}",
        "rope_theta": float(rope.temperature or 0),
        "rope_axes": "xy" if rope.grid_indexing == "xy" else "yx",
    }

    if name == "RotaryEmbeddingDinoV3":  # Coordinates from -1 to 1
        has_temperature = rope.min_period is None or rope.max_period is None
        check_supported(
            has_temperature and rope.normalize_coords == "separate" and not rope.grid_offset,
            "rotary positions with min_period and max_period, with an offset, or with "
            f"normalize_coords={rope.normalize_coords!r}",
        )
        return fields | {"rope_coordinates": "centered"}
    if name == "RotaryEmbeddingMixed":  # Learned frequencies (RoPE-ViT)
        return fields | {"rope_coordinates": "grid"}

    check_supported(
        not rope.in_pixels and rope.grid_type == "index",
        "rotary positions in pixels",
    )
    return fields | {  # EVA-02, Perception Encoder
        "rope_coordinates": "grid",
        "rope_grid_offset": float(rope.grid_offset),
        "rope_reference_grid": None if rope.ref_feat_shape is None else list(rope.ref_feat_shape),
    }


def read_norms(model: TimmModule) -> Fields:
    """Read the type and eps of the norms, and which of the optional norms exist."""
    # `sub_norm` is the norm of differential attention. Its eps is fixed, here as in timm.
    norms = {
        (NORM_TYPES.get(get_class_name(module), get_class_name(module)), module.eps)
        for name, module in model.named_modules()
        if "Norm" in get_class_name(module)
        and hasattr(module, "eps")
        and not name.endswith(".sub_norm")
    }
    names = ", ".join(f"{norm_type} {eps}" for norm_type, eps in sorted(norms))
    check_supported(len(norms) == 1, f"norms with different types or eps values: {names}")
    [(norm_type, eps)] = norms
    check_supported(norm_type in NORM_TYPES.values(), f"norm {norm_type}")
    return {
        "norm_type": norm_type,
        "layer_norm_eps": eps,
        "final_norm": is_present(model.norm),
        "pooled_norm": is_present(model.fc_norm),
    }


def read_block(block: TimmModule) -> Fields:
    """Read the fields of a block that applies attention and then an MLP."""
    layer_type = (
        "post" if get_class_name(block) in ("ResPostBlock", "EvaBlockPostNorm") else "standard"
    )
    return {
        "layer_type": layer_type,
        **read_attention(block.attn),
        **read_mlp(block.mlp),
        **read_layer_scale(block),
    }


def read_parallel_block(block: TimmModule) -> Fields:
    """Read the fields of a block with attention and MLP in parallel and fused projections."""
    return {
        "layer_type": "parallel",
        "attention_type": "differential" if hasattr(block, "sub_norm") else "softmax",
        "num_attention_heads": block.num_heads,
        "intermediate_size": block.in_split[0],
        "hidden_act": read_activation(block.mlp_act),
        "qk_norm": is_present(block.q_norm),
        "qkv_bias": block.in_proj.bias is not None,
        **read_layer_scale(block),
    }


BLOCK_READERS: dict[str, Callable[[TimmModule], Fields]] = {
    "Block": read_block,
    "EvaBlock": read_block,
    "ResPostBlock": read_block,
    "EvaBlockPostNorm": read_block,
    "ParallelScalingBlock": read_parallel_block,
    "DiffParallelScalingBlock": read_parallel_block,
}


def read_attention(attention: TimmModule) -> Fields:
    """Read the fields of an attention module: type, heads, norms, biases and dropout."""
    name = get_class_name(attention)
    check_supported(
        name in ("Attention", "AttentionRope", "EvaAttention", "DiffAttention"),
        f"attention of class {name}",
    )
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
        **read_qkv_biases(attention),
    }


def read_qkv_biases(attention: TimmModule) -> Fields:
    """Read the configuration fields for the query, key and value biases.

    In EVA, the key projections have no bias.
    """
    if getattr(attention, "q_bias", None) is not None:
        return {"query_bias": True, "key_bias": False, "value_bias": True}
    if attention.qkv is not None:
        return {"qkv_bias": attention.qkv.bias is not None}
    return {
        f"{name}_bias": getattr(attention, f"{name[0]}_proj").bias is not None
        for name in ("query", "key", "value")
    }


def read_mlp(mlp: TimmModule) -> Fields:
    """Read the fields of a plain or gated MLP: type, activation, hidden size, biases and norm."""
    name = get_class_name(mlp)
    check_supported(name in ("Mlp", "GluMlp", "SwiGLU"), f"MLP of class {name}")
    activation = read_activation(mlp.act)
    check_supported(name == "Mlp" or activation == "silu", f"an MLP gated by {activation}")
    fields = (
        {"mlp_type": "swiglu"} if name != "Mlp" else {"mlp_type": "mlp", "hidden_act": activation}
    )
    return {
        **fields,
        "intermediate_size": mlp.fc2.in_features,
        "mlp_bias": mlp.fc2.bias is not None,
        "mlp_norm": is_present(mlp.norm),
    }


def read_layer_scale(block: TimmModule) -> Fields:
    """Read the initial LayerScale value.

    If only attention has LayerScale, the MLP's LayerScale values become 1.
    """
    layer_scale: Any = getattr(block, "ls1", getattr(block, "ls", None))  # VisionTransformer
    if is_present(layer_scale):
        return {"layer_scale_init_value": float(layer_scale.init_values)}
    has_layer_scale = getattr(block, "gamma_1", None) is not None  # Eva
    return {"layer_scale_init_value": float(block.init_values)} if has_layer_scale else {}


def read_pooling(model: TimmModule, hidden_act: str | None) -> Fields:
    """Read the fields of the pooling method before the head."""
    if not model.global_pool:
        check_supported(not model.num_classes, "a classifier on every token (global_pool='')")
        # A new classifier would use it.
        return {"pooling": "cls" if model.cls_token is not None else "mean"}

    check_supported(model.global_pool in POOLINGS, f"global_pool={model.global_pool!r}")
    pooling = POOLINGS[model.global_pool]
    if pooling == "attention":
        return {"pooling": pooling, **read_attention_pool(model, hidden_act)}
    use_prefix_tokens = getattr(model, "pool_include_prefix", False)
    check_supported(
        pooling == "cls" or not use_prefix_tokens, f"{pooling} pooling that includes special tokens"
    )
    return {"pooling": pooling}


def read_attention_pool(model: TimmModule, hidden_act: str | None) -> Fields:
    """Read the fields of attention pooling.

    In `Eva`, the query also attends to special tokens.
    """
    pooler = model.attn_pool
    check_supported(
        get_class_name(pooler) == "AttentionPoolLatent",
        f"pooling of class {get_class_name(pooler)}",
    )
    activation = read_activation(pooler.mlp.act)
    check_supported(
        hidden_act in (activation, None), "different activations in attention pooling and blocks"
    )
    pools_all_tokens = getattr(model, "pool_include_prefix", True)
    return {
        "attention_pool_tokens": "all" if pools_all_tokens else "patches",
        "attention_pool_heads": pooler.num_heads,
        "attention_pool_intermediate_size": pooler.mlp.fc1.out_features,
        "hidden_act": activation,
    }


def read_timm_labels(model: TimmModule) -> Fields:
    """Read the label names, or the number of labels if the model has no label names."""
    if not model.num_classes:
        return {}
    label_names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if label_names and len(label_names) == model.num_classes:
        return {"id2label": dict(enumerate(label_names))}
    return {"num_labels": model.num_classes}


def read_activation(module: TimmModule) -> str:
    """Read the transformers name of an activation."""
    name = (
        "GELUTanh" if getattr(module, "approximate", "none") == "tanh" else get_class_name(module)
    )
    check_supported(name in ACTIVATIONS, f"activation {name}")
    return ACTIVATIONS[name]


def get_class_name(module: TimmModule) -> str:
    """Name the class of a module, which decides how it is converted."""
    return type(module).__name__


def is_present(module: TimmModule) -> bool:
    """Check whether a module is neither None nor an identity."""
    return module is not None and not isinstance(module, nn.Identity)


def check_supported(is_supported: bool, feature: str) -> None:
    """Raise ConversionError with the name of a feature if the feature is not supported."""
    if not is_supported:
        raise ConversionError(f"ViTCLS does not support {feature}")

"""Convert published state dicts through timm.

The families are DINO, iBOT, MSN, I-JEPA, DINOv2, DINOv3, TIPS, DeiT, MAE and big_vision.

    weights = prepare_weights(torch.load("dinov2_vits14_reg4_pretrain.pth", weights_only=True), "dinov2")
    model = convert_family_model(build_timm_model(weights, "dinov2"), weights, "dinov2")

1. The architecture is inferred from the weight shapes, and timm builds the model
   (`build_timm_model`). The number of heads cannot be inferred; it is known for the published
   widths.
2. timm's `checkpoint_filter_fn` renames the weights. For big_vision, timm's `load_pretrained` reads
   the Flax arrays.
3. The timm model is converted as in from_timm.py.
4. `apply_family` restores what timm leaves out or does differently from the authors' code:
   resampling of position embeddings, stored rotary periods, mask tokens and the second CLS token
   of TIPS.

timm's name of a family also selects the preprocessing of the family. timm alone reads the files of
other models (`timm:NAME@FILE`); their conversion follows timm.
"""

import io
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.adaptation_vitcls import replace_fields
from ..model.modeling_vitcls import ViTCLSPreTrainedModel
from ..runtime.errors import format_error
from ..runtime.files import replace_control_characters
from .from_timm import has_pooler, read_timm_model
from .weight_rules import ConversionError, Fields, Weights, build_converted_model


# Resampling of learned position embeddings in the authors' code, as differences from timm's
# configuration (bicubic with antialiasing). DINO, iBOT and DINOv2 add 0.1 to the size of the new
# grid. big_vision aligns the corners of both grids.
BICUBIC: Fields = {"position_antialias": False}
BICUBIC_WITH_OFFSET: Fields = {"position_antialias": False, "position_offset": 0.1}


@dataclass(frozen=True)
class FileFamily:
    """How to load one family: its timm model, and how its authors resample."""

    timm_name: str  # timm model with the preprocessing of the family; its sizes are replaced
    resampling: Fields  # Empty if position embeddings are not resampled (rotary)
    # Other timm models, by the weight that selects them; the first match is used.
    timm_names: Mapping[str, str] = field(default_factory=dict)


GATE = "blocks.0.mlp.w3.weight"  # Weight of a gated MLP
FAMILIES = {  # The names are values of --family
    "dinov2": FileFamily(
        "vit_small_patch14_dinov2.lvd142m",
        BICUBIC_WITH_OFFSET,
        {GATE: "vit_giant_patch14_dinov2.lvd142m"},
    ),
    "tips": FileFamily(
        "vit_base_patch14_reg1_tipsv2.webli",
        {"position_interpolation": "bilinear"},
        {GATE: "vit_giant_patch14_reg1_tipsv2.webli"},
    ),
    "dinov3": FileFamily(
        "vit_small_patch16_dinov3_qkvb.lvd1689m",
        {},
        {
            f"{GATE} blocks.0.attn.qkv.bias": "vit_small_plus_patch16_dinov3_qkvb.lvd1689m",
            GATE: "vit_small_plus_patch16_dinov3.lvd1689m",
        },
    ),
    "deit": FileFamily(
        "deit_small_patch16_224.fb_in1k",
        BICUBIC,
        {
            "blocks.0.gamma_1": "deit3_small_patch16_224.fb_in1k",
            "dist_token": "deit_small_distilled_patch16_224.fb_in1k",
        },
    ),
    "dino": FileFamily("vit_small_patch16_224.dino", BICUBIC_WITH_OFFSET),
    "ibot": FileFamily("vit_small_patch16_224.dino", BICUBIC_WITH_OFFSET),
    "msn": FileFamily("vit_small_patch16_224.dino", BICUBIC),
    "mae": FileFamily("vit_base_patch16_224.mae", BICUBIC),
    "ijepa": FileFamily("vit_huge_patch14_gap_224.in1k_ijepa", BICUBIC),
    "big_vision": FileFamily(
        "vit_base_patch16_224.augreg_in21k",
        {"position_interpolation": "bilinear", "position_antialias": False},
        {"MAPHead_0/probe": "vit_base_patch16_siglip_224.webli"},
    ),
}
DINOV2_WITH_REGISTERS = FileFamily(
    "vit_small_patch14_reg4_dinov2.lvd142m",
    {},
    {GATE: "vit_giant_patch14_reg4_dinov2.lvd142m"},
)
# Number of heads by width, for the published models. DINOv3 has 20 heads for the width 1280.
NUM_HEADS = {
    192: 3,
    384: 6,
    512: 8,
    768: 12,
    1024: 16,
    1152: 16,
    1280: 16,
    1408: 16,
    1536: 24,
    4096: 32,
}
# Preprocessing of the authors that differs from timm's settings for the model, or that timm does
# not have (MSN).
PREPROCESSING: dict[str, dict[str, Any]] = {
    "tips": {"interpolation": "bilinear", "crop_mode": "squash"},
    "msn": {"interpolation": "bilinear", "crop_pct": 0.875},
}


def convert_family_model(model: Any, weights: Weights, family: str) -> ViTCLSPreTrainedModel:
    """Convert a timm model that was built from the weights of a family."""
    config, converted_weights = read_timm_model(model)
    config = replace_fields(config, apply_family(converted_weights, weights, family))
    return build_converted_model(config, converted_weights, add_pooling_layer=has_pooler(model))


def apply_family(converted_weights: Weights, weights: Weights, family: str) -> Fields:
    """Restore what timm leaves out or does differently from the authors' code.

    The converted weights are changed in place, and fields of the configuration are returned.
    `weights` are the published weights.
    """
    fields = dict(get_family(family, weights).resampling)
    if family == "dinov3" and "rope_embed.periods" in weights:
        # The published periods are rounded to bfloat16, and the authors' code uses them as they
        # are. timm and transformers compute new ones.
        fields["rope_periods"] = weights["rope_embed.periods"].float().tolist()

    if family == "tips":
        # timm calls the second CLS token a register.
        tokens = [
            converted_weights["embeddings.cls_token"],
            converted_weights.pop("embeddings.register_tokens"),
        ]
        converted_weights["embeddings.cls_token"] = torch.cat(tokens, dim=1)
        fields |= {"num_cls_tokens": 2, "num_register_tokens": 0, "pooled_cls_tokens": [0]}

    mask_token = weights.get("mask_token", weights.get("masked_embed"))
    if mask_token is not None and family in ("dinov2", "tips", "dinov3", "ibot"):
        converted_weights["embeddings.mask_token"] = mask_token.float().reshape(1, 1, -1)
        fields["use_mask_token"] = True
    return fields


def get_family(family: str, weights: Weights) -> FileFamily:
    """Look up a family in `FAMILIES`; DINOv2 with registers has an entry of its own."""
    if family == "dinov2" and "register_tokens" in weights:
        return DINOV2_WITH_REGISTERS
    return FAMILIES[family]


# Preparation --------------------------------------------------------------------------------------


def prepare_weights(weights: Mapping[str, Any], family: str) -> Weights:
    """Convert published arrays to tensors for timm.

    Raise ConversionError if the family is unknown, or the weights are not floating-point numbers.
    """
    if family not in FAMILIES:
        raise ConversionError(
            f"the family {family!r} is unknown. Set `family` to one of {', '.join(FAMILIES)}"
        )

    ignored_prefixes = ("decoder", "mask_token") if family == "mae" else ("local_cls_norm",)
    tensors: Weights = {}
    for name, array in weights.items():
        if not str(name).startswith(ignored_prefixes):
            tensors[replace_control_characters(str(name))] = convert_to_tensor(str(name), array)

    # The larger models were trained with blocks in chunks, and have names such as
    # `blocks.CHUNK.BLOCK`.
    if family == "dinov2":
        tensors = {
            re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): tensor
            for name, tensor in tensors.items()
        }

    if family == "dinov3":
        # A mask in the file removes the key biases. Without a mask they would count, and the model
        # has no place for them.
        for name, bias in tensors.items():
            if (
                name.endswith("attn.qkv.bias")
                and f"{name}_mask" not in tensors
                and bias.chunk(3)[1].any()
            ):
                raise ConversionError(
                    f"{name} contains nonzero key biases, but DINOv3 has no key biases"
                )

    if family == "big_vision":
        # Prefixes of the image model in two-tower models (SigLIP), and in files with optimizer
        # state.
        prefixes = ("params/img/", "params/", "opt/target/img/", "opt/target/", "img/")
        prefix = next((prefix for prefix in prefixes if f"{prefix}embedding/kernel" in tensors), "")
        tensors = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        if "pre_logits/kernel" in tensors:
            raise ConversionError(
                "timm does not support the layer pre_logits. Use a file without this layer"
            )

    return tensors


def convert_to_tensor(name: str, array: Any) -> Tensor:
    """Convert an array to a tensor.

    Raise ConversionError unless weights are arrays of floating-point numbers.
    """
    try:
        tensor = torch.as_tensor(array)
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    is_weight = name.endswith(("weight", ".bias", "kernel", "embed", "token"))
    if tensor is None or (is_weight and not (tensor.ndim and tensor.is_floating_point())):
        found = type(array).__name__ if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise ConversionError(
            f"{replace_control_characters(name)} must be an array of floating-point numbers, but "
            f"it is {found}. Save the weights in float32"
        )
    return tensor


# timm models --------------------------------------------------------------------------------------


def build_timm_model(weights: Weights, family: str) -> Any:
    """Build a timm model with the sizes and values of prepared weights, in float32.

    Raise ConversionError if the weights do not belong to the family.
    """
    import timm

    try:
        entry = get_family(family, weights)
        names = entry.timm_names.items()
        name = next(
            (name for keys, name in names if weights.keys() >= set(keys.split())), entry.timm_name
        )
        options = (
            read_big_vision_options(weights)
            if family == "big_vision"
            else read_vit_options(weights, family)
        )
        model: Any = timm.create_model(name, pretrained=False, **options)
        load_timm_weights(model, weights, family)
    # It is a ValueError as well, and says more than the line below.
    except ConversionError:
        raise
    except (LookupError, RuntimeError, ValueError, AssertionError) as error:
        raise ConversionError(
            f"the weights do not match the family {family}: {format_error(error)}. Set `family` to "
            "another family, or use timm:NAME@FILE"
        ) from error
    # Use the size at which the weights were trained; timm's entry may name another.
    model.pretrained_cfg |= PREPROCESSING.get(family, {})
    model.pretrained_cfg["input_size"] = (3, *model.patch_embed.img_size)
    return model.eval()


def load_timm_weights(model: Any, weights: Weights, family: str) -> None:
    """Load prepared weights into a timm model with timm's own rules for parameter names."""
    # In half precision, the sums of tokens and position embeddings in timm would be rounded.
    # DeiT III has another name for LayerScale.
    tensors = {
        re.sub(r"gamma_([12])$", r"ls\1.gamma", name): weight.float()
        for name, weight in weights.items()
    }
    if family == "big_vision":
        file = io.BytesIO()
        # timm detects big_vision by this prefix
        prefix = "params/" if "pos_embedding" in tensors else ""
        arrays: dict[str, Any] = {
            f"{prefix}{name}": tensor.numpy() for name, tensor in tensors.items()
        }
        np.savez(file, **arrays)
        file.seek(0)
        model.load_pretrained(file)
        return

    tensors.pop("masked_embed", None)
    # timm computes the periods in float32. The published ones are rounded, and the outputs of the
    # reference must be the authors'.
    if "rope_embed.periods" in tensors:
        periods = tensors["rope_embed.periods"]
        model.rope._compute_periods = lambda device="cpu", dtype=None: periods.to(device, dtype)
        model.rope.reset_parameters()
    if family in ("dinov2", "tips"):
        # timm's filter recognizes DINOv2 by this name, which some files lack.
        tensors.setdefault("mask_token", torch.zeros(1))

    # Each file of timm's models has its own filter for the names in published checkpoints.
    timm_module = sys.modules[type(model).__module__]
    model.load_state_dict(timm_module.checkpoint_filter_fn(tensors, model))


def read_vit_options(weights: Weights, family: str) -> dict[str, Any]:
    """Read the arguments of `timm.create_model` for weights named as in timm or DINOv2."""
    width, channels, *patch_size = find_weight(weights, "patch_embed.proj.weight").shape
    num_heads = 20 if (family, width) == ("dinov3", 1280) else NUM_HEADS.get(width)
    if num_heads is None:
        raise ConversionError(
            f"the number of heads is unknown for the width {width}. Build the model with "
            "timm.create_model, and use convert_from_timm"
        )

    # timm's DINOv2 has one layer for the gate and the values, and takes the width of both as the
    # hidden size.
    if GATE in weights:
        hidden_size = weights[GATE].shape[1] * (1 if family == "dinov3" else 2)
    else:
        hidden_size = find_weight(weights, "blocks.0.mlp.fc1.weight").shape[0]

    options: dict[str, Any] = {
        # The file does not show the training size, because rotary positions do not depend on it, so
        # 16 x 16 patches are assumed.
        "img_size": [16 * size for size in patch_size] if family == "dinov3" else None,
        "patch_size": patch_size,
        "in_chans": channels,
        "embed_dim": width,
        "depth": count_blocks(weights, r"blocks\.(\d+)\."),
        "num_heads": num_heads,
        "mlp_ratio": (hidden_size + 0.5) / width,  # timm rounds down
        "num_classes": len(weights["head.weight"]) if "head.weight" in weights else 0,
    }

    registers = weights.get("storage_tokens" if family == "dinov3" else "register_tokens")
    if registers is not None:
        options["num_reg_tokens" if family == "dinov3" else "reg_tokens"] = registers.shape[1]
    if family == "mae" and "fc_norm.weight" in weights:
        options["global_pool"] = "avg"

    if family != "dinov3":
        has_cls_position = family != "ijepa" and (
            family != "deit" or "blocks.0.gamma_1" not in weights  # DeiT III has these
        )
        num_positions = find_weight(weights, "pos_embed").shape[1]
        num_patches = num_positions - has_cls_position - ("dist_token" in weights)
        options["img_size"] = compute_image_size(num_patches, patch_size)
    return options


def read_big_vision_options(weights: Weights) -> dict[str, Any]:
    """Read the arguments of `timm.create_model` for Flax arrays.

    Flax's `nn.gelu` is the tanh approximation.
    """
    *patch_size, channels, width = find_weight(weights, "embedding/kernel").shape
    query_kernel = find_weight(weights, r"Transformer/encoderblock(_0)?/MultiHead\w+/query/kernel")
    mlp_kernel = find_weight(weights, r"Transformer/encoderblock(_0)?/MlpBlock_\d/Dense_0/kernel")
    positions = find_weight(weights, r"(Transformer/posembed_input/)?pos_embedding")
    has_cls = "cls" in weights
    has_cls_position = has_cls and "pos_embedding" not in weights

    depth = len(query_kernel)  # The blocks are stacked
    if "Transformer/encoderblock/LayerNorm_0/scale" not in weights:
        depth = count_blocks(weights, r"Transformer/encoderblock_(\d+)/")
    options: dict[str, Any] = {
        "img_size": compute_image_size(positions.shape[-2] - has_cls_position, patch_size),
        "patch_size": patch_size,
        "in_chans": channels,
        "embed_dim": width,
        "depth": depth,
        "num_heads": query_kernel.shape[-2],
        "mlp_ratio": (mlp_kernel.shape[-1] + 0.5) / width,
        "num_classes": weights["head/kernel"].shape[1] if "head/kernel" in weights else 0,
        "act_layer": "gelu_tanh",
    }

    if not has_cls and "MAPHead_0/probe" not in weights:
        options |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    elif has_cls and not has_cls_position:
        options |= {"no_embed_class": True}
    return options


def compute_image_size(num_patches: int, patch_size: list[int]) -> list[int]:
    """Compute the image size (height, width) in pixels.

    Raise ConversionError if the patch grid is not square.
    """
    grid_side = math.isqrt(max(num_patches, 0))
    if grid_side**2 != num_patches:
        raise ConversionError(
            "pos_embed must belong to a square grid of patches. Use convert_from_timm"
        )
    return [grid_side * length for length in patch_size]


def count_blocks(weights: Weights, pattern: str) -> int:
    """Count the blocks.

    `pattern` matches the start of the names, with the index of the block as group.
    """
    return len({match[1] for name in weights if (match := re.match(pattern, name))})


def find_weight(weights: Weights, pattern: str) -> Tensor:
    """Find the first weight whose name matches a pattern, or raise ConversionError."""
    for name, weight in weights.items():
        if re.fullmatch(pattern, name):
            return weight
    raise ConversionError(
        f"the family requires the weight {pattern}. Set `family` to another family"
    )

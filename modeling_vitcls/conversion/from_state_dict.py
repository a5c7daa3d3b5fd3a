"""Convert published state dicts through timm.

The families are DINO, iBOT, DINOv2, DINOv3, DeiT and MAE.

    weights = prepare_weights(torch.load("dinov2_vits14_reg4_pretrain.pth", weights_only=True), "dinov2")
    model = convert_family_model(build_timm_model(weights, "dinov2"), weights, "dinov2")

1. The architecture is inferred from the weight shapes, and timm builds the model
   (`build_timm_model`). The number of heads cannot be inferred; it is known for the published
   widths. If timm's name of the architecture is known, only the number of classes and the image size
   are read from the weights (`build_named_model`).
2. timm's `checkpoint_filter_fn` renames the weights.
3. The timm model is converted as in from_timm.py.
4. `apply_family` restores what timm leaves out or does differently from the authors' code:
   resampling of position embeddings, stored rotary periods and mask tokens.

timm's name of a family also selects the preprocessing of the family. The conversion of a named
architecture (`timm:NAME@FILE`) follows timm.
"""

import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
# grid.
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
    "mae": FileFamily("vit_base_patch16_224.mae", BICUBIC),
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
    1280: 16,
    1536: 24,
    4096: 32,
}
PATCH_PROJECTION = "patch_embed.proj.weight"


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

    mask_token = weights.get("mask_token", weights.get("masked_embed"))
    if mask_token is not None and family in ("dinov2", "dinov3", "ibot"):
        converted_weights["embeddings.mask_token"] = mask_token.float().reshape(1, 1, -1)
        fields["use_mask_token"] = True
    return fields


def get_family(family: str, weights: Weights) -> FileFamily:
    """Look up a family in `FAMILIES`; DINOv2 with registers has an entry of its own."""
    if family == "dinov2" and "register_tokens" in weights:
        return DINOV2_WITH_REGISTERS
    return FAMILIES[family]


# Preparation --------------------------------------------------------------------------------------


def prepare_weights(weights: Mapping[str, Any], family: str | None = None) -> Weights:
    """Convert published arrays to tensors for timm.

    Raise ConversionError if the family is unknown, or the weights are not floating-point numbers.
    """
    if family and family not in FAMILIES:
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

    return tensors


def convert_to_tensor(name: str, array: Any) -> Tensor:
    """Convert an array to a tensor.

    Raise ConversionError unless weights are arrays of floating-point numbers.
    """
    try:
        tensor = torch.as_tensor(array)
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    is_weight = name.endswith(("weight", ".bias", "embed", "token"))
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

    with explain_mismatch(
        f"the family {family}", "Set `family` to another family, or use timm:NAME@FILE"
    ):
        entry = get_family(family, weights)
        names = entry.timm_names.items()
        name = next(
            (name for keys, name in names if weights.keys() >= set(keys.split())), entry.timm_name
        )
        options = read_vit_options(weights, family)
        model: Any = timm.create_model(name, pretrained=False, **options)
        # timm computes the periods in float32. The published ones are rounded, and the outputs of
        # the reference must be the authors'.
        if "rope_embed.periods" in weights:
            periods = weights["rope_embed.periods"].float()
            model.rope._compute_periods = lambda device="cpu", dtype=None: periods.to(device, dtype)
            model.rope.reset_parameters()
        return load_timm_weights(model, weights)


def build_named_model(weights: Weights, name: str, file: Path) -> Any:
    """Build a model by its timm name, with the classes, image size and values of prepared weights.

    Raise ConversionError if the weights do not belong to the model. timm itself reads Flax arrays in a
    file, and resamples their positions to the image size of the model.
    """
    import timm

    model: Any = timm.create_model(name, pretrained=False)
    with explain_mismatch(
        f"timm:{name}", "Use timm:NAME@FILE with the model that was trained, or FILE with `family`"
    ):
        if any(key.endswith("embedding/kernel") for key in weights):
            biases = [len(value) for key, value in weights.items() if key.endswith("head/bias")]
            model.reset_classifier(max(biases, default=0))
            model.load_pretrained(str(file))
            return model.eval()
        # Of names in other formats, which timm renames, the model's own head is kept.
        if PATCH_PROJECTION in weights:
            model.reset_classifier(len(weights.get("head.weight", ())))

        positions = weights.get("pos_embed")
        own = model.pos_embed
        if positions is not None and own is not None and positions.shape[1] != own.shape[1]:
            num_special = own.shape[1] - model.patch_embed.num_patches
            if "register_tokens" in weights:  # timm adds DINOv2's position of CLS to the token
                num_special = 1
            num_patches = positions.shape[1] - num_special
            # The model gets the image size of the training; timm would resample the positions.
            size = compute_image_size(num_patches, list(model.patch_embed.patch_size))
            model.set_input_size(img_size=size)
        return load_timm_weights(model, weights)


@contextmanager
def explain_mismatch(owner: str, remedy: str) -> Iterator[None]:
    """Raise timm's errors about weights as ConversionErrors of one line."""
    try:
        yield
    # It is a ValueError as well, and says more than the line below.
    except ConversionError:
        raise
    except (LookupError, RuntimeError, ValueError, AssertionError, AttributeError) as error:
        raise ConversionError(
            f"the weights do not match {owner}: {format_error(error)}. {remedy}"
        ) from error


def load_timm_weights(model: Any, weights: Weights) -> Any:
    """Load prepared weights into a timm model with timm's own rules for parameter names."""
    # In half precision, the sums of tokens and position embeddings in timm would be rounded.
    # DeiT III has another name for LayerScale.
    tensors = {
        re.sub(r"gamma_([12])$", r"ls\1.gamma", name): weight.float()
        for name, weight in weights.items()
    }
    tensors.pop("masked_embed", None)
    if {"register_tokens", "blocks.0.mlp.w12.weight"} & tensors.keys():
        # timm's filter recognizes DINOv2 by this name, which some files lack.
        tensors.setdefault("mask_token", torch.zeros(1))

    # Each file of timm's models has its own filter for the names in published checkpoints.
    timm_module = sys.modules[type(model).__module__]
    model.load_state_dict(timm_module.checkpoint_filter_fn(tensors, model))
    # The size at which the weights were trained; timm's entry may name another.
    model.pretrained_cfg["input_size"] = (3, *model.patch_embed.img_size)
    return model.eval()


def read_vit_options(weights: Weights, family: str) -> dict[str, Any]:
    """Read the arguments of `timm.create_model` for weights named as in timm or DINOv2."""
    width, channels, *patch_size = weights[PATCH_PROJECTION].shape
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
        hidden_size = weights["blocks.0.mlp.fc1.weight"].shape[0]

    options: dict[str, Any] = {
        # The file does not show the training size, because rotary positions do not depend on it, so
        # 16 x 16 patches are assumed.
        "img_size": [16 * size for size in patch_size] if family == "dinov3" else None,
        "patch_size": patch_size,
        "in_chans": channels,
        "embed_dim": width,
        "depth": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
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
        # DeiT III has these scales, and no position of the CLS token.
        has_cls_position = family != "deit" or "blocks.0.gamma_1" not in weights
        num_positions = weights["pos_embed"].shape[1]
        num_patches = num_positions - has_cls_position - ("dist_token" in weights)
        options["img_size"] = compute_image_size(num_patches, patch_size)
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

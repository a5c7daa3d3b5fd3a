"""State dicts as their authors publish them -> ours: facebookresearch's DINOv2, DINOv3, DeiT and MAE, and big_vision.

    weights = torch.load("dinov2_vits14_reg4_pretrain.pth", weights_only=True)
    model = convert_state_dict(weights, family="dinov2")

    weights = dict(np.load("ViT-B_16.npz"))
    model = convert_state_dict(weights, family="big_vision")

A state dict has no configuration. What its shapes do not tell (heads, eps, how positions are resampled) is in the
reader of its family, as its authors' code has it. big_vision's tables are in big_vision.py.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..configuration_vitcls import ViTCLSConfig
from ..modeling_vitcls import ViTCLSPreTrainedModel
from .big_vision import RULES as BIG_VISION_RULES
from .big_vision import prepare_big_vision, read_big_vision
from .head_transfer import ClassifierChoice, assemble, split_classifier
from .timm_tables import BLOCKS, GATED_MLP, MLPS, STEM, head_rules, in_halves
from .weight_rules import ConversionError, Rule, convert_weights


Fields = dict[str, Any]
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """How one repository's checkpoints become ours: tidied, read, translated."""

    prepare: Callable[[Weights], Weights]
    read: Callable[[Weights], Fields]
    rules: Sequence[Rule]


def convert_state_dict(
    weights: Mapping[str, Any],
    family: str,
    *,
    drop: Sequence[str] = (),
    classifier: ClassifierChoice = "keep",
    num_labels: int | None = None,
    **fields: Any,
) -> ViTCLSPreTrainedModel:
    """A published state dict as one of our models, in eval mode: a classifier where it has one.

    Args:
        weights: names -> tensors or arrays, as saved; a `{"model": ...}` around them is taken off.
        family: `"dinov2"`, `"dinov3"`, `"deit"` (also DeiT III, and DINO), `"mae"` or `"big_vision"`.
        drop: beginnings of names to leave out, such as `("decoder", "mask_token")` of a full MAE checkpoint.
        classifier: "keep" the source's, start a "new" one, or "drop" it (`ViTCLSModel`).
        num_labels: of a new classifier.
        fields: of `ViTCLSConfig`, where they are other than published (`num_attention_heads` of an unusual width,
            `image_size` of an oblong grid of positions), or for labels (`id2label`).

    Raises:
        ConversionError: for an unknown family, weights that do not belong to it (they are listed), or sizes that have
            to be given.
    """
    if family not in FAMILIES:
        raise ConversionError(f"unknown family {family!r}: use one of {', '.join(FAMILIES)}")
    known = FAMILIES[family]
    kept = {name: part for name, part in weights.get("model", weights).items() if not name.startswith(tuple(drop))}
    tensors = known.prepare({name: as_tensor(name, part) for name, part in kept.items()})
    merged = {**known.read(tensors), **fields}
    for name in ("num_attention_heads", "image_size"):
        if merged[name] is None:
            raise ConversionError(f"{name} cannot be told from the weights: pass {name}=...")
    config = ViTCLSConfig(**merged)
    encoder, head = split_classifier(convert_weights(tensors, known.rules, config))
    return assemble(config, encoder, head, classifier, num_labels)


def flatten_mask_token(tensor: torch.Tensor, config: ViTCLSConfig) -> list[torch.Tensor]:
    """[1, D] -> [1, 1, D]."""
    return [tensor.view(1, 1, -1)]


def without_key(tensor: torch.Tensor, config: ViTCLSConfig) -> list[torch.Tensor]:
    """Biases of queries, keys and values [3 * D], of which that of the keys does nothing."""
    query, _, value = tensor.chunk(3)
    return [query, tensor.new_empty(0), value]


# The names that timm shares with them.
VIT = [*STEM, *BLOCKS, *head_rules("pooler")]

DINOV2 = [
    Rule("register_tokens", "embeddings.register_tokens"),
    Rule("mask_token", "embeddings.mask_token", flatten_mask_token),
    Rule("blocks.{i}.mlp.w12.{rest}", GATED_MLP, in_halves),
    Rule("blocks.{i}.mlp.w3.{rest}", "layers.{i}.mlp.down_proj.{rest}"),
    *VIT,
    *MLPS["Mlp"],
]

DINOV3 = [
    Rule("storage_tokens", "embeddings.register_tokens"),
    Rule("mask_token", "embeddings.mask_token", flatten_mask_token),
    Rule("rope_embed.periods", []),  # checked by prepare_dinov3
    Rule("local_cls_norm.{rest}", []),  # for the small crops of pre-training
    Rule("blocks.{i}.attn.qkv.bias", [f"layers.{{i}}.attention.{letter}_proj.bias" for letter in "qkv"], without_key),
    Rule("blocks.{i}.mlp.w1.{rest}", "layers.{i}.mlp.gate_proj.{rest}"),
    Rule("blocks.{i}.mlp.w2.{rest}", "layers.{i}.mlp.up_proj.{rest}"),
    Rule("blocks.{i}.mlp.w3.{rest}", "layers.{i}.mlp.down_proj.{rest}"),
    *VIT,
    *MLPS["Mlp"],
]


def as_it_is(weights: Weights) -> Weights:
    """Nothing to tidy."""
    return weights


def without_chunks(weights: Weights) -> Weights:
    """DINOv2's larger models number their blocks `blocks.CHUNK.BLOCK`: drop the chunk."""
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): part for name, part in weights.items()}


def prepare_dinov3(weights: Weights) -> Weights:
    """Apply the mask of the biases, which leaves the keys without; check that rotary positions are the usual ones.

    The published periods are in bfloat16; ours, as transformers' and timm's, are computed in float32.
    """
    prepared = {name: part for name, part in weights.items() if not name.endswith("bias_mask")}
    for name in prepared:
        if not name.endswith("attn.qkv.bias"):
            continue
        mask = weights.get(f"{name}_mask")
        if mask is not None:
            if not torch.isin(mask, mask.new_tensor([0, 1])).all():
                raise ConversionError(f"{name}_mask has values other than 0 and 1")
            prepared[name] = prepared[name] * mask
        if prepared[name].chunk(3)[1].any():
            raise ConversionError(f"{name} has a bias of the keys: DINOv3 has none")
    if (periods := weights.get("rope_embed.periods")) is not None:
        usual = 100.0 ** (torch.arange(len(periods), dtype=torch.float64) / len(periods))
        if not torch.allclose(periods.double().cpu(), usual, rtol=0.01):
            raise ConversionError("rope_embed.periods: rotary positions with other periods than DINOv3's")
    return prepared


def read_vit(weights: Weights, heads: Mapping[int, int]) -> Fields:
    """What the shapes tell of any of these ViTs; `heads` is width -> heads of the published ones."""
    projection = needed(weights, "patch_embed.proj.weight")
    width, channels, patch_height, patch_width = projection.shape
    blocks = {int(found[1]) for name in weights if (found := re.match(r"blocks\.(\d{1,9})\.", name))}
    if blocks != set(range(len(blocks))):
        missing = next(index for index in range(len(blocks)) if index not in blocks)
        raise ConversionError(f"the weights have blocks up to {max(blocks)}, but no block {missing}")
    fields: Fields = {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": [patch_height, patch_width],
        "num_hidden_layers": len(blocks),
        "num_attention_heads": heads.get(width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "use_mask_token": "mask_token" in weights,
        **read_mlp(weights),
    }
    if "blocks.0.ls1.gamma" in weights or "blocks.0.gamma_1" in weights:
        fields["layer_scale_init_value"] = 1.0
    if "head.weight" in weights:
        fields["num_labels"] = len(weights["head.weight"])
    return fields


def read_mlp(weights: Weights) -> Fields:
    """Kind and width of the MLPs."""
    if "blocks.0.mlp.w3.weight" in weights:
        return {"mlp_type": "swiglu", "intermediate_size": weights["blocks.0.mlp.w3.weight"].shape[1]}
    return {"intermediate_size": needed(weights, "blocks.0.mlp.fc1.weight").shape[0]}


def read_positions(weights: Weights, num_special: int) -> Fields:
    """The grid of learned positions [1, N, D], beside those of special tokens or alone; None if it is no square."""
    count = needed(weights, "pos_embed").shape[1]
    patch_height, patch_width = weights["patch_embed.proj.weight"].shape[-2:]
    for special, positioned in ((num_special, "cls" if num_special == 1 else "all"), (0, "patches")):
        side = math.isqrt(count - special)
        if side * side == count - special:
            image_size = [side * patch_height, side * patch_width]
            return {"position_embedding_tokens": positioned, "image_size": image_size}
    return {"image_size": None}


def read_dinov2(weights: Weights) -> Fields:
    """DINOv2 (arXiv 2304.07193), without or with registers (arXiv 2309.16588)."""
    registers = weights.get("register_tokens")
    resampling: Fields = {"position_offset": 0.1} if registers is None else {"position_antialias": True}
    return {
        **read_vit(weights, {384: 6, 768: 12, 1024: 16, 1536: 24}),
        **read_positions(weights, num_special=1),
        **resampling,
        "num_register_tokens": 0 if registers is None else registers.shape[1],
    }


def read_dinov3(weights: Weights) -> Fields:
    """DINOv3 (arXiv 2508.10104)."""
    fields = read_vit(weights, {384: 6, 768: 12, 1024: 16, 1280: 20, 4096: 32})
    return fields | {
        "image_size": 16 * fields["patch_size"][0],
        "key_bias": False,
        "num_register_tokens": needed(weights, "storage_tokens").shape[1],
        "position_embedding_type": "rope_2d",
        "layer_norm_eps": 1e-5,
    }


def read_deit(weights: Weights) -> Fields:
    """DeiT (arXiv 2012.12877), distilled or not, DeiT III (arXiv 2204.07118) and DINO (arXiv 2104.14294)."""
    special = [name for name in ("cls_token", "dist_token") if name in weights]
    return {
        **read_vit(weights, {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16}),
        **read_positions(weights, num_special=len(special)),
        "num_distillation_tokens": special.count("dist_token"),
    }


def read_mae(weights: Weights) -> Fields:
    """The encoder of MAE (arXiv 2111.06377), pre-trained or fine-tuned. Its fixed positions become learned ones."""
    pools_mean = "fc_norm.weight" in weights
    return {
        **read_vit(weights, {768: 12, 1024: 16, 1280: 16}),
        **read_positions(weights, num_special=1),
        "final_norm": not pools_mean,
        "pooled_norm": pools_mean,
        "pooling": "mean" if pools_mean else "cls",
    }


def as_tensor(name: str, part: Any) -> torch.Tensor:
    """A tensor of a tensor or array."""
    try:
        return torch.as_tensor(part)
    except TypeError:
        raise ConversionError(f"{name} is no array of numbers that torch knows: convert it to float32") from None


def needed(weights: Weights, name: str) -> torch.Tensor:
    """The weight of this name, without which nothing can be read."""
    if name not in weights:
        found = ", ".join(list(weights)[:4])
        raise ConversionError(f"no {name} among the weights ({found}, ...): are they of another family?")
    return weights[name]


FAMILIES = {
    "dinov2": Family(without_chunks, read_dinov2, DINOV2),
    "dinov3": Family(prepare_dinov3, read_dinov3, DINOV3),
    "deit": Family(as_it_is, read_deit, [*VIT, *MLPS["Mlp"]]),
    "mae": Family(as_it_is, read_mae, [*VIT, *MLPS["Mlp"]]),
    "big_vision": Family(prepare_big_vision, read_big_vision, BIG_VISION_RULES),
}

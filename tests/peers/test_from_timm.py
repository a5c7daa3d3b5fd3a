"""Compare every ViT of timm with its conversion: same outputs, or a named error.

All parameters are filled with random values. The tests compare all tokens of the encoder and the
logits, at the native size and, after `set_input_size`, at a rectangle.
"""

import copy
from collections.abc import Callable
from functools import partial, partialmethod
from typing import Any

import pytest
import timm
import torch
from helpers.source_checkpoints import refuses_conversion
from helpers.tiny_models import assert_same_bits, build_images, get_largest_difference
from timm.layers import Attention, GluMlp, LayerNorm, RmsNorm, SwiGLU
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
)
from torch import nn

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel, convert_from_timm
from modeling_vitcls.conversion.from_timm import convert_timm_model
from modeling_vitcls.conversion.weight_rules import ConversionError
from scripts.tools.random_weights import randomize_weights


TOLERANCE = 1e-5
MODULES = ("vision_transformer", "deit", "eva")
NATIVE = (4, 4)
RECTANGLE = (3, 6)  # in patches
TINY = {"embed_dim": 96, "num_heads": 4, "depth": 2, "num_classes": 7}

# One name for each set of switches among timm's architectures.
REPRESENTATIVES = [
    "vit_tiny_patch16_224",
    "vit_base_patch16_rpn_224",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_base_patch16_siglip_224",
    "vit_giant_patch14_reg4_dinov2",
    "vit_base_patch16_xp_224",
    "vit_dpwee_patch16_reg1_gap_256",
    "vit_dwee_patch16_reg1_gap_256",
    "aimv2_large_patch14_224",
    "test_vit3",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "eva_giant_patch14_224",
    "eva02_base_patch14_224",
    "vit_pe_lang_large_patch14_448",
    "vit_small_patch16_rope_mixed_ape_224",
    "vit_7b_patch16_dinov3",
    "vit_base_patch16_sapiens2",
]
SMALL_HEADS = type(
    "Attention", (Attention,), {"__init__": partialmethod(Attention.__init__, attn_head_dim=6)}
)

PLAIN = "vit_tiny_patch16_224"

# What no name has, but a user may ask `timm.create_model` for, by default for PLAIN.
OWN_ARGUMENTS = {
    "oblong": {"patch_size": (8, 16), "in_chans": 1},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "CLS token, included": {"global_pool": "token", "pool_include_prefix": True},
    "every norm": {
        "qk_norm": True,
        "scale_attn_norm": True,
        "scale_mlp_norm": True,
        "fc_norm": True,
        "norm_layer": RmsNorm,
    },
    "maximum": {"global_pool": "max", "reg_tokens": 2, "act_layer": "relu"},
    "attention pool, then norm": {"global_pool": "map", "fc_norm": True},
    "parallel, with biases": {"block_fn": ParallelScalingBlock, "init_values": 0.1},
    "parallel differential, normed": {"block_fn": DiffParallelScalingBlock, "qk_norm": True},
    "heads of another size": {"attn_layer": SMALL_HEADS},
    "tanh GELU": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "gate last": {"mlp_layer": GluMlp, "act_layer": "silu", "scale_mlp_norm": True},
    "DINOv3, neighbouring channels": {
        "name": "vit_small_patch16_dinov3",
        "rope_rotate_half": False,
        "rope_grid_indexing": "xy",
    },
    "EVA, non-square reference grid": {"name": "eva02_tiny_patch14_224", "ref_feat_shape": (6, 12)},
    "Sapiens, neighbouring channels": {
        "name": "vit_base_patch16_sapiens2",
        "rope_rotate_half": False,
        "num_kv_heads": (2, 1),
        "global_pool": "avg",
        "use_fc_norm": True,
    },
    "EVA, attention pool": {
        "name": "eva02_tiny_patch14_224",
        "global_pool": "map",
        "num_reg_tokens": 2,
        "use_fc_norm": True,
    },
}

REFUSED = {
    "an MLP gated by gelu": {"mlp_layer": GluMlp},
    "MLP gated by gelu": {"mlp_layer": SwiGLU},
    "global_pool='')": {"global_pool": ""},
    "global_pool='avgmax'": {"global_pool": "avgmax"},
    "mean pooling that includes special": {"global_pool": "avg", "pool_include_prefix": True},
    "dynamic_img_pad": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "norms with different types or eps values": {
        "embed_norm_layer": LayerNorm,
        "norm_layer": RmsNorm,
    },
    "blocks of class ParallelThingsBlock": {"name": "vit_small_patch16_18x2_224"},
    "different activations in attention pooling and blocks": {
        "name": "vit_pe_core_tiny_patch16_384",
        "swiglu_mlp": False,
    },
    "registers together with a distillation token": {
        "name": "deit_tiny_distilled_patch16_224",
        "reg_tokens": 2,
    },
    "multiple of 4": {"name": "vit_small_patch16_dinov3", "embed_dim": 24},
}


def peer(name: str = PLAIN, **arguments: Any) -> nn.Module:
    """Build a timm model with two blocks and random values, for images of `NATIVE` patches."""
    if "sapiens2" in name:  # by default one value per block of the full depth
        arguments = {
            "num_kv_heads": (arguments["num_heads"], arguments["num_heads"] // 2),
            **arguments,
        }
    model = timm.create_model(name, **{"depth": 2, "num_classes": 7, **arguments})
    model.set_input_size(img_size=pixels(model, NATIVE))
    randomize_weights(model)
    for weight_name, weight in model.named_parameters():
        if "lambda_" in weight_name:  # their products are exponentiated
            weight.data *= 0.1
    return model


def build_narrow_peer(name: str) -> nn.Module:
    """Build a `peer` with the head size of the architecture, and at most six heads."""
    original = timm.create_model(name, device="meta")
    heads = next(module.num_heads for module in original.modules() if hasattr(module, "num_heads"))
    head_dim = original.embed_dim // heads
    heads = min(heads, 6)
    return peer(name, embed_dim=heads * head_dim, num_heads=heads)


def pixels(model: nn.Module, grid: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) in pixels of an image with a grid of patches."""
    height, width = model.patch_embed.patch_size
    return grid[0] * height, grid[1] * width


@torch.no_grad()
def largest_difference(model: nn.Module, ours: ViTCLSForImageClassification) -> float:
    """Return the largest difference of tokens and logits at both sizes.

    The timm model keeps the last size.
    """
    differences = []
    for grid in (NATIVE, RECTANGLE):
        size = pixels(model, grid)
        model.set_input_size(img_size=size)
        images = build_images(2, *size, model.in_chans)
        tokens = model.forward_features(images)
        differences.append(get_largest_difference(ours.vitcls(images).last_hidden_state, tokens))
        differences.append(get_largest_difference(ours(images).logits, model(images)))
    return max(differences)


@pytest.mark.parametrize("what", [*REPRESENTATIVES, *OWN_ARGUMENTS])
def test_converted_models_have_the_same_outputs(what: str) -> None:
    """Representatives of all architectures, and models with other arguments."""
    model = peer(**TINY, **OWN_ARGUMENTS.get(what, {"name": what}))
    assert largest_difference(model, convert_from_timm(model)) <= TOLERANCE


@pytest.mark.parametrize("feature", REFUSED)
def test_errors_name_the_unsupported_feature(feature: str) -> None:
    model = peer(**TINY | REFUSED[feature])
    if feature == "different activations in attention pooling and blocks":
        model.attn_pool.mlp.act = nn.ReLU()
    with refuses_conversion(feature):
        convert_from_timm(model)


def use_another_class(module: nn.Module) -> None:
    """Change the class of a module to a subclass, which may compute anything."""
    module.__class__ = type("Another", (type(module),), {})


def change_rotation(**settings: Any) -> Callable[[Any], None]:
    """Return a function that changes attributes of the rotary position embeddings of a model."""
    return lambda model: vars(model.rope).update(settings)


# Name of an architecture, a change of the model, and a part of the error message.
CHANGES = {
    "block": (
        PLAIN,
        lambda model: use_another_class(model.blocks[0]),
        "blocks of class Another",
    ),
    "attention": (
        PLAIN,
        lambda model: use_another_class(model.blocks[0].attn),
        "attention of class Another",
    ),
    "biases": (
        PLAIN,
        lambda model: model.blocks[0].mlp.fc1.register_parameter("bias", None),
        "fc1.bias",
    ),
    "pixels": (
        "eva02_tiny_patch14_224",
        change_rotation(in_pixels=True),
        "rotary positions in pixels",
    ),
    "grid": (
        "eva02_tiny_patch14_224",
        change_rotation(grid_type="offset"),
        "rotary positions in pixels",
    ),
    "coordinates": (
        "vit_small_patch16_dinov3",
        change_rotation(normalize_coords="max"),
        "normalize_coords='max'",
    ),
    "offset": ("vit_small_patch16_dinov3", change_rotation(grid_offset=0.5), "with an offset"),
    "periods": (
        "vit_small_patch16_dinov3",
        change_rotation(min_period=1.0, max_period=9.0),
        "min_period and max",
    ),
    "gate": (
        PLAIN,
        lambda model: setattr(model.blocks[0].attn, "gate", nn.Linear(96, 96)),
        "attention.gate.weight",
    ),
    "activation": (
        PLAIN,
        lambda model: setattr(model.blocks[0].mlp, "act", nn.ReLU()),
        "differ from VisionTransformer",
    ),
    "quantized": (
        PLAIN,
        lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True),
        "the weights are quantized",
    ),
    "forward": (
        PLAIN,
        lambda model: setattr(model, "forward", model.forward_features),
        "names or shapes",
    ),
    "query norm": (
        "vit_base_patch16_siglip_224",
        lambda model: setattr(model.attn_pool, "q_norm", LayerNorm(24)),
        "attn_pool.q_norm.weight",
    ),
}


@pytest.mark.parametrize(("name", "change", "message"), CHANGES.values(), ids=CHANGES)
def test_changed_modules_raise_an_error(
    name: str, change: Callable[[Any], Any], message: str
) -> None:
    model = peer(name, **TINY)
    convert_from_timm(model)
    change(model)
    with refuses_conversion(message):
        convert_from_timm(model)


def test_models_of_other_classes_raise_an_error() -> None:
    with refuses_conversion("it is ResNet"):
        convert_from_timm(timm.create_model("resnet18", num_classes=2))
    other = peer("vit_tiny_patch16_224", **TINY)
    other.__class__ = type("VisionTransformer", (type(other),), {"__module__": "other"})
    with refuses_conversion("it is VisionTransformer"):
        convert_from_timm(other)


def test_initial_layer_scales_and_whole_patches_are_kept() -> None:
    """Image sizes are rounded down to whole patches."""
    for name, arguments, scale in (
        ("deit3_small_patch16_224", {"init_values": 1e-4}, 1e-4),
        ("vit_base_patch16_xp_224", {"init_values": 1e-3}, 1e-3),
        ("vit_base_patch16_sapiens2", {"init_values": 1e-2}, 1e-2),
        ("eva02_tiny_patch14_224", {}, None),
    ):
        config = convert_from_timm(peer(name, **TINY, **arguments)).config
        assert config.layer_scale_init_value == scale, name

    model = timm.create_model(
        "vit_tiny_patch16_224", depth=1, num_classes=0, patch_size=8, img_size=(36, 47)
    )

    assert convert_from_timm(model).config.image_height_width == (32, 40)


@torch.no_grad()
def test_a_model_without_a_classifier_pools_as_in_timm() -> None:
    """`num_classes=0` gives a base model, which pools as timm's does."""
    for name in (
        "vit_base_patch16_reg4_gap_256",
        "vit_base_patch16_siglip_224",
        "vit_pe_core_tiny_patch16_384",
    ):
        model = peer(name, **TINY | {"num_classes": 0})
        ours = convert_from_timm(model)
        images = torch.randn(2, 3, *pixels(model, NATIVE))
        assert type(ours) is ViTCLSModel
        assert get_largest_difference(ours(images).pooler_output, model(images)) <= TOLERANCE
    for name, pooling in (("vit_tiny_patch16_224", "cls"), ("vit_base_patch16_siglip_224", "mean")):
        unpooled = convert_from_timm(peer(name, **TINY | {"num_classes": 0, "global_pool": ""}))
        assert unpooled.config.pooling == pooling
        assert unpooled.pooler is None


@torch.no_grad()
def test_dtype_labels_and_the_source_are_kept() -> None:
    model = peer("vit_tiny_patch16_224", **TINY).to(torch.bfloat16)
    model.pretrained_cfg["label_names"] = list("abcdefg")
    before = copy.deepcopy(model.state_dict())
    ours = convert_from_timm(model)

    assert ours.dtype == torch.bfloat16
    assert not ours.training
    assert ours.config.id2label[1] == "b"
    assert ours.config.label2id["g"] == 6
    del model.pretrained_cfg  # as in a model without `timm.create_model`
    assert convert_from_timm(model).config.num_labels == 7

    ours.classifier.weight.zero_()
    assert_same_bits(model.state_dict(), before)


@pytest.mark.slow
def test_every_architecture_is_exact_or_refused() -> None:
    """No architecture of timm differs after conversion, and at least 215 can be converted."""
    names = [name for module in MODULES for name in timm.list_models(module=module)]
    exact = []
    refused = []
    wrong = {}
    for name in names:
        model = build_narrow_peer(name)
        try:
            ours = convert_timm_model(model)
        except ConversionError:
            refused.append(name)
            continue
        difference = largest_difference(model, ours)
        if difference <= TOLERANCE:
            exact.append(name)
        else:
            wrong[name] = difference

    assert not wrong
    assert len(exact) == len(names) - len(refused) >= 215

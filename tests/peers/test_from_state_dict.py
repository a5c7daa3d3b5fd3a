"""Compare converted state dicts with timm models that load the same state dicts.

The state dicts are small and random, with the names and shapes of the published ones. timm loads them with
`checkpoint_filter_fn` and `load_pretrained`.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models import eva, vision_transformer
from torch import nn

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel
from modeling_vitcls.conversion.from_state_dict import FAMILIES, convert_state_dict
from modeling_vitcls.conversion.weight_rules import ConversionError


pytestmark = pytest.mark.integration


TOLERANCE = 1e-5
WIDTH, HEADS, LAYERS, NEURONS, PATCH, GRID, LABELS = 48, 4, 2, 96, 8, 4, 7
TINY = {"embed_dim": WIDTH, "num_heads": HEADS, "depth": LAYERS, "mlp_ratio": 2, "num_classes": 0}
PIXELS = {"patch_size": PATCH, "img_size": GRID * PATCH}
Weights = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]


def random_weights(shapes: Shapes, seed: int = 0) -> Weights:
    """Build random values that keep activations close to 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: get_std(name, shape) * torch.randn(shape, generator=generator) + is_scale(name, shape)
        for name, shape in shapes.items()
    }


def is_scale(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether the values are factors close to 1."""
    return len(shape) == 1 and any(part in name for part in ("weight", "gamma", "scale"))


def get_std(name: str, shape: tuple[int, ...]) -> float:
    """Return the standard deviation of the values."""
    if len(shape) == 1:
        return 0.2
    if name.endswith("weight"):
        return math.prod(shape[1:]) ** -0.5
    return math.prod(shape[:-1]) ** -0.5 if name.endswith("kernel") else 0.5


def vit_shapes(num_positions: int, mlp: str = "plain") -> Shapes:
    """Return the shapes of the weights that DINOv2, DINOv3, DeiT and MAE share."""
    shapes: Shapes = {"pos_embed": (1, num_positions, WIDTH)} if num_positions else {}
    shapes |= {
        "cls_token": (1, 1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    layers = {"norm1": None, "norm2": None, "attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), **MLPS[mlp]}
    for index in range(LAYERS):
        for name, shape in layers.items():
            shapes[f"blocks.{index}.{name}.weight"] = shape or (WIDTH,)
            shapes[f"blocks.{index}.{name}.bias"] = (shape or (WIDTH,))[:1]
    return shapes


MLPS: dict[str, Shapes] = {
    "plain": {"mlp.fc1": (NEURONS, WIDTH), "mlp.fc2": (WIDTH, NEURONS)},
    "DINOv2 giant": {"mlp.w12": (2 * NEURONS, WIDTH), "mlp.w3": (WIDTH, NEURONS)},
    "DINOv3 gated": {"mlp.w1": (NEURONS, WIDTH), "mlp.w2": (NEURONS, WIDTH), "mlp.w3": (WIDTH, NEURONS)},
}


def layer_scales(names: tuple[str, str]) -> Shapes:
    return {f"blocks.{index}.{name}": (WIDTH,) for index in range(LAYERS) for name in names}


def timm_model(name: str, weights: Weights, **arguments: Any) -> nn.Module:
    """Build a timm model and load the weights with timm's filter."""
    model = timm.create_model(name, **{**TINY, **PIXELS, **arguments}).eval()
    module = eva if isinstance(model, eva.Eva) else vision_transformer
    extra = {"adapt_layer_scale": True} if "deit3" in name else {}
    filtered = module.checkpoint_filter_fn(dict(weights), model, **extra)
    model.load_state_dict(filtered)
    return model


@torch.no_grad()
def token_difference(model: nn.Module, ours: ViTCLSModel, grid: tuple[int, int] = (GRID, GRID)) -> float:
    size = (grid[0] * PATCH, grid[1] * PATCH)
    model.set_input_size(img_size=size)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    return (ours(images).last_hidden_state - model.forward_features(images)).abs().max().item()


@torch.no_grad()
def logit_difference(model: nn.Module, ours: ViTCLSForImageClassification) -> float:
    images = torch.randn(2, 3, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(1))
    return (ours(images).logits - model(images)).abs().max().item()


def dinov2_weights(mlp: str = "plain", registers: int = 0) -> Weights:
    shapes = vit_shapes(1 + GRID**2, mlp) | layer_scales(("ls1.gamma", "ls2.gamma")) | {"mask_token": (1, WIDTH)}
    if registers:
        shapes["register_tokens"] = (1, registers, WIDTH)
    return random_weights(shapes)


def test_dinov2() -> None:
    weights = dinov2_weights()
    ours = convert_state_dict(weights, "dinov2", num_attention_heads=HEADS)
    assert token_difference(timm_model("vit_small_patch14_dinov2", weights), ours) <= TOLERANCE
    assert torch.equal(ours.embeddings.mask_token[0], weights["mask_token"])
    # The original code resamples with an offset and without antialiasing, unlike timm.
    assert (ours.config.position_offset, ours.config.position_antialias) == (0.1, False)


def test_dinov2_with_registers() -> None:
    """The original code resamples like timm."""
    weights = dinov2_weights(registers=4)
    ours = convert_state_dict(weights, "dinov2", num_attention_heads=HEADS)
    model = timm_model("vit_small_patch14_reg4_dinov2", weights)
    assert token_difference(model, ours) <= TOLERANCE
    assert token_difference(model, ours, (3, 6)) <= TOLERANCE


def test_dinov2_giant_in_chunks() -> None:
    """Gated MLPs, and block names with chunk indices."""
    weights = dinov2_weights("DINOv2 giant", registers=4)
    chunked = {re.sub(r"^blocks\.(\d+)\.", r"blocks.\1.\1.", name): part for name, part in weights.items()}
    assert "blocks.1.1.mlp.w12.weight" in chunked
    ours = convert_state_dict(chunked, "dinov2", num_attention_heads=HEADS)
    model = timm_model("vit_giant_patch14_reg4_dinov2", weights, mlp_ratio=2 * NEURONS / WIDTH)
    assert token_difference(model, ours) <= TOLERANCE


def dinov3_weights(mlp: str = "plain", bias: bool = True) -> Weights:
    shapes = vit_shapes(0, mlp) | layer_scales(("ls1.gamma", "ls2.gamma"))
    shapes |= {"storage_tokens": (1, 4, WIDTH), "mask_token": (1, WIDTH)}
    weights = random_weights(shapes)
    quarter = WIDTH // HEADS // 4
    weights["rope_embed.periods"] = (100.0 ** (torch.arange(quarter) / quarter)).bfloat16()
    for index in range(LAYERS):
        name = f"blocks.{index}.attn.qkv.bias"
        weights[f"{name}_mask"] = torch.cat([torch.ones(WIDTH), torch.zeros(WIDTH), torch.ones(WIDTH)])
        if not bias:
            del weights[name], weights[f"{name}_mask"]
    return weights


@pytest.mark.parametrize(
    ("name", "mlp", "bias"),
    [
        ("vit_small_patch16_dinov3_qkvb", "plain", True),
        ("vit_small_plus_patch16_dinov3_qkvb", "DINOv3 gated", True),
        ("vit_small_plus_patch16_dinov3", "DINOv3 gated", False),
    ],
)
def test_dinov3(name: str, mlp: str, bias: bool) -> None:
    weights = dinov3_weights(mlp, bias)
    if not bias:  # the 7B model
        weights |= {"local_cls_norm.weight": torch.ones(WIDTH), "local_cls_norm.bias": torch.ones(WIDTH)}
    ours = convert_state_dict(weights, "dinov3", num_attention_heads=HEADS, rope_periods=None)  # as timm
    model = timm_model(name, weights)
    assert token_difference(model, ours) <= TOLERANCE
    assert token_difference(model, ours, (3, 6)) <= TOLERANCE
    assert torch.equal(ours.embeddings.mask_token[0], weights["mask_token"])
    assert ours.config.layer_norm_eps == 1e-5
    assert ours.config.image_height_width == (16 * PATCH, 16 * PATCH)


def test_dinov3_with_something_else() -> None:
    weights = dinov3_weights()
    for periods in (torch.ones(4), torch.zeros(3), torch.full((3,), float("nan"))):
        with pytest.raises(ValueError, match=r"`rope_periods` must have head_dim / 4 = 3 positive numbers"):
            convert_state_dict(weights | {"rope_embed.periods": periods}, "dinov3", num_attention_heads=HEADS)
    unmasked = {name: part for name, part in weights.items() if not name.endswith("bias_mask")}
    with pytest.raises(ConversionError, match="nonzero key biases"):
        convert_state_dict(unmasked, "dinov3", num_attention_heads=HEADS)
    unset = weights | {"blocks.0.attn.qkv.bias_mask": torch.full((3 * WIDTH,), float("nan"))}
    with pytest.raises(ConversionError, match="values other than 0 and 1"):
        convert_state_dict(unset, "dinov3", num_attention_heads=HEADS)


@pytest.mark.parametrize(
    ("name", "num_positions", "extra"),
    [
        ("deit_small_patch16_224", 1 + GRID**2, {}),
        (
            "deit_small_distilled_patch16_224",
            2 + GRID**2,
            {"dist_token": (1, 1, WIDTH), "head_dist.weight": (LABELS, WIDTH), "head_dist.bias": (LABELS,)},
        ),
        ("deit3_small_patch16_224", GRID**2, layer_scales(("gamma_1", "gamma_2"))),
    ],
)
def test_deit(name: str, num_positions: int, extra: Shapes) -> None:
    head = {"head.weight": (LABELS, WIDTH), "head.bias": (LABELS,)}
    weights = random_weights(vit_shapes(num_positions) | head | extra)
    ours = convert_state_dict({"model": weights}, "deit", num_attention_heads=HEADS)
    model = timm_model(name, weights, num_classes=LABELS)
    assert token_difference(model, ours.vitcls) <= TOLERANCE
    assert logit_difference(model, ours) <= TOLERANCE
    new = convert_state_dict(weights, "deit", num_attention_heads=HEADS, classifier="new", num_labels=3)
    assert new.classifier.out_features == 3


@torch.no_grad()
def test_rectangular_patches_of_gray_images() -> None:
    weights = random_weights(vit_shapes(1 + GRID**2) | {"patch_embed.proj.weight": (WIDTH, 1, PATCH, 2 * PATCH)})
    ours = convert_state_dict(weights, "deit", num_attention_heads=HEADS)
    size = (GRID * PATCH, 2 * GRID * PATCH)
    assert ours.config.image_height_width == size
    model = timm_model("deit_small_patch16_224", weights, patch_size=(PATCH, 2 * PATCH), img_size=size, in_chans=1)
    images = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(1))
    assert (ours(images).last_hidden_state - model.forward_features(images)).abs().max() <= TOLERANCE


def test_mae() -> None:
    """Convert a pre-trained encoder, and a full checkpoint whose decoder is dropped by name."""
    weights = random_weights(vit_shapes(1 + GRID**2))
    model = timm_model("vit_base_patch16_224", weights)
    ours = convert_state_dict({"model": weights}, "mae", num_attention_heads=HEADS)
    assert type(ours) is ViTCLSModel
    assert token_difference(model, ours) <= TOLERANCE
    whole = weights | random_weights({"mask_token": (1, 1, WIDTH), "decoder_embed.weight": (32, WIDTH)})
    with pytest.raises(ConversionError, match=r"unexpected weights: .*decoder_embed"):
        convert_state_dict(whole, "mae", num_attention_heads=HEADS)
    whole["decoder_arguments"] = None
    dropped = convert_state_dict(whole, "mae", num_attention_heads=HEADS, drop=("decoder", "mask_token"))
    assert token_difference(model, dropped) <= TOLERANCE


def test_fine_tuned_mae() -> None:
    """The mean of the patches, then the norm, then the classifier."""
    head = {
        "head.weight": (LABELS, WIDTH),
        "head.bias": (LABELS,),
        "fc_norm.weight": (WIDTH,),
        "fc_norm.bias": (WIDTH,),
    }
    weights = random_weights(vit_shapes(1 + GRID**2) | head)
    del weights["norm.weight"], weights["norm.bias"]
    model = timm_model("vit_base_patch16_224", weights, num_classes=LABELS, global_pool="avg")
    ours = convert_state_dict(
        {"model": weights}, "mae", num_attention_heads=HEADS, id2label=dict(enumerate("abcdefg"))
    )
    assert logit_difference(model, ours) <= TOLERANCE
    assert ours.config.id2label[6] == "g"


# Family -> timm models of the published sizes.
PUBLISHED_SIZES = {
    "dinov2": [f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large", "giant")],
    "dinov3": [f"vit_{size}_patch16_dinov3" for size in ("small", "base", "large", "huge_plus", "7b")],
    "deit": [
        *(f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")),
        "deit3_medium_patch16_224",
        "deit3_large_patch16_224",
        "deit3_huge_patch14_224",
    ],
    "dino": [f"vit_{size}_patch16_224" for size in ("small", "base")],
    "ibot": [f"vit_{size}_patch16_224" for size in ("small", "base", "large")],
    "msn": [f"vit_{size}_patch16_224" for size in ("small", "base", "large")],
    "mae": ["vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224"],
    "ijepa": [
        *(f"vit_{size}_patch16_224" for size in ("base", "large")),
        "vit_huge_patch14_gap_224",
        "vit_giant_patch16_gap_224",
    ],
}


@pytest.mark.parametrize("family", PUBLISHED_SIZES)
def test_published_widths_have_the_published_number_of_heads(family: str) -> None:
    """The weights do not contain the number of heads, and a comparison would use the same number."""
    shapes = vit_shapes(1 + GRID**2) | {"storage_tokens": (1, 4, WIDTH)}
    for name in PUBLISHED_SIZES[family]:
        model = timm.create_model(name, device="meta", depth=1, num_classes=0)
        weights = {
            key: torch.empty([model.embed_dim if size == WIDTH else size for size in shape], device="meta")
            for key, shape in shapes.items()
        }
        assert FAMILIES[family].read_fields(weights)["num_attention_heads"] == model.blocks[0].attn.num_heads, name


def flax_shapes(modules: tuple[int, int, int], positions: str, num_positions: int) -> Shapes:
    """big_vision's names; `modules` are the positions of attention, second norm and MLP within a block."""
    shapes: Shapes = {
        "embedding/kernel": (PATCH, PATCH, 3, WIDTH),
        "embedding/bias": (WIDTH,),
        positions: (1, num_positions, WIDTH),
        "Transformer/encoder_norm/scale": (WIDTH,),
        "Transformer/encoder_norm/bias": (WIDTH,),
        "head/kernel": (WIDTH, LABELS),
        "head/bias": (LABELS,),
    }
    attention, second_norm, mlp = modules
    for index in range(LAYERS):
        block = f"Transformer/encoderblock_{index}"
        shapes |= flax_norm(f"{block}/LayerNorm_0") | flax_norm(f"{block}/LayerNorm_{second_norm}")
        shapes |= flax_attention(f"{block}/MultiHeadDotProductAttention_{attention}")
        shapes |= flax_mlp(f"{block}/MlpBlock_{mlp}")
    return shapes


def flax_norm(name: str) -> Shapes:
    return {f"{name}/scale": (WIDTH,), f"{name}/bias": (WIDTH,)}


def flax_attention(name: str) -> Shapes:
    shapes: Shapes = {}
    for part in ("query", "key", "value"):
        shapes |= {
            f"{name}/{part}/kernel": (WIDTH, HEADS, WIDTH // HEADS),
            f"{name}/{part}/bias": (HEADS, WIDTH // HEADS),
        }
    return shapes | {f"{name}/out/kernel": (HEADS, WIDTH // HEADS, WIDTH), f"{name}/out/bias": (WIDTH,)}


def flax_mlp(name: str) -> Shapes:
    return {
        f"{name}/Dense_0/kernel": (WIDTH, NEURONS),
        f"{name}/Dense_0/bias": (NEURONS,),
        f"{name}/Dense_1/kernel": (NEURONS, WIDTH),
        f"{name}/Dense_1/bias": (WIDTH,),
    }


EARLIER = ((1, 2, 3), "Transformer/posembed_input/pos_embedding")
BIG_VISION = ((0, 1, 0), "pos_embedding")


def saved(weights: Weights, file: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """Write an .npz file and load it."""
    np.savez(file, **{f"{prefix}{name}": part.numpy() for name, part in weights.items()})
    with np.load(file) as arrays:
        return dict(arrays)


def timm_from_npz(name: str, file: Path, **arguments: Any) -> nn.Module:
    model = timm.create_model(name, **{**TINY, **PIXELS, "num_classes": LABELS, "act_layer": "gelu_tanh", **arguments})
    model.load_pretrained(str(file))
    return model.eval()


def assert_same(model: nn.Module, ours: ViTCLSForImageClassification) -> None:
    assert token_difference(model, ours.vitcls) <= TOLERANCE
    assert logit_difference(model, ours) <= TOLERANCE


def test_vision_transformer_npz(tmp_path: Path) -> None:
    """google-research/vision_transformer: the CLS token has a position."""
    weights = random_weights(flax_shapes(*EARLIER, 1 + GRID**2) | {"cls": (1, 1, WIDTH)})
    ours = convert_state_dict(saved(weights, tmp_path / "vit.npz"), "big_vision")
    assert_same(timm_from_npz("vit_base_patch16_224", tmp_path / "vit.npz"), ours)
    assert ours.config.position_interpolation == "bilinear" and not ours.config.position_antialias
    weights = random_weights(flax_shapes(*EARLIER, GRID**2))  # without a CLS token
    ours = convert_state_dict(saved(weights, tmp_path / "gap.npz"), "big_vision")
    gap = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    assert_same(timm_from_npz("vit_base_patch16_224", tmp_path / "gap.npz", **gap), ours)


def test_big_vision_npz(tmp_path: Path) -> None:
    """The mean of the patches; or a CLS token without position."""
    weights = random_weights(flax_shapes(*BIG_VISION, GRID**2))
    ours = convert_state_dict(saved(weights, tmp_path / "gap.npz", "params/"), "big_vision")
    gap = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    assert_same(timm_from_npz("vit_base_patch16_224", tmp_path / "gap.npz", **gap), ours)
    weights["cls"] = torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(2))
    ours = convert_state_dict(saved(weights, tmp_path / "tok.npz", "params/"), "big_vision")
    assert_same(timm_from_npz("vit_base_patch16_224", tmp_path / "tok.npz", no_embed_class=True), ours)
    encoder = convert_state_dict({key: part for key, part in weights.items() if "head" not in key}, "big_vision")
    assert type(encoder) is ViTCLSModel
    images = torch.randn(2, 3, GRID * PATCH, GRID * PATCH)
    flat = convert_state_dict(weights | {"pos_embedding": weights["pos_embedding"][0]}, "big_vision")
    assert torch.equal(flat(images).logits, ours(images).logits)
    assert torch.equal(encoder(images).last_hidden_state, ours.vitcls(images).last_hidden_state)


@torch.no_grad()
def test_rectangular_patches_of_gray_images_npz(tmp_path: Path) -> None:
    kernel = {"embedding/kernel": (PATCH, 2 * PATCH, 1, WIDTH)}
    weights = random_weights(flax_shapes(*BIG_VISION, GRID**2) | kernel)
    ours = convert_state_dict(saved(weights, tmp_path / "gap.npz"), "big_vision")
    height, width = GRID * PATCH, 2 * GRID * PATCH
    assert ours.config.patch_height_width == (PATCH, 2 * PATCH)
    assert ours.config.image_height_width == (height, width)
    sizes = {"patch_size": (PATCH, 2 * PATCH), "img_size": (height, width), "in_chans": 1}
    pooling = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    model = timm_from_npz("vit_base_patch16_224", tmp_path / "gap.npz", **sizes, **pooling)
    images = torch.randn(2, 1, height, width, generator=torch.Generator().manual_seed(1))
    assert (ours(images).logits - model(images)).abs().max() <= TOLERANCE


def test_siglip_npz(tmp_path: Path) -> None:
    """The image tower of two, its blocks stacked in one array, and a MAP head."""
    shapes = flax_shapes(*BIG_VISION, GRID**2) | {"MAPHead_0/probe": (1, 1, WIDTH)}
    shapes |= flax_attention("MAPHead_0/MultiHeadDotProductAttention_0")
    shapes |= flax_norm("MAPHead_0/LayerNorm_0") | flax_mlp("MAPHead_0/MlpBlock_0")
    weights = random_weights(shapes)
    for name in [name for name in weights if "encoderblock_0" in name]:
        layers = [weights.pop(name.replace("encoderblock_0", f"encoderblock_{index}")) for index in range(LAYERS)]
        weights[name.replace("encoderblock_0", "encoderblock")] = torch.stack(layers)
    arrays = saved(weights, tmp_path / "siglip.npz", "params/img/")
    arrays |= {"params/t": np.ones(1), "params/txt/head/bias": np.ones(3)}
    ours = convert_state_dict(arrays, "big_vision")
    assert ours.config.pooling == "attention"
    assert_same(timm_from_npz("vit_base_patch16_siglip_224", tmp_path / "siglip.npz"), ours)


@torch.no_grad()
def test_layer_before_the_classifier() -> None:
    """`pre_logits`, which timm leaves out: a tanh layer on the CLS token."""
    shapes = flax_shapes(*EARLIER, 1 + GRID**2) | {"cls": (1, 1, WIDTH)}
    shapes |= {"pre_logits/kernel": (WIDTH, WIDTH), "pre_logits/bias": (WIDTH,)}
    weights = random_weights(shapes)
    ours = convert_state_dict(weights, "big_vision").vitcls
    outputs = ours(torch.randn(1, 3, GRID * PATCH, GRID * PATCH))
    expected = torch.tanh(outputs.last_hidden_state[:, 0] @ weights["pre_logits/kernel"] + weights["pre_logits/bias"])
    assert (outputs.pooler_output - expected).abs().max() <= TOLERANCE


def test_errors_name_the_remedy() -> None:
    weights = random_weights(vit_shapes(1 + GRID**2))
    flax = random_weights(flax_shapes(*BIG_VISION, GRID**2))
    errors = {
        "family='swin' is unknown. Use one of dinov2": ((weights, "swin"), {}),
        "Set num_attention_heads=": ((weights, "deit"), {}),
        "Set image_size=": (
            (weights | {"pos_embed": torch.zeros(1, 1 + 3 * 6, WIDTH)}, "mae"),
            {"num_attention_heads": 4},
        ),
        "requires the weight patch_embed.proj.weight, but": (
            ({"cls": torch.zeros(1, 1, 4)}, "dinov2"),
            {},
        ),
        "requires the weight embedding/kernel, but it is missing": ((weights, "big_vision"), {}),
        "weights missing: .*layernorm.weight": (
            ({name: part for name, part in weights.items() if name != "norm.weight"}, "deit"),
            {"num_attention_heads": 4},
        ),
        "unexpected weights: blocks.0.extra": (
            (weights | {"blocks.0.extra": torch.zeros(1)}, "deit"),
            {"num_attention_heads": 4},
        ),
        "blocks up to 999, but no block 2": (
            (
                {name.replace("blocks.1.", "blocks.999."): part for name, part in weights.items()}
                | {"blocks.1.x": torch.ones(1)},
                "deit",
            ),
            {"num_attention_heads": 4},
        ),
        "weights must be a state dict, but the type is list": (([torch.zeros(1)], "deit"), {}),
        "the weight shapes do not match the family deit": (
            (weights | {"pos_embed": torch.zeros(3)}, "deit"),
            {"num_attention_heads": 4},
        ),
        "requires attention and MLP weights in Transformer/encoderblock_0": (
            ({name: part for name, part in flax.items() if "encoderblock_0/Multi" not in name}, "big_vision"),
            {},
        ),
        "blocks.0.attn.q_bias other": (  # a line break in a name
            (weights | {"blocks.0.attn.q_bias\nother": torch.zeros(1)}, "deit"),
            {"num_attention_heads": 4},
        ),
        "the weight shapes do not match the family deit: ": (
            (weights | {"blocks.0.attn.qkv.bias": torch.tensor(0.0)}, "deit"),
            {"num_attention_heads": 4},
        ),
        "image_size cannot be inferred from the weights": (
            (flax | {"pos_embedding": torch.zeros(1, 3 * 6, WIDTH)}, "big_vision"),
            {},
        ),
        "cls_token is not an array of numbers": (({"cls_token": None}, "deit"), {}),
        "the weights contain no position embeddings": (
            ({name: part for name, part in flax.items() if name != "pos_embedding"}, "big_vision"),
            {},
        ),
        "is not an array of numbers": (({"cls_token": np.zeros(2, dtype="V2")}, "deit"), {}),
    }
    for message, (arguments, fields) in errors.items():
        with pytest.raises(ConversionError, match=message) as error:
            convert_state_dict(*arguments, **fields)
        assert "\n" not in str(error.value)
    oblong = weights | {"pos_embed": torch.zeros(1, 1 + 3 * 6, WIDTH)}
    size = {"image_size": [3 * PATCH, 6 * PATCH], "num_attention_heads": HEADS}
    assert convert_state_dict(oblong, "mae", **size).config.grid_size == (3, 6)

"""Published state-dict files: containers, families, accuracy against timm, and what is refused."""

import argparse
import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers.tiny_models import raises_one_line
from safetensors.torch import load_file, save_file
from torch import nn

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel
from modeling_vitcls.conversion.convert import convert_checkpoint
from modeling_vitcls.conversion.from_state_dict import convert_state_dict
from modeling_vitcls.conversion.parity_report import compare_models
from modeling_vitcls.conversion.random_weights import randomize_weights
from modeling_vitcls.conversion.source_files import FileSource, describe_differences
from modeling_vitcls.conversion.weight_rules import ConversionError
from modeling_vitcls.hub.provenance import find_provenance
from peers.test_from_state_dict import (
    BIG_VISION,
    GRID,
    HEADS,
    LABELS,
    PATCH,
    WIDTH,
    Weights,
    dinov2_weights,
    dinov3_weights,
    flax_attention,
    flax_mlp,
    flax_norm,
    flax_shapes,
    random_weights,
    saved,
    vit_shapes,
)


pytestmark = pytest.mark.integration


HEAD_WIDTH = 64  # the published width of one head


def plain_weights(width: int = 192) -> Weights:
    """Return a plain encoder of a published width, so that the number of heads is known."""
    return widen(vit_shapes(1 + GRID**2), width)


def widen(shapes: dict[str, tuple[int, ...]], width: int) -> Weights:
    """Return random weights of these shapes with another width."""
    sizes = {WIDTH: width, 3 * WIDTH: 3 * width}
    return random_weights({name: tuple(sizes.get(size, size) for size in shape) for name, shape in shapes.items()})


def build_dinov3(mlp: str, bias: bool) -> Weights:
    """Return the weights of a DINOv3 model of a published width."""
    weights = {name: widen_dinov3(tensor, 384) for name, tensor in dinov3_weights(mlp, bias).items()}
    return weights | {"rope_embed.periods": (100.0 ** (torch.arange(16) / 16)).bfloat16()}


HEAD = {"head.weight": (LABELS, WIDTH), "head.bias": (LABELS,)}
DISTILLED_HEAD = {"dist_token": (1, 1, WIDTH), "head_dist.weight": (LABELS, WIDTH), "head_dist.bias": (LABELS,)}
GAMMAS = {f"blocks.{index}.gamma_{number}": (WIDTH,) for index in range(2) for number in (1, 2)}
SCALES = {f"blocks.{index}.ls{number}.gamma": (WIDTH,) for index in range(2) for number in (1, 2)}
FILES: dict[str, tuple[str, str | None, Any]] = {
    # name: family, --family, content
    "dino, bare": ("dino", "dino", lambda: plain_weights()),
    "dino, full": (
        "dino",
        None,
        lambda: {
            "args": argparse.Namespace(arch="vit"),
            "epoch": 3,
            "student": {"module.backbone.cls_token": torch.zeros(1)},
            "teacher": {f"module.backbone.{name}": tensor for name, tensor in plain_weights().items()}
            | {"module.head.last_layer.weight": torch.zeros(3)},
        },
    ),
    "ibot": ("ibot", None, lambda: {"state_dict": plain_weights() | {"masked_embed": torch.ones(1, 192), "epoch": 3}}),
    "msn": ("msn", None, lambda: {"target_encoder": {f"module.{n}": t for n, t in plain_weights(384).items()}}),
    "ijepa": (
        "ijepa",
        None,
        lambda: {
            "encoder": {},
            "target_encoder": {
                f"module.{name}": tensor
                for name, tensor in widen(vit_shapes(GRID**2), 768).items()
                if name != "cls_token"
            },
        },
    ),
    "mae": ("mae", None, lambda: {"state_dict": {"model": widen(vit_shapes(1 + GRID**2), 768)}}),
    "deit": ("deit", None, lambda: {"model": widen(vit_shapes(1 + GRID**2) | HEAD, 192)}),
    "deit distilled": (
        "deit",
        None,
        lambda: {"model": widen(vit_shapes(2 + GRID**2) | HEAD | DISTILLED_HEAD, 192)},
    ),
    "deit iii": (
        "deit",
        None,
        lambda: {"model": widen(vit_shapes(GRID**2) | HEAD | GAMMAS, 384)},
    ),
    "dinov2": (
        "dinov2",
        None,
        lambda: widen(vit_shapes(1 + GRID**2) | SCALES, 384) | {"mask_token": torch.ones(1, 384)},
    ),
    "dinov2 with registers": (
        "dinov2",
        None,
        lambda: (
            widen(vit_shapes(1 + GRID**2) | SCALES, 384)
            | {"mask_token": torch.ones(1, 384), "register_tokens": torch.randn(1, 4, 384)}
        ),
    ),
    "dinov2 giant": (
        "dinov2",
        None,
        lambda: (
            widen(vit_shapes(1 + GRID**2, "DINOv2 giant") | SCALES, 1536)
            | {"mask_token": torch.ones(1, 1536), "register_tokens": torch.randn(1, 4, 1536)}
        ),
    ),
    "dinov3 plus": ("dinov3", None, lambda: build_dinov3("DINOv3 gated", bias=True)),
    "dinov3 without biases": ("dinov3", None, lambda: build_dinov3("DINOv3 gated", bias=False)),
}


@pytest.mark.parametrize("name", FILES)
def test_published_files_are_converted_exactly(name: str, tmp_path: Path) -> None:
    """At two sizes, with the resampling of the authors' code."""
    family, option, build = FILES[name]
    torch.save(build(), tmp_path / "weights.pth")
    report = convert_checkpoint(str(tmp_path / "weights.pth"), tmp_path / "made", family=option)
    assert report.family == family
    assert len(report.comparisons) == 2 and not report.not_compared
    assert report.source == "path/to/weights.pth"
    saved_report = json.loads((tmp_path / "made" / "parity_report.json").read_text())
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    assert saved_report["source_sha256"] == report.source_sha256 == digest
    assert str(tmp_path) not in json.dumps(saved_report)
    reason = "timm has no preprocessing settings for MSN" if family == "msn" else ""
    assert report.preprocessing["assumed_because"] == reason
    assert report.classifier == ("kept" if family == "deit" else "none")
    assert ("logits" in report.comparisons[0].differences) is (family == "deit")
    notes = " ".join(report.notes)
    has_other_resampling = family in ("dino", "ibot", "msn", "mae", "deit", "ijepa") or name == "dinov2"
    assert ("without antialiasing, as in the authors' code" in notes) is has_other_resampling
    assert ("offset 0.1" in notes) is (family in ("dino", "ibot") or name == "dinov2")
    unused = "1 weights outside of backbone.* are not converted, for example head.last_layer.weight"
    assert (unused in report.notes) is (name == "dino, full")


@torch.no_grad()
@pytest.mark.parametrize("grid", [(GRID, GRID), (6, 6), (3, 7)])
def test_dino_and_ibot_resample_positions_as_their_authors(grid: tuple[int, int]) -> None:
    """`interpolate_pos_encoding` of facebookresearch/dino, written out."""
    weights = plain_weights()
    model = convert_state_dict(weights, "dino")
    patches = weights["pos_embed"][:, 1:].reshape(1, GRID, GRID, -1).permute(0, 3, 1, 2)
    if grid != (GRID, GRID):
        factors = tuple((size + 0.1) / GRID for size in grid)
        patches = nn.functional.interpolate(patches, scale_factor=factors, mode="bicubic")
    positions = torch.cat([weights["pos_embed"][:, :1], patches.flatten(2).transpose(1, 2)], dim=1)
    reference = timm.create_model(
        "vit_tiny_patch16_224",
        patch_size=PATCH,
        img_size=(grid[0] * PATCH, grid[1] * PATCH),
        depth=2,
        mlp_ratio=0.5,
        num_classes=0,
    )
    reference.load_state_dict(weights | {"pos_embed": positions})
    images = torch.randn(2, 3, grid[0] * PATCH, grid[1] * PATCH)
    difference = model(images).last_hidden_state - reference.eval().forward_features(images)
    assert difference.abs().max() <= 1e-5


@torch.no_grad()
def test_dinov3_with_stored_and_with_computed_periods() -> None:
    """Both variants are exact: as the authors run the weights, and as timm and transformers do."""
    weights = dinov3_weights()
    stored = convert_state_dict(weights, "dinov3", num_attention_heads=HEADS)
    computed = convert_state_dict(weights, "dinov3", num_attention_heads=HEADS, rope_periods=None)
    periods = weights["rope_embed.periods"]
    assert periods.dtype == torch.bfloat16 and stored.config.rope_periods == periods.float().tolist()
    assert computed.config.rope_periods is None
    assert describe_differences("dinov3", computed.config) == []
    images = torch.randn(2, 3, GRID * PATCH, 6 * PATCH)
    for model, expected in (
        (stored, periods.float()),
        (computed, 100.0 ** (torch.arange(len(periods)) / len(periods))),
    ):
        cos, _ = model.rotary_positions((GRID, 6), torch.zeros(1))
        y, x = torch.meshgrid(*((torch.arange(n) + 0.5) / n * 2 - 1 for n in (GRID, 6)), indexing="ij")
        angles = 2 * torch.pi * torch.stack([y, x], dim=-1).flatten(0, 1)[:, :, None] / expected
        torch.testing.assert_close(cos, angles.flatten(1).tile(2).cos(), atol=2e-6, rtol=0)
    difference = stored(images).last_hidden_state - computed(images).last_hidden_state
    assert difference.abs().max() > 1e-4


def test_stored_periods_survive_saving_and_are_named(tmp_path: Path) -> None:
    weights = build_dinov3("plain", bias=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "dinov3.safetensors")
    report = convert_checkpoint(str(tmp_path / "dinov3.safetensors"), tmp_path / "made")
    assert report.family == "dinov3" and "rotary periods: as stored in the file" in report.notes[0]
    model = ViTCLSModel.from_pretrained(tmp_path / "made")
    assert model.config.rope_periods == weights["rope_embed.periods"].float().tolist()


def widen_dinov3(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Return random values of another width; masks of biases keep their values."""
    shape = [{WIDTH: width, 3 * WIDTH: 3 * width}.get(size, size) for size in tensor.shape]
    if set(tensor.unique().tolist()) == {0.0, 1.0}:
        return torch.cat([torch.ones(width), torch.zeros(width), torch.ones(width)])
    return torch.randn(shape) * (0.1 if len(shape) > 1 else 0.2) + (1.0 if len(shape) == 1 else 0.0)


# Classifiers ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_linear_classifier_of_dinov2(tmp_path: Path) -> None:
    """It reads the CLS token and the mean of the patches, both after the norm."""
    backbone = widen(vit_shapes(1 + GRID**2) | SCALES, 384)
    head = {"weight": torch.randn(LABELS, 768) * 0.05, "bias": torch.randn(LABELS)}
    weights = {f"backbone.{name}": tensor for name, tensor in backbone.items()}
    weights |= {f"linear_head.{name}": tensor for name, tensor in head.items()}
    torch.save(weights, tmp_path / "lc.pth")
    report = convert_checkpoint(str(tmp_path / "lc.pth"), tmp_path / "made")
    assert report.classifier == "kept" and "logits" in report.comparisons[0].differences
    model = ViTCLSForImageClassification.from_pretrained(tmp_path / "made")
    images = torch.randn(2, 3, GRID * PATCH, GRID * PATCH)
    sequence = model.vitcls(images).last_hidden_state
    pooled = torch.cat([sequence[:, 0], sequence[:, 1:].mean(dim=1)], dim=1)
    torch.testing.assert_close(model(images).logits, pooled @ head["weight"].T + head["bias"], atol=1e-5, rtol=0)


def test_the_linear_classifier_of_dinov2_in_half_precision(tmp_path: Path) -> None:
    """The mean excludes the registers, and the converted weights have the dtype of the file."""
    backbone = widen(vit_shapes(1 + GRID**2) | SCALES | {"register_tokens": (1, 4, WIDTH)}, 384)
    weights = {f"backbone.{name}": tensor for name, tensor in backbone.items()}
    weights |= {"linear_head.weight": torch.randn(LABELS, 768) * 0.05, "linear_head.bias": torch.randn(LABELS)}
    torch.save({name: weight.half() for name, weight in weights.items()}, tmp_path / "lc.pth")
    report = convert_checkpoint(str(tmp_path / "lc.pth"), tmp_path / "made")
    assert "logits" in report.comparisons[1].differences and report.notes == []
    saved_weights = load_file(tmp_path / "made" / "model.safetensors")
    assert {weight.dtype for weight in saved_weights.values()} == {torch.float16}


def test_a_fine_tuned_mae(tmp_path: Path) -> None:
    head = HEAD | {"fc_norm.weight": (WIDTH,), "fc_norm.bias": (WIDTH,)}
    weights = widen(vit_shapes(1 + GRID**2) | head, 768)
    del weights["norm.weight"], weights["norm.bias"]
    torch.save({"model": weights}, tmp_path / "mae.pth")
    source = FileSource.load(tmp_path / "mae.pth")
    comparisons, reason = compare_models(source, source.convert("keep", None), has_source_classifier=True)
    assert source.family == "mae" and not reason
    assert [set(comparison.differences) for comparison in comparisons] == [{"cls", "patches", "logits"}] * 2


def test_the_decoder_of_mae_and_rectangular_patches(tmp_path: Path) -> None:
    """The decoder is ignored. The patches of gray images are not square."""
    shapes = vit_shapes(1 + GRID**2) | {"patch_embed.proj.weight": (WIDTH, 1, PATCH, 2 * PATCH)}
    weights = widen(shapes, 768)
    decoder = {"decoder_embed.weight": torch.zeros(3, 768), "mask_token": torch.zeros(1, 1, 3)}
    torch.save({"model": weights | decoder}, tmp_path / "mae.pth")
    source = FileSource.load(tmp_path / "mae.pth")
    assert source.family == "mae" and source.weights.keys() == weights.keys()
    comparisons, reason = compare_models(source, source.convert("keep", None), has_source_classifier=False)
    assert [comparison.image_size for comparison in comparisons] == [(32, 64), (24, 96)] and not reason


def test_the_classifier_of_four_layers_is_refused() -> None:
    weights = dinov2_weights() | {"linear_head.weight": torch.zeros(3, 5 * WIDTH), "linear_head.bias": torch.zeros(3)}
    with raises_one_line("uses 4 layers", "linear4_head", error=ConversionError):
        convert_state_dict(weights, "dinov2", num_attention_heads=HEADS)


# Families by way of timm ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("clip", "vit_base_patch32_clip_quickgelu_224"),
        ("eva02", "eva02_base_patch14_224"),
        ("aimv2", "aimv2_large_patch14_224"),
    ],
)
def test_families_that_timm_reads(family: str, name: str, tmp_path: Path) -> None:
    """From files with the authors' names, of the published widths."""
    source: Any = randomize_weights(timm.create_model(name, depth=2, num_classes=0 if family == "aimv2" else 7))
    if family == "clip":
        source.head.bias.zero_()
    weights = {name: tensor.contiguous() for name, tensor in NAMES[family](dict(source.state_dict())).items()}
    save_file(weights, tmp_path / "weights.safetensors")
    loaded = FileSource.load(tmp_path / "weights.safetensors")
    assert loaded.family == family
    images = torch.randn(1, 3, *source.patch_embed.img_size)
    torch.testing.assert_close(loaded.model(images), source(images))
    height, width = source.patch_embed.patch_size
    wide = torch.randn(1, 3, 3 * height, 5 * width)
    resized = copy.deepcopy(source)
    resized.set_input_size(img_size=wide.shape[-2:])
    torch.testing.assert_close(loaded.build_resized_model(wide.shape[-2:])(wide), resized(wide))
    model: Any = loaded.convert("keep", None)
    expected = source.forward_features(images)
    torch.testing.assert_close(model.base_model(images).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    if family != "aimv2":
        torch.testing.assert_close(model(images).logits, source(images), atol=1e-5, rtol=1e-5)
        assert loaded.convert("new", 3).config.num_labels == 3
    if family == "clip":  # a file with only the image encoder
        weights = {name.removeprefix("visual."): tensor for name, tensor in weights.items() if "visual" in name}
        save_file(weights, tmp_path / "visual.safetensors")
        image_encoder = FileSource.load(tmp_path / "visual.safetensors")
        assert image_encoder.family == "clip"
        assert torch.equal(image_encoder.model(images), loaded.model(images))


def name_as_eva(weights: Weights) -> Weights:
    """Return the names of baaivision/EVA."""
    swaps = {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.norm": "mlp.ffn_ln", "mlp.fc2": "mlp.w3"}
    swaps |= {"attn.q_proj.bias": "attn.q_bias", "attn.v_proj.bias": "attn.v_bias"}
    renamed: Weights = {}
    for name, tensor in weights.items():
        for ours, theirs in swaps.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


def name_as_openai(weights: Weights) -> Weights:
    """Return OpenAI's names and shapes of a CLIP image encoder, next to weights of the text encoder."""
    renamed: Weights = {"visual.proj": weights.pop("head.weight").T, "logit_scale": torch.ones(1)}
    weights.pop("head.bias", None)
    swaps = [
        ("patch_embed.proj", "conv1"),
        ("norm_pre", "ln_pre"),
        ("norm.", "ln_post."),
        ("blocks.", "transformer.resblocks."),
        ("norm1", "ln_1"),
        ("norm2", "ln_2"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("attn.proj", "attn.out_proj"),
        ("attn.qkv.", "attn.in_proj_"),
    ]
    for name, tensor in weights.items():
        if name == "cls_token":
            renamed["visual.class_embedding"] = tensor.flatten()
        elif name == "pos_embed":
            renamed["visual.positional_embedding"] = tensor[0]
        else:
            for theirs, ours in swaps:
                name = name.replace(theirs, ours) if theirs != "norm." or name.startswith("norm.") else name
            renamed[f"visual.{name}"] = tensor
    return renamed


def name_as_apple(weights: Weights) -> Weights:
    """Return the names of apple/ml-aim."""
    swaps = {
        "patch_embed.proj": "preprocessor.patchifier.proj",
        "patch_embed.norm": "preprocessor.patchifier.norm",
        "pos_embed": "preprocessor.pos_embed",
        "blocks": "trunk.blocks",
        "norm.": "trunk.post_trunk_norm.",
    }
    renamed: Weights = {}
    for name, tensor in weights.items():
        theirs = next((swaps[ours] + name.removeprefix(ours) for ours in swaps if name.startswith(ours)), name)
        theirs = (
            theirs.replace("norm1", "norm_1")
            .replace("norm2", "norm_2")
            .replace("mlp.fc1_g", "mlp.fc1")
            .replace("mlp.fc1_x", "mlp.fc3")
        )
        renamed[theirs] = tensor
    return renamed


NAMES = {"clip": name_as_openai, "eva02": name_as_eva, "aimv2": name_as_apple}


# Refusals ------------------------------------------------------------------------------------------------------------


def test_what_is_not_a_supported_file_is_refused(tmp_path: Path) -> None:
    cases: dict[str, tuple[Any, str | None, tuple[str, ...]]] = {
        "several": (
            plain_weights(),
            None,
            ("several families", "--family to one of dino, ibot, msn, mae, deit, ijepa"),
        ),
        "beit": (
            {"blocks.0.attn.relative_position_bias_table": torch.zeros(3)},
            None,
            ("beit", "transformers:microsoft/beit"),
        ),
        "swin": (
            {"layers.0.weight": torch.zeros(3)},
            None,
            ("does not contain a supported image encoder", "timm:NAME"),
        ),
        "unknown": (plain_weights(), "swin", ("--family swin is unknown", "dinov2")),
        "wrong": (plain_weights(), "dinov3", ("nonzero key biases",)),
        "list": ([torch.zeros(3)], None, ("contains an object of type list instead of a state dict",)),
        "huge": (
            {
                "visual.class_embedding": torch.zeros(3),
                "visual.conv1.weight": torch.zeros(3, 3, 8, 8),
                "visual.positional_embedding": torch.zeros(5, 3),
            },
            None,
            ("clip files require a (width, patch size) of (768, 32)", "timm:NAME"),
        ),
        "no positions": (
            {name: tensor for name, tensor in plain_weights().items() if name != "pos_embed"},
            "eva02",
            ("does not contain eva02 weights", "position embeddings"),
        ),
        "no layers": (
            {
                "visual.class_embedding": torch.zeros(768),
                "visual.conv1.weight": torch.zeros(768, 3, 32, 32),
                "visual.positional_embedding": torch.zeros(50, 768),
            },
            None,
            ("does not contain clip weights: Error(s) in loading state_dict",),
        ),
        "other blocks": (
            {"blocks.0.gamma_1": torch.zeros(192)} | {n: t for n, t in plain_weights().items() if "mlp" not in n},
            "deit",
            ("blocks.0.mlp.fc1.weight",),
        ),
    }
    for name, (content, family, words) in cases.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with raises_one_line(*words, error=ConversionError):
            FileSource.load(tmp_path / f"{name}.pth", family)
    with raises_one_line("is not a file", error=OSError):
        FileSource.load(tmp_path / "missing.pth")
    (tmp_path / "weights.ckpt").touch()
    with raises_one_line("weights.ckpt is not supported", ".npz .safetensors", error=ConversionError):
        FileSource.load(tmp_path / "weights.ckpt")
    (tmp_path / "damaged.pth").write_bytes(b"damaged")
    with raises_one_line("damaged.pth", error=ConversionError):
        FileSource.load(tmp_path / "damaged.pth")


class RunWhenUnpickled:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_no_code_in_a_file_runs(tmp_path: Path) -> None:
    torch.save({"model": RunWhenUnpickled(tmp_path / "ran")}, tmp_path / "evil.pth")
    with raises_one_line("is a pickle with objects other than tensors", error=ConversionError):
        FileSource.load(tmp_path / "evil.pth")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with raises_one_line("TorchScript archive, which contains code", error=ConversionError):
        FileSource.load(tmp_path / "script.pt")
    np.savez(tmp_path / "evil.npz", embedding=np.array([RunWhenUnpickled(tmp_path / "ran")], dtype=object))
    with raises_one_line("cannot read the weights in", "evil.npz", error=ConversionError):
        FileSource.load(tmp_path / "evil.npz")
    assert not (tmp_path / "ran").exists()


MAP_HEAD = {
    "MAPHead_0/probe": (1, 1, WIDTH),
    **flax_attention("MAPHead_0/MultiHeadDotProductAttention_0"),
    **flax_norm("MAPHead_0/LayerNorm_0"),
    **flax_mlp("MAPHead_0/MlpBlock_0"),
}


RECTANGLES = {"embedding/kernel": (PATCH, 2 * PATCH, 3, WIDTH)}


@pytest.mark.parametrize(
    "extra",
    [{}, {"cls": (1, 1, WIDTH)}, MAP_HEAD, RECTANGLES],
    ids=["mean", "cls", "attention", "rectangular patches"],
)
def test_npz_files_of_big_vision(extra: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    saved(random_weights(flax_shapes(*BIG_VISION, GRID**2) | extra), tmp_path / "vit.npz", "params/")
    source = FileSource.load(tmp_path / "vit.npz")
    assert source.family == "big_vision" and "aligns the corners" in source.notes[0]
    model = source.convert("keep", None)
    assert source.image_size == tuple(GRID * size for size in model.config.patch_height_width)
    preprocessing = source.convert_preprocessing()
    assert bool(preprocessing.default_reason) == (extra is RECTANGLES)  # timm crops only squares
    assert extra is RECTANGLES or list(preprocessing.processor.image_mean) == [0.5, 0.5, 0.5]
    comparisons, reason = compare_models(source, model, has_source_classifier=True)
    assert all("logits" in comparison.differences for comparison in comparisons)
    assert len(comparisons) == 2 and not reason


def test_a_file_as_a_model_of_other_commands(tmp_path: Path) -> None:
    file = tmp_path / "deit.pth"
    torch.save({"model": widen(vit_shapes(1 + GRID**2) | HEAD, 192)}, file)
    source = FileSource.load(file)
    model, processor = source.convert("keep", None), source.convert_preprocessing().processor
    provenance = find_provenance(str(file))
    assert isinstance(model, ViTCLSForImageClassification) and model.config.num_labels == LABELS
    assert (processor.crop_size.height, processor.crop_size.width) == (GRID * PATCH, GRID * PATCH)
    assert provenance.name == "deit.pth" and provenance.license is None
    assert source.convert("new", 3).config.num_labels == 3
    assert type(source.convert("drop", None)) is ViTCLSModel

"""Published state-dict files: families, exactness, preprocessing, and refusals.

All parameters have random values. The forward passes in helpers/published_weights.py use neither
timm nor this package.
"""

import argparse
import hashlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers.published_weights import (
    GRID,
    LABELS,
    PATCH,
    Weights,
    build_dinov3_weights,
    build_vit_weights,
    fill,
    run_authors_vit,
)
from helpers.source_checkpoints import RunWhenUnpickled
from helpers.tiny_models import raises_one_line
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import interpolate, layer_norm

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor, ViTCLSModel
from modeling_vitcls.conversion.convert import convert_checkpoint, load_source
from modeling_vitcls.conversion.from_state_dict import (
    NUM_HEADS,
    build_timm_model,
    convert_family_model,
    prepare_weights,
    read_vit_options,
)
from modeling_vitcls.conversion.open_model import compute_cache_name
from modeling_vitcls.conversion.source_files import FileSource
from modeling_vitcls.conversion.weight_rules import ConversionError
from scripts.tools.random_weights import randomize_weights


pytestmark = pytest.mark.usefixtures("no_grad")

LIMIT = 1e-5  # DESIGN.md
HEAD = {"head.weight": (LABELS, 192), "head.bias": (LABELS,)}


def resample_dino(maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """facebookresearch/dino, vision_transformer.py, and dinov2 without registers (offset 0.1)."""
    return interpolate(
        maps, scale_factor=((grid[0] + 0.1) / GRID, (grid[1] + 0.1) / GRID), mode="bicubic"
    )


# facebookresearch/deit and mae, util/pos_embed.py
resample_bicubic = partial(interpolate, mode="bicubic", align_corners=False)
# facebookresearch/dinov2, hub/backbones.py: with antialiasing, without an offset
resample_dinov2_reg4 = partial(interpolate, mode="bicubic", antialias=True)


def convert_state_dict(weights: Weights, family: str) -> Any:
    """Convert a published state dict."""
    tensors = prepare_weights(weights, family)
    return convert_family_model(build_timm_model(tensors, family), tensors, family)


def add_token(weights: Weights, **tokens: tuple[int, ...]) -> Weights:
    """Add random tokens."""
    return weights | fill(dict(tokens))


def add_prefix(prefix: str, weights: Weights) -> Weights:
    """Add what programs put before the names of weights."""
    return {f"{prefix}{name}": weight for name, weight in weights.items()}


# File name: family, --family, weights, function that wraps them as published, resampling of the
# authors
FILES: dict[str, tuple[str, str | None, Callable[[], Weights], Callable[[Weights], Any], Any]] = {
    "dino.pth": ("dino", "dino", lambda: build_vit_weights(depth=12), dict, resample_dino),
    "dino_full.pth": (
        "dino",
        None,
        build_vit_weights,
        lambda weights: {
            "args": argparse.Namespace(arch="vit"),
            "epoch": 3,
            "student": {"module.backbone.cls_token": torch.zeros(1)},
            "teacher": add_prefix("module.backbone.", weights)
            | {"module.head.last_layer.weight": torch.zeros(3)},
        },
        resample_dino,
    ),
    "ibot.pth": (
        "ibot",
        None,
        lambda: add_token(build_vit_weights(), masked_embed=(1, 192)),
        lambda weights: {"model": {"state_dict": weights | {"epoch": 3}}},
        resample_dino,
    ),
    "mae.pth": (
        "mae",
        None,
        lambda: build_vit_weights(width=768),
        lambda weights: {
            "model": weights
            | {"decoder_embed.weight": torch.zeros(3, 768), "mask_token": torch.zeros(1, 1, 3)}
        },
        resample_bicubic,
    ),
    "mae_tuned.pth": (  # normalizes the mean of the patches
        "mae",
        None,
        lambda: {
            re.sub("^norm", "fc_norm", name): tensor
            for name, tensor in build_vit_weights(
                width=768, extra={"head.weight": (LABELS, 768), "head.bias": (LABELS,)}
            ).items()
        },
        lambda weights: {"model": weights},
        resample_bicubic,
    ),
    "deit.pth": (
        "deit",
        None,
        lambda: build_vit_weights(extra=HEAD),
        lambda w: {"model": w},
        resample_bicubic,
    ),
    "deit_distilled.pth": (
        "deit",
        None,
        lambda: build_vit_weights(
            2,
            extra=HEAD
            | {
                "dist_token": (1, 1, 192),
                "head_dist.weight": (LABELS, 192),
                "head_dist.bias": (LABELS,),
            },
        ),
        lambda weights: {"model": weights},
        resample_bicubic,
    ),
    "deit3.pth": (
        "deit",
        None,
        lambda: build_vit_weights(0, "gamma_{}", extra=HEAD),
        lambda weights: {"model": add_prefix("_orig_mod.", weights)},
        resample_bicubic,
    ),
    "dinov2.pth": (
        "dinov2",
        None,
        lambda: add_token(build_vit_weights(1, "ls{}.gamma", width=384), mask_token=(1, 384)),
        dict,
        resample_dino,
    ),
    "dinov2_giant_reg4.pth": (  # block names with chunk indices
        "dinov2",
        None,
        lambda: add_token(
            build_vit_weights(1, "ls{}.gamma", width=384, mlp="fused"), register_tokens=(1, 4, 384)
        ),
        lambda weights: {
            re.sub(r"^blocks\.(\d+)\.", r"blocks.\1.\1.", name): t for name, t in weights.items()
        },
        resample_dinov2_reg4,
    ),
}


def save(content: Any, file: Path) -> Path:
    """Write a file in the format of its suffix."""
    if file.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, file)
    else:
        torch.save(content, file)
    return file


@pytest.mark.parametrize("name", FILES)
def test_files_are_converted_exactly(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tokens equal those of the authors' code, at the native size and at a non-square size."""
    monkeypatch.chdir(tmp_path)
    family, option, build, wrap, resample = FILES[name]
    weights = build()
    file = save(wrap(weights), Path(name))

    report = convert_checkpoint(name, tmp_path / "made", family=option)
    assert report["family"] == family
    assert report["source"] == f"path/to/{name}"
    # timm resamples as these authors, and compares a second size
    assert len(report["comparisons"]) == (2 if name == "dinov2_giant_reg4.pth" else 1)
    assert report["source_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert str(tmp_path) not in (tmp_path / "made" / "parity_report.json").read_text()
    assert not report["preprocessing"]["assumed_because"]

    is_classifier = "head.weight" in weights
    assert report["classifier"] == ("kept" if is_classifier else "none")
    model_class = ViTCLSForImageClassification if is_classifier else ViTCLSModel
    model: Any = model_class.from_pretrained(tmp_path / "made")
    for rows, columns in ((GRID, GRID), (3, 7)):
        images = torch.randn(2, 3, rows * PATCH, columns * PATCH)
        expected = run_authors_vit(weights, images, resample)
        difference = model.base_model(images).last_hidden_state - expected
        assert difference.abs().max() <= LIMIT * expected.abs().max()
    if is_classifier:
        pooled = expected[:, 0]
        if "fc_norm.weight" in weights:
            norm = weights["fc_norm.weight"], weights["fc_norm.bias"]
            pooled = layer_norm(expected[:, 1:].mean(dim=1), (768,), *norm, eps=1e-6)
        logits = pooled @ weights["head.weight"].T + weights["head.bias"]
        if "dist_token" in weights:
            logits = (
                logits + expected[:, 1] @ weights["head_dist.weight"].T + weights["head_dist.bias"]
            ) / 2
        assert (model(images).logits - logits).abs().max() <= LIMIT * logits.abs().max()
    if (mask_token := weights.get("mask_token", weights.get("masked_embed"))) is not None:
        assert torch.equal(model.embeddings.mask_token.flatten(), mask_token.flatten())
    unused = (
        "1 weights outside of module.backbone.* are not converted, for example "
        "module.head.last_layer.weight"
    )
    assert (unused in report["notes"]) is (name == "dino_full.pth")


def test_dinov3_is_exact_with_stored_and_with_computed_periods(tmp_path: Path) -> None:
    """Both variants are exact: as the authors run the weights, and as timm and transformers do."""
    weights = build_dinov3_weights()
    stored = convert_state_dict(weights, "dinov3")
    computed = convert_state_dict(
        {n: w for n, w in weights.items() if n != "rope_embed.periods"}, "dinov3"
    )

    periods = weights["rope_embed.periods"]
    assert periods.dtype == torch.bfloat16
    assert stored.config.rope_periods == periods.float().tolist()
    assert torch.equal(stored.embeddings.mask_token[0], weights["mask_token"])

    images = torch.randn(2, 3, GRID * PATCH, 6 * PATCH)
    assert (
        stored(images).last_hidden_state - computed(images).last_hidden_state
    ).abs().max() > 1e-4

    for mlp, bias in (("plain", True), ("gated", True), ("gated", False)):
        file = save(build_dinov3_weights(mlp, bias), tmp_path / f"{mlp}{bias}.pth")
        report = convert_checkpoint(str(file), tmp_path / f"made {mlp} {bias}")
        assert len(report["comparisons"]) == 2
        assert report["image_size"] == (16 * PATCH, 16 * PATCH)


def test_rectangular_patches_of_gray_images_are_converted_exactly() -> None:
    shapes = {"patch_embed.proj.weight": (192, 1, PATCH, 2 * PATCH)}
    weights = build_vit_weights(extra=shapes)
    model = convert_state_dict(weights, "deit")
    images = torch.randn(2, 1, GRID * PATCH, 2 * GRID * PATCH)
    torch.testing.assert_close(
        model(images).last_hidden_state, run_authors_vit(weights, images), atol=1e-5, rtol=1e-5
    )


# Architectures of the published sizes, by family.
PUBLISHED_SIZES = {
    "vit_{}_patch14_dinov2": ("small", "base", "large", "giant"),
    "deit_{}_patch16_224": ("tiny", "small", "base"),
    "deit3_{}_224": ("medium_patch16", "large_patch16", "huge_patch14"),
    "vit_{}_224": ("large_patch16", "huge_patch14"),
}


def test_published_widths_have_the_published_number_of_heads() -> None:
    """The weights do not contain this number, and a comparison would use the same one."""
    for pattern, sizes in PUBLISHED_SIZES.items():
        for size in sizes:
            model: Any = timm.create_model(pattern.format(size), device="meta", depth=1)
            assert NUM_HEADS[model.embed_dim] == model.blocks[0].attn.num_heads
    for size in ("small", "base", "large", "huge_plus", "7b"):
        model = timm.create_model(f"vit_{size}_patch16_dinov3", device="meta", depth=1)
        weights = {
            "patch_embed.proj.weight": model.patch_embed.proj.weight,
            "blocks.0.mlp.fc1.weight": torch.ones(1),
        }
        assert read_vit_options(weights, "dinov3")["num_heads"] == model.blocks[0].attn.num_heads


# Files with the name of an architecture -----------------------------------------------------------


def save_lab_checkpoint(file: Path) -> Any:
    """Save what timm's train.py writes for a model of 7 classes at 64 pixels; return the model."""
    model: Any = timm.create_model("test_vit", num_classes=LABELS, img_size=64)
    average = randomize_weights(model).state_dict()
    last = {name: weight * 0.5 for name, weight in average.items()}
    content = {"state_dict": last, "state_dict_ema": average, "arch": "test_vit", "epoch": 3}
    torch.save(content, file)
    return model


@pytest.mark.parametrize("prefix", ["", "timm:test_vit@"])
def test_a_checkpoint_of_timms_training_is_exact_with_and_without_its_name(
    prefix: str, tmp_path: Path
) -> None:
    file = tmp_path / "model_best@2.pth.tar"
    trained = save_lab_checkpoint(file)
    report = convert_checkpoint(f"{prefix}{file}", tmp_path / "made")
    assert report["image_size"] == (64, 64)
    assert len(report["comparisons"]) == 2
    assert report["source_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    notes = "".join(report["notes"])
    assert "'state_dict_ema'" in notes
    assert ("timm:test_vit" in notes) is (prefix == "")

    model: Any = ViTCLSForImageClassification.from_pretrained(tmp_path / "made")
    images = torch.randn(2, 3, 64, 64)
    expected = trained(images)
    assert expected.shape == (2, LABELS)
    assert (model(images).logits - expected).abs().max() <= LIMIT * expected.abs().max()
    # Of this model, not of DeiT
    processor = ViTCLSImageProcessor.from_pretrained(tmp_path / "made")
    assert tuple(processor.image_mean) == (0.5, 0.5, 0.5)


def test_a_changed_file_of_a_named_architecture_is_converted_again(tmp_path: Path) -> None:
    file = tmp_path / "best.pth"
    save_lab_checkpoint(file)
    cache_name = compute_cache_name(f"timm:test_vit@{file}")
    torch.save({"x": torch.zeros(1)}, file)
    assert compute_cache_name(f"timm:test_vit@{file}") != cache_name


def test_an_encoder_of_a_named_architecture_has_no_classifier(tmp_path: Path) -> None:
    source: Any = timm.create_model("test_vit", num_classes=0)
    file = save(add_prefix("encoder.", source.state_dict()), tmp_path / "encoder.safetensors")
    model = load_source(f"timm:test_vit@{file}").convert()
    assert isinstance(model, ViTCLSModel)


def test_flax_arrays_of_a_named_architecture_keep_their_classes(tmp_path: Path) -> None:
    """timm reads them, but by default with a random classifier of 1,000 classes."""
    model: Any = timm.create_model("test_vit")
    width, heads = model.embed_dim, model.blocks[0].attn.num_heads
    hidden, size = model.blocks[0].mlp.fc1.out_features, (heads, width // heads)
    shapes: dict[str, tuple[int, ...]] = {
        "embedding/kernel": (16, 16, 3, width),
        "embedding/bias": (width,),
        "cls": (1, 1, width),
        "pos_embedding": model.pos_embed.shape,
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, LABELS),
        "head/bias": (LABELS,),
    }
    for index in range(len(model.blocks)):
        block = f"Transformer/encoderblock_{index}"
        for name in ("LayerNorm_0", "LayerNorm_1"):
            shapes |= {f"{block}/{name}/scale": (width,), f"{block}/{name}/bias": (width,)}
        attention = f"{block}/MultiHeadDotProductAttention_0"
        for name in ("query", "key", "value"):
            shapes |= {
                f"{attention}/{name}/kernel": (width, *size),
                f"{attention}/{name}/bias": size,
            }
        shapes |= {
            f"{attention}/out/kernel": (*size, width),
            f"{attention}/out/bias": (width,),
            f"{block}/MlpBlock_0/Dense_0/kernel": (width, hidden),
            f"{block}/MlpBlock_0/Dense_0/bias": (hidden,),
            f"{block}/MlpBlock_0/Dense_1/kernel": (hidden, width),
            f"{block}/MlpBlock_0/Dense_1/bias": (width,),
        }
    weights = fill(shapes)
    np.savez(tmp_path / "vit.npz", **{f"params/{name}": w.numpy() for name, w in weights.items()})

    converted: Any = load_source(f"timm:test_vit@{tmp_path / 'vit.npz'}").convert()
    assert torch.equal(converted.classifier.weight, weights["head/kernel"].T)
    assert torch.equal(converted.classifier.bias, weights["head/bias"])
    with raises_one_line("vit.npz", "timm:NAME@FILE", error=ConversionError):
        load_source(str(tmp_path / "vit.npz"))


# Refusals -----------------------------------------------------------------------------------------


def build_nested_state_dict() -> dict[str, Any]:
    """Return a state dict that contains itself."""
    content: dict[str, Any] = {"epoch": 3}
    content["model"] = content
    return content


PLAIN = build_vit_weights()
# Name: content of the file, --family, words in the error
REFUSED: dict[str, tuple[Any, str | None, tuple[str, ...]]] = {
    "several families": (PLAIN, None, ("`family`", "dino", "mae", "deit")),
    "TIPS": (
        add_token(build_vit_weights(1, "ls{}.gamma"), register_tokens=(1, 1, 192)),
        None,
        ("several families", "timm:NAME@FILE"),
    ),
    "swin": ({"layers.0.weight": torch.zeros(3)}, None, ("layers.0.weight", "timm:NAME")),
    "nothing": ({}, None, ("timm:NAME",)),
    "unknown family": (PLAIN, "swin", ("swin", "`family`", "dinov2")),
    "wrong family": (PLAIN, "dinov3", ("nonzero key biases",)),
    "list": ([torch.zeros(3)], None, ("list",)),
    "a state dict in itself": (build_nested_state_dict(), None, ("no weights",)),
    "integers": (
        {
            "model": build_vit_weights(extra=HEAD)
            | {"blocks.0.attn.qkv.weight": torch.zeros(576, 192).to(torch.int8)}
        },
        None,
        ("blocks.0.attn.qkv.weight", "int8"),
    ),
    "no positions": (
        {n: t for n, t in PLAIN.items() if n != "pos_embed"},
        "deit",
        ("pos_embed", "`family`"),
    ),
    "no final norm": (
        {n: t for n, t in PLAIN.items() if n != "norm.weight"},
        "deit",
        ("norm.weight",),
    ),
    "another weight": (
        PLAIN | {"blocks.0.extra\nname": torch.zeros(1)},
        "deit",
        ("blocks.0.extra name", "timm:NAME@FILE"),
    ),
    "heads": (build_vit_weights(width=48), "deit", ("the width 48", "convert_from_timm")),
    "grid": (PLAIN | {"pos_embed": torch.zeros(1, 1 + 3 * 6, 192)}, "mae", ("pos_embed",)),
    "shape": (
        PLAIN | {"blocks.0.attn.qkv.bias": torch.tensor(0.0)},
        "deit",
        ("blocks.0.attn.qkv.bias",),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_files_are_refused(name: str, tmp_path: Path) -> None:
    content, family, words = REFUSED[name]
    torch.save(content, tmp_path / "weights.pth")
    with raises_one_line(*words, error=ConversionError):
        FileSource.from_file(tmp_path / "weights.pth", family)


def test_unreadable_files_and_unused_families_are_refused(tmp_path: Path) -> None:
    with raises_one_line("is not a file", error=OSError):
        FileSource.from_file(tmp_path / "missing.pth")
    with raises_one_line("`family='dino'`", "timm:test_vit", error=ConversionError):
        load_source("timm:test_vit", family="dino")
    for name, content, words in (
        ("weights.ckpt", "", ""),
        ("damaged.pth", "damaged", ""),
        ("model.onnx", "", " is one file of a model"),
        ("config.json", "{}", " is one file of a model"),
    ):
        (tmp_path / name).write_text(content)
        with raises_one_line(name + words, error=ConversionError):
            load_source(str(tmp_path / name))


def test_no_code_in_a_file_runs(tmp_path: Path) -> None:
    torch.save({"model": RunWhenUnpickled(tmp_path / "ran")}, tmp_path / "evil.pth")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))  # as OpenAI publishes CLIP
    np.savez(
        tmp_path / "evil.npz",
        embedding=np.array([RunWhenUnpickled(tmp_path / "ran")], dtype=object),
    )

    for name, remedy in (
        ("evil.pth", "safetensors"),
        ("script.pt", "state dict"),
        ("evil.npz", ""),
    ):
        with raises_one_line(name, remedy, error=ConversionError):
            load_source(str(tmp_path / name))
    with raises_one_line("evil.pth", "safetensors", error=ConversionError):
        load_source(f"timm:test_vit@{tmp_path / 'evil.pth'}")

    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "key", "prefix"),
    [
        ("last.ckpt", "state_dict", "model."),
        ("run.pth", "net", ""),
        ("run.pth", "model", "module.encoder."),
    ],
)
def test_checkpoints_of_training_programs_are_unwrapped(
    file: str, key: str, prefix: str, tmp_path: Path
) -> None:
    """Lightning's prefix, and containers and suffixes of other programs."""
    torch.save({key: add_prefix(prefix, PLAIN)}, tmp_path / file)
    source = FileSource.from_file(tmp_path / file, family="deit")
    assert torch.equal(source.model.blocks[0].mlp.fc1.weight, PLAIN["blocks.0.mlp.fc1.weight"])

"""Published state-dict files: families, exactness, preprocessing, and refusals.

All parameters have random values. The reference is the model of timm that had them, with the positions
resampled as by the authors.
"""

import argparse
import hashlib
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
    build_timm_vit,
    rename,
    resample_positions,
)
from helpers.source_checkpoints import RunWhenUnpickled, refuses_conversion
from helpers.tiny_models import get_largest_difference, raises_one_line
from pytest import MonkeyPatch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import interpolate

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
from scripts.tools.random_weights import randomize_weights


pytestmark = pytest.mark.usefixtures("no_grad")

LIMIT = 1e-5  # DESIGN.md


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


def add_prefix(prefix: str, weights: Weights) -> Weights:
    """Add what programs put before the names of weights."""
    return {f"{prefix}{name}": weight for name, weight in weights.items()}


def rename_giant(weights: Weights) -> Weights:
    """Name weights as DINOv2's authors, with chunk indices and a position of the CLS token."""
    names = {
        r"^blocks\.(\d)": r"blocks.\1.\1",
        "fc1": "w12",
        "fc2": "w3",
        "reg_token": "register_tokens",
    }
    renamed = rename(weights, names)
    position = torch.full((1, 1, 384), 0.5)
    renamed["cls_token"] = renamed["cls_token"] - position
    renamed["pos_embed"] = torch.cat([position, renamed["pos_embed"]], dim=1)
    return renamed


GAMMAS = {r"ls(\d)\.gamma": r"gamma_\1"}  # of DeiT III

build_dino = partial(build_timm_vit, "vit_small_patch16_224")
build_mae = partial(build_timm_vit, "vit_base_patch16_224", width=768)
build_deit = partial(build_timm_vit, "deit_small_patch16_224", num_classes=LABELS)
build_dinov2 = partial(build_timm_vit, "vit_small_patch14_dinov2", width=384)

# File name: family, --family, model, function that wraps its weights as published, resampling of the
# authors
FILES = {
    "dino.pth": ("dino", "dino", partial(build_dino, depth=12), dict, resample_dino),
    "dino_full.pth": (
        "dino",
        None,
        build_dino,
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
        build_dino,
        lambda weights: {
            "model": {"state_dict": weights | {"epoch": 3, "masked_embed": torch.ones(1, 192)}}
        },
        resample_dino,
    ),
    "mae.pth": (
        "mae",
        None,
        build_mae,
        lambda weights: {
            "model": weights
            | {"decoder_embed.weight": torch.zeros(3, 768), "mask_token": torch.zeros(1, 1, 3)}
        },
        resample_bicubic,
    ),
    "mae_tuned.pth": (  # normalizes the mean of the patches
        "mae",
        None,
        partial(build_mae, num_classes=LABELS, global_pool="avg"),
        lambda weights: {"model": weights},
        resample_bicubic,
    ),
    "deit.pth": ("deit", None, build_deit, lambda weights: {"model": weights}, resample_bicubic),
    "deit_distilled.pth": (
        "deit",
        None,
        partial(build_timm_vit, "deit_small_distilled_patch16_224", num_classes=LABELS),
        lambda weights: {"model": weights},
        resample_bicubic,
    ),
    "deit3.pth": (
        "deit",
        None,
        partial(build_timm_vit, "deit3_small_patch16_224", num_classes=LABELS),
        lambda weights: {"model": add_prefix("_orig_mod.", rename(weights, GAMMAS))},
        resample_bicubic,
    ),
    "dinov2.pth": (
        "dinov2",
        None,
        build_dinov2,
        lambda weights: weights | {"mask_token": torch.ones(1, 384)},
        resample_dino,
    ),
    "dinov2_giant_reg4.pth": (
        "dinov2",
        None,
        partial(build_timm_vit, "vit_giant_patch14_reg4_dinov2", width=384),
        rename_giant,
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


def check_outputs(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that the largest difference is far below the largest value."""
    assert get_largest_difference(found, expected) <= LIMIT * expected.abs().max()


@pytest.mark.parametrize("name", FILES)
def test_files_are_converted_exactly(name: str, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """All tokens equal those of the authors' code, at the native size and at a non-square size."""
    monkeypatch.chdir(tmp_path)
    family, option, build, wrap, resample = FILES[name]
    source = build()
    file = save(wrap(source.state_dict()), Path(name))

    report = convert_checkpoint(name, tmp_path / "made", family=option)
    assert report["family"] == family
    assert report["source"] == f"path/to/{name}"
    # timm resamples as these authors, and compares a second size
    assert len(report["comparisons"]) == (2 if name == "dinov2_giant_reg4.pth" else 1)
    assert report["source_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert str(tmp_path) not in (tmp_path / "made/parity_report.json").read_text()
    assert not report["preprocessing"]["assumed_because"]

    is_classifier = source.num_classes > 0
    assert report["classifier"] == ("kept" if is_classifier else "none")
    model_class = ViTCLSForImageClassification if is_classifier else ViTCLSModel
    model = model_class.from_pretrained(tmp_path / "made")
    resized = resample_positions(source, (3, 7), resample)
    for authors, size in ((source, (GRID, GRID)), (resized, (3, 7))):
        images = torch.randn(2, 3, *(PATCH * side for side in size))
        check_outputs(model.base_model(images).last_hidden_state, authors.forward_features(images))
        if is_classifier:
            check_outputs(model(images).logits, authors(images))
    if name in ("ibot.pth", "dinov2.pth"):
        assert (model.embeddings.mask_token == 1).all()
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
    states = [model(images).last_hidden_state for model in (stored, computed)]
    assert get_largest_difference(*states) > 1e-4

    for is_gated, bias in ((False, True), (True, True), (True, False)):
        file = save(build_dinov3_weights(is_gated, bias), tmp_path / f"{is_gated}{bias}.pth")
        report = convert_checkpoint(str(file), tmp_path / f"made {is_gated} {bias}")
        assert len(report["comparisons"]) == 2
        assert report["image_size"] == (16 * PATCH, 16 * PATCH)


def test_rectangular_patches_of_gray_images_are_converted_exactly() -> None:
    size = (GRID * PATCH, 2 * GRID * PATCH)
    source = build_deit(img_size=size, patch_size=(PATCH, 2 * PATCH), in_chans=1)
    images = torch.randn(2, 1, *size)
    check_outputs(convert_state_dict(source.state_dict(), "deit")(images).logits, source(images))


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
            model = timm.create_model(pattern.format(size), device="meta", depth=1)
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
    model = timm.create_model("test_vit", num_classes=LABELS, img_size=64)
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

    model = ViTCLSForImageClassification.from_pretrained(tmp_path / "made")
    images = torch.randn(2, 3, 64, 64)
    assert trained(images).shape == (2, LABELS)
    check_outputs(model(images).logits, trained(images))
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
    source = timm.create_model("test_vit", num_classes=0)
    file = save(add_prefix("encoder.", source.state_dict()), tmp_path / "encoder.safetensors")
    model = load_source(f"timm:test_vit@{file}").convert()
    assert isinstance(model, ViTCLSModel)


def test_flax_arrays_of_a_named_architecture_keep_their_classes(tmp_path: Path) -> None:
    """timm reads them, but by default with a random classifier of 1,000 classes."""
    model = timm.create_model("test_vit")
    width, heads = model.embed_dim, model.blocks[0].attn.num_heads
    hidden, size = model.blocks[0].mlp.fc1.out_features, (heads, width // heads)
    shapes: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, width),
        "pos_embedding": model.pos_embed.shape,
        "embedding/kernel": (16, 16, 3, width),
        "Transformer/encoder_norm/scale": (width,),
        "head/kernel": (width, LABELS),
    }
    for index in range(len(model.blocks)):
        block = f"Transformer/encoderblock_{index}"
        attention = f"{block}/MultiHeadDotProductAttention_0"
        for name in ("query", "key", "value"):
            shapes[f"{attention}/{name}/kernel"] = (width, *size)
            shapes[f"{attention}/{name}/bias"] = size
        shapes |= {
            f"{block}/LayerNorm_0/scale": (width,),
            f"{block}/LayerNorm_1/scale": (width,),
            f"{attention}/out/kernel": (*size, width),
            f"{block}/MlpBlock_0/Dense_0/kernel": (width, hidden),
            f"{block}/MlpBlock_0/Dense_1/kernel": (hidden, width),
        }
    for name, shape in list(shapes.items()):
        layer = name.rpartition("/")[0]
        if layer:  # The bias of a layer is as wide as its output
            shapes.setdefault(f"{layer}/bias", shape[-1:])
    weights = {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}
    np.savez(tmp_path / "vit.npz", **{f"params/{name}": w.numpy() for name, w in weights.items()})

    converted = load_source(f"timm:test_vit@{tmp_path / 'vit.npz'}").convert()
    assert torch.equal(converted.classifier.weight, weights["head/kernel"].T)
    assert torch.equal(converted.classifier.bias, weights["head/bias"])
    with refuses_conversion("vit.npz", "timm:NAME@FILE"):
        load_source(str(tmp_path / "vit.npz"))


# Refusals -----------------------------------------------------------------------------------------


def build_nested_state_dict() -> dict[str, Any]:
    """Return a state dict that contains itself."""
    content = {"epoch": 3}
    content["model"] = content
    return content


PLAIN = build_dino().state_dict()
# Name: content of the file, --family, words in the error
REFUSED = {
    "several families": (PLAIN, None, ("`family`", "dino", "mae", "deit")),
    "TIPS": (
        build_dinov2().state_dict() | {"register_tokens": torch.zeros(1, 1, 384)},
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
            "model": build_deit().state_dict()
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
    "heads": (
        build_deit(width=48, num_heads=1).state_dict(),
        "deit",
        ("the width 48", "convert_from_timm"),
    ),
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
    with refuses_conversion(*words):
        FileSource.from_file(tmp_path / "weights.pth", family)


def test_unreadable_files_and_unused_families_are_refused(tmp_path: Path) -> None:
    with raises_one_line("is not a file", error=OSError):
        FileSource.from_file(tmp_path / "missing.pth")
    with refuses_conversion("`family='dino'`", "timm:test_vit"):
        load_source("timm:test_vit", family="dino")
    for name, content, words in (
        ("weights.ckpt", "", ""),
        ("damaged.pth", "damaged", ""),
        ("model.onnx", "", " is one file of a model"),
        ("config.json", "{}", " is one file of a model"),
    ):
        (tmp_path / name).write_text(content)
        with refuses_conversion(name + words):
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
        with refuses_conversion(name, remedy):
            load_source(str(tmp_path / name))
    with refuses_conversion("evil.pth", "safetensors"):
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

"""The conversion of image processors: equal pixels on real photographs, and defaults."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import transformers
from helpers.sample_photographs import photograph
from pytest import MonkeyPatch
from timm.data import create_transform, resolve_data_config
from transformers import AutoImageProcessor

from modeling_vitcls import ViTCLSImageProcessor, ViTCLSImageProcessorPil
from modeling_vitcls.conversion import processors


TIMM_CONFIGS = {
    "crop": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "clip": "vit_base_patch16_clip_224.openai",
    "squash": "vit_base_patch16_siglip_256.webli",
    "bilinear rectangle": "vit_base_patch16_sapiens2.fb",
    "dinov2": "vit_small_patch14_reg4_dinov2.lvd142m",
    "eva": "eva02_tiny_patch14_336.mim_in22k_ft_in1k",
}


def build_config_only(name: str) -> Any:
    """Return a model with only the attribute that timm's preprocessing reads."""
    return SimpleNamespace(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())


@pytest.mark.parametrize("name", TIMM_CONFIGS.values(), ids=TIMM_CONFIGS)
def test_timm_preprocessing_is_equal(name: str, tmp_path: Path) -> None:
    """Pixels are equal with PIL, which timm uses, and within 2 gray levels with torchvision."""
    model = build_config_only(name)
    processor, record = processors.convert_timm_preprocessing(model)
    assert record["largest_difference_in_gray_levels"] == 0
    assert not record["assumed_because"]

    processor.save_pretrained(tmp_path)
    config = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    wanted = create_transform(**config, is_training=False)(photograph("china.jpg"))

    std = torch.tensor(config["std"]).view(3, 1, 1)
    for backend, limit in ((ViTCLSImageProcessorPil, 1e-3), (ViTCLSImageProcessor, 2.01)):
        found = backend.from_pretrained(tmp_path)(photograph("china.jpg"), return_tensors="pt")[
            "pixel_values"
        ][0]
        assert found.shape == wanted.shape
        assert ((found - wanted).abs() * std * 255).max() <= limit


THEIRS = {
    "vit": ("ViTImageProcessor", {}, 0.0),
    "vit with pil": ("ViTImageProcessorPil", {}, 0.0),
    "deit": ("DeiTImageProcessor", {}, 0.0),
    "beit": ("BeitImageProcessor", {}, 0.0),
    "clip": ("CLIPImageProcessor", {}, 0.0),
    "dinov2": ("BitImageProcessor", {"size": {"shortest_edge": 256}}, 0.0),
    "dinov3": ("DINOv3ViTImageProcessor", {}, 1.0),  # resizes before rounding
    "not normalized": ("CLIPImageProcessor", {"do_normalize": False}, 0.0),
    "not resized": ("ViTImageProcessor", {"do_resize": False}, 0.0),
}


@pytest.mark.parametrize(("name", "settings", "limit"), THEIRS.values(), ids=THEIRS)
def test_transformers_preprocessing_is_equal(
    name: str, settings: dict[str, Any], limit: float, tmp_path: Path
) -> None:
    theirs = getattr(transformers, name)(**settings)
    theirs.save_pretrained(tmp_path / "source")

    processor, record = processors.convert_transformers_preprocessing(
        str(tmp_path / "source"), (32, 32)
    )
    assert not record["assumed_because"]
    assert (
        record["largest_difference_in_gray_levels"]
        <= limit
        <= 3 * record["largest_difference_in_gray_levels"]
    )

    processor.save_pretrained(tmp_path / "made")
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "source")
    ours = ViTCLSImageProcessor.from_pretrained(tmp_path / "made")

    wanted, found = (
        one(photograph("flower.jpg"), return_tensors="pt")["pixel_values"][0]
        for one in (theirs, ours)
    )
    std = torch.tensor(ours.image_std if ours.do_normalize else [1.0]).view(-1, 1, 1)
    assert ((found - wanted).abs() * std * 255).max() <= limit + 1e-4


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        (None, "has no image processor"),
        # patches, not images
        (
            transformers.Siglip2ImageProcessor(),
            "differs from Siglip2ImageProcessor in the output shape",
        ),
    ],
)
def test_a_default_is_stated(theirs: Any, reason: str, tmp_path: Path) -> None:
    if theirs is not None:
        theirs.save_pretrained(tmp_path)
    processor, record = processors.convert_transformers_preprocessing(str(tmp_path), (32, 48))
    assert reason in record["assumed_because"]
    assert dict(processor.size) == {"height": 32, "width": 48}


# Change of timm's settings, sizes of the converted image processor, reason for the default.
CHANGED = [
    ({"crop_mode": "border"}, {"height": 224, "width": 224}, "crop_mode='border'"),
    (
        {"input_size": (3, 224, 192)},
        {"height": 224, "width": 192},
        "crop_mode='center' for 224 x 192",
    ),
    ({"interpolation": "hamming"}, {"height": 224, "width": 224}, "interpolation='hamming'"),
    (
        {"input_size": (3, 224, 192), "crop_pct": 0.875, "crop_mode": "squash"},
        {"height": 256, "width": 219},
        "",
    ),
]


@pytest.mark.parametrize(("change", "size", "reason"), CHANGED, ids=str)
def test_other_settings_of_timm_are_converted_exactly_or_give_the_default(
    change: dict[str, Any], size: dict[str, int], reason: str
) -> None:
    model = build_config_only(TIMM_CONFIGS["crop"])
    model.pretrained_cfg |= change
    processor, record = processors.convert_timm_preprocessing(model)
    assert reason in record["assumed_because"]
    assert reason or record["largest_difference_in_gray_levels"] == 0
    assert dict(processor.size) == size
    assert list(processor.image_mean) == list(model.pretrained_cfg["mean"])


def test_preprocessing_of_gray_images_of_timm_is_equal() -> None:
    model = build_config_only(TIMM_CONFIGS["crop"])
    model.pretrained_cfg |= {"input_size": (1, 28, 28), "mean": (0.4,), "std": (0.3,)}
    processor, record = processors.convert_timm_preprocessing(model)
    assert record["largest_difference_in_gray_levels"] == 0
    assert record["origin"] == "timm's pretrained_cfg"
    assert processor.do_convert_rgb is False
    pixels = processor(photograph("china.jpg").convert("L"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 1, 28, 28)


def test_a_processor_that_differs_is_not_written(monkeypatch: MonkeyPatch) -> None:
    """The check on a test image detects a crop that is shifted by one pixel."""
    settings = processors.convert_timm_settings
    monkeypatch.setattr(
        processors, "convert_timm_settings", lambda values: settings(values | {"crop_pct": 0.89})
    )
    _processor, record = processors.convert_timm_preprocessing(
        build_config_only(TIMM_CONFIGS["crop"])
    )
    assert "gray levels" in record["assumed_because"]

"""`--resize`: the region of an image that reaches the model, in training and prediction."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_models import build_tiny_config, save_with_processor
from helpers.tiny_options import build_initial_model
from PIL import Image
from torch.testing import assert_close

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSImageProcessor,
    ViTCLSImageProcessorPil,
)
from modeling_vitcls.data.aspect_ratio import set_resize
from modeling_vitcls.data.augmentation import build_augmentation
from modeling_vitcls.data.batches import Normalizer
from modeling_vitcls.data.labels import OneLabel
from modeling_vitcls.data.options import AugmentationOptions
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.inference.image_pass import read_pixels
from modeling_vitcls.inference.load_model import load_for_inference


CROP = {
    "size": {"shortest_edge": 36},
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
}
LABELS = OneLabel({"label": ["yes", "no"]})


def build_edge_images() -> list[Image.Image]:
    """Return black images, wide and tall, each with a white square at one of its edges."""
    images = []
    for height, width in ((160, 640), (640, 160)):
        for top, left in (
            (0, 0),
            (0, width - 40),
            (height - 40, 0),
            (height // 2, 0),
            (0, width // 2),
        ):
            pixels = np.zeros((height, width, 3), dtype=np.uint8)
            pixels[top : top + 40, left : left + 40] = 255
            images.append(Image.fromarray(pixels))
    return images


@pytest.fixture(scope="module")
def cropping_checkpoint(module_path: Path) -> Path:
    """Return a checkpoint whose processor crops, as after the conversion of most timm models."""
    config = build_tiny_config(num_labels=2, id2label={0: "yes", 1: "no"})
    model = ViTCLSForImageClassification(config)
    return save_with_processor(model, module_path / "crop", ViTCLSImageProcessor(**CROP))


@pytest.mark.parametrize("image_size", [None, (32, 48)])
@pytest.mark.parametrize("resize", [None, "pad", "crop"])
def test_a_white_square_at_each_edge_reaches_the_input(
    resize: str | None,
    image_size: tuple[int, int] | None,
    cropping_checkpoint: Path,
    tmp_path: Path,
) -> None:
    """The saved processor, both backends and training see the same region.

    By default, the checkpoint's own setting is kept.
    """
    flags = {} if resize is None else {"resize": resize}
    _, processor, _ = build_initial_model(
        cropping_checkpoint, LABELS, image_size=image_size, **flags
    )
    processor.save_pretrained(tmp_path)
    fixed_transform, _ = build_augmentation(AugmentationOptions(crop_scale=1.0), processor)

    for image in build_edge_images():
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        seen_in_training = fixed_transform(pixels)
        assert seen_in_training.shape[-2:] == (image_size or (32, 32))
        is_seen = [bool((seen_in_training > 200).any())]
        for backend in (ViTCLSImageProcessor, ViTCLSImageProcessorPil):
            values = backend.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"]
            assert values.shape[-2:] == (image_size or (32, 32))
            if backend is ViTCLSImageProcessor:
                normalized = Normalizer(processor, torch.device("cpu"))(seen_in_training[None])
                assert_close(normalized, values, atol=0.01, rtol=0)
            is_seen.append(bool((values > 1.5).any()))  # white is above 2 after normalization
        assert is_seen == [is_seen[0]] * 3
        assert is_seen[0] or resize in (None, "crop")


def test_random_crops_of_padded_images_have_the_aspect_ratio_of_the_input() -> None:
    processor = ViTCLSImageProcessor(do_resize=False)
    set_resize(processor, "pad", (32, 48))
    assert processor.do_resize  # in prediction

    fixed_transform, _ = build_augmentation(AugmentationOptions(crop_scale=0.5), processor)
    assert fixed_transform(torch.zeros(3, 40, 30, dtype=torch.uint8)).shape == (3, 40, 60)
    assert fixed_transform(torch.zeros(1, 20, 90, dtype=torch.uint8)).shape == (1, 60, 90)

    processor.do_normalize = False
    # black
    assert fixed_transform(torch.ones(3, 40, 30, dtype=torch.uint8)).sum() == 3 * 40 * 30


def test_a_crop_keeps_its_ratio_at_another_size() -> None:
    for settings, edge in (
        ({"size": {"height": 40, "width": 40}}, 80),
        ({"size": {"max_height": 40, "max_width": 50}}, 80),
        ({"size": {"height": 40, "width": 40}, "do_resize": False}, 64),
        ({"size": {"max_height": 24, "max_width": 24}}, 64),  # padded by the crop
        ({"size": {"shortest_edge": 36}}, 72),
    ):
        processor = ViTCLSImageProcessor(
            **settings, do_center_crop=True, crop_size={"height": 32, "width": 32}
        )
        set_resize(processor, "crop", (32, 32))  # the same crop
        assert dict(processor.size) == settings["size"]
        set_resize(processor, "crop", (64, 64))
        assert (processor.size.shortest_edge, processor.crop_size.height) == (edge, 64)
    set_resize(processor, "crop", (20, 28))
    assert (processor.size.shortest_edge, processor.crop_size.width) == (
        31,
        28,
    )  # 31.5, rounded down


def test_a_photo_that_is_too_thin_for_padding_is_unreadable() -> None:
    processor = ViTCLSImageProcessor()
    set_resize(processor, "pad", (32, 32))
    assert "greater than 0" in read_pixels([Image.new("RGB", (100, 1))], processor, 3, 0)


def test_another_fit_keeps_the_size_of_the_processor(tmp_path: Path) -> None:
    """Checkpoints of large native images often come with a processor for 224 pixels."""
    model = ViTCLSForImageClassification(build_tiny_config(image_size=64))
    save_with_processor(model, tmp_path, ViTCLSImageProcessor(**CROP))
    for resize in ("squash", "pad", "crop"):
        loaded = load_for_inference(
            ModelFolder(tmp_path),
            torch.device("cpu"),
            use_head=True,
            batch_size=1,
            max_batch_size=1,
            resize=resize,
        )
        pixels = loaded.processor(Image.new("RGB", (50, 40)), return_tensors="pt")["pixel_values"]
        assert pixels.shape[-2:] == (32, 32)

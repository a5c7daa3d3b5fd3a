"""The pixels of one image are those of the image processor, to the bit."""

from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.odd_photos import REFUSED, insert_segment, write_odd_photos
from helpers.photo_folders import encode_image
from helpers.sample_photographs import photograph
from helpers.tiny_models import raises_one_line
from pytest import MonkeyPatch
from transformers.image_utils import SizeDict

from modeling_vitcls import ViTCLSImageProcessor
from modeling_vitcls.model.image_processing_vitcls import image_to_tensor, read_image
from modeling_vitcls.speed import fast_images
from modeling_vitcls.speed.fast_images import CHECKED_SETTINGS, compute_pixels, try_read_jpeg


CROP = {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 33}
SIZES = [
    {"size": {"height": 48, "width": 48}, "resample": 3},
    CROP | {"resample": 3},
    CROP | {"crop_rounding": "even", "resample": 2},
    CROP
    | {
        "size": {"shortest_edge": 40, "longest_edge": 60},
        "crop_size": {"height": 24, "width": 30},
        "resample": 0,
    },
    CROP | {"size": {"max_height": 40, "max_width": 50}, "crop_size": 20, "resample": 1},
    CROP | {"size": 50, "do_resize": False, "crop_size": 60, "resample": 3},
]


PHOTO = photograph("china.jpg").crop((40, 100, 141, 177))
JPEG = encode_image(PHOTO, "JPEG", quality=60)


@pytest.fixture(scope="module")
def examples(module_path: Path) -> dict[str, Any]:
    """Return photos in every form that the image processor accepts."""
    files = write_odd_photos(module_path)
    values = np.array(PHOTO)
    return {
        **{name: files[name] for name in files.keys() - {*REFUSED, "wide.png", "tall.jpg"}},
        "jpeg 4:4:4 progressive": encode_image(
            PHOTO, "JPEG", quality=95, subsampling=0, progressive=True
        ),
        **{
            mode: PHOTO.convert(mode)
            for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")
        },
        "array": values,
        "array of floats": values.astype(np.float32) / 255,
        "array of whole numbers": values.astype(np.int64),
        "gray array": values[..., 0],
        "channels first": torch.from_numpy(values).permute(2, 0, 1).contiguous(),
        "batch of one": torch.from_numpy(values).permute(2, 0, 1)[None],
    }


def run_processor(processor: ViTCLSImageProcessor, image: Any) -> torch.Tensor:
    return processor(image, return_tensors="pt")["pixel_values"][0]


def check_same(processor: ViTCLSImageProcessor, image: Any, name: str) -> None:
    """Check that the second call uses the fast path and returns the pixels of the processor."""
    wanted = run_processor(processor, image)
    assert torch.equal(compute_pixels(processor, image), wanted), name
    assert processor in CHECKED_SETTINGS
    found = compute_pixels(processor, image)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert torch.equal(found, wanted), name


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_all_images_have_the_same_values(sizes: dict[str, Any], examples: dict[str, Any]) -> None:
    processor = ViTCLSImageProcessor(**sizes)
    for name, image in examples.items():
        check_same(processor, image, name)


def test_the_first_photo_is_decoded_as_later_ones(monkeypatch: MonkeyPatch) -> None:
    """PIL and torchvision may contain different versions of libjpeg."""
    pixels = torch.full((3, 60, 60), 99, dtype=torch.uint8)
    monkeypatch.setattr(fast_images, "try_read_jpeg", lambda source: pixels)
    processor = ViTCLSImageProcessor(size=32)
    first, second = (compute_pixels(processor, JPEG) for _ in range(2))
    assert torch.equal(first, second)


# Arithmetic coding, and chroma at a third of the width: 8 rows, 16 columns (`cjpeg -sample 3x1`)
ARITHMETIC = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wCDEAAoABwAHgAjAB4AGQAoACMAIQAjAC0AKwAoADAAPABkAEEAPAA3ADcAPAB7"
    "AFgAXQBJAGQAkQCAAJkAlgCPAIAAjACKAKAAtADmAMMAoACqANoArQCKAIwAyAERAMsA2gDuAPUBAgEEAQIAmwDBARsB"
    "LwEYAPoBLADmAP0BAgD4/9sAQwErLS08NTx2QUF2+KWMpfj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4"
    "+Pj4+Pj4+Pj4+Pj4+Pj4/8kAEQgACAAQAwExAAIRAQMRAf/MAAoAEBAFARARBf/aAAwDAQACEQMRAD8AwBFw5QONgcMB"
    "2//Z"
)
ADOBE = b"Adobe\0\x64\0\0\0\0"  # The last byte of the segment is the color transform
ODD_JPEG = {
    **{
        f"{name} {quality}": encode_image(PHOTO.convert(mode), "JPEG", quality=quality, **options)
        for quality in (20, 95)
        for name, (mode, options) in {
            "baseline": ("RGB", {}),
            "progressive": ("RGB", {"progressive": True}),
            "chroma at half the width": ("RGB", {"subsampling": "4:2:2"}),
            "restart markers": ("RGB", {"restart_marker_blocks": 3}),
            "RGB": ("RGB", {"keep_rgb": True}),
            "color profile": ("RGB", {"icc_profile": b"not one"}),
            "gray": ("L", {"progressive": True}),
            "CMYK": ("CMYK", {}),
        }.items()
    },
    "arithmetic": b64decode(ARITHMETIC),
    "stated as YCbCr": insert_segment(JPEG, 0xEE, ADOBE + b"\1"),
    "stated as RGB": insert_segment(JPEG, 0xEE, ADOBE + b"\0"),
    "YCCK": insert_segment(encode_image(PHOTO.convert("CMYK"), "JPEG"), 0xEE, ADOBE + b"\2"),
    "damaged EXIF": insert_segment(JPEG, 0xE1, b"Exif\0\0II*\0\xff\xff\xff\x7f"),
    "no end": JPEG[:-2],
    "cut": JPEG[: len(JPEG) // 2],
    "filled with zeros": JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2),
    "12 bits": JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"),
}


@pytest.mark.parametrize("kind", ODD_JPEG)
def test_torchvision_and_pillow_decode_the_same_pixels(kind: str) -> None:
    """A kind that one of them decodes differently, or refuses, is left to Pillow at every door."""
    encoded = ODD_JPEG[kind]
    pixels = try_read_jpeg(encoded)
    if kind.startswith(("baseline", "progressive", "restart", "gray")):
        assert pixels is not encoded
    if pixels is not encoded:
        assert torch.equal(pixels, image_to_tensor(read_image(encoded), to_rgb=True))


def test_errors_are_those_of_the_slow_path(tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(ODD_JPEG["cut"])
    (tmp_path / "text.jpg").write_text("no image")
    known = ViTCLSImageProcessor(do_resize=False)
    compute_pixels(known, JPEG)
    wrong = [
        tmp_path / "cut.jpg",
        str(tmp_path / "text.jpg"),
        "a\0b.jpg",
        "x" * 5000,  # too long for a name
        None,
        [],
        [JPEG, PHOTO.resize((20, 20))],  # images of two shapes
        np.full((8, 8, 3), 300.0),
        PIL.Image.new("F", (5, 5)),
    ]

    for images in wrong:
        with pytest.raises(ValueError) as fresh:
            ViTCLSImageProcessor(do_resize=False)(images, return_tensors="pt")
        with raises_one_line(str(fresh.value)):
            compute_pixels(known, images)


def test_settings_may_change_between_calls() -> None:
    """Change a setting, a value within a size, and set a wrong value."""
    processor = ViTCLSImageProcessor(size=32)
    check_same(processor, JPEG, "as built")
    for name, value in {
        "size": SizeDict(height=20, width=30),
        "image_mean": (0.1, 0.2, 0.3),
        "resample": 2,
    }.items():
        setattr(processor, name, value)
        check_same(processor, JPEG, name)

    processor.size["height"] = 24
    assert compute_pixels(processor, JPEG).shape == (3, 24, 30)

    processor.size["height"] = -1
    with raises_one_line("must be from 1 to 4,096 pixels"):
        compute_pixels(processor, JPEG)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_pad": True, "pad_size": {"height": 64, "width": 64}},
        {"image_mean": 0.5},
        {"image_std": 0.5},
        {"input_data_format": "channels_first"},
        {"device": "cpu"},
    ],
    ids=str,
)
def test_other_settings_use_the_slow_path(settings: dict[str, Any]) -> None:
    processor = ViTCLSImageProcessor(size=32, **settings)
    for _ in range(2):
        assert torch.equal(compute_pixels(processor, JPEG), run_processor(processor, JPEG))
    assert processor not in CHECKED_SETTINGS


def test_methods_of_a_subclass_are_called() -> None:
    class Brighter(ViTCLSImageProcessor):
        def rescale_and_normalize(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().rescale_and_normalize(*args, **kwargs) + 1

    plain, brighter = ViTCLSImageProcessor(size=32), Brighter(size=32)
    for _ in range(2):  # the second call could use the fast path
        assert torch.equal(compute_pixels(brighter, JPEG), compute_pixels(plain, JPEG) + 1)

"""The image processor: all kinds of images, both backends, errors, and saving."""

import base64
import functools
import os
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import huggingface_hub
import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from helpers.local_hub import LocalHub
from helpers.photo_folders import draw_pixels, encode_image, get_file_names
from helpers.sample_photographs import photograph
from helpers.tiny_models import raises_one_line
from numpy.testing import assert_allclose
from PIL.ExifTags import Base
from PIL.PngImagePlugin import PngInfo
from pytest import MonkeyPatch
from torch.testing import assert_close
from transformers.testing_utils import CaptureLogger

from modeling_vitcls import ViTCLSImageProcessor, ViTCLSImageProcessorPil
from modeling_vitcls.model import image_processing_vitcls
from modeling_vitcls.model.image_processing_vitcls import IMAGE_FORMATS, image_to_tensor
from modeling_vitcls.runtime.files import read_json
from modeling_vitcls.speed.fast_images import read_jpeg_bytes


BACKENDS = {"torchvision": ViTCLSImageProcessor, "pil": ViTCLSImageProcessorPil}
# Settings that leave the values unchanged, so that tests can state the expected values.
RAW = {"do_resize": False, "do_rescale": False, "do_normalize": False}


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS)
def backend(request: pytest.FixtureRequest) -> type:
    return request.param


def build_gradient(height: int = 5, width: int = 6) -> PIL.Image.Image:
    """Return a color image in which all pixels differ."""
    values = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    return PIL.Image.fromarray(values)


def get_raw_values(backend: type, image: object, **settings: object) -> np.ndarray:
    """Return the image before resizing: [H, W, C]."""
    return as_hwc(backend(**RAW, **settings)(image, return_tensors="np")["pixel_values"][0])


def as_hwc(values: np.ndarray) -> np.ndarray:
    return np.moveaxis(values, 0, -1)


def get_error(backend: type, image: object, **settings: object) -> str:
    """Return the one-line message of the ValueError that the image or the settings raise."""
    with pytest.raises(ValueError) as caught:
        backend(**settings)(image, return_tensors="pt")
    message = str(caught.value)
    assert "\n" not in message
    return message


# Results ------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_imagenet(backend: type) -> None:
    processor = backend()
    assert dict(processor.size) == {"height": 224, "width": 224}
    assert processor.resample == PIL.Image.Resampling.BICUBIC
    # as published with torchvision's models
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert list(processor.image_std) == [0.229, 0.224, 0.225]
    pixel_values = processor(build_gradient(), return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 224, 224)
    assert pixel_values.dtype == torch.float32


@pytest.mark.parametrize(("rounding", "top"), [("down", 1), ("even", 2)])
def test_margins_of_a_center_crop_are_rounded(backend: type, rounding: str, top: int) -> None:
    """They are 1.5 and 2.5 pixels."""
    values = draw_pixels(9, 12, 3)
    crop = {"do_center_crop": True, "crop_size": {"height": 6, "width": 7}}
    cropped = get_raw_values(backend, values, **crop, crop_rounding=rounding)
    assert np.array_equal(cropped, values[top : top + 6, 2:9])
    # the image is too small
    assert get_raw_values(backend, values[:5], **crop).shape == (6, 7, 3)


@pytest.mark.parametrize("resample", [2, 3], ids=["bilinear", "bicubic"])
def test_backends_agree_within_the_tolerance_of_the_docstring(resample: int) -> None:
    for image, at_any_pixel, on_average in [
        (photograph("china.jpg"), 2, 0.05),
        (photograph("flower.jpg"), 2, 0.05),
        (draw_pixels(150, 333, 3), 16, 0.5),
    ]:
        first, second = (
            cls(resample=resample, do_rescale=False, do_normalize=False)(
                image, return_tensors="pt"
            ).pixel_values.float()
            for cls in BACKENDS.values()
        )
        difference = (first - second).abs()
        assert difference.max() <= at_any_pixel
        assert difference.mean() <= on_average


def test_images_of_several_shapes_are_returned_as_a_list(backend: type) -> None:
    images = [build_gradient(), build_gradient(9, 4)]
    pixel_values = backend(**RAW)(images)["pixel_values"]
    assert isinstance(pixel_values, list)
    for values, image in zip(pixel_values, images, strict=True):
        assert np.array_equal(as_hwc(np.asarray(values)), np.asarray(image))


# Sources ------------------------------------------------------------------------------------------


def test_paths_bytes_images_arrays_and_tensors_are_the_same_image(
    backend: type, tmp_path: Path
) -> None:
    image = build_gradient()
    content = encode_image(image)
    path = tmp_path / "image.png"
    path.write_bytes(content)
    values = np.array(image)

    sources = [
        path,
        str(path),
        content,
        bytearray(content),
        "data:image/png;base64," + base64.b64encode(content).decode(),
        "data:image/png," + quote(content),
        image,
        PIL.Image.open(path),  # opened, but not decoded yet
        values,
        values[::-1][::-1],  # negative strides
        values.astype(np.int64),
        values.astype(np.uint32),
        np.moveaxis(values, -1, 0),
        torch.from_numpy(values),
        torch.from_numpy(values).permute(2, 0, 1),
    ]
    for source in sources:
        assert np.array_equal(get_raw_values(backend, source), values)
    batch = backend(**RAW)(sources, return_tensors="np")["pixel_values"]
    assert batch.shape == (len(sources), 3, 5, 6)


def test_images_are_downloaded_and_failed_downloads_name_their_address(
    backend: type, hub: LocalHub, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    image = encode_image(build_gradient())
    hub.create("ann/photos", files={"image.png": image, "image.bin": image})
    address = f"{hub.url}/ann/photos/resolve/main"
    for name in ("image.png", "image.bin"):  # the second one is redirected
        found = get_raw_values(backend, f"{address}/{name}")
        assert np.array_equal(found, np.array(build_gradient()))
    message = get_error(backend, f"{address}/missing.png")
    assert f"{address}/missing.png" in message
    assert "404" in message


def test_nested_lists_and_batches_keep_their_order(backend: type) -> None:
    shades = [np.full((5, 5, 3), shade, dtype=np.uint8) for shade in range(5)]
    images = ([shades[0], shades[1]], np.stack(shades[2:4]), [shades[4]])
    batch = backend(**RAW)(images, return_tensors="np")["pixel_values"]
    assert batch.shape == (5, 3, 5, 5)
    assert batch[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("file_format", ["GIF", "TIFF"])
def test_the_first_of_several_frames_is_used(backend: type, file_format: str) -> None:
    frames = [PIL.Image.new("L", (6, 5), shade) for shade in (10, 200)]
    file = encode_image(frames[0], file_format, save_all=True, append_images=frames[1:])
    for source in (file, PIL.Image.open(BytesIO(file))):
        values = get_raw_values(backend, source)
        assert values.shape == (5, 6, 3)
        assert (values == 10).all()


def test_inputs_are_not_changed(backend: type) -> None:
    tensor = torch.rand(3, 8, 8)
    array = np.array(build_gradient())
    array.setflags(write=False)
    before = tensor.clone()
    backend(do_rescale=False, do_resize=False)(tensor, return_tensors="pt")
    assert torch.equal(tensor, before)
    # PyTorch would share the memory of a read-only array.
    pixels = image_to_tensor(array, to_rgb=True, do_rescale=True, input_data_format=None)
    assert np.array_equal(as_hwc(pixels.numpy()), array)
    assert not np.shares_memory(pixels.numpy(), array)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(backend: type, orientation: int, tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[Base.Orientation] = orientation
    path = tmp_path / "image.png"
    build_gradient().save(path, exif=exif)
    upright = np.array(PIL.ImageOps.exif_transpose(PIL.Image.open(path)))

    for source in (path, path.read_bytes(), PIL.Image.open(path)):
        assert np.array_equal(get_raw_values(backend, source), upright)
    assert np.array_equal(np.array(backend().fetch_images(path)), upright)


# Channels and bit depth ---------------------------------------------------------------------------


def build_rgba(alpha: int) -> PIL.Image.Image:
    image = build_gradient()
    image.putalpha(alpha)
    return image


def test_transparency_is_composited_on_white(backend: type) -> None:
    color = np.array(build_gradient()).astype(float)
    assert np.array_equal(get_raw_values(backend, build_rgba(255)), color)
    assert (get_raw_values(backend, build_rgba(0)) == 255).all()

    expected = np.round(color * 100 / 255 + 155)
    image = build_rgba(100)
    for source in (image, np.array(image), torch.from_numpy(np.array(image))):
        assert_allclose(get_raw_values(backend, source), expected, atol=1)

    half_gray = PIL.Image.merge("LA", [PIL.Image.new("L", (6, 4), value) for value in (50, 100)])
    for to_rgb, channels in ((True, 3), (False, 1)):
        values = get_raw_values(backend, half_gray, do_convert_rgb=to_rgb)
        assert values.shape == (4, 6, channels)
        assert (values == round(50 * 100 / 255 + 155)).all()

    rgba = np.array(image, dtype=np.float32) / 255
    assert_allclose(get_raw_values(backend, rgba) * 255, expected, atol=1)
    assert (get_raw_values(backend, np.ones((4, 6), dtype=bool)) == 255).all()

    one_shade = encode_image(PIL.Image.new("L", (6, 4), 7), transparency=7)
    assert (get_raw_values(backend, one_shade) == 255).all()
    palette = PIL.Image.new("P", (6, 4))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((5, 0), 1)
    values = get_raw_values(backend, encode_image(palette, transparency=1))
    assert values[0, 0].tolist() == [255, 0, 0]
    assert values[0, 5].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(backend: type, mode: str) -> None:
    image = build_gradient().convert(mode)
    expected = np.array(image.convert("RGB"))
    assert np.array_equal(get_raw_values(backend, image), expected)


@pytest.mark.parametrize("bit_depth", [16, 12])
@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "array"])
def test_more_than_eight_bits_are_scaled_not_clipped(
    backend: type, mode: str, bit_depth: int
) -> None:
    white = 2**bit_depth - 1
    values = np.linspace(0, white, 24).astype(np.uint16).reshape(4, 6)
    if mode == "array":
        source: object = values
    elif mode == "I":
        source = PIL.Image.fromarray(values.astype(np.int32))
    else:
        source = PIL.Image.frombytes(
            mode, (6, 4), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
        )

    assert getattr(source, "mode", "array") == mode
    result = get_raw_values(backend, source, bit_depth=bit_depth)
    assert np.array_equal(result, np.dstack([np.round(values / white * 255)] * 3))
    assert f"{white} exceed bit_depth=10" in get_error(backend, source, bit_depth=10)


def test_a_tiff_that_states_its_bits_is_scaled_by_them(backend: type) -> None:
    white = encode_image(PIL.Image.new("I;16", (6, 4), 65535), "TIFF")
    bits = b"\x02\x01\x03\x00\x01\x00\x00\x00%c"  # BitsPerSample, one number of 2 bytes
    largest = {281: 4095}  # MaxSampleValue
    sources = [
        white.replace(bits % 16, bits % 12),  # Its values are packed
        encode_image(PIL.Image.new("I;16", (6, 4), 4095), "TIFF", tiffinfo=largest),
    ]
    for source in sources:
        assert (get_raw_values(backend, source) == 255).all()
        assert (get_raw_values(backend, PIL.Image.open(BytesIO(source))) == 255).all()


def test_an_almost_black_file_of_sixteen_bits_is_named_with_its_largest_value(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(image_processing_vitcls, "REPORTED_BIT_DEPTHS", set())
    PIL.Image.fromarray(np.full((4, 6), 1000, np.uint16)).save(tmp_path / "scan.png")
    with CaptureLogger(image_processing_vitcls.logger) as logs:
        for _ in range(2):
            ViTCLSImageProcessor()(tmp_path / "scan.png", return_tensors="pt")
    assert logs.out.count("scan.png' is 1,000, so the image is almost black") == 1
    assert "set bit_depth=10" in logs.out


@pytest.mark.parametrize("do_rescale", [True, False])
@pytest.mark.parametrize("maximum", [1.0001, 255.0, np.nan])
def test_floats_that_are_not_from_0_to_1_are_errors(
    backend: type, maximum: float, do_rescale: bool
) -> None:
    bright = np.full((4, 4), maximum)
    assert "floats must be from 0 to 1" in get_error(backend, bright, do_rescale=do_rescale)


def test_floats_are_the_same_image_with_and_without_rescaling(backend: type) -> None:
    values = np.array(build_gradient())
    expected = backend(do_resize=False)(values, return_tensors="pt").pixel_values
    for do_rescale in (True, False):
        processor = backend(do_resize=False, do_rescale=do_rescale)
        result = processor(values.astype(np.float32) / 255, return_tensors="pt").pixel_values
        assert_close(result, expected)


@pytest.mark.parametrize("kind", [np.uint8, PIL.Image.fromarray])
def test_integers_without_rescaling_require_their_own_mean(backend: type, kind: Any) -> None:
    image = kind(np.array(build_gradient()))
    assert "do_rescale=True" in get_error(backend, image, do_rescale=False)
    backend(do_rescale=False, image_mean=[127.5] * 3)(image, return_tensors="pt")


def test_without_rgb_an_image_keeps_its_own_channels(backend: type) -> None:
    color = build_gradient()
    gray = color.convert("L")
    channels = {
        "gray file": (encode_image(gray), 1),
        "gray": (gray, 1),
        "1 bit": (gray.convert("1"), 1),
        "16 bits": (np.zeros((5, 6), dtype=np.uint16), 1),
        "gray with alpha": (gray.convert("LA"), 1),
        "color": (color, 3),
        "palette": (color.convert("P"), 3),
        "ink": (color.convert("CMYK"), 3),
        "color with alpha": (build_rgba(100), 4),
        "array": (np.zeros((5, 6, 4), dtype=np.uint8), 4),
    }

    for name, (source, expected) in channels.items():
        assert get_raw_values(backend, source, do_convert_rgb=False).shape == (5, 6, expected), name


@pytest.mark.parametrize("kind", [encode_image, np.array, lambda image: image, torch.from_numpy])
def test_color_images_become_gray_for_a_gray_model(backend: type, kind: Any) -> None:
    """The gray levels are those of PIL, also in the second call, which may take the fast path."""
    processor = backend(do_convert_rgb=False, image_mean=[0.5], image_std=[0.5], size=28)
    color = photograph("china.jpg")
    expected = processor(color.convert("L"), return_tensors="pt").pixel_values
    source = kind(np.array(color)) if kind is torch.from_numpy else kind(color)
    for _ in range(2):
        result = processor(source, return_tensors="pt").pixel_values
        assert_close(result, expected, atol=2.1 / 255, rtol=0)


# Errors -------------------------------------------------------------------------------------------


def test_unreadable_sources_are_named(backend: type, tmp_path: Path) -> None:
    missing, text, truncated = (
        tmp_path / name for name in ("missing.png", "text.png", "truncated.jpg")
    )
    text.write_text("not an image")
    photo = encode_image(photograph("china.jpg"), "JPEG")
    truncated.write_bytes(photo[: len(photo) // 2])

    for path in (missing, text, truncated, tmp_path):
        assert path.name in get_error(backend, path)
        assert path.name in get_error(backend, str(path))
    assert truncated.name in get_error(backend, PIL.Image.open(truncated))
    for broken in (b"", b"not an image", photo[:1000]):
        assert f"{len(broken)} bytes" in get_error(backend, broken)
    for start in ("x", "data:image/png;base64,"):  # the end of a long name is kept
        assert len(message := get_error(backend, start + "A" * 100_000 + "/cat.png")) < 1000
        assert "/cat.png" in message


def test_damaged_and_long_metadata_of_png_files_are_named(backend: type) -> None:
    texts, long_texts = PngInfo(), PngInfo()
    texts.add_text("a", "bcdef")
    long_texts.add_text("parameters", "x" * 3_000_000, zip=True)
    short, long = (
        encode_image(PIL.Image.new("RGB", (8, 8)), pnginfo=each) for each in (texts, long_texts)
    )
    damaged = short.replace(b"bcdef", b"bcdeg")
    assert "the file is damaged, such as by a wrong checksum" in get_error(backend, damaged)
    assert "with three bands" in get_error(backend, b"II*\0" + bytes(40))
    assert "its metadata (texts or color profile) exceeds 1 MB" in get_error(backend, long)


def test_the_thumbnail_of_a_raw_file_is_no_photo(backend: type) -> None:
    """NEF, DNG and ARW are TIFF files whose first image is a reduced one."""
    reduced = {Base.NewSubfileType: 1}
    image = build_gradient(12, 16)
    assert get_raw_values(backend, encode_image(image, "TIFF", tiffinfo=reduced)) is not None
    tags = reduced | {Base.SubIFDs: 8}
    error = get_error(backend, encode_image(image, "TIFF", tiffinfo=tags))
    assert "raw file, of which only a thumbnail of 16 x 12 pixels" in error


@pytest.mark.parametrize("file_format", IMAGE_FORMATS)
def test_supported_formats_are_read(backend: type, file_format: str, tmp_path: Path) -> None:
    if file_format == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    path = tmp_path / "image.png"  # the content determines the format
    path.write_bytes(encode_image(build_gradient(16, 16), file_format))
    expected = np.asarray(PIL.Image.open(path).convert("RGB"))
    for source in (path, path.read_bytes()):
        assert np.array_equal(get_raw_values(backend, source), expected)


@pytest.mark.parametrize("file_format", ["EPS", "TGA", "PCX", "PDF"])
def test_other_formats_are_errors(
    backend: type, file_format: str, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """PIL would start Ghostscript to decode EPS."""
    monkeypatch.setattr(
        PIL.EpsImagePlugin, "Ghostscript", lambda *_args: pytest.fail("Ghostscript was started")
    )
    path = tmp_path / "image.png"
    path.write_bytes(encode_image(build_gradient(), file_format))
    for source in (path, path.read_bytes()):
        message = get_error(backend, source)
        assert "not an image in a supported format (JPEG, PNG, " in message
    assert path.name in get_error(backend, path)


@pytest.mark.usefixtures("time_limit")
def test_pipes_and_devices_are_errors(backend: type, tmp_path: Path) -> None:
    """Opening a pipe blocks until a process writes to it."""
    pipe, device, link = (tmp_path / f"{name}.png" for name in ("pipe", "device", "link"))
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    link.symlink_to(pipe)
    assert read_jpeg_bytes(pipe) is None
    for path in (pipe, device, link, tmp_path):
        message = get_error(backend, path)
        assert path.name in message
        assert "is not a regular file" in message


# Image, settings, and what the error names.
UNUSABLE = [
    ([], {}, "empty"),
    ([build_gradient(), None], {}, "NoneType"),
    ([build_gradient(), 3], {}, "int"),
    ([build_gradient(), {"bytes": b""}], {}, "dict"),
    (np.zeros(5), {}, "[5]"),
    (np.zeros((0, 8, 3)), {}, "[0, 8, 3]"),
    (np.zeros((7, 8, 9), dtype=np.uint8), {}, "channel"),
    (np.full((4, 4), 300), {}, "300"),
    (np.full((4, 4), -1), {}, "-1"),
    (PIL.Image.new("F", (4, 4)), {}, "mode F"),
    (PIL.Image.new("I", (4, 4), 70_000), {}, "70000"),
    (PIL.Image.new("I", (4, 4), -1), {}, "-1"),
    (encode_image(PIL.Image.new("I;16", (6, 4)), "PNG", transparency=0), {}, "transparent level"),
    (build_gradient().convert("L"), {"do_convert_rgb": False}, "image_mean"),
    (np.zeros((2, 5, 6), dtype=np.uint8), {"input_data_format": "channels_first"}, "2 channels"),
    (build_gradient(), {"crop_rounding": "up"}, "crop_rounding"),
    ([build_gradient(), build_gradient(9, 4)], {"do_resize": False}, "[(3, 5, 6), (3, 9, 4)]"),
]


@pytest.mark.parametrize(
    ("image", "settings", "named"), UNUSABLE, ids=[case[-1] for case in UNUSABLE]
)
def test_unusable_images_are_errors(
    backend: type, image: object, settings: dict, named: str
) -> None:
    assert named in get_error(backend, image, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 224}},
        {"size": {"height": 224, "width": 0}},
        {"image_std": 0},
        {"rescale_factor": 0},
        {"crop_size": None, "do_center_crop": True},
        {"crop_size": {"height": 8, "width": 225}, "do_center_crop": True},
        {"crop_size": 225, "do_center_crop": True, "size": {"shortest_edge": 224}},
        *({"resample": resample} for resample in ("bicubic", 4)),
        {"do_centre_crop": True},
    ],
    ids=str,
)
def test_contradictory_settings_are_errors(backend: type, settings: dict) -> None:
    """The error names the first setting."""
    processor = backend()
    for attempt in (
        lambda **values: backend(**values)(build_gradient()),
        functools.partial(processor, build_gradient()),
    ):
        with raises_one_line(next(iter(settings))):
            attempt(**settings)


# Saving and loading -------------------------------------------------------------------------------

SETTINGS = {
    "size": {"height": 32, "width": 48},
    "resample": 2,
    "image_mean": [0.1, 0.2, 0.3],
    "bit_depth": 12,
}


def test_saved_settings_name_both_backends(backend: type, tmp_path: Path) -> None:
    backend(**SETTINGS).save_pretrained(tmp_path)
    assert get_file_names(tmp_path) == {
        "preprocessor_config.json",
        "image_processing_vitcls.py",
        "field_checks_vitcls.py",
    }
    stored = read_json(tmp_path / "preprocessor_config.json")
    assert stored["image_processor_type"] == "ViTCLSImageProcessor"
    assert stored["bit_depth"] == 12
    assert stored["auto_map"] == {
        "AutoImageProcessor": {
            "torchvision": "image_processing_vitcls.ViTCLSImageProcessor",
            "pil": "image_processing_vitcls.ViTCLSImageProcessorPil",
        }
    }
    for other in BACKENDS.values():
        assert other.from_pretrained(tmp_path).to_dict() == backend(**SETTINGS).to_dict()
    assert backend.from_pretrained(tmp_path, size=64).size == {"height": 64, "width": 64}


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_above_the_limit_of_pillow_names_file_and_setting(
    tmp_path: Path, monkeypatch: MonkeyPatch, suffix: str
) -> None:
    """torchvision, which reads JPEG files, has no limit of its own."""
    file = tmp_path / f"large.{suffix}"
    PIL.Image.new("RGB", (30, 20)).save(file)
    processor = ViTCLSImageProcessor()
    processor(build_gradient(), return_tensors="pt")  # Later calls use the fast path
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    message = rf"large\.{suffix}': .*600 pixels.*PIL\.Image\.MAX_IMAGE_PIXELS"
    with pytest.raises(ValueError, match=message):
        processor(file, return_tensors="pt")

"""Photos as cameras, scanners, microscopes and phones write them, and files that are refused."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from helpers.photo_folders import encode_image
from helpers.sample_photographs import photograph


ORIENTATION = 0x0112
REFUSED = (
    *("float.tif", "nan.tif", "truncated.jpg", "truncated.png", "empty.jpg", "text.jpg"),
    *("drawing.svg", "page.pdf"),
)


def write_odd_photos(folder: Path) -> dict[str, Path]:
    """Write the files, and return their paths by name. Those in `REFUSED` are no answerable photo."""
    folder.mkdir(parents=True, exist_ok=True)
    photo = photograph("flower.jpg").crop((200, 90, 341, 191))
    for name, (image, settings) in build_photos(photo).items():
        image.save(folder / name, **settings)

    gray = np.asarray(photo.convert("L"), np.float32) / 255
    Image.fromarray(gray).save(folder / "float.tif")
    Image.fromarray(np.where(gray > 0.9, np.nan, gray)).save(folder / "nan.tif")
    for kind in ("jpg", "png"):
        encoded = encode_image(photo, "JPEG" if kind == "jpg" else "PNG")
        (folder / f"truncated.{kind}").write_bytes(encoded[: len(encoded) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not a photo")
    (folder / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (folder / "page.pdf").write_bytes(b"%PDF-1.7\n%%EOF\n")
    return {file.name: file for file in sorted(folder.iterdir())}


def build_photos(photo: Image.Image) -> dict[str, tuple[Image.Image, dict[str, Any]]]:
    """Build images of all color modes, orientations and shapes by name, with settings of `save`."""
    gray16 = (np.asarray(photo.convert("L"), np.uint16) * 257) // 2
    alpha = Image.linear_gradient("L").resize(photo.size)
    transparent = photo.copy()
    transparent.putalpha(alpha)
    gray_alpha = photo.convert("LA")
    gray_alpha.putalpha(alpha)
    palette = photo.quantize(32)
    photos: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "one_pixel.png": (photo.resize((1, 1)), {}),
        "wide.png": (photo.resize((1000, 10)), {}),
        "tall.jpg": (photo.resize((10, 1000)), {}),
        "plain.png": (photo, {}),
        "gray16.png": (Image.fromarray(gray16), {}),
        "gray16.tif": (Image.fromarray(gray16), {}),
        "gray.jpg": (photo.convert("L"), {}),
        "bits.png": (photo.convert("1"), {}),
        "alpha.png": (transparent, {}),
        "alpha.webp": (transparent, {"lossless": True}),
        "gray_alpha.png": (gray_alpha, {}),
        "palette.png": (palette, {}),
        "transparent_palette.png": (palette, {"transparency": 0}),
        "cmyk.jpg": (photo.convert("CMYK"), {}),
        "animated.gif": (photo, {"save_all": True, "append_images": [photo.rotate(180)]}),
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        photos[f"exif{orientation}.jpg"] = (photo, {"exif": exif, "quality": 95})
    return photos


# Metadata in front of the EXIF segment of a JPEG, as editors and thermal cameras write them
XMP = b"http://ns.adobe.com/xap/1.0/\0"
OTHER_SEGMENTS = {0xE1: XMP + b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>", 0xED: b"Photoshop 3.0\0"}


def encode_turned(photo: Image.Image, file_format: str, orientation: int) -> list[bytes]:
    """Encode a photo in files that state an orientation, in each way of the format."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    xmp = f"<rdf:Description tiff:Orientation='{orientation}'/>".replace("'", '"').encode()
    if file_format == "TIFF":
        return [encode_image(photo, "TIFF", exif=exif)]
    if file_format == "WEBP":
        return [
            encode_image(photo, "WEBP", **{name: value})
            for name, value in (("exif", exif), ("xmp", xmp))
        ]
    if file_format == "PNG":
        texts = PngInfo()
        texts.add_itxt("XML:com.adobe.xmp", xmp.decode())
        return [encode_image(photo, exif=exif), encode_image(photo, pnginfo=texts)]

    files = [encode_image(photo, "JPEG", exif=exif), encode_image(photo, "JPEG", xmp=xmp)]
    for marker, content in OTHER_SEGMENTS.items():
        files.append(insert_segment(files[0], marker, content))
    return files


def insert_segment(jpeg: bytes, marker: int, content: bytes) -> bytes:
    """Insert a segment at the start of a JPEG file."""
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content + jpeg[2:]

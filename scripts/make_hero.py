"""Draw the image in README.md: photographs, patch features and the attention of the CLS token.

    python scripts/make_hero.py --model runs/hero

    vitcls pretrain --model vitcls-tiny --dataset FOLDER --image-size 32 --patch-size 8 \\
        --hidden-size 128 --num-hidden-layers 6 --num-attention-heads 4 --intermediate-size 512 --epochs 11 \\
        --batch-size 128 --learning-rate 1e-3 --output-dir runs/hero    # FOLDER: 20,000 images of CIFAR-10, as Parquet

The model is an encoder that `vitcls pretrain` (LeJEPA) trained without labels on images of
CIFAR-10 (32 pixels, patches of 8 pixels). It runs on the photographs at 224 pixels. The attention
maps are those of layer 3, averaged over the heads, and the colors are the first three principal
components of the patches of all photographs.

Photographs: coffee by Rachel Michetti (scikit-image, CC0); flower by vultilion and china by
danielbuechele (scikit-learn, CC BY 2.0).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from skimage import data
from sklearn.datasets import load_sample_image
from sklearn.decomposition import PCA

from modeling_vitcls import ViTCLSImageProcessor, ViTCLSModel


IMAGE_SIZE, TILE, MARGIN, HEADER = 224, 220, 8, 34  # pixels of the input and of the figure
LAYER = 3
TITLES = ("image", f"patches, layer {LAYER}", "patches, last layer", f"CLS, layer {LAYER}")


@dataclass
class HeroOptions:
    """Draw the image in README.md."""

    model: Path = Path("runs", "hero")
    """Folder of the pre-trained encoder."""
    output: Path = Path("docs", "images", "hero.jpg")
    """Image file to write."""


def load_photographs() -> list[Image.Image]:
    """Return the photographs, cropped to squares."""
    arrays = (data.coffee(), load_sample_image("flower.jpg"), load_sample_image("china.jpg"))
    images = []
    for image in map(Image.fromarray, arrays):
        side = min(image.size)
        left = (image.width - side) // 2
        top = (image.height - side) // 2
        images.append(
            image.crop((left, top, left + side, top + side)).resize((IMAGE_SIZE, IMAGE_SIZE))
        )
    return images


@torch.no_grad()
def compute_maps(folder: Path, images: list[Image.Image]) -> list[np.ndarray]:
    """Return the colors of two layers and the attention of the CLS token.

    The values are in 0..1, [images, rows, columns, (3)].
    """
    model = ViTCLSModel.from_pretrained(folder).eval()
    processor = ViTCLSImageProcessor.from_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    pixel_values = processor(images, size=size, return_tensors="pt")["pixel_values"]
    patches = model.config.token_layout.patches
    side = IMAGE_SIZE // model.config.patch_size
    hidden_states = model(pixel_values, output_hidden_states=True).hidden_states
    maps = []
    for layer in (LAYER, -1):
        features = hidden_states[layer][:, patches].flatten(0, 1).numpy()
        colors = PCA(3, random_state=0).fit_transform(features).reshape(len(images), side, side, 3)
        low, high = np.percentile(colors, (2, 98), axis=(0, 1, 2))
        maps.append(((colors - low) / (high - low)).clip(0, 1))
    attention = model.token_attention(pixel_values, tokens=("cls",), layers=[LAYER - 1])
    attention = attention.mean(dim=(1, 2, 3))[:, patches].reshape(len(images), side, side).numpy()
    return [
        *maps,
        (attention / np.percentile(attention, 99, axis=(1, 2), keepdims=True)).clip(0, 1),
    ]


def blend(image: Image.Image, values: np.ndarray) -> Image.Image:
    """Return a map over the image in gray: colors, or a heat map of numbers."""
    if values.ndim == 2:
        values = np.stack([values, values**2, values**6], axis=-1)  # black, orange, white
    colors = Image.fromarray((values * 255).astype(np.uint8)).resize(
        image.size, Image.Resampling.BILINEAR
    )
    return Image.blend(image.convert("L").convert("RGB"), colors, 0.7)


def main() -> None:
    """Compute the maps and draw the figure: one row per photograph."""
    options = tyro.cli(HeroOptions, description=__doc__)
    images = load_photographs()
    maps = compute_maps(options.model, images)
    step = TILE + MARGIN
    figure = Image.new(
        "RGB", (step * len(TITLES) - MARGIN, HEADER + step * len(images) - MARGIN), "white"
    )
    draw = ImageDraw.Draw(figure)
    font = ImageFont.load_default(size=20)
    for column, title in enumerate(TITLES):
        draw.text(
            (column * step + TILE / 2, HEADER / 2), title, fill="#24292f", font=font, anchor="mm"
        )
    for row, image in enumerate(images):
        tiles = [image, *(blend(image, values[row]) for values in maps)]
        for column, tile in enumerate(tiles):
            figure.paste(tile.resize((TILE, TILE)), (column * step, HEADER + row * step))
    figure.save(options.output, quality=88)


if __name__ == "__main__":
    main()

"""Draw the image in README.md: digits, their patches as colors, and the attention of CLS and register tokens.

    python scripts/make_hero.py                       # trains the model first (a few minutes on one CPU thread)
    python scripts/make_hero.py --model runs/hero     # uses an existing model

The model is trained with the digits recipe, but with a patch size of 4 instead of 8 pixels. The head uses only the CLS
token of the last layer, so patch features and register attention are taken from the second-to-last layer.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from modeling_vitcls.commands.parsing import exit_on_error


SCRIPTS = Path(__file__).parent
PATCH_SIZE = 4  # patch size in pixels: one patch per pixel of scikit-learn's 8 x 8 digits
DIGITS = (3, 8)  # classes of the rows; each row shows the first image of its class
NUM_PCA_IMAGES = 500  # images on which the principal components are computed
TITLES = ("image", "patches (PCA)", "CLS", "register 1", "register 2")
BACKGROUND_COLOR, TEXT_COLOR = "#ffffff", "#24292f"


@dataclass
class HeroOptions:
    """Draw the image in README.md."""

    model: Path = Path("runs", "hero")
    """Folder of the model. If the folder does not exist, the model is trained."""
    output: Path = Path("docs", "images", "hero.png")
    """Image file to write."""


def main() -> None:
    """Train the model if its folder does not exist, then draw the image."""
    options = tyro.cli(HeroOptions, description=__doc__)
    if not options.model.exists():
        train_model(options.model)
    with exit_on_error():
        figure = draw_figure(*compute_figure_data(options.model))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.output, dpi=100, facecolor=BACKGROUND_COLOR, metadata={"Software": None})


def train_model(folder: Path) -> None:
    """Train the model whose attention is drawn."""
    flags = ["--config", SCRIPTS / "recipes" / "digits.yaml", "--patch-size", PATCH_SIZE, "--output-dir", folder]
    subprocess.run([sys.executable, SCRIPTS / "finetune.py", *map(str, flags)], check=True)


@torch.no_grad()
def compute_figure_data(folder: Path) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Return the digits to draw, their patches as colors, and their attention maps.

    Returns:
        The digits, the colors [digits, rows, columns, 3] in [0, 1], and the attention of the CLS token and each
        register to the patches, [digits, token, rows, columns].
    """
    from sklearn.datasets import load_digits

    from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
    from modeling_vitcls.analysis.maps import extract_patch_maps

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)  # [images, 8, 8]
    shown_indices = [digits.target.tolist().index(digit) for digit in DIGITS]

    model = ViTCLSForImageClassification.from_pretrained(folder).eval()
    processor = ViTCLSImageProcessor.from_pretrained(folder)
    layout, image_size = model.config.token_layout, model.config.image_height_width

    def encode(indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pixel values, and the patches [images, patches, D] after the second-to-last layer."""
        pixel_values = processor([pixels[index] for index in indices], return_tensors="pt")["pixel_values"]
        hidden_states = model(pixel_values, output_hidden_states=True).hidden_states
        return pixel_values, hidden_states[-2][:, layout.patches]

    pca = PCA(n_components=3).fit(encode(range(NUM_PCA_IMAGES))[1].flatten(0, 1).numpy())
    pixel_values, patches = encode(shown_indices)
    colors = pca.transform(patches.flatten(0, 1).numpy())
    minimum, maximum = np.percentile(colors, (2, 98), axis=0)
    colors = ((colors - minimum) / (maximum - minimum)).clip(0, 1)
    colors = colors.reshape(len(shown_indices), *model.config.grid_size, 3)

    attention = model.token_attention(pixel_values, tokens=("cls", "registers"))
    attention = attention.mean(dim=2)  # [digits, layer, token, key]
    attention = torch.cat([attention[:, -1, : layout.cls.stop], attention[:, -2, layout.cls.stop :]], dim=1)
    attention_maps = extract_patch_maps(attention, model.config, image_size).numpy()
    return [pixels[index] for index in shown_indices], colors, attention_maps


def draw_figure(images: list[np.ndarray], colors: np.ndarray, attention_maps: np.ndarray) -> Figure:
    """Return a figure with one row per digit: image, patches, and one attention map per token."""
    figure = Figure(figsize=(2 * len(TITLES), 2 * len(images) + 0.4), layout="constrained")
    for row, axes in zip(range(len(images)), figure.subplots(len(images), len(TITLES)), strict=True):
        axes[0].imshow(images[row], cmap="gray", interpolation="bicubic")
        axes[1].imshow(colors[row], interpolation="bicubic")
        for token, axis in enumerate(axes[2:]):
            axis.imshow(attention_maps[row, token], cmap="magma", interpolation="bicubic")
        for axis, title in zip(axes, TITLES, strict=True):
            axis.set_axis_off()
            if row == 0:
                axis.set_title(title, color=TEXT_COLOR, fontsize=17)
    return figure


if __name__ == "__main__":
    main()

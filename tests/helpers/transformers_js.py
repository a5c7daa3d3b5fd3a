"""The npm package of transformers.js, and a classifier of digits to run with it."""

import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from helpers.tiny_models import build_tiny_config, save_both
from helpers.varied_models import center_logits
from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from scripts.space.static_space import TRANSFORMERS_JS_VERSION


NUM_DIGITS = 500


def install_transformers_js(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install transformers.js once per session, and return its folder.

    Skip the test without node, npm or a network.
    """
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.getbasetemp() / "npm"
    if not (folder / "node_modules").is_dir():
        folder.mkdir(exist_ok=True)
        package = f"@huggingface/transformers@{TRANSFORMERS_JS_VERSION}"
        command = ["npm", "install", "--no-fund", "--no-audit", "--ignore-scripts", package]
        installed = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if installed.returncode:
            pytest.skip(
                f"npm cannot install {package}: {installed.stderr.strip().splitlines()[-1:]}"
            )
    return folder


def load_digit_images() -> list[Image.Image]:
    """Return digits in the size of the model, so that no image is resized."""
    return [
        Image.fromarray((digit * 15.9).astype("uint8"))
        .resize((32, 32), Image.Resampling.NEAREST)
        .convert("RGB")
        for digit in load_digits().images[:NUM_DIGITS]
    ]


def save_digits_classifier(folder: Path) -> Path:
    """Save a random classifier that predicts several classes for the digits."""
    names = {index: f"digit {index}" for index in range(10)}
    config = build_tiny_config(
        num_hidden_layers=1, num_register_tokens=2, num_labels=10, id2label=names
    )
    processor = ViTCLSImageProcessor(size={"height": 32, "width": 32})
    pixel_values = processor(load_digit_images(), return_tensors="pt")["pixel_values"]
    model = center_logits(ViTCLSForImageClassification(config), pixel_values)
    return save_both(model, folder, processor)

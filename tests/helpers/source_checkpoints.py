"""Small models of other projects in folders, for tests of conversion."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import timm
import transformers
from timm.models import save_for_hf

from helpers.tiny_models import initialize, raises_one_line, save_both
from modeling_vitcls.conversion.weight_rules import ConversionError
from scripts.tools.random_weights import randomize_weights


# Expect a ConversionError of one line with these words
refuses_conversion = partial(raises_one_line, error=ConversionError)

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
NAMES = {0: "ant", 1: "bee", 2: "cow"}


def save_checkpoint(model: transformers.PreTrainedModel, folder: Path) -> str:
    """Save a model and return its folder as a source of the conversion."""
    model.save_pretrained(folder)
    return f"transformers:{folder}"


def save_timm_model(folder: Path) -> str:
    """Save a timm model with random weights, and return it as a source of the conversion."""
    model = randomize_weights(timm.create_model("test_vit"))
    save_for_hf(model, folder, safe_serialization=True)
    return f"timm:local-dir:{folder}"


def build_vit_classifier(**fields: Any) -> transformers.PreTrainedModel:
    """Return a small ViT classifier of transformers."""
    return randomize_weights(
        transformers.ViTForImageClassification(
            transformers.ViTConfig(**SIZES, id2label=NAMES, **fields)
        )
    )


def save_vit_classifier(folder: Path) -> Path:
    """Save such a classifier with its image processor, and return the folder."""
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    return save_both(build_vit_classifier(), folder, processor)


def save_large_encoder(folder: Path, num_layers: int = 2) -> str:
    """Save an encoder with a native side of 280 pixels and its processor, and return the folder."""
    config = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=280,
        patch_size=28,
    )
    initialize(transformers.Dinov2Model(config)).save_pretrained(folder)
    processor = transformers.ViTImageProcessor(size={"height": 280, "width": 280})
    processor.save_pretrained(folder)
    return str(folder)


class RunWhenUnpickled:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)

"""Small models of transformers, saved as folders, for tests of conversion."""

from pathlib import Path
from typing import Any

import transformers

from modeling_vitcls.conversion.random_weights import randomize_weights


WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
NAMES = {0: "ant", 1: "bee", 2: "cow"}
SIZES = WIDTHS | {"image_size": 32, "patch_size": 8}


def saved(model: transformers.PreTrainedModel, folder: Path) -> str:
    """Where it is, as a source."""
    model.save_pretrained(folder)
    return f"transformers:{folder}"


def vit_classifier(**fields: Any) -> transformers.PreTrainedModel:
    """A small ViT of transformers."""
    return randomize_weights(
        transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, id2label=NAMES, **fields))
    )

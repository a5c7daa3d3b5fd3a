"""Train a small model on scikit-learn's digits in seconds, for tests of trained tokens."""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional as F

from helpers.tiny_models import initialize
from modeling_vitcls import ViTCLSConfig, ViTCLSForImageClassification


DIGITS = load_digits()
PIXELS = (torch.tensor(DIGITS.images, dtype=torch.float32) / 8 - 1).unsqueeze(1)  # [1797, 1, 8, 8]
LABELS = torch.tensor(DIGITS.target)
NUM_TRAINED = 1500
BATCH_SIZE = 100
# Images [30, 8, 8] that look like no digit
STRIPES = np.zeros((30, 8, 8), np.uint8)
STRIPES[:, :, ::2] = np.arange(200, 230, dtype=np.uint8)[:, None, None]
STRIPED = [(Image.fromarray(pixels), "stripes") for pixels in STRIPES]
HELD_OUT = PIXELS[NUM_TRAINED : NUM_TRAINED + 128], LABELS[NUM_TRAINED : NUM_TRAINED + 128]


def build_digits_config(**fields: Any) -> ViTCLSConfig:
    """Return a configuration with 16 patches, width 32 and three layers."""
    sizes = {
        "image_size": 8,
        "patch_size": 2,
        "num_channels": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
    }
    settings = {"num_hidden_layers": 3, "num_attention_heads": 2, "initializer_range": 0.08}
    return ViTCLSConfig(**(sizes | settings | fields))


def train_digits_model(epochs: int = 12, **fields: Any) -> ViTCLSForImageClassification:
    """Train a model with two registers to an accuracy of about 90%.

    `fields` overrides fields of the configuration. With fewer labels, the other digits are left out.
    """
    config = build_digits_config(**{"num_register_tokens": 2, "num_labels": 10} | fields)
    model = initialize(ViTCLSForImageClassification(config)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    known = torch.nonzero(LABELS[:NUM_TRAINED] < config.num_labels)[:, 0]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, epochs * math.ceil(len(known) / BATCH_SIZE)
    )
    for _ in range(epochs):
        for indices in known[torch.randperm(len(known))].split(BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(model(PIXELS[indices]).logits, LABELS[indices]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()

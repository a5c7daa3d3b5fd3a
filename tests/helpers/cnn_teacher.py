"""Train a small convolutional teacher on handwritten digits in a few seconds, and save it for transformers."""

from pathlib import Path

import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from modeling_vitcls.data.images import LabeledImages
from modeling_vitcls.data.splits import load_training_data
from modeling_vitcls.options import DataOptions


SIZE = 32
EPOCHS = 8
BATCH_SIZE = 64
LARGEST_SHIFT = 3  # pixels


def train_cnn_teacher(folder: Path, label_names: list[str] | None = None, seed: int = 0) -> float:
    """Train a ResNet (75,000 parameters) on the training split of `digits`, save it, and return its held-out accuracy.

    `label_names` sets another order of the labels.
    """
    torch.manual_seed(seed)
    data = load_training_data(DataOptions(dataset="digits"))
    names = data.label_space.names
    label_names = label_names or names
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
    )
    model = ResNetForImageClassification(config)
    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)

    def preprocess(split: LabeledImages) -> tuple[torch.Tensor, torch.Tensor]:
        rgb_images = [split.images[index].convert("RGB") for index in range(len(split))]
        labels = torch.tensor([label_names.index(names[label]) for label in split.labels])
        return processor(rgb_images, return_tensors="pt")["pixel_values"], labels

    train_network(model, *preprocess(data.train))
    with torch.no_grad():
        pixel_values, labels = preprocess(data.held_out)
        accuracy = (model.eval()(pixel_values).logits.argmax(-1) == labels).float().mean().item()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return accuracy


def train_network(model: nn.Module, pixel_values: torch.Tensor, labels: torch.Tensor) -> None:
    """Train with one-cycle AdamW on randomly shifted images."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = EPOCHS * (len(labels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        indices = torch.randint(len(labels), (BATCH_SIZE,))
        shifts = torch.randint(-LARGEST_SHIFT, LARGEST_SHIFT + 1, (2,)).tolist()
        shifted = pixel_values[indices].roll(shifts, dims=(2, 3))
        loss = nn.functional.cross_entropy(model(shifted).logits, labels[indices])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

# /// script
# requires-python = ">=3.11"
# dependencies = ["modeling_vitcls[cli]"]
#
# [tool.uv.sources]
# modeling_vitcls = { path = "../..", editable = true }
# ///
"""Train a small ResNet on labeled images, as a teacher for distillation.

python scripts/studies/train_cnn_teacher.py --dataset digits --folder runs/teacher
vitcls finetune --config digits --teacher runs/teacher --output-dir runs/student
"""

from pathlib import Path

import torch
import tyro
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from modeling_vitcls.data.images import LabeledImages
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.splits import divide_images, load_undivided_images


BATCH_SIZE = 64
MAX_SHIFT = 0.1  # maximum shift of the training images, as a fraction of the image size


def train_cnn_teacher(
    dataset: str,
    folder: Path,
    image_size: int = 32,
    hidden_sizes: tuple[int, ...] = (32, 64),
    epochs: int = 8,
    flip: bool = False,
    seed: int = 0,
) -> float:
    """Train and save a ResNet with one basic block per stage.

    Return the accuracy on the held-out images.

    Args:
        dataset: Dataset of labeled images, as in `vitcls finetune`.
        folder: Folder in which the model and the image processor are saved.
        image_size: Height and width to which images are resized, in pixels.
        hidden_sizes: Number of channels of each stage.
        epochs: Number of passes over the training images.
        flip: Whether to flip images horizontally with a probability of 0.5.
        seed: Seed of the initial weights, the sampling of images and the augmentation.
    """
    torch.manual_seed(seed)
    images = load_undivided_images(DataOptions(dataset=dataset, num_workers=0))
    data = divide_images(images, held_out_fraction=0.2)
    names = data.label_space.names
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=list(hidden_sizes),
        depths=[1] * len(hidden_sizes),
        layer_type="basic",
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = ResNetForImageClassification(config)
    size = {"height": image_size, "width": image_size}
    processor = ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)

    def prepare_split(split: LabeledImages) -> tuple[torch.Tensor, torch.Tensor]:
        images = [split.images[index].convert("RGB") for index in range(len(split))]
        return processor(images, return_tensors="pt")["pixel_values"], torch.tensor(split.labels)

    train_network(model, *prepare_split(data.train), epochs, flip)
    pixel_values, labels = prepare_split(data.held_out)
    with torch.no_grad():
        logits = torch.cat([model.eval()(batch).logits for batch in pixel_values.split(BATCH_SIZE)])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return (logits.argmax(-1) == labels).float().mean().item()


def train_network(
    model: nn.Module, pixel_values: torch.Tensor, labels: torch.Tensor, epochs: int, flip: bool
) -> None:
    """Train a model on randomly shifted images, with AdamW and a one-cycle schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    num_steps = epochs * (len(labels) // BATCH_SIZE)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=num_steps)
    max_shift = round(MAX_SHIFT * pixel_values.shape[-1])
    model.train()
    for _ in range(num_steps):
        indices = torch.randint(len(labels), (BATCH_SIZE,))
        images = pixel_values[indices].roll(
            torch.randint(-max_shift, max_shift + 1, (2,)).tolist(), dims=(2, 3)
        )
        if flip:
            images = torch.where(
                (torch.rand(BATCH_SIZE) < 0.5)[:, None, None, None], images.flip(-1), images
            )
        loss = nn.functional.cross_entropy(model(images).logits, labels[indices])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


if __name__ == "__main__":
    print(f"accuracy on the held-out images: {tyro.cli(train_cnn_teacher):.2%}")

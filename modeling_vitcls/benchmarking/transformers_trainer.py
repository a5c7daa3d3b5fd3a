"""The other side of training: transformers' Trainer and built-in ViT, as its example for image classification does it.

    python -m modeling_vitcls.benchmarking.transformers_trainer SETTINGS.json

Pictures are augmented one by one in the data loader, with the same transforms as ours. Every `log_every` steps a line
is appended to the file `metrics`. It trains until it is stopped.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTForImageClassification


class Pictures(Dataset):
    """Labelled pictures, in memory or in files, with transforms."""

    def __init__(self, pictures: list[Any], labels: list[int], transform: v2.Transform) -> None:
        self.pictures = pictures
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = self.pictures[index]
        if isinstance(picture, Path):
            with Image.open(picture) as opened:
                picture = opened.convert("RGB")
        return {"pixel_values": self.transform(picture), "labels": self.labels[index]}


class Lines(TrainerCallback):
    """Appends a line to a file now and then."""

    def __init__(self, file: Path, every: int) -> None:
        self.file = file
        self.every = every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each optimiser step."""
        if state.global_step % self.every == 0:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step}) + "\n")


def digits(size: int) -> tuple[list[Any], list[int]]:
    """scikit-learn's digits as pictures of the model's size, in memory as ours are."""
    from sklearn.datasets import load_digits

    data = load_digits()
    levels = (data.images * (255 / 16)).round().astype("uint8")  # [1797, 8, 8]
    pictures = [
        Image.fromarray(level).convert("RGB").resize((size, size), Image.Resampling.BILINEAR) for level in levels
    ]
    return pictures, data.target.tolist()


def folder(path: Path) -> tuple[list[Any], list[int]]:
    """The files of a folder with a sub-folder per class."""
    classes = sorted(entry.name for entry in path.iterdir())
    files = sorted(path.glob("*/*.jpg"))
    return list(files), [classes.index(file.parent.name) for file in files]


def transforms(augmentation: dict[str, Any], size: int) -> v2.Transform:
    """As `build_augmentation` in data/augmentation.py, for one image."""
    steps: list[v2.Transform] = [v2.PILToTensor()]
    if augmentation["crop_scale"] < 1:
        steps.append(v2.RandomResizedCrop((size, size), scale=(augmentation["crop_scale"], 1.0)))
    if augmentation["flip"]:
        steps.append(v2.RandomHorizontalFlip())
    if augmentation["rotation"]:
        shift, zoom = augmentation["shift"], augmentation["zoom"]
        steps.append(
            v2.RandomAffine(
                degrees=augmentation["rotation"],
                translate=(shift, shift),
                scale=(1 - zoom, 1 + zoom),
                interpolation=v2.InterpolationMode.BILINEAR,
            )
        )
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])


def main(settings: dict[str, Any]) -> None:
    """Train."""
    model = ViTForImageClassification.from_pretrained(settings["model"])
    size = settings["image_size"]
    pictures, labels = digits(size) if settings["dataset"] == "digits" else folder(Path(settings["dataset"]))
    arguments = TrainingArguments(
        output_dir=settings["output_dir"],
        max_steps=settings["max_steps"],
        per_device_train_batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=settings["max_steps"] // 10,
        weight_decay=0.05,
        label_smoothing_factor=0.1,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=settings["mixed_precision"] == "bf16",
        use_cpu=not torch.accelerator.is_available(),
        dataloader_num_workers=settings["num_workers"],
        dataloader_drop_last=True,
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Pictures(pictures, labels, transforms(settings["augmentation"], size)),
        callbacks=[Lines(Path(settings["metrics"]), settings["log_every"])],
    )
    trainer.train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

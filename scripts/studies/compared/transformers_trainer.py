"""Fine-tuning with `Trainer`, as in transformers' example: 5 epochs, learning rate 2e-5."""

import os

import numpy as np
import torch
from datasets import load_dataset
from torchvision import transforms
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
)


photos = load_dataset("imagefolder", data_dir=os.environ["PHOTOS"])
names = photos["train"].features["label"].names
processor = AutoImageProcessor.from_pretrained(os.environ["ENCODER"])
normalize = [
    transforms.ToTensor(),
    transforms.Normalize(mean=processor.image_mean, std=processor.image_std),
]
augment = transforms.Compose(
    [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *normalize]
)
crop = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), *normalize])


def prepare(transform):
    return lambda batch: {
        "pixel_values": [transform(image.convert("RGB")) for image in batch["image"]],
        "labels": batch["label"],
    }


def collate(examples):
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


model = AutoModelForImageClassification.from_pretrained(
    os.environ["ENCODER"],
    id2label=dict(enumerate(names)),
    label2id={name: index for index, name in enumerate(names)},
)
arguments = TrainingArguments(
    output_dir=os.environ["OUTPUT"],
    num_train_epochs=5,
    learning_rate=2e-5,
    per_device_train_batch_size=8,
    per_device_eval_batch_size=8,
    remove_unused_columns=False,
    save_strategy="no",
    report_to="none",
    seed=1337,
)
trainer = Trainer(
    model=model,
    args=arguments,
    train_dataset=photos["train"].with_transform(prepare(augment)),
    eval_dataset=photos["test"].with_transform(prepare(crop)),
    data_collator=collate,
    compute_metrics=lambda outputs: {
        "accuracy": np.mean(outputs.predictions.argmax(1) == outputs.label_ids)
    },
)
trainer.train()
print("accuracy", trainer.evaluate()["eval_accuracy"])

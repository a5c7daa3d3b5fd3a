"""Metrics over labelled pictures, every one of them counted exactly once on any number of processes.

All processes run equally many batches of one size (sharded models need that). Places beyond the last picture repeat
the first one with the label -100, which no metric counts.
"""

import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from ..image_processing_vitcls import ViTCLSImageProcessor
from ..losses_vitcls import IGNORED_LABEL
from ..modeling_vitcls import ViTCLSForImageClassification
from .data import LabelledPictures, load_evaluation_data
from .environment import build_accelerator
from .model import check_is_vitcls
from .options import EvaluateOptions


class HeldOutPictures(Dataset):
    """One process's share: pictures as they are, with labels, padded to whole batches."""

    def __init__(self, source: LabelledPictures, batch_size: int, process: int, num_processes: int) -> None:
        self.source = source
        per_round = batch_size * num_processes
        num_rounds = -(-len(source) // per_round)
        self.positions = [
            start + process * batch_size + place
            for start in range(0, num_rounds * per_round, per_round)
            for place in range(batch_size)
        ]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        position = self.positions[index]
        if position < len(self.source):
            return self.source.pictures[position], self.source.labels[position]
        return self.source.pictures[0], IGNORED_LABEL


class Collator:
    """Pictures with labels -> the image processor's `pixel_values` and `labels`."""

    def __init__(self, processor: ViTCLSImageProcessor) -> None:
        self.processor = processor

    def __call__(self, examples: list[tuple[Any, int]]) -> dict[str, torch.Tensor]:
        pictures, labels = zip(*examples, strict=True)
        return {
            "pixel_values": self.processor(list(pictures), return_tensors="pt")["pixel_values"],  # [B, C, H, W]
            "labels": torch.tensor(labels),  # [B]
        }


class Evaluator:
    """Evaluates a model, again and again, on the same pictures."""

    def __init__(
        self,
        pictures: LabelledPictures,
        processor: ViTCLSImageProcessor,
        num_labels: int,
        batch_size: int,
        num_workers: int,
        accelerator: Accelerator,
    ) -> None:
        self.num_pictures = len(pictures)
        self.num_labels = num_labels
        self.accelerator = accelerator
        share = HeldOutPictures(pictures, batch_size, accelerator.process_index, accelerator.num_processes)
        self.loader = DataLoader(share, batch_size, num_workers=num_workers, collate_fn=Collator(processor))

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float | int]:
        """Accuracy (top 1, and top 5 of more than five labels), loss, and over how many pictures.

        Raises:
            RuntimeError: if any picture was not counted exactly once.
        """
        device = self.accelerator.device
        metrics: dict[str, Metric] = {"accuracy": self.accuracy(top_k=1)}
        if self.num_labels > 5:
            metrics["top_5_accuracy"] = self.accuracy(top_k=5)
        mean_loss, counted = MeanMetric().to(device), SumMetric().to(device)
        for logits, labels in self.predictions(model):
            for metric in metrics.values():
                metric.update(logits, labels)
            losses = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="none")
            mean_loss.update(losses, weight=labels != IGNORED_LABEL)
            counted.update((labels != IGNORED_LABEL).sum())

        metrics["loss"] = mean_loss
        num_images = int(counted.compute().item())
        if num_images != self.num_pictures:
            raise RuntimeError(f"evaluation counted {num_images} images of {self.num_pictures}: this is a bug")
        values = {name: round(metric.compute().item(), 6) for name, metric in metrics.items()}
        return {**values, "num_images": num_images}

    def accuracy(self, top_k: int) -> MulticlassAccuracy:
        """A fresh metric, over all pictures alike."""
        metric = MulticlassAccuracy(self.num_labels, top_k=top_k, average="micro", ignore_index=IGNORED_LABEL)
        return metric.to(self.accelerator.device)

    def predictions(self, model: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Logits [B, labels], `float32`, and labels [B] of this process's batches."""
        for batch in self.loader:
            with self.accelerator.autocast():
                logits = model(batch["pixel_values"].to(self.accelerator.device)).logits
            yield logits.float(), batch["labels"].to(self.accelerator.device)


def evaluate_checkpoint(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate a saved model, print the results, and write them where asked.

    Raises:
        ValueError: for another kind of model, a split that does not exist, or labels that the model does not know.
        OSError: for a checkpoint that cannot be found or read.
    """
    accelerator = build_accelerator()
    with accelerator.main_process_first():  # downloads once
        check_is_vitcls(options.model)
        model = ViTCLSForImageClassification.from_pretrained(options.model).to(accelerator.device).eval()
        processor = ViTCLSImageProcessor.from_pretrained(options.model)
        label_names, pictures = load_evaluation_data(options.data, options.split)
    pictures = relabelled(pictures, label_names, model.config.label2id)
    evaluator = Evaluator(
        pictures, processor, model.config.num_labels, options.batch_size, options.data.num_workers, accelerator
    )
    started = time.perf_counter()
    metrics = evaluator(model)
    speed = metrics["num_images"] / (time.perf_counter() - started)
    asked = {"model": options.model, "dataset": options.data.dataset, "split": options.split}
    results = {**asked, **metrics, "images_per_second": round(speed, 1)}
    if accelerator.is_main_process:
        text = json.dumps(results, indent=2)
        print(text)
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(text + "\n", encoding="utf-8")
    accelerator.end_training()
    return results


def relabelled(pictures: LabelledPictures, names: list[str], label2id: dict[str, int]) -> LabelledPictures:
    """The pictures with the model's label indices in place of the data set's, matched by name."""
    used = {names[label] for label in pictures.labels}
    if unknown := sorted(used - label2id.keys()):
        raise ValueError(
            f"the data set has the label {unknown[0]!r} and the model does not: it knows {', '.join(label2id)}"
        )
    return LabelledPictures(pictures.pictures, [label2id[names[label]] for label in pictures.labels])

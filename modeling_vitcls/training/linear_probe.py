"""Linear probing with cached features: the frozen encoder sees every picture once, and then only the heads run.

    pictures -> encoder, once -> what the heads read [pictures, F] -> batches -> heads -> loss

It gives what training the heads on a frozen encoder gives, for the cost of a few small matrix products per step. It
needs an encoder that is frozen as a whole, a pooler without parameters, and no random change to the pictures (or a
few fixed views of each). Where that is not so, the frozen encoder runs in every step (`trainable.set_training` keeps
it in eval mode).

classifier     features: [pooled vector | mean of the distillation tokens]
several tasks  features: [CLS token of the first task | of the second | ...]
"""

import copy
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn

from ..data.batches import Batch, BatchPlan, Key, PreparedBatches, TrainingPictures
from ..data.workers import from_workers
from ..heads_vitcls import combine_logits
from ..inference.evaluator import Evaluator, HeldOutBatch
from ..modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageClassifierOutput,
    ViTCLSMultiTaskOutput,
)


# Features and the heads that read them -------------------------------------------------------------------------------


def features_of(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the heads of a classifier read, [B, F], of images [B, C, H, W]."""
    outputs = model.vitcls(pixel_values)
    if isinstance(model, ViTCLSForMultiTaskClassification):
        return outputs.tokens["cls"].flatten(1)  # [B, k * D]
    vectors = [outputs.pooler_output]  # [B, P]
    if model.distillation_classifier is not None:
        vectors.append(outputs.tokens["distillation"].mean(dim=1))  # [B, D]
    return torch.cat(vectors, dim=1)


class HeadOnly(nn.Module):
    """The heads of an image classifier, on features. Its parameters are the model's own, under the same names."""

    def __init__(self, model: ViTCLSForImageClassification) -> None:
        super().__init__()
        self.config = model.config
        self.classifier = model.classifier
        self.distillation_classifier = model.distillation_classifier

    def forward(self, features: torch.Tensor) -> ViTCLSImageClassifierOutput:
        """Features [B, F] -> what the model answers to the images that they were made of."""
        pooled_size = self.config.pooled_size
        logits = cls_logits = self.classifier(features[:, :pooled_size])  # [B, labels]
        distillation_logits = None
        if self.distillation_classifier is not None:
            distillation_logits = self.distillation_classifier(features[:, pooled_size:])
            logits = combine_logits(cls_logits, distillation_logits, self.config.distillation_inference)
        return ViTCLSImageClassifierOutput(
            logits=logits, cls_logits=cls_logits, distillation_logits=distillation_logits
        )


class MultiTaskHeadOnly(nn.Module):
    """The heads of a multi-task model, on features. Its parameters are the model's own, under the same names."""

    def __init__(self, model: ViTCLSForMultiTaskClassification) -> None:
        super().__init__()
        self.config = model.config
        self.classifiers = model.classifiers

    def forward(self, features: torch.Tensor) -> ViTCLSMultiTaskOutput:
        """Features [B, F] -> what the model answers to the images that they were made of."""
        tasks = list(self.config.task_labels())
        tokens = features.unflatten(1, (len(tasks), -1)).unbind(dim=1)
        heads = self.classifiers.values()
        return ViTCLSMultiTaskOutput(
            logits={task: head(token) for task, head, token in zip(tasks, heads, tokens, strict=True)}
        )


def build_head_only(model: Any) -> HeadOnly | MultiTaskHeadOnly:
    """The heads of a classifier as a module of their own."""
    if isinstance(model, ViTCLSForMultiTaskClassification):
        return MultiTaskHeadOnly(model)
    return HeadOnly(model)


def trained_outside_heads(model: nn.Module) -> list[str]:
    """Names of trained parameters that are not of the heads: where there are any, features cannot be cached."""
    heads = {id(parameter) for parameter in build_head_only(model).parameters()}
    return [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in heads
    ]


# Caching -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def cache_features(
    model: nn.Module,
    pictures: TrainingPictures,
    keys: Sequence[Key],
    normalise: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int,
    num_workers: int,
    accelerator: Accelerator,
) -> Batch:
    """One large batch of the pictures with these keys, on the CPU: with `features` [keys, F] in place of `pixels`.

    Each process encodes its share, in eval mode; all of them get the whole.

    Args:
        model: the classifier, on the device, not wrapped.
        normalise: pixels on the device -> `pixel_values`.

    Raises:
        ValueError: if no picture can be read.
    """
    was_training = model.training
    model.eval()
    parts: list[Batch] = []
    share = shares(keys, batch_size, accelerator.process_index, accelerator.num_processes)
    for batch in from_workers(PreparedBatches(pictures), share, num_workers):
        pixels = batch.pop("pixels").to(accelerator.device, non_blocking=True)
        with accelerator.autocast():
            features = features_of(model, normalise(pixels)).float()
        rows = send_to_device(batch, accelerator.device) | {"features": features}
        parts.append(send_to_device(accelerator.gather(rows), "cpu"))  # in the order of the keys
    model.train(was_training)
    return rows_of(concatenated(parts), slice(len(keys)))


def shares(keys: Sequence[Key], batch_size: int, process: int, num_processes: int) -> list[list[Key]]:
    """One process's batches: equally many for each, all of one size; places beyond the last key repeat it."""
    starts = range(process * batch_size, len(keys) + process * batch_size, num_processes * batch_size)
    last = len(keys) - 1
    return [[keys[min(place, last)] for place in range(start, start + batch_size)] for start in starts]


def feature_batches(
    cached: Batch, plan: BatchPlan, process: int, num_views: int = 1, first_step: int = 0
) -> Generator[Batch, None, None]:
    """The batches of one process in the order of the plan, with `features` in place of `pixels`.

    `cached` is of all pictures, view by view: epoch e shows view e modulo `num_views`.
    """
    num_pictures = len(cached["features"]) // num_views
    for keys in plan.batches(process, first_step):
        epochs, indices = torch.tensor(keys).unbind(dim=1)
        yield rows_of(cached, epochs % num_views * num_pictures + indices) | {"epoch": epochs}


@torch.no_grad()
def probe_evaluator(evaluator: Evaluator, model: nn.Module) -> Evaluator:
    """An evaluator for `build_head_only(model)`, with the pictures of `evaluator` encoded once.

    `model` is the classifier, on the device, not wrapped; each process encodes its own share, in eval mode.
    """
    was_training = model.training
    model.eval()
    encoded = copy.copy(evaluator)
    encoded.batches = copy.copy(evaluator.batches)
    encoded.batches.kept = [encoded_batch(batch, model, evaluator.accelerator) for batch in evaluator.batches]
    model.train(was_training)
    return encoded


def encoded_batch(batch: HeldOutBatch, model: Any, accelerator: Accelerator) -> HeldOutBatch:
    """A held-out batch with features [G, F] in the place of its pixel values."""
    num_pictures, pixel_values = 0, torch.zeros(1, model.config.num_channels, *model.config.image_height_width)
    if batch.pixel_values is not None:
        num_pictures, pixel_values = len(batch.pixel_values), batch.pixel_values
    with accelerator.autocast():
        features = features_of(model, pixel_values.to(accelerator.device)).float()
    return HeldOutBatch(features[:num_pictures].cpu(), batch.labels, batch.broken)


# Nested batches ------------------------------------------------------------------------------------------------------


def rows_of(batch: Batch, rows: torch.Tensor | slice) -> Batch:
    """Some rows of every tensor of a batch; labels of several tasks are a dict."""
    return {name: rows_of(value, rows) if isinstance(value, dict) else value[rows] for name, value in batch.items()}


def concatenated(parts: list[Batch]) -> Batch:
    """One batch of several."""
    return {
        name: concatenated([part[name] for part in parts])
        if isinstance(value, dict)
        else torch.cat([part[name] for part in parts])
        for name, value in parts[0].items()
    }

"""Linear probing with cached features. The frozen encoder encodes every image once, and only the heads are trained.

    images -> encoder, once -> inputs of the heads [images, F] -> batches -> heads -> loss

The result is the same as when the heads are trained on top of a frozen encoder, but each step requires only a few
small matrix products. Features can be cached if the encoder is frozen, the pooler has no parameters, and the images
either are not augmented randomly or have a fixed number of augmented views. Otherwise, the frozen encoder runs in eval
mode in every step (`set_train_mode` in model.py).

    model                    features
    classifier               [pooled vector | mean of the distillation tokens]
    multi-task classifier    [CLS token of the first task | CLS token of the second task | ...]
"""

import copy
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import concatenate, recursively_apply, send_to_device
from torch import nn

from ..data.batches import Batch, TrainingImages, load_batches
from ..data.sampling import BatchPlan, ImageKey
from ..heads_vitcls import combine_logits
from ..inference.evaluator import Evaluator, HeldOutBatch
from ..modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageClassifierOutput,
    ViTCLSMultiTaskOutput,
)


# Features and heads --------------------------------------------------------------------------------------------------


def compute_features(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the inputs of a classifier's heads [B, F] for images [B, C, H, W]."""
    outputs = model.vitcls(pixel_values)
    if isinstance(model, ViTCLSForMultiTaskClassification):
        return outputs.tokens["cls"].flatten(1)  # [B, k * D]
    vectors = [outputs.pooler_output]  # [B, P]
    if model.distillation_classifier is not None:
        vectors.append(outputs.tokens["distillation"].mean(dim=1))  # [B, D]
    return torch.cat(vectors, dim=1)


class ClassifierHeads(nn.Module):
    """Heads of an image classifier, applied to cached features. The parameters are shared with the model."""

    def __init__(self, model: ViTCLSForImageClassification) -> None:
        super().__init__()
        self.config = model.config
        self.classifier = model.classifier
        self.distillation_classifier = model.distillation_classifier

    def forward(self, features: torch.Tensor) -> ViTCLSImageClassifierOutput:
        """Return the model's outputs for features [B, F]."""
        pooled_size = self.config.pooled_size
        logits = cls_logits = self.classifier(features[:, :pooled_size])  # [B, labels]
        distillation_logits = None
        if self.distillation_classifier is not None:
            distillation_logits = self.distillation_classifier(features[:, pooled_size:])
            logits = combine_logits(cls_logits, distillation_logits, self.config.distillation_inference)
        return ViTCLSImageClassifierOutput(
            logits=logits, cls_logits=cls_logits, distillation_logits=distillation_logits
        )


class MultiTaskHeads(nn.Module):
    """Heads of a multi-task model, applied to cached features. The parameters are shared with the model."""

    def __init__(self, model: ViTCLSForMultiTaskClassification) -> None:
        super().__init__()
        self.config = model.config
        self.classifiers = model.classifiers

    def forward(self, features: torch.Tensor) -> ViTCLSMultiTaskOutput:
        """Return the model's outputs for features [B, F]."""
        tasks = list(self.config.task_labels())
        tokens = features.unflatten(1, (len(tasks), -1)).unbind(dim=1)
        heads = self.classifiers.values()
        logits = {task: head(token) for task, head, token in zip(tasks, heads, tokens, strict=True)}
        return ViTCLSMultiTaskOutput(logits=logits)


def build_classifier_heads(model: Any) -> ClassifierHeads | MultiTaskHeads:
    is_multi_task = isinstance(model, ViTCLSForMultiTaskClassification)
    return MultiTaskHeads(model) if is_multi_task else ClassifierHeads(model)


def find_trainable_parameters_outside_heads(model: nn.Module) -> list[str]:
    """Return the names of trainable parameters outside the heads. Features can be cached only if the list is empty."""
    head_parameter_ids = {id(parameter) for parameter in build_classifier_heads(model).parameters()}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in head_parameter_ids
    ]


# Caching -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def cache_features(
    model: nn.Module,
    images: TrainingImages,
    keys: Sequence[ImageKey],
    normalize: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int,
    num_workers: int,
    accelerator: Accelerator,
) -> Batch:
    """Encode the images identified by `keys`, and return one CPU batch with `features` [num_keys, F] instead of
    `pixels`. Raise ValueError if none of the images can be read. Each process encodes a subset of the images and
    receives the features of all images. `model` is the unwrapped classifier on the device and is run in eval mode.
    `normalize` converts pixels on the device to `pixel_values`."""
    was_training = model.training
    model.eval()
    batches: list[Batch] = []
    local_keys = split_keys(keys, batch_size, accelerator.process_index, accelerator.num_processes)
    for batch in load_batches(images, local_keys, num_workers):
        pixels = batch.pop("pixels").to(accelerator.device, non_blocking=True)
        with accelerator.autocast():
            features = compute_features(model, normalize(pixels)).float()
        batch_on_device = send_to_device(batch, accelerator.device) | {"features": features}
        # The rows of the gathered batch are in the order of the keys.
        batches.append(send_to_device(accelerator.gather(batch_on_device), "cpu"))
    model.train(was_training)
    return select_rows(concatenate(batches), slice(len(keys)))


def select_rows(batch: Batch, rows: torch.Tensor | slice) -> Batch:
    """Return the selected rows of every tensor in a batch, including the tensors in a dictionary of labels."""
    return recursively_apply(lambda values: values[rows], batch)


def split_keys(
    keys: Sequence[ImageKey], batch_size: int, process_index: int, num_processes: int
) -> list[list[ImageKey]]:
    """Return batches with the keys of the images that one process encodes. All processes have the same number of
    batches, and all batches have the same size. The last key is repeated as padding."""
    starts = range(process_index * batch_size, len(keys) + process_index * batch_size, num_processes * batch_size)
    return [[keys[min(index, len(keys) - 1)] for index in range(start, start + batch_size)] for start in starts]


def iterate_feature_batches(
    cached_batch: Batch, plan: BatchPlan, process_index: int, num_views: int = 1, first_step: int = 0
) -> Generator[Batch, None, None]:
    """Yield the batches of one process in the order of the plan, with `features` instead of `pixels`. `cached_batch`
    contains the first view of all images, then the second view, and so on. Epoch e uses view e modulo `num_views`."""
    num_images = len(cached_batch["features"]) // num_views
    for keys in plan.iterate_keys(process_index, first_step):
        epochs, indices = torch.tensor(keys).unbind(dim=1)
        yield select_rows(cached_batch, epochs % num_views * num_images + indices) | {"epoch": epochs}


@torch.no_grad()
def build_probe_evaluator(evaluator: Evaluator, model: nn.Module) -> Evaluator:
    """Build an evaluator for `build_classifier_heads(model)`. The images of `evaluator` are encoded once in eval mode,
    and each process encodes the images that it evaluates. `model` is the unwrapped classifier on the device."""
    was_training = model.training
    model.eval()
    probe_evaluator = copy.copy(evaluator)
    probe_evaluator.batches = copy.copy(evaluator.batches)
    probe_evaluator.batches.cache = [encode_batch(batch, model, evaluator.accelerator) for batch in evaluator.batches]
    model.train(was_training)
    return probe_evaluator


def encode_batch(batch: HeldOutBatch, model: Any, accelerator: Accelerator) -> HeldOutBatch:
    """Return a held-out batch with features [num_images, F] instead of pixel values."""
    num_images, pixel_values = 0, torch.zeros(1, model.config.num_channels, *model.config.image_height_width)
    if batch.pixel_values is not None:
        num_images, pixel_values = len(batch.pixel_values), batch.pixel_values
    with accelerator.autocast():
        features = compute_features(model, pixel_values.to(accelerator.device)).float()
    return HeldOutBatch(features[:num_images].cpu(), batch.labels, batch.indices, batch.error_messages)

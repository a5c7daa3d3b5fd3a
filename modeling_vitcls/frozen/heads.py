"""The classifiers on the features of a frozen encoder.

    features, labels -> LinearProbe of each task -> build_heads: FrozenHead of each task -> the weights of the model

The choice is made in frozen/linear_probe.py. Each of several tasks has a classifier of its own, of
the same features.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.labels import LabelSpace, PerTask
from ..data.splits import TrainingData
from ..inference.features import Features, Tokens
from ..model.field_checks_vitcls import Size
from .class_statistics import expand_rows
from .linear_probe import (
    MIN_DISTANCE_IMAGES,
    Candidate,
    LinearProbe,
    describe_candidate,
    stack_tokens,
)


def find_read(probes: Collection[LinearProbe]) -> Candidate:
    """Find what a model reads for the classifiers of all tasks."""
    candidates = [each.candidate_ for each in probes]
    if len(candidates) == 1:
        return candidates[0]
    layers = max((each.layers for each in candidates), key=len)
    reads_patches = any(each.pooling != "cls" for each in candidates)
    return Candidate(layers, "cls_mean" if reads_patches else "cls")


def build_heads(
    probes: Mapping[str, LinearProbe],
    label_space: LabelSpace,
    features: Features,
    held_out: Features,
    sample: Features | None,
    grid_size: Size,
) -> dict[str, "FrozenHead"]:
    """Join the classifier of each task with the features of its training and held-out images."""
    tokens = find_read(probes.values()).tokens
    held_out_parts = split_tasks(held_out, label_space)
    samples = {} if sample is None else split_tasks(sample, label_space)
    heads = {}
    for task, own in split_tasks(features, label_space).items():
        left_out = held_out_parts[task]
        heads[task] = FrozenHead(
            task=task,
            probe=probes[task],
            tokens=tokens,
            labels=label_space.tasks[task],
            features=own,
            held_out=left_out if len(left_out.labels) else None,
            sample=samples.get(task),
            grid_size=grid_size,
        )
    return heads


def build_record(heads: Mapping[str, "FrozenHead"]) -> dict[str, Any]:
    """Record what was chosen for results.json. The only task is the record itself."""
    records = {
        task: each.probe.build_record(len(each.features.labels)) for task, each in heads.items()
    }
    if "" in records:
        return records[""]
    read = find_read([each.probe for each in heads.values()])
    return {"layers": list(read.layers), "pooling": read.pooling, "tasks": records}


def split_tasks(features: Features, label_space: LabelSpace) -> dict[str, Features]:
    """Take, for each task, the features of the images that have its label."""
    if not isinstance(label_space, PerTask):
        return {"": features}
    return {
        task: replace(features, labels=labels).take(labels >= 0)
        for task, labels in zip(label_space.tasks, features.labels.T, strict=True)
    }


@dataclass(frozen=True)
class FrozenHead:
    """The classifier of a task on a frozen encoder, and the features that it was fitted to.

    Attributes:
        task: its name; "" if it is the only one.
        probe: the classifier.
        tokens: what the head of the model reads. With several tasks, the classifier reads a part of
            it, and the weights of the others are zero.
        labels: of the task.
        features: of the training images, the images of the choice first.
        held_out: of the held-out images, if there are any.
        sample: of some of the training images, with rings at the border, if a classifier may read
            patches.
        grid_size: rows and columns of the patches.
    """

    task: str
    probe: LinearProbe
    tokens: Tokens
    labels: LabelSpace
    features: Features
    held_out: Features | None
    sample: Features | None = None
    grid_size: Size = (0, 0)

    @property
    def num_folds(self) -> int:
        """The number of folds of the cross-validation; 0 for held-out images."""
        return self.probe.num_folds_ if self.held_out is None else 0

    def predict_out_of_fold(self) -> Features:
        """Predict the training images with classifiers that were not fitted to them: logits [N, L]."""
        probe = self.probe
        num_labels = len(self.labels.names)
        probabilities = expand_rows(probe.out_of_fold_.T, probe.classes_, num_labels).T  # [N, L]
        known = np.flatnonzero(np.isfinite(probabilities).all(axis=1))
        known = known[np.argsort(self.features.indices[known])]
        features = self.features.take(known)
        # Logarithms of the probabilities are logits: softmax gives the same probabilities back.
        return replace(
            features, logits=probe.target_.to_logits(probabilities[known]).astype(np.float32)
        )

    def predict_held_out(self) -> Features:
        """Predict the held-out images with the classifier that is fitted to all training images."""
        features = self.held_out
        assert features is not None, "there are held-out images"
        tokens = features.get_tokens()
        candidate = self.probe.candidate_
        logits = []
        for head, read in enumerate(candidate.heads):
            # In the precision of the layers of the model
            inputs, weight, bias = (
                torch.from_numpy(array).float()
                for array in (
                    stack_tokens(tokens, read),
                    *self.probe.build_linear(len(self.labels.names), head),
                )
            )
            logits.append(nn.functional.linear(inputs, weight, bias).numpy())
        return replace(features, logits=candidate.join(logits))

    def copy_to(self, model: Any) -> None:
        """Set the weights of the heads, and which of them the model returns."""
        layer = model.classifiers[f"task_{self.task}"] if self.task else model.classifier
        weight, bias = self.probe.build_linear(layer.out_features)
        first, *second = self.probe.candidate_.heads
        if first != self.tokens:
            blocks = dict(zip(first, np.split(weight, len(first), axis=1), strict=True))
            assert blocks.keys() <= set(self.tokens), "the head reads every token of the classifier"
            zeros = np.zeros_like(blocks[first[0]])
            weight = np.concatenate([blocks.get(token, zeros) for token in self.tokens], axis=1)
        set_weights(layer, weight, bias)
        if second:
            set_weights(
                model.distillation_classifier, *self.probe.build_linear(layer.out_features, head=1)
            )
            model.config.distillation_inference = self.probe.candidate_.inference


@torch.no_grad()
def set_weights(layer: nn.Linear, weight: np.ndarray, bias: np.ndarray) -> None:
    """Set the weight [L, F] and the bias [L] of a head."""
    layer.weight.copy_(torch.from_numpy(weight))
    layer.bias.copy_(torch.from_numpy(bias))


# Record -------------------------------------------------------------------------------------------


def describe_choice(record: dict[str, Any]) -> str:
    """Describe the choice, with the result of the simplest candidate for comparison."""
    chosen = describe_candidate(record)
    if not record["num_folds"]:
        return f"{chosen}, without cross-validation"
    default, *others = record["candidates"]
    folds = f"in {record['num_folds']}-fold cross-validation"
    text = f"{chosen}, log loss {record['loss']:.2f}"
    if not others:
        return f"{text} {folds}"
    return (
        f"{text}: the lowest of {1 + len(others)} candidates {folds} "
        f"({describe_candidate(default)}: {default['loss']:.2f})"
    )


def measure_threshold(_: TrainingData, head: FrozenHead) -> dict[str, Any] | None:
    """Record the distance of photos that show none of the classes, and what it was measured on.

    None for several labels per image: an image that shows none of them simply has none.
    """
    probe = head.probe
    if probe.lines_ is not None:
        return None
    return {
        "distance": probe.distance_threshold_,
        # An image that every fold needs has no distance out of fold
        "num_measured": int(np.isfinite(probe.losses_).sum()),
        "has_statistics": probe.statistics_ is not None,
    }


def describe_threshold(record: dict[str, Any]) -> str:
    """Say whether predictions mark images that show none of the classes, or what they lack."""
    requirement = "CLS or the mean of the patches as pooling"
    if record["num_measured"] < MIN_DISTANCE_IMAGES:
        requirement = f"{MIN_DISTANCE_IMAGES} training images, in classes of two or more"
    elif record["has_statistics"]:
        requirement = "a class of three photos, which tell how much photos of a class differ"
    return describe_unknown(record["distance"], requirement)


def describe_unknown(threshold: float | None, requirement: str) -> str:
    """Say which distance marks an image as showing none of the classes, or what this requires."""
    if threshold is None:
        return (
            f"photos that show none of the classes will not be marked: this requires {requirement}"
        )
    return f"photos farther than {threshold:.1f} from every class will be marked"

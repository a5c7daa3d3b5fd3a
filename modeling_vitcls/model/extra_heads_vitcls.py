# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""The configuration of extra heads: classifiers of further tasks, or of added classes.

heads_vitcls.py has the layers.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from .field_checks_vitcls import (
    MAX_LABELS,
    probability,
    raise_one_line_errors,
    shorten_errors,
)


# Names that an extra head cannot have, because exported graphs have outputs with these names.
RESERVED_OUTPUT_NAMES = (
    "logits",
    "cls_logits",
    "distillation_logits",
    "distance",
    "cls_attention",
)

ExtraPooling = Literal["cls", "mean", "cls_mean", "max"]


@shorten_errors
@strict
@dataclasses.dataclass
class ExtraHead:
    """An entry of `ViTCLSConfig.extra_heads`, with default values.

    Attributes:
        labels: label names, in the order of the logits.
        pooling: "cls", "mean", "cls_mean" or "max"; or a list with one of them for each of the
            layers.
        pooled_layers: layers whose tokens are pooled, as in `ViTCLSConfig`.
        problem_type: "single_label_classification" or "multi_label_classification".
        threshold: for several labels per image, the probability from which a label is predicted.
        adds_classes: whether the logits are appended to `logits`: the head then adds classes to the
            classifier, and its labels are the last ones of `id2label`.
    """

    labels: list[str]
    pooling: ExtraPooling | list[ExtraPooling] = "cls"
    pooled_layers: list[int] | None = None
    problem_type: Literal["single_label_classification", "multi_label_classification"] = (
        "single_label_classification"
    )
    threshold: float | int | None = probability(default=None)
    adds_classes: bool = False

    def validate_head(self) -> None:
        """Check that each layer has a pooling, and that added classes share a softmax."""
        if len(self.layer_poolings) != len(self.pooled_layers or [-1]):
            raise ValueError("`pooling` must be one, or one for each of `pooled_layers`")
        if self.adds_classes and self.problem_type == "multi_label_classification":
            raise ValueError("`adds_classes` requires the default `problem_type`")

    @property
    def layer_poolings(self) -> list[ExtraPooling]:
        """The pooling of each layer."""
        if isinstance(self.pooling, list):
            return self.pooling
        return [self.pooling] * len(self.pooled_layers or [-1])


class ExtraHeadsConfig:
    """The part of `ViTCLSConfig` that is about `extra_heads`."""

    def get_extra_heads(self: Any) -> dict[str, ExtraHead]:
        """Build an `ExtraHead` for each entry of `extra_heads`, sorted by name."""
        return {
            name: ExtraHead(**fields) for name, fields in sorted((self.extra_heads or {}).items())
        }

    def get_added_tasks(self) -> dict[str, ExtraHead]:
        """Select the extra heads that do not add classes, sorted by name."""
        return {
            name: head for name, head in self.get_extra_heads().items() if not head.adds_classes
        }

    def get_added_classes(self) -> dict[str, list[str]]:
        """Select the labels of the extra heads that add classes: head -> labels."""
        return {
            name: head.labels for name, head in self.get_extra_heads().items() if head.adds_classes
        }

    def build_task_config(self: Any, name: str) -> Any:
        """Build the configuration of a classifier for an added task alone.

        All of its classes are added ones.
        """
        tasks = self.get_added_tasks()
        if name not in tasks:
            choice = f"Choose from {', '.join(tasks)}" if tasks else "Add it with `vitcls add-task`"
            raise ValueError(
                f"task {name}: the model has no such added task. {choice}; its own tasks need no `task`"
            )
        head = tasks[name]

        changes = {
            "tasks": None,
            "architectures": None,
            "compute_all_tokens": self.compute_all_tokens or not self.num_labels,
            # An extra head on its own, without the other classifier, has the same bits
            "extra_heads": {
                name: {
                    "labels": head.labels,
                    "pooling": head.pooling,
                    "pooled_layers": head.pooled_layers,
                    "adds_classes": True,
                }
            },
            "id2label": dict(enumerate(head.labels)),
            "label2id": {label: index for index, label in enumerate(head.labels)},
            "problem_type": head.problem_type,
            "class_statistics": None,
            "distance_threshold": None,
        }
        config = copy.deepcopy(self)
        for field, value in changes.items():
            setattr(config, field, value)
        return config

    def validate_extra_heads(self: Any) -> None:
        """Check the names of the extra heads, and that the model has the tokens that they read."""
        for name, fields in (self.extra_heads or {}).items():
            owner = f"`extra_heads`: {name!r}"
            self._check_head_name(
                "extra_heads", name, (*RESERVED_OUTPUT_NAMES, *(self.tasks or ()))
            )
            with raise_one_line_errors(f"{owner}: "):
                head = ExtraHead(**fields)
            is_binary = head.problem_type == "multi_label_classification" or head.adds_classes
            self._check_label_names(owner, head.labels, min_labels=1 if is_binary else 2)
            self._check_layers(f"{owner}: `pooled_layers`", head.pooled_layers)
            reads_cls = any("cls" in pooling for pooling in head.layer_poolings)
            if reads_cls and not self.num_cls_tokens:
                raise ValueError(
                    f'{owner} requires a CLS token, but the model has none. Set `pooling="mean"`.'
                )

        added_labels = [label for labels in self.get_added_classes().values() for label in labels]
        labels = [label for _, label in sorted((self.id2label or {}).items())]
        last_labels = labels[-len(added_labels) :]
        if added_labels and (self.tasks or last_labels != added_labels):
            raise ValueError(
                "`extra_heads`: the labels of heads with `adds_classes` must be the last ones of "
                f"`id2label`, which are {last_labels[:3]}. Append them, or set `extra_heads={{}}`."
            )

    def _check_head_name(self, field: str, name: str, reserved: Sequence[str] = ()) -> None:
        """Check that the name of a head is free, and can be a part of the names of its weights."""
        if not name.isidentifier() or name in reserved:
            raise ValueError(
                f"`{field}`: {name!r} is not a free name. Use another one, of letters, digits and "
                "underscores."
            )

    def _check_label_names(self, owner: str, labels: Sequence[Any], min_labels: int = 1) -> None:
        """Check the number of label names, and that none repeats."""
        if not min_labels <= len(labels) <= MAX_LABELS or len(set(labels)) != len(labels):
            raise ValueError(f"{owner} requires {min_labels} to {MAX_LABELS:,} distinct labels.")

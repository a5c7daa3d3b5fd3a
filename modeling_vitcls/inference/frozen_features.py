"""One pass of images through a frozen encoder, whose features serve everything that follows.

    images -> encoder, once -> per layer: final norm, CLS and mean of the patches -> FrozenPass
                               FrozenPass.features             for fits, on every process
                               HeadEvaluator(pass, ...)(model) metrics of a classifier, without the encoder

The features of a layer are what a classifier with `config.pooled_layers` reads, so that a
regression on them is the model's classifier.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from ..model.configuration_vitcls import ViTCLSConfig
from ..model.heads_vitcls import TokenPooler, build_pooler
from .class_statistics import Token
from .evaluator import Evaluator, HeadOutput
from .image_pass import ImageBatch, ImageOutput, ImagePass, list_rows, stack_rows
from .linear_probe import Candidate


OWN_POOLING = "own"  # tokens of a candidate that reads the output of the model's pooler


@dataclass(frozen=True)
class FeatureLayout:
    """Where the features of each layer and kind of token are in a vector of features."""

    num_layers: int  # the last layers, the earliest first
    widths: dict[str, int]  # kind of token -> number of features; the same in each layer

    @classmethod
    def from_config(cls, config: ViTCLSConfig, num_layers: int | None = None) -> "FeatureLayout":
        """Return the layout for an encoder: all layers, or the last `num_layers`.

        A pooler with weights, and the maximum, read the last layer as a whole. They are the only
        kind of token then.
        """
        if not has_searchable_pooling(config):
            return cls(1, {OWN_POOLING: config.pooled_size})
        kinds = ("cls", "mean") if config.num_cls_tokens else ("mean",)
        widths = {kind: build_kind_config(config, kind).pooled_size for kind in kinds}
        return cls(min(num_layers or config.num_hidden_layers, config.num_hidden_layers), widths)

    @classmethod
    def for_extra_heads(cls, config: ViTCLSConfig, num_layers: int) -> "FeatureLayout":
        """Return the layout of the last `num_layers` for extra heads.

        They do not use the model's pooler.
        """
        pooling = "cls" if config.num_cls_tokens else "mean"
        plain_config = build_kind_config(config, pooling)
        plain_config.pooled_norm = False
        plain_config.pooled_activation = None
        return cls.from_config(plain_config, num_layers)

    @property
    def token_choices(self) -> tuple[str, ...]:
        """Return the values of `pooling` that a classifier can have, the simplest first."""
        if OWN_POOLING in self.widths:
            return (OWN_POOLING,)
        return ("cls", "cls_mean") if "cls" in self.widths else ("mean",)

    def get_columns(self, layers: Sequence[int], tokens: str) -> np.ndarray:
        """Return the columns of what a classifier reads, in the order of its input.

        The order is layer after layer, each with CLS before the mean of the patches. `tokens` is
        the pooling of a `Candidate`.
        """
        layer_width = sum(self.widths.values())
        columns = []
        for layer in layers:
            start = (self.num_layers + layer) * layer_width
            for kind, width in self.widths.items():
                if kind == tokens or tokens == "cls_mean":
                    columns.append(np.arange(start, start + width))
                start += width
        return np.concatenate(columns)

    def split(self, values: np.ndarray) -> dict[Token, np.ndarray]:
        """Return the features [N, D] of each token, of features [N, all]."""
        return {
            (layer, kind): values[:, self.get_columns([layer], kind)]
            for layer in range(-self.num_layers, 0)
            for kind in self.widths
        }


def has_searchable_pooling(config: ViTCLSConfig) -> bool:
    """Return whether the pooler has no weights, and reads CLS or the mean of the patches."""
    is_plain = config.pooled_activation is None and not config.pooled_norm
    return is_plain and config.pooling in ("cls", "mean", "cls_mean")


def build_kind_config(config: ViTCLSConfig, kind: str) -> ViTCLSConfig:
    """Return the configuration of a model that pools one kind of token of the last layer."""
    kind_config = copy.deepcopy(config)
    kind_config.pooling = kind  # type: ignore[assignment]
    kind_config.pooled_layers = None
    return kind_config


def pool_layers(encoder: Any, outputs: Any, layout: FeatureLayout) -> torch.Tensor:
    """Return the features [B, all] of an encoder's outputs.

    The outputs contain the hidden states unless the layout is that of the encoder's own pooling.
    """
    if OWN_POOLING in layout.widths:
        if encoder.pooler is None:
            return build_pooler(encoder.config)(outputs.last_hidden_state).float()
        return outputs.pooler_output.float()

    poolers = [TokenPooler(build_kind_config(encoder.config, kind)) for kind in layout.widths]
    parts = []
    for states in outputs.hidden_states[-layout.num_layers :]:
        normalized = encoder.normalize(states)  # [B, N, D]
        parts += [pooler(normalized).float() for pooler in poolers]
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Features:
    """Features and labels of the readable images of a pass."""

    layout: FeatureLayout
    values: np.ndarray  # [N, all] float32
    labels: np.ndarray  # [N] class indices, or [N, L] with several labels per image
    indices: np.ndarray  # [N] indices of the images among those of the pass

    def get_tokens(self) -> dict[Token, np.ndarray]:
        """Return the features [N, D] of each token, in the order in which classifiers read them."""
        return self.layout.split(self.values)

    def take(self, is_taken: np.ndarray) -> "Features":
        """Return the features of some images."""
        return replace(
            self,
            values=self.values[is_taken],
            labels=self.labels[is_taken],
            indices=self.indices[is_taken],
        )


def concatenate_features(first: Features, second: Features) -> Features:
    """Return the features of two parts of the same images."""
    return Features(
        first.layout,
        values=np.concatenate([first.values, second.values]),
        labels=np.concatenate([first.labels, second.labels]),
        indices=np.concatenate([first.indices, second.indices]),
    )


class FrozenPass(ImagePass):
    """One pass of images through an encoder. Calling it with a model computes the features, once.

    With `has_logits`, the last columns of the features are the logits of the classifier.

    Attributes:
        features: of the readable images, in their order, the same on every process.
        batches: batches of this process, with features in place of pixels.
    """

    is_repeated = False

    def __init__(
        self, images: Any, layout: FeatureLayout, has_logits: bool = False, **arguments: Any
    ) -> None:
        super().__init__(images, **arguments)
        self.arguments = arguments
        self.layout = layout
        self.has_logits = has_logits
        self.batches: list[ImageBatch] = []

    def __call__(self, model: nn.Module, console: Console | None = None) -> Features:
        """Compute and return the features, with a classifier or an encoder."""
        encoder = getattr(model, "vitcls", model)
        rows: list[ImageOutput] = []
        for batch, features in self.iterate(encoder, partial(self.compute, model), console):
            rows += list_rows(batch, features)
            self.batches.append(replace(batch, pixel_values=features[: len(batch.indices)].cpu()))

        rows = self.gather_rows(rows)
        values, labels = stack_rows(rows)
        self.features = Features(
            self.layout, values, labels, indices=np.array([row.index for row in rows])
        )
        return self.features

    def compute(self, model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the features [B, all], or [B, all + L] with logits, of images [B, C, H, W]."""
        encoder = getattr(model, "vitcls", model)
        program = model if self.has_logits else encoder
        outputs = program(pixel_values, output_hidden_states=OWN_POOLING not in self.layout.widths)
        features = pool_layers(encoder, outputs, self.layout)
        return torch.cat([features, outputs.logits.float()], dim=1) if self.has_logits else features


class HeadEvaluator(Evaluator):
    """Evaluates the classifier of a model on the features of a `FrozenPass`."""

    def __init__(self, frozen_pass: FrozenPass, candidate: Candidate) -> None:
        super().__init__(frozen_pass.images, **frozen_pass.arguments | {"warn": ignore_message})
        columns = frozen_pass.layout.get_columns(candidate.layers, candidate.pooling)
        self.cache = []
        for batch in frozen_pass.batches:
            assert batch.pixel_values is not None
            # the "pixels" are the features [G, F] that the classifier reads
            self.cache.append(replace(batch, pixel_values=batch.pixel_values[:, columns]))

    def pad_batch(self, model: nn.Module, batch: ImageBatch) -> ImageBatch:
        """Return the batch itself: the classifier needs no padding."""
        if batch.pixel_values is not None:
            return batch
        width = self.accelerator.unwrap_model(model).config.pooled_size
        return replace(batch, pixel_values=torch.zeros(0, width))

    def compute_outputs(self, model: nn.Module, pixel_values: torch.Tensor) -> HeadOutput:
        """Return the logits [B, L], in single precision."""
        classifier = self.accelerator.unwrap_model(model)
        with torch.autocast(pixel_values.device.type, enabled=False):
            logits = classifier.classifier(pixel_values) / classifier.config.temperature
        return HeadOutput(logits)


def ignore_message(message: str) -> None:
    """Ignore a warning that the pass over the images has printed."""

"""One pass of images through a frozen encoder, whose features serve everything that follows.

    images -> encode: special tokens and mean of the patches of the last layers, after the final norm
           -> pool          vectors that classifiers, class statistics and scenes read -> Features
           -> apply_heads   what the model returns: logits and distance
           -> FeatureStore  keeps it: a photo passes an encoder once (feature_store.py)

The features of a layer are what a classifier with `config.pooled_layers` reads, so a linear
classifier of them is the model's classifier.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ..data.images import LabeledImages
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.field_checks_vitcls import Size
from ..model.heads_vitcls import ALL_TOKENS, TokenPooler, hash_weights, select_weights
from ..speed.cpu_kernels import can_use_cpu_kernels, has_own_hooks
from ..speed.packed import pack
from .feature_store import FeatureStore, find_store_file
from .image_pass import ImageOutputs, ImagePass


Token = tuple[int, str]  # Negative index of a layer, and "cls" or "mean" (of the patches)
Tokens = tuple[Token, ...]  # In the order in which a classifier reads them
# What images leave in a pass, [B, F]: for each layer the tokens that are read (CLS, the mean of the
# distillation tokens, the mean of the patches) and the parts of the latter mean at the border (rings), then
# the output of a pooler that reads other tokens
States = Tensor

PASS_VERSION = 1  # Increased when `encode` computes something else for the same weights and pixels
NUM_LAST_LAYERS = 4  # Classifiers and class statistics read as many
OWN_POOLING = "own"  # Tokens of a candidate that reads the output of the model's pooler
# Widths of the rings at the border of an image, as fractions of its sides; at least one patch
RING_WIDTHS = (0, 1 / 8)

# Fields of a configuration on which the tokens of the encoder do not depend
HEAD_FIELDS = {
    *("architectures", "auto_map", "transformers_version", "_name_or_path", "dtype"),
    *("id2label", "label2id", "problem_type", "tasks", "head_type", "distillation_inference"),
    *("extra_heads", "class_statistics", "distance_threshold", "compute_all_tokens"),
    *("pooling", "pooled_layers"),
}


@dataclass(frozen=True)
class FeatureLayout:
    """Where the features of each layer and kind of token are in a vector of features."""

    num_layers: int  # The last layers, the earliest first
    widths: dict[str, int]  # Kind of token -> number of features; the same in each layer

    @classmethod
    def for_extra_heads(cls, config: ViTCLSConfig, num_layers: int) -> "FeatureLayout":
        """Build the layout of the last `num_layers` for heads that do not use the model's pooler."""
        kinds = ("cls", "mean") if config.num_cls_tokens else ("mean",)
        widths = {kind: config.compute_pooled_size(kind, 1) for kind in kinds}
        return cls(min(num_layers, config.num_hidden_layers), widths)


def has_searchable_pooling(config: ViTCLSConfig) -> bool:
    """Return whether the pooler has no weights, and reads CLS or the mean of the patches."""
    is_plain = config.pooled_activation is None and not config.pooled_norm
    return is_plain and config.pooling in ("cls", "mean", "cls_mean")


def mark_rings(grid_size: Size) -> list[np.ndarray]:
    """Mark the patches [rows * columns] of each ring at the border."""
    rings = []
    for width in RING_WIDTHS:
        is_border = np.ones(grid_size, dtype=bool)
        rows, columns = (max(1, round(side * width)) for side in grid_size)
        is_border[rows:-rows, columns:-columns] = False
        rings.append(is_border.ravel())
    return rings


@dataclass(frozen=True, kw_only=True)
class Features(ImageOutputs):
    """Features of the readable images of a pass."""

    layout: FeatureLayout

    def get_tokens(self) -> dict[Token, np.ndarray]:
        """Divide the features into those [N, D] of each token, in the order of a classifier's weights.

        The order is layer after layer; in each, the order of `widths`.
        """
        widths = self.layout.widths
        tokens = [(layer, kind) for layer in range(-self.layout.num_layers, 0) for kind in widths]
        ends = np.cumsum([widths[kind] for _, kind in tokens])
        return dict(zip(tokens, np.split(self.features, ends[:-1], axis=1), strict=True))


class FrozenEncoder:
    """A model whose weights stay, and its pass over images: weights are hashed once.

    Args:
        model: a classifier or an encoder, on its device and in evaluation mode.
        num_layers: number of the last layers that features are of, at least; the heads may read more.
        arguments: of each `ImagePass`, without the images.
    """

    def __init__(self, model: Any, num_layers: int = NUM_LAST_LAYERS, **arguments: Any) -> None:
        self.model = model
        self.encoder = model.base_model
        self.reader = self.encoder  # What computes a pass
        self.arguments = arguments
        self.rings: dict[Size, Tensor] = {}  # Size of the grid -> [rings, patches], parts of a mean
        last = len(self.encoder.layers)
        read = {max(1, last - num_layers + 1), *self.encoder.pooled_layer_indices}
        if model is not self.encoder:
            read |= {*model.extra_heads.layers, *getattr(model, "distance_layers", ())}
        self.layers = list(range(min(read - {ALL_TOKENS}), last + 1))

    def encode(self, values: Tensor) -> States:
        """Compute what heads, class statistics and scenes read of images [B, C, H, W].

        What is kept of earlier images, [B, F], is returned as it is.
        """
        if values.ndim == 2:
            return values
        config = self.encoder.config
        layout = config.token_layout
        outputs = self.reader(values, output_layers=self.layers)
        masks = self.get_rings(self.encoder.embeddings.patch_embeddings.get_grid_size(values))
        states = []
        for layer in self.layers:
            tokens = outputs.layer_tokens[layer]
            patches = tokens[:, layout.patches]
            parts = [tokens[:, layout.cls], patches.mean(dim=1, keepdim=True)]
            if config.num_distillation_tokens:
                parts.insert(1, tokens[:, layout.distillation].mean(dim=1, keepdim=True))
            with torch.autocast(patches.device.type, enabled=False):
                parts.append(masks @ patches.float())
            states += [part.float().flatten(1) for part in parts]
        if self.has_own_pooling:
            states.append(outputs.pooler_output.float())
        return torch.cat(states, dim=1)

    @property
    def has_own_pooling(self) -> bool:
        """Whether the pooler reads other tokens than those of `States`."""
        return self.encoder.pooler is not None and not has_searchable_pooling(self.encoder.config)

    def get_rings(self, grid_size: Size) -> Tensor:
        """Get the weights [rings, patches] of the patches of each ring at the border."""
        if grid_size not in self.rings:
            marks = torch.tensor(np.stack(mark_rings(grid_size)), dtype=torch.float32)
            self.rings[grid_size] = (marks / marks.shape[1]).to(self.encoder.device)
        return self.rings[grid_size]

    def divide(self, states: States) -> tuple[Tensor, Tensor]:
        """Divide states into the tokens and the rings of each layer, [B, layers, tokens or rings, D]."""
        config = self.encoder.config
        if self.has_own_pooling:
            states = states[:, : -config.pooled_size]
        tokens = states.unflatten(1, (len(self.layers), -1, config.hidden_size))
        return tokens.tensor_split([-len(RING_WIDTHS)], dim=2)

    def get_layer_tokens(self, states: States) -> dict[int, Tensor]:
        """Put the tokens of layers in their places; others are 0, and the mean of the patches is the only patch."""
        config = self.encoder.config
        tokens = self.divide(states)[0].to(self.encoder.dtype)
        cls, means = tokens.tensor_split([config.num_cls_tokens], dim=2)
        layout = config.token_layout
        placed = tokens.new_zeros(*tokens.shape[:2], layout.get_num_tokens(1, 1), tokens.shape[3])
        placed[:, :, layout.cls] = cls
        placed[:, :, layout.distillation] = means[:, :, :1]  # No place if there are none
        placed[:, :, layout.patches] = means[:, :, -1:]
        layers = [*self.layers, ALL_TOKENS]
        return dict(zip(layers, [*placed.unbind(dim=1), placed[:, -1]], strict=True))

    def pool(self, states: States, layout: FeatureLayout) -> Tensor:
        """Pool each layer that a classifier may read, side by side: [B, all]."""
        if OWN_POOLING in layout.widths:
            return states[:, -self.encoder.config.pooled_size :]
        tokens = self.get_layer_tokens(states)
        poolers = [TokenPooler(self.encoder.config, kind) for kind in layout.widths]
        layers = self.layers[-layout.num_layers :]
        return torch.cat(
            [pooler(tokens[layer]) for layer in layers for pooler in poolers], dim=1
        ).float()

    def apply_heads(self, states: States) -> Any:
        """Compute what the model returns for images that have passed its encoder: logits, distance."""
        tokens = self.get_layer_tokens(states)
        pooled = (
            states[:, -self.encoder.config.pooled_size :]
            if self.has_own_pooling
            else self.encoder.pool(tokens)
        )
        has_distance = bool(getattr(self.model, "distance_layers", ()))
        return SimpleNamespace(**self.model.apply_heads(tokens, pooled, has_distance))

    def open_store(self, processor: Any, precision: str) -> FeatureStore | None:
        """Open what photos have left in earlier passes; None if nothing is kept.

        Nothing is for sharded or quantized weights, adapters and hooks. The states of a photo depend on
        its content and on the key of the pass, of which these are the parts:

            version      of `encode`, `PASS_VERSION`
            weights      SHA-256 of the encoder in memory, without heads: models that were trained on a
                         frozen encoder share what is kept
            config       settings of the encoder, without `HEAD_FIELDS`; of its own pooling, those too
            processor    class and settings of the image processor. There is one decoder
            layers       whose tokens are kept
            precision    of `torch.autocast` in the pass, and the type of the weights
            kernels      the type of the device, the attention function and whether CPU kernels are on

        Args:
            processor: image processor of the pass.
            precision: of `torch.autocast` in the pass.
        """
        encoder, config = self.encoder, self.encoder.config
        file = find_store_file()
        if file is None or self.weights_hash is None:
            return None
        parts = [
            PASS_VERSION,
            self.weights_hash,
            {name: value for name, value in config.to_dict().items() if name not in HEAD_FIELDS},
            [config.pooling, config.pooled_layers] if self.has_own_pooling else None,
            processor.to_dict(),
            self.layers,
            [precision, encoder.dtype],
            [encoder.device.type, config._attn_implementation, can_use_cpu_kernels()],
        ]
        text = json.dumps(parts, sort_keys=True, default=str)
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        return FeatureStore(file, key, self.num_values)

    @cached_property
    def weights_hash(self) -> str | None:
        """Hash what the states depend on; None if it is not plain numbers in plain modules."""
        encoder = self.encoder
        # What is kept outlives the process, in which a hook may change what these weights compute
        if has_own_hooks(encoder.modules()):
            return None
        if any(type(module).__module__.startswith("peft.") for module in encoder.modules()):
            return None
        weights = {**encoder.state_dict(keep_vars=True), **dict(encoder.named_buffers())}
        digest = hash_weights(weights if self.has_own_pooling else select_weights(weights))
        return None if digest is None else digest.hex()

    @property
    def num_values(self) -> int:
        """Number of values of the states of an image."""
        config = self.encoder.config
        num_tokens = config.num_cls_tokens + bool(config.num_distillation_tokens) + 1
        size = len(self.layers) * (num_tokens + len(RING_WIDTHS)) * config.hidden_size
        return size + config.pooled_size * self.has_own_pooling

    def compute_features(
        self,
        images: LabeledImages,
        layout: FeatureLayout,
        select_logits: Callable[[Any], Tensor] | None = None,
        has_rings: bool = False,
        console: Console | None = None,
        **arguments: Any,
    ) -> "Features":
        """Compute the features of images in one pass; they are the same on every process.

        Args:
            images: what passes the encoder.
            layout: of the features.
            select_logits: selects the logits [B, L] among what `apply_heads` returns; None for none.
            has_rings: whether the parts of the mean of the patches at the border are returned, too.
            console: shows the progress.
            arguments: of this `ImagePass`.
        """

        def read(states: States) -> dict[str, Tensor]:
            computed = {}
            if layout.widths:
                computed["features"] = self.pool(states, layout)
            if select_logits is not None:
                computed["logits"] = select_logits(self.apply_heads(states))
            if has_rings:
                computed["rings"] = self.divide(states)[1].transpose(1, 2)
            if image_pass.store is not None:
                computed["row"] = states
            return computed

        self.reader = pack(self.encoder)  # Each time: training in between changes the weights
        arguments = self.arguments | arguments
        precision = arguments["accelerator"].mixed_precision
        image_pass = ImagePass(
            images, **arguments, store=self.open_store(arguments["processor"], precision)
        )
        outputs = image_pass.collect(self.reader, self.encode, console, read)
        self.reader = self.encoder
        return Features(layout=layout, **vars(outputs))

    def compute_labeled_features(self, images: LabeledImages, **arguments: Any) -> "Features":
        """Compute the features of the images that have a label: others (-100) belong to no mean."""
        features = self.compute_features(images, **arguments)
        return features.take(features.labels >= 0)

"""One pass of images through a frozen encoder, whose features serve everything that follows.

    images -> encode: special tokens and mean of the patches of the last layers, after the final norm
           -> pool          vectors that classifiers, class statistics and scenes read -> Features
           -> apply_heads   what the model returns: logits and distance

The features of a layer are what a classifier with `config.pooled_layers` reads, so a linear
classifier of them is the model's classifier.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
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
from ..model.heads_vitcls import ALL_TOKENS, TokenPooler
from ..speed.cpu_kernels import can_use_cpu_kernels
from ..speed.lean_layers import use_fast_modules
from .feature_store import (
    LABEL_FIELDS,
    POOLER_FIELDS,
    FeatureStore,
    find_store_file,
)
from .image_pass import ImageOutputs, ImagePass


Token = tuple[int, str]  # Negative index of a layer, and "cls" or "mean" (of the patches)
Tokens = tuple[Token, ...]  # In the order in which a classifier reads them
# What a pass says about images [B]: "tokens" [B, layers, CLS + distillation + mean, D], the parts of the
# mean at the border, "rings" [B, rings, layers, D], and "own" [B, P] of a pooler that reads more than those
States = Mapping[str, Tensor]

PASS_VERSION = 1  # Increased when `encode` computes something else for the same weights and pixels
NUM_LAST_LAYERS = 4  # Classifiers and class statistics read as many
OWN_POOLING = "own"  # Tokens of a candidate that reads the output of the model's pooler
# Widths of the rings at the border of an image, as fractions of its sides; at least one patch
RING_WIDTHS = (0, 1 / 8)


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
    """A model whose weights stay, and its pass over images.

    Args:
        model: a classifier or an encoder, on its device and in evaluation mode.
        num_layers: number of the last layers that features are of, at least; the heads may read more.
        arguments: of each `ImagePass`, without the images.
    """

    def __init__(self, model: Any, num_layers: int = NUM_LAST_LAYERS, **arguments: Any) -> None:
        self.model = model
        self.encoder = model.base_model
        self.arguments = arguments
        self.rings: dict[Size, Tensor] = {}  # Size of the grid -> [rings, patches], parts of a mean
        last = len(self.encoder.layers)
        read = {max(1, last - num_layers + 1), *self.encoder.pooled_layer_indices}
        if model is not self.encoder:
            read |= {*model.extra_heads.layers, *getattr(model, "distance_layers", ())}
        self.layers = list(range(min(read - {ALL_TOKENS}), last + 1))

    def encode(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Compute what heads, class statistics and scenes read of images [B, C, H, W]."""
        config = self.encoder.config
        layout = config.token_layout
        outputs = self.encoder(pixel_values, output_layers=self.layers)
        masks = self.get_rings(outputs.grid_size)
        tokens = []
        rings = []
        for layer in self.layers:
            states = outputs.layer_tokens[layer]
            patches = states[:, layout.patches]
            parts = [states[:, layout.cls], patches.mean(dim=1, keepdim=True)]
            if config.num_distillation_tokens:
                parts.insert(1, states[:, layout.distillation].mean(dim=1, keepdim=True))
            tokens.append(torch.cat(parts, dim=1).float())
            with torch.autocast(patches.device.type, enabled=False):
                rings.append(masks @ patches.float())
        computed = {"tokens": torch.stack(tokens, dim=1), "rings": torch.stack(rings, dim=2).half()}
        if self.has_own_pooling:
            computed["own"] = outputs.pooler_output.float()
        return computed

    @property
    def has_own_pooling(self) -> bool:
        """Whether the pooler reads more than the tokens that are kept."""
        return self.encoder.pooler is not None and not has_searchable_pooling(self.encoder.config)

    def open_kept(self, processor: Any, precision: str) -> FeatureStore | None:
        """Open what photos have left in earlier passes; None for a function instead of an image processor.

        Args:
            processor: image processor of the pass.
            precision: of `torch.autocast` in the pass.
        """
        file = find_store_file()
        if file is None or not hasattr(processor, "to_dict"):
            return None
        config = self.encoder.config
        width, num_layers = config.hidden_size, len(self.layers)
        num_tokens = config.num_cls_tokens + bool(config.num_distillation_tokens) + 1
        fields: list[Any] = [
            ("tokens", np.float32, (num_layers, num_tokens, width)),
            ("rings", np.float16, (len(RING_WIDTHS), num_layers, width)),
        ]
        if self.has_own_pooling:
            fields.append(("own", np.float32, config.pooled_size))
        return FeatureStore(file, self.compute_pass_key(processor, precision), np.dtype(fields))

    def compute_pass_key(self, processor: Any, precision: str) -> bytes:
        """Compute the key of all that the features of a photo depend on, besides its content.

        Nothing else is in the key:

            version      of what is computed and kept, `PASS_VERSION`
            weights      SHA-256 of the tensors of the encoder, without heads and, unless its output is
                         kept, pooler: a model that was trained again on a frozen encoder shares what
                         is kept
            config       settings of the encoder, without the fields in feature_store.py
            processor    class and settings of the image processor. There is one decoder
            layers       whose tokens are kept
            precision    of the pass, and the type of the weights
            kernels      the type of the device, the attention function and whether CPU kernels are on
        """
        encoder, config = self.encoder, self.encoder.config
        unread = LABEL_FIELDS if self.has_own_pooling else LABEL_FIELDS | POOLER_FIELDS
        parts = [
            PASS_VERSION,
            self.weights_hash,
            {name: value for name, value in config.to_dict().items() if name not in unread},
            processor.to_dict(),
            self.layers,
            [precision, encoder.dtype],
            [encoder.device.type, config._attn_implementation, can_use_cpu_kernels()],
        ]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    @cached_property
    def weights_hash(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.encoder.state_dict().items()):
            if self.has_own_pooling or not name.startswith("pooler."):
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                values = tensor.detach().cpu().contiguous().flatten()
                digest.update(values.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def get_rings(self, grid_size: Size) -> Tensor:
        """Get the weights [rings, patches] of the patches of each ring at the border."""
        if grid_size not in self.rings:
            marks = torch.tensor(np.stack(mark_rings(grid_size)), dtype=torch.float32)
            self.rings[grid_size] = (marks / marks.shape[1]).to(self.encoder.device)
        return self.rings[grid_size]

    def get_layer_tokens(self, states: States) -> dict[int, Tensor]:
        """Put the tokens of layers in their places: registers are 0, and their mean is the only patch."""
        config = self.encoder.config
        tokens = states["tokens"].to(self.encoder.dtype)
        cls, others = tokens.tensor_split([config.num_cls_tokens], dim=2)
        registers = torch.zeros_like(tokens[:, :, :1]).expand(
            -1, -1, config.num_register_tokens, -1
        )
        distillation = others[:, :, :1].expand(-1, -1, config.num_distillation_tokens, -1)
        placed = torch.cat([cls, distillation, registers, others[:, :, -1:]], dim=2)
        layers = [*self.layers, ALL_TOKENS]
        return dict(zip(layers, [*placed.unbind(dim=1), placed[:, -1]], strict=True))

    def pool(self, states: States, layout: FeatureLayout) -> Tensor:
        """Pool each layer that a classifier may read, side by side: [B, all]."""
        if OWN_POOLING in layout.widths:
            return states["own"]
        tokens = self.get_layer_tokens(states)
        poolers = [TokenPooler(self.encoder.config, kind) for kind in layout.widths]
        layers = self.layers[-layout.num_layers :]
        return torch.cat(
            [pooler(tokens[layer]) for layer in layers for pooler in poolers], dim=1
        ).float()

    def apply_heads(self, states: States) -> Any:
        """Compute what the model returns for images that have passed its encoder: logits, distance."""
        tokens = self.get_layer_tokens(states)
        pooled = states.get("own")
        if pooled is None:
            pooled = self.encoder.pool(tokens)
        has_distance = bool(getattr(self.model, "distance_layers", ()))
        return SimpleNamespace(**self.model.apply_heads(tokens, pooled, has_distance))

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
                computed["rings"] = states["rings"]
            return computed

        use_fast_modules(self.encoder, packed=True)  # Each time: training in between ends it
        image_pass = ImagePass(images, **self.arguments | arguments)
        accelerator = image_pass.accelerator
        kept = self.open_kept(image_pass.processor, accelerator.mixed_precision)
        outputs = image_pass.collect(self.encoder, self.encode, console, read, kept)
        return Features(layout=layout, **vars(outputs))

    def compute_labeled_features(self, images: LabeledImages, **arguments: Any) -> "Features":
        """Compute the features of the images that have a label: others (-100) belong to no mean."""
        features = self.compute_features(images, **arguments)
        return features.take(features.labels >= 0)

# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""Poolers, classifiers, the pixel decoder for masked image modeling, losses, and class statistics.

    tokens [B, N, D] -> pooler -> [B, P] -> classifier -> logits [B, labels] -> loss

The losses support `num_items_in_batch`, which Trainer passes during gradient accumulation if labels
can be counted. Unlike the losses of transformers, they do not set `config.problem_type`.

    ClassDistance.forward    tokens -> distance [B] to the nearest class
    ClassDistance.check      weights -> whether the statistics belong to them
    ClassDistance.renew      weights to save -> what the file says about them

The package fits class statistics (frozen/class_statistics.py). They belong to one encoder: after any
change of its weights, distances mean nothing. SHA-256 digests of these weights are therefore stored
beside them, compared when a folder is loaded and when one is saved.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.utils import logging

from .attention_masks_vitcls import TokenFadeIn
from .blocks_vitcls import build_norm
from .configuration_vitcls import ViTCLSConfig
from .field_checks_vitcls import Size


logger = logging.get_logger(__name__)

IGNORED_LABEL = -100
TAU = 3.0  # Temperature of soft distillation, as in DeiT
LOSSES = {
    "regression": nn.functional.mse_loss,
    "multi_label_classification": nn.functional.binary_cross_entropy_with_logits,
    "single_label_classification": nn.functional.cross_entropy,
}
# Index of the last layer for readers of its patches: other classifiers need only its special tokens
ALL_TOKENS = -1


# Poolers ------------------------------------------------------------------------------------------
class TokenPooler(nn.Module):
    """Pooling without parameters, [B, N, D] -> [B, P].

    `pooling` (default: `config.pooling`) is "cls": the CLS token, or several CLS tokens combined as
    `config.cls_pooling` specifies; "mean" or "max": the mean or maximum over the patches; or
    "cls_mean": the CLS token and the mean of the patches, concatenated. "distillation" is the mean
    of the distillation tokens.
    """

    def __init__(self, config: ViTCLSConfig, pooling: str | None = None) -> None:
        super().__init__()
        self.pooling = config.pooling if pooling is None else pooling
        self.cls_pooling = config.cls_pooling
        self.layout = config.token_layout
        self.cls_tokens = config.pooled_cls_tokens or self.layout.cls

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.pooling == "cls":
            return self.pool_cls(hidden_states)
        if self.pooling == "distillation":
            return hidden_states[:, self.layout.distillation].mean(dim=1)
        patches = hidden_states[:, self.layout.patches]  # [B, rows * columns, D]
        if self.pooling == "max":
            return patches.amax(dim=1)
        mean = patches.mean(dim=1)  # [B, D]
        if self.pooling == "mean":
            return mean
        return torch.cat([self.pool_cls(hidden_states), mean], dim=-1)

    def pool_cls(self, hidden_states: Tensor) -> Tensor:
        """Combine the pooled CLS tokens: the first, their mean or their concatenation."""
        tokens = hidden_states[:, self.cls_tokens]  # [B, k, D]
        if self.cls_pooling == "first":
            return tokens[:, 0]
        return tokens.mean(dim=1) if self.cls_pooling == "mean" else tokens.flatten(1)


class MultiLayerPooler(nn.Module):
    """Pooling of several layers (`config.pooled_layers`), list of [B, N, D] -> [B, layers * P].

    The vectors are concatenated, as for DINOv2's linear evaluation (arXiv 2304.07193).
    """

    def __init__(self, pooler: nn.Module) -> None:
        super().__init__()
        self.pooler = pooler

    def forward(self, layer_tokens: Sequence[Tensor]) -> Tensor:
        return torch.cat([self.pooler(tokens) for tokens in layer_tokens], dim=-1)


class AttentionPooler(nn.Module):
    """Attention pooling with a learned query, [B, N, D] -> [B, D] (MAP, arXiv 2106.04560).

    `PooledMLP` can follow.
    """

    pooling = "attention"

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.token_slice = (
            slice(None) if config.attention_pool_tokens == "all" else config.token_layout.patches
        )
        self.head_dim = width // (config.attention_pool_heads or config.num_attention_heads)
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.transform = PooledMLP(config) if config.attention_pool_mlp else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens = hidden_states[:, self.token_slice]  # [B, N', D]: patches, or all tokens
        query = self.q_proj(self.probe)
        key = self.k_proj(tokens)
        value = self.v_proj(tokens)
        # Query [1, heads, 1, head_dim], key and value [B, heads, N', head_dim]
        query, key, value = (
            states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for states in (query, key, value)
        )
        # The probe is the same for all images, so it was projected once.
        query = query.expand(hidden_states.shape[0], -1, -1, -1)

        # [B, heads, 1, head_dim]
        attn_output = nn.functional.scaled_dot_product_attention(query, key, value)
        pooled_output: Tensor = self.o_proj(attn_output.transpose(1, 2).flatten(1))  # [B, D]
        return pooled_output if self.transform is None else self.transform(pooled_output)


class PooledMLP(nn.Module):
    """Norm and MLP with a residual connection, applied to the pooled vector. [B, D] -> [B, D]."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        hidden_size = config.attention_pool_intermediate_size or config.intermediate_size
        self.layernorm = build_norm(config)
        self.fc1 = nn.Linear(config.hidden_size, hidden_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(hidden_size, config.hidden_size)

    def forward(self, pooled_output: Tensor) -> Tensor:
        return pooled_output + self.fc2(self.activation_fn(self.fc1(self.layernorm(pooled_output))))


def build_pooler(config: ViTCLSConfig) -> nn.Module:
    """Build the pooler for `config.pooling`, followed by an optional norm and dense layer.

    The pooler maps tokens [B, N, D] to [B, P]; with several `pooled_layers`, it maps a list of
    tokens, one per layer.
    """
    pooler: nn.Module = (
        AttentionPooler(config) if config.pooling == "attention" else TokenPooler(config)
    )

    if len(config.pooled_layer_indices) > 1:
        pooler = MultiLayerPooler(pooler)

    layers: dict[str, nn.Module] = {}
    if config.pooled_norm:
        layers["layernorm"] = build_norm(config, config.pooled_size)
    if config.pooled_activation is not None:
        layers["dense"] = nn.Linear(config.pooled_size, config.pooled_size)
        layers["activation"] = ACT2FN[config.pooled_activation]
    return nn.Sequential(OrderedDict(pooler=pooler, **layers)) if layers else pooler


# Classifiers --------------------------------------------------------------------------------------
def build_classifier(config: ViTCLSConfig, in_features: int, num_labels: int | None) -> nn.Module:
    """Build a classifier, [B, in_features] -> [B, num_labels]; the identity for 0 labels."""
    if not num_labels:
        return nn.Identity()
    if config.head_type == "linear":
        return nn.Linear(in_features, num_labels)
    hidden_size = config.head_hidden_size or config.hidden_size
    return nn.Sequential(
        nn.Linear(in_features, hidden_size), nn.GELU(), nn.Linear(hidden_size, num_labels)
    )


class ExtraHeads(nn.ModuleDict):
    """Linear classifiers that read the tokens of a finished forward pass (`config.extra_heads`).

    The state dict has the names `task_NAME.weight` and `task_NAME.bias`. The weights are frozen:
    they are fitted to the features of the model, and the loss of the model does not contain the
    extra heads.

    Attributes:
        layers: indices, from 1, of the layers that the heads read, and perhaps `ALL_TOKENS`.
        poolers: the layer and the pooling of each part of what a head reads.
        added_classes: names of the heads whose logits are further classes of the classifier.
    """

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        # Here and not in `forward`, because torch.compile does not trace the checks of `ExtraHead`
        heads = config.get_extra_heads()
        self.added_classes = list(config.get_added_classes())
        self.layers: set[int] = set()
        self.poolers: dict[str, list[tuple[int, TokenPooler]]] = {}

        for name, head in heads.items():
            layers = config.resolve_layers(head.pooled_layers)
            self.layers.update(layers)
            self.poolers[name] = []
            for layer, pooling in zip(layers, head.layer_poolings, strict=True):
                if layer == config.num_hidden_layers and pooling != "cls":
                    layer = ALL_TOKENS
                    self.layers.add(layer)
                self.poolers[name].append((layer, TokenPooler(config, pooling)))

            size = sum(config.compute_pooled_size(pooling, 1) for pooling in head.layer_poolings)
            # nn.ModuleDict has methods `keys` and `values`
            self[f"task_{name}"] = nn.Linear(size, len(head.labels))
        self.requires_grad_(False)

    def forward(self, layer_tokens: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Compute the logits [B, labels] of each head.

        Every head is computed alone, so its logits do not depend on which other heads exist.

        Args:
            layer_tokens: layer index -> tokens [B, N, D] after the final norm.
        """
        logits: dict[str, Tensor] = {}
        for name, poolers in self.poolers.items():
            pooled = [pooler(layer_tokens[layer]) for layer, pooler in poolers]
            logits[name] = self[f"task_{name}"](torch.cat(pooled, dim=-1))
        return logits


# Pixel decoder ------------------------------------------------------------------------------------
class PixelDecoder(nn.Module):
    """A linear layer that maps each patch to its pixels (SimMIM, arXiv 2111.09886, section 3.4)."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_height_width
        num_pixels = config.num_channels * math.prod(self.patch_size)
        self.projection = nn.Linear(config.hidden_size, num_pixels)

    def forward(self, patches: Tensor, grid_size: Size) -> Tensor:
        """Decode patches [B, rows * columns, D] to pixels [B, C, H, W]."""
        pixels = self.projection(patches).mT  # [B, C * patch height * patch width, patches]
        size = (grid_size[0] * self.patch_size[0], grid_size[1] * self.patch_size[1])
        return nn.functional.fold(pixels, size, self.patch_size, stride=self.patch_size)


# Losses -------------------------------------------------------------------------------------------
def compute_classification_loss(
    labels: Tensor,
    logits: Tensor,
    config: ViTCLSConfig,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Compute the loss of logits [B, C] for C classes. `config.problem_type` selects the loss:

    - integer labels [B]: cross-entropy; -100 is ignored;
    - float labels with "single_label_classification": cross-entropy with probabilities [B, C]
      (mixup, CutMix);
    - float labels with "multi_label_classification": binary cross-entropy, one label per class [B,
      C];
    - "regression", or a single output: mean squared error.

    Args:
        num_items_in_batch: divisor of the loss, the number of labels in all accumulated batches
            (default: this batch).
        kwargs: ignored, as by the losses of transformers.

    Raises:
        ValueError: if a label is not a class index, if `problem_type` is not set for other labels, or if
            these have another shape than the logits.
    """
    labels = labels.to(logits.device)
    if logits.shape[-1] != config.num_labels:
        raise ValueError(
            f"the model has {logits.shape[-1]} outputs, but num_labels={config.num_labels}: set num_labels"
        )

    num_items = labels.numel() if num_items_in_batch is None else num_items_in_batch
    problem_type = config.problem_type or ("regression" if config.num_labels == 1 else None)

    has_indices = problem_type in (None, "single_label_classification")
    if has_indices and not labels.is_floating_point() and labels.shape != logits.shape:
        return compute_cross_entropy(logits, labels, num_items_in_batch)
    if problem_type is None:
        raise ValueError(
            'labels that are no indices require config.problem_type: "single_label_classification" for '
            'class probabilities or "multi_label_classification" for several labels per image'
        )
    if labels.numel() != logits.numel():
        raise ValueError(
            f"labels of {problem_type} require the shape of the logits, {list(logits.shape)}, but have "
            f"{list(labels.shape)}. Class indices are integers"
        )
    targets = labels.float().reshape(logits.shape)
    loss_sum = LOSSES[problem_type](logits.float(), targets, reduction="sum")  # type: ignore[operator]
    if has_indices:
        # `num_items` is B * C, so the result is the mean over images.
        loss_sum = loss_sum * labels.shape[-1]
    return loss_sum / num_items


def compute_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    owner: str = "the model",
) -> Tensor:
    """Compute the cross-entropy of logits [B, C] and class indices [B], ignoring -100.

    The result is 0 if all indices are -100.

    Raises:
        ValueError: if there is not one label per image or, only on the CPU, a label is not a class
            index. The message about the index names the `owner` of the labels.
    """
    labels = labels.reshape(-1).to(logits.device, torch.long)
    try:
        loss_sum = nn.functional.cross_entropy(
            logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum"
        )
    except IndexError as error:
        num_labels = logits.shape[-1]
        raise ValueError(
            f"unknown label id: {owner} has {num_labels} labels, 0 to {num_labels - 1}. {error}"
        ) from error

    if num_items_in_batch is not None:
        return loss_sum / num_items_in_batch
    return loss_sum / (labels != IGNORED_LABEL).sum().clamp(min=1)


def compute_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: str = "hard",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Compute the mean loss of logits [B, C] against those of a teacher, in float32.

    Source: DeiT, arXiv 2012.12877, section 4. "hard" is the cross-entropy with the class that the
    teacher ranks first (equation 3). "soft" is TAU² times the Kullback-Leibler divergence between
    softened probabilities (equation 2): the sum of p_teacher * log(p_teacher / p_student). The
    factor TAU² keeps the gradients of any temperature as large (arXiv 1503.02531).

    Args:
        num_items_in_batch: divisor of the loss, as in `compute_classification_loss`.

    Raises:
        ValueError: if the teacher has other classes, or `kind` is neither "hard" nor "soft".
    """
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits require the shape of the logits, {list(student_logits.shape)}, but have "
            f"{list(teacher_logits.shape)}: take a teacher of the same classes"
        )
    student, teacher = student_logits.float(), teacher_logits.float().to(student_logits.device)
    if kind == "hard":
        loss_sum = nn.functional.cross_entropy(student, teacher.argmax(dim=-1), reduction="sum")
    elif kind == "soft":
        student, teacher = ((each / TAU).log_softmax(dim=-1) for each in (student, teacher))
        divergence = nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
        loss_sum = TAU**2 * divergence
    else:
        raise ValueError(f'distillation_loss="{kind}": choose "hard" or "soft"')
    return loss_sum / (len(student) if num_items_in_batch is None else num_items_in_batch)


def compute_masked_pixel_loss(
    reconstruction: Tensor, pixel_values: Tensor, bool_masked_pos: Tensor, config: ViTCLSConfig
) -> Tensor:
    """Compute the mean loss over the masked pixels, in float32.

    Sources: SimMIM, arXiv 2111.09886, section 3.5; MAE, arXiv 2111.06377, section 3.

    Args:
        reconstruction: prediction [B, C, H, W].
        pixel_values: images [B, C, H, W].
        bool_masked_pos: [B, rows * columns], true for masked patches.
    """
    # [B, rows * columns, values per patch]
    predictions = split_into_patches(reconstruction, config).float()
    target = split_into_patches(pixel_values, config).float()

    if config.norm_pixel_target:
        # The unbiased variance of a patch with a single value would be NaN.
        correction = int(target.shape[-1] > 1)
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True, correction=correction)
        target = (target - mean) / (variance + 1e-6).sqrt()

    pixel_losses = (
        (predictions - target).abs() if config.mim_loss == "l1" else (predictions - target) ** 2
    )
    mask = bool_masked_pos.bool().to(pixel_losses.dtype)  # [B, rows * columns]
    # Without a masked patch, the loss is 0 instead of NaN.
    return (pixel_losses.mean(dim=-1) * mask).sum() / mask.sum().clamp(min=1)


def split_into_patches(pixels: Tensor, config: ViTCLSConfig) -> Tensor:
    """Split images [B, C, H, W] into patches [B, rows * columns, C * height * width]."""
    size = config.patch_height_width
    return nn.functional.unfold(pixels, size, stride=size).mT


# Class statistics ---------------------------------------------------------------------------------
# A digest for each type that the weights may be loaded in: rounding to it is no change
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIGEST_SIZE = hashlib.sha256().digest_size
# Parts of an encoder that the tokens do not depend on
OTHER_WEIGHTS = ("pooler.", "embeddings.mask_token")
REMEDY = "`vitcls finetune --model FOLDER` fits a classifier and them"


class ClassDistance(nn.Module):
    """Class means and covariances of several tokens, and the distance to the nearest class.

    The state dict has, for each token i of `config.class_statistics`, `means_i` [K, D] and
    `precisions_i` [D, D]; for all tokens, `counts` [K] (number of training images) and `sizes`
    (effective number of features); and `digests` [3, 32] of the encoder's weights, as they are in
    each of `DTYPES`. With added classes, `scales` [K] divide the distances to each class.

    `from_pretrained` compares the digests with the weights. `train()`, `load_state_dict` and
    `eval()` of an encoder with other modules, such as adapters of PEFT, end the use of the
    statistics. Three changes are noticed only when the model is saved: weights that are edited in
    evaluation mode, those of `torch.func.functional_call`, and adapters that are added and used
    without `eval()`. A saved folder never claims other weights than its own.

    Attributes:
        layers: indices, from 1, of the layers that are read.
        num_together: numbers of classes that were fitted, or added, at a time.
        is_valid: whether the statistics belong to the weights, as far as known.
    """

    # transformers keeps these in float32, in a model of any precision: all but the digests.
    _keep_in_fp32_modules_strict = {r"class_distance\.[cmps]"}

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        # Also if transformers builds the model in half precision
        zeros = partial(torch.zeros, dtype=torch.float32)
        statistics = config.class_statistics or {}
        self.tokens = [(layer, kind) for layer, kind in statistics["tokens"]]
        self.layers = config.resolve_layers([layer for layer, _ in self.tokens])
        self.poolers = [TokenPooler(config, kind) for _, kind in self.tokens]
        num_classes = statistics["num_classes"]
        num_added = [*map(len, config.get_added_classes().values())]
        self.num_together = [num_classes - sum(num_added), *num_added]
        for index, (_, kind) in enumerate(self.tokens):
            size = config.compute_pooled_size(kind, 1)
            self.register_buffer(f"means_{index}", zeros(num_classes, size))
            self.register_buffer(f"precisions_{index}", zeros(size, size))
        if statistics.get("has_scales"):
            self.scales = nn.Buffer(zeros(num_classes))
        self.counts = nn.Buffer(zeros(num_classes))
        self.sizes = nn.Buffer(zeros(len(self.tokens)))
        self.digests = nn.Buffer(torch.zeros(len(DTYPES), DIGEST_SIZE, dtype=torch.uint8))
        self.is_valid = False
        self.num_modules = 0  # Of the encoder, when it was checked
        self.terms: list[tuple[Tensor, ...]] | None = None  # `pack` computes them once

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the buffers, but keep them in float32: half precision has too few digits for them."""

        def move(buffer: Tensor) -> Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        return super()._apply(move, recurse)

    def forward(self, layer_tokens: Mapping[int, Tensor]) -> Tensor:
        """Compute the Mahalanobis distance [B] to the nearest class mean (arXiv 1807.03888).

        It is the root of the mean over the tokens of the squared distances, without the noise of
        the means of few images (`sizes` / `counts`).

        Args:
            layer_tokens: layer index -> tokens [B, N, D] after the final norm.
        """
        pooled = [
            pooler(layer_tokens[layer])
            for layer, pooler in zip(self.layers, self.poolers, strict=True)
        ]
        # FLOPs are counted on "meta"
        device = "cpu" if pooled[0].is_meta else pooled[0].device.type
        squares = []
        # The distance is a difference of large numbers, for which bfloat16 has too few digits.
        with torch.autocast(device, enabled=False):
            all_terms = self.compute_terms() if self.terms is None else self.terms
            for index, (values, terms) in enumerate(zip(pooled, all_terms, strict=True)):
                center, means, of_means = terms
                values = values.float() - center
                products = values @ getattr(self, f"precisions_{index}")  # [B, D]
                own = (products * values).sum(dim=1, keepdim=True)
                parts = [products @ part.T for part in means.split(self.num_together)]
                squares.append(own - 2 * torch.cat(parts, dim=1) + of_means)  # [B, K]
        distances = torch.stack(squares).mean(dim=0)
        if "scales" in self._buffers:
            distances = distances / self.scales.square()
        # The mean of a class without images is a placeholder, and must not be the nearest one.
        distances = distances.masked_fill(self.counts == 0, torch.inf)
        # Without the noise of the means, an estimated square can be slightly negative.
        return distances.amin(dim=1).clamp(min=0).sqrt()

    def compute_terms(self) -> list[tuple[Tensor, ...]]:
        """Compute what is the same for all images.

        Far from zero, squares would be large and their differences inexact. A common shift does not
        change these.

        Returns:
            For each token, a center [D], the means around it [K, D], and their squares without the
            noise [K].
        """
        terms: list[tuple[Tensor, ...]] = []
        for index in range(len(self.tokens)):
            means = getattr(self, f"means_{index}")
            # Added classes do not change the bits of old ones, which have their own center and products.
            center = means[: self.num_together[0]].mean(dim=0)
            means = means - center
            noise = self.sizes[index] / self.counts.clamp(min=1)
            precision = getattr(self, f"precisions_{index}")
            products = torch.cat([part @ precision for part in means.split(self.num_together)])
            terms.append((center, means, (products * means).sum(dim=1) - noise))
        return terms

    def check(self, encoder: nn.Module) -> bool:
        """Compare the digests with the weights of an encoder that was loaded, and say if they differ.

        Weights that are not in memory as plain numbers (quantized, sharded, offloaded) cannot be
        compared, so the statistics do not count as theirs.
        """
        self.is_valid = self.belongs_to(encoder.state_dict(keep_vars=True))
        self.num_modules = count_modules(encoder)
        if not self.is_valid:
            logger.warning(
                "class statistics (`distance`, `unknown`): not used, because the file lacks them, or they "
                "do not belong to these weights of the encoder, or an older version has stored "
                f"them, or the weights are sharded, quantized or offloaded. {REMEDY}"
            )
        return self.is_valid

    def claim(self, encoder: nn.Module, weights: Mapping[str, Tensor] | None = None) -> None:
        """Declare that the statistics belong to the weights of an encoder, as they are or are saved.

        Args:
            encoder: of this model.
            weights: state dict that will be saved for it, if that is another one: merged or gathered.
        """
        digests = compute_digests(
            encoder.state_dict(keep_vars=True) if weights is None else weights
        )
        self.is_valid = digests is not None
        self.num_modules = count_modules(encoder)
        self.digests.copy_(torch.zeros_like(self.digests) if digests is None else digests)

    def drop(self, reason: str) -> None:
        """End the use of the statistics, and say so once."""
        if self.is_valid:
            self.is_valid = False
            logger.warning(
                f"class statistics (`distance`, `unknown`): not used any more, because {reason}. {REMEDY}"
            )

    def belongs_to(self, weights: Mapping[str, Tensor]) -> bool:
        """Compare the digest of one type with an encoder's state dict of that type."""
        dtypes = {each.dtype for each in weights.values() if each.is_floating_point()}
        if len(dtypes) != 1 or not dtypes <= {*DTYPES} or self.digests.is_meta:
            return False
        dtype = dtypes.pop()
        stored = bytes(self.digests[DTYPES.index(dtype)].tolist())
        return stored == hash_weights(select_weights(weights), dtype)

    def renew(self, weights: Mapping[str, Tensor]) -> Tensor | None:
        """Compute the digests [3, 32] of an encoder's state dict; None if the statistics are of others."""
        return compute_digests(weights) if self.belongs_to(weights) else None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.drop("`load_state_dict` has changed the weights. `from_pretrained` checks them")


# Digests ------------------------------------------------------------------------------------------


def select_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the weights of an encoder's state dict that its tokens depend on."""
    selected = {
        name: weight for name, weight in weights.items() if not name.startswith(OTHER_WEIGHTS)
    }
    progress = selected.get("fade_in.progress")
    if progress is not None and not progress.is_meta and bool((progress >= TokenFadeIn.FULL).all()):
        del selected["fade_in.progress"]  # These tokens are saved as ordinary ones
    return selected


def compute_digests(weights: Mapping[str, Tensor]) -> Tensor | None:
    """Compute the digests [3, 32] of an encoder's state dict, as it is in each of `DTYPES`."""
    selected = select_weights(weights)
    digests = [hash_weights(selected, dtype) for dtype in DTYPES]
    if None in digests:
        return None
    return torch.tensor([list(each or b"") for each in digests], dtype=torch.uint8)


@torch.no_grad()
def hash_weights(weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> bytes | None:
    """Compute the SHA-256 of names, shapes, types and bytes of weights; 0.1 s for a ViT-S (88 MB).

    Args:
        weights: in any order.
        dtype: of the numbers that are hashed; that of each weight by default.

    Returns:
        None if any weight is not in memory as plain numbers.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        if type(weight) not in (Tensor, nn.Parameter, nn.Buffer) or weight.is_meta:
            return None
        if dtype is not None and weight.is_floating_point():
            weight = weight.to(dtype)
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        numbers = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(numbers.numpy().data)
    return digest.digest()


def count_modules(encoder: nn.Module) -> int:
    """Count the modules of an encoder but its pooler: adapters of PEFT add some."""
    return sum(not name.startswith("pooler") for name, _ in encoder.named_modules())

# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""Class statistics in a model: the weights that they belong to, and the distance that they give.

    ClassDistance.forward    tokens -> distance [B] to the nearest class
    ClassDistance.check      weights -> whether the statistics belong to them
    ClassDistance.renew      weights to save -> what the file says about them

frozen/class_statistics.py fits the statistics. They belong to one encoder: after any change of its
weights, distances mean nothing. SHA-256 digests of these weights are therefore stored beside the
statistics, compared when a folder is loaded and when one is saved.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .attention_masks_vitcls import TokenFadeIn
from .configuration_vitcls import ViTCLSConfig
from .heads_vitcls import TokenPooler


logger = logging.get_logger(__name__)

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
        self.terms: list[tuple[Tensor, ...]] = []
        self.state_of_terms: list[Any] = []

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
            for index, (values, terms) in enumerate(zip(pooled, self.get_terms(), strict=True)):
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

    def get_terms(self) -> list[tuple[Tensor, ...]]:
        """Take what `compute_terms` returns from the last pass, unless a buffer has changed since."""
        if torch.compiler.is_compiling():
            return self.compute_terms()
        state = [read_state(buffer) for buffer in self.buffers()]
        if state == self.state_of_terms:
            return self.terms
        with torch.inference_mode(False), torch.no_grad():
            terms = self.compute_terms()
        try:
            terms[0][0].data_ptr()
        except RuntimeError:  # A tensor of torch.func, which ends with its function
            return terms
        self.terms, self.state_of_terms = terms, state
        return terms

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


def read_state(buffer: Tensor) -> tuple[Any, ...]:
    """Read the memory of a buffer and the number of its edits."""
    # Tensors of inference mode do not count their edits, so each pass may have other ones.
    version = object() if buffer.is_inference() else buffer._version
    return buffer.data_ptr(), version


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

"""Patch dropout: in training, each image goes through the encoder with a random part of its patches.

    tokens       [ special | patches ]  ->  [ special | kept patches ]      positions are in them, or in the rotations
    masks        rows and columns of the kept tokens
    rotations    those of the kept patches

Fewer tokens are less work, and the model learns from less of each image (PatchDropout, arXiv 2208.07220; FLIP, arXiv
2212.00794). Special tokens always stay. In evaluation nothing is dropped.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .configuration_vitcls import ViTCLSConfig
from .rotary_vitcls import Rotation


Kept = tuple[torch.Tensor, list[Any], list[Rotation]]  # hidden states [B, n, D]; per layer, mask and rotation


class PatchDropout(nn.Module):
    """Keeps as many patches of each image, chosen at random, as `config.patch_drop_rate` leaves: one or more."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()
        self.rate = config.patch_drop_rate
        self.num_special = config.token_layout.num_prefix_tokens

    def forward(self, hidden_states: torch.Tensor, masks: list[Any], rotations: list[Rotation]) -> Kept:
        """Drop patches of [B, N, D] with all that belongs to them; in training only."""
        if not self.training:
            return hidden_states, masks, rotations
        kept = self.choose(hidden_states)  # [B, n patches]
        special = torch.arange(self.num_special, device=kept.device).expand(kept.shape[0], -1)
        places = torch.cat([special, kept + self.num_special], dim=1)  # [B, n]
        return (
            tokens_at(places, hidden_states),
            for_each_layer(masks, lambda mask: mask_of(places, mask)),
            for_each_layer(rotations, lambda rotation: rotation_of(kept, rotation)),
        )

    def choose(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Indices among the patches of those to keep, in their order, [B, n patches]."""
        num_images, num_patches = hidden_states.shape[0], hidden_states.shape[1] - self.num_special
        num_kept = num_kept_patches(self.rate, num_patches)
        order = torch.rand(num_images, num_patches, device=hidden_states.device).argsort(dim=1)
        return order[:, :num_kept].sort(dim=1).values

    def extra_repr(self) -> str:
        """The rate, for `print(model)`."""
        return f"rate={self.rate}"


class AllPatches(nn.Module):
    """Stands where `PatchDropout` would, for models that are trained on whole images."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__()

    def forward(self, hidden_states: torch.Tensor, masks: list[Any], rotations: list[Rotation]) -> Kept:
        """Return everything as it is."""
        return hidden_states, masks, rotations


def build_patch_dropout(config: ViTCLSConfig) -> nn.Module:
    """What a configuration asks for."""
    return PatchDropout(config) if config.patch_drop_rate > 0 else AllPatches(config)


def num_kept_patches(rate: float, num_patches: int) -> int:
    """How many patches of an image stay in training: the nearest whole number, at least one."""
    return max(1, round(num_patches * (1 - rate)))


def require_all_patches(model: nn.Module, config: ViTCLSConfig) -> None:
    """Raise ValueError where a model that answers for every patch would be trained without some of them."""
    if model.training and config.patch_drop_rate > 0:
        raise ValueError(
            f"{type(model).__name__} needs every patch and patch_drop_rate is {config.patch_drop_rate}: "
            "set patch_drop_rate=0 to train it"
        )


def for_each_layer(per_layer: list[Any], select: Callable[[Any], Any]) -> list[Any]:
    """`select` of what each layer is given; computed once where all are given the same."""
    first = per_layer[0]
    if all(given is first for given in per_layer):
        return [select(first)] * len(per_layer)
    return [select(given) for given in per_layer]


def tokens_at(places: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """The tokens at `places` [B, n] of [B, N, D], [B, n, D]."""
    return hidden_states.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))


def mask_of(places: torch.Tensor, mask: Any) -> Any:
    """The part of a mask that is about the tokens at `places` [B, n], in any of the forms that implementations take.

    These are none, [B, N] over keys (flash), [B or 1, maps or 1, N or 1, N] boolean or added to scores (SDPA, eager),
    and flex attention's, which is a function of the places.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        return block_mask_of(places, mask)
    if mask.ndim == 2:
        return torch.take_along_dim(mask, places, dim=1)
    if mask.shape[2] > 1:
        mask = torch.take_along_dim(mask, places[:, None, :, None], dim=2)
    return torch.take_along_dim(mask, places[:, None, None, :], dim=3)


def block_mask_of(places: torch.Tensor, mask: Any) -> Any:
    """Flex attention's mask for the tokens at `places` [B, n]."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return mask.mask_mod(batch, head, places[batch, query], places[batch, key])

    num_images, num_tokens = places.shape
    return create_block_mask(visible, num_images, None, num_tokens, num_tokens, device=places.device)


def rotation_of(kept: torch.Tensor, rotation: Rotation) -> Rotation:
    """Cosines and sines [heads or none, patches, head_dim] of the kept patches, [B, heads or 1, n, head_dim]."""
    if rotation is None:
        return None
    index = kept[:, None, :, None]
    cos, sin = (
        torch.take_along_dim(part.reshape(1, -1, *part.shape[-2:]), index, dim=2)
        for part in rotation  # [1, heads or 1, patches, head_dim]
    )
    return cos, sin

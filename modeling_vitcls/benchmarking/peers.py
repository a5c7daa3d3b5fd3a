"""Other projects' ViTs, with random weights, and ours converted from them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..conversion.from_timm import convert_from_timm
from ..conversion.from_transformers import convert_from_transformers
from ..conversion.random_weights import random_fill
from .comparison import Answer


@dataclass(frozen=True)
class Size:
    """What decides how much work a plain ViT is."""

    image_size: int
    patch_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_labels: int = 1000

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP."""
        return 4 * self.hidden_size


SMALL = Size(image_size=224, patch_size=16, hidden_size=384, num_hidden_layers=12, num_attention_heads=6)
TOY = Size(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=5)


@dataclass(frozen=True)
class Peer:
    """A model of another project, and ours with the same weights."""

    name: str
    size: Size
    theirs: nn.Module
    ours: nn.Module
    their_answer: Answer
    our_answer: Answer

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Peer":
        """Both in another precision, and on a device."""
        self.theirs.to(device, dtype)
        self.ours.to(device, dtype)
        return self


def transformers_vit(size: Size, **labels: Any) -> Any:
    """The ViT that transformers has built in, with fresh weights."""
    from transformers import ViTConfig, ViTForImageClassification

    values = vars(size) if not labels else {name: value for name, value in vars(size).items() if name != "num_labels"}
    return ViTForImageClassification(ViTConfig(**values, **labels, intermediate_size=size.intermediate_size))


def timm_vit(size: Size, num_registers: int = 0) -> nn.Module:
    """timm's ViT, with fresh weights."""
    from timm.models import VisionTransformer

    return VisionTransformer(
        img_size=size.image_size,
        patch_size=size.patch_size,
        embed_dim=size.hidden_size,
        depth=size.num_hidden_layers,
        num_heads=size.num_attention_heads,
        num_classes=size.num_labels,
        reg_tokens=num_registers,
    )


def against_transformers(size: Size) -> Peer:
    """transformers' built-in ViT and ours."""
    theirs = transformers_vit(size)
    random_fill(theirs)
    ours = convert_from_transformers(theirs)
    return Peer(
        "transformers", size, theirs, ours, lambda pixels: theirs(pixels).logits, lambda pixels: ours(pixels).logits
    )


def against_timm(size: Size, num_registers: int = 0) -> Peer:
    """timm's ViT and ours."""
    theirs = random_fill(timm_vit(size, num_registers))
    ours = convert_from_timm(theirs)
    return Peer("timm", size, theirs, ours, theirs, lambda pixels: ours(pixels).logits)


PEERS: dict[str, Callable[[Size], Peer]] = {"transformers": against_transformers, "timm": against_timm}
WITH_REGISTERS: dict[str, Callable[[Size, int], Peer]] = {"timm": against_timm}  # transformers' ViT has none

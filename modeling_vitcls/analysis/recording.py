"""Attention of every layer of one forward pass, under any attention implementation.

    with recorded_attention(model) as layers:
        model(pixel_values)
    layers[0].weights()      # [B, maps, N, N], computed when asked for: one layer's maps in memory at a time

Queries, keys and values are noted where each layer's `AttentionCore` receives them, so memory grows with N, not N².
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..token_attention_vitcls import attention_rows, first_rows_of
from .classifiers import plain_model


@dataclass(frozen=True)
class RecordedLayer:
    """What went into and came out of one layer's attention; a head has one map, in differential attention two."""

    query: torch.Tensor  # [B, maps, N, d]
    key: torch.Tensor  # [B, maps, N, d]
    value: torch.Tensor  # [B, maps, N, head_dim]
    mask: Any
    scaling: float
    attended: torch.Tensor  # [B, N, maps, head_dim]

    def weights(self, num_rows: int | None = None) -> torch.Tensor:
        """The attention maps [B, maps, N, N], as with eager attention; or the rows of the first tokens alone.

        In float32, so that rows sum to 1 in half precision too.
        """
        query, key = self.query[:, :, :num_rows].float(), self.key.float()
        return attention_rows(query, key, first_rows_of(self.mask, query, key), self.scaling)


@contextmanager
def recorded_attention(model: Any) -> Iterator[list[RecordedLayer]]:
    """Note the attention of the forward pass made inside the block, all tokens of the last layer included."""
    layers: list[RecordedLayer] = []

    def note(core: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple[torch.Tensor, Any]) -> None:
        _, query, key, value, mask = args
        layers.append(RecordedLayer(query, key, value, mask, kwargs["scaling"], output[0]))

    encoder = plain_model(model).base_model
    with ExitStack() as hooks:
        hooks.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code has no hooks
        hooks.enter_context(encoder.register_forward_pre_hook(ask_for_all_tokens, with_kwargs=True))
        for layer in encoder.layers:
            hooks.enter_context(layer.attention.core.register_forward_hook(note, with_kwargs=True))
        yield layers


def ask_for_all_tokens(encoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A hook that takes back what a head said about the tokens that it reads (last_layer_vitcls.py)."""
    return args, {name: value for name, value in kwargs.items() if name != "num_tokens_read"}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without dropout; afterwards each part of it as it was (frozen ones may differ)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training

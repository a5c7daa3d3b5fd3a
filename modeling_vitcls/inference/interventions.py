"""Interventions in the forward pass: special tokens are hidden, or replaced with those of other photos.

    with intervene(model, [1, 2]):                     no token attends to the special tokens 1 and 2
    states = model(others, output_hidden_states=True).hidden_states
    with intervene(model, [1, 2], states, (3, 6)):     in layers 3 to 6, they are those of other photos

Hiding a token measures its place: without a token that takes much attention, every softmax changes,
whatever the token held. Another photo's token in its place measures its content (arXiv 2604.14433).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model.attention_masks_vitcls import apply_mask, require_mask


# The first and the last layer, from 1; None is all layers
LayerRange = tuple[int, int] | None


@contextmanager
def intervene(
    model: Any,
    positions: Sequence[int],
    sources: Sequence[Tensor] | None = None,
    layers: LayerRange = None,
) -> Iterator[None]:
    """Hide or replace special tokens in all passes within the context.

    No token attends to a hidden token, not even the token itself; a head that reads it still reads it.
    A replaced token is another photo's in the inputs of the layers and after each, where a head may read it.
    The context sets hooks, so it needs no gates. The attention must be SDPA or eager.

    Args:
        model: any ViTCLS model.
        positions: of the special tokens in the sequence, from 0 (`config.token_layout`).
        sources: hidden states [B, N or more special tokens, D] of B other photos, before the first layer
            and after each layer. Default: the tokens are hidden.
        layers: the first and the last layer, from 1. Default: all.

    Raises:
        ValueError: if there are no such layers, or the attention takes no mask.

    Examples:
        >>> from modeling_vitcls import ViTCLSModel
        >>> from modeling_vitcls.inference.interventions import intervene
        >>> model = ViTCLSModel.from_pretrained("runs/photos", num_register_tokens=4).eval()
        >>> with intervene(model, [1, 2, 3, 4], layers=(1, 2)):
        ...     outputs = model(pixel_values)
    """
    encoder = model.base_model
    number = len(encoder.layers)
    first, last = layers or (1, number)
    if not 1 <= first <= last <= number:
        raise ValueError(
            f"layers {first} to {last}: the model has layers 1 to {number}. Name the first and the last"
        )

    def hide(layer: nn.Module, args: tuple) -> tuple:
        hidden_states, mask, *others = args
        bias = hidden_states.new_zeros(1, 1, 1, hidden_states.shape[1])
        bias[..., positions] = -torch.inf
        return (hidden_states, apply_mask(bias, mask), *others)

    def replace(states: Tensor, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        replaced = output.clone()
        replaced[:, positions] = states[:, positions].to(output)
        return replaced

    with ExitStack() as hooks:
        if sources is None:
            require_mask(encoder.config, "hiding tokens")
            for layer in encoder.layers[first - 1 : last]:
                hooks.enter_context(layer.register_forward_pre_hook(hide))
        else:
            modules = [encoder.embeddings, *encoder.layers]
            for index in range(first - 1, last + 1):
                hook = partial(replace, sources[index])
                hooks.enter_context(modules[index].register_forward_hook(hook))
        yield

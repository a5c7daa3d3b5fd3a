"""Interventions in the forward pass: tokens are hidden, replaced with those of other photos, or left out.

    with intervene(model, [1, 2]):                     no token attends to the special tokens 1 and 2
    states = model(others, output_hidden_states=True).hidden_states
    with intervene(model, [1, 2], states, (3, 6)):     in layers 3 to 6, they are those of other photos
    continue_from(model, photo, states[:5], shown)     outputs without other patches after four layers

Hiding a token measures its place: without a token that takes much attention, every softmax changes,
whatever the token held. Another photo's token in its place measures its content (arXiv 2604.14433).
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ..model.attention_masks_vitcls import apply_mask, require_mask
from ..model.blocks_vitcls import ViTCLSLayers


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
    The context sets hooks, so it needs no fading. The attention must be SDPA or eager.

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


def continue_from(model: Any, pixel_values: Tensor, states: Sequence[Tensor], shown: Tensor) -> Any:
    """Run the later layers of a model on some patches of a photo that has passed the earlier ones.

    The other patches are left out of the sequence. Those that stay keep their positions. Meanwhile, no other
    thread may use the model.

    Args:
        model: any ViTCLS classifier or encoder, with SDPA or eager attention if it has a mask.
        pixel_values: the photo [1, C, H, W].
        states: [1, N, D] before the first layer and after each layer that the photo has passed.
        shown: [B, n], the patches that stay in each of B sequences.

    Returns:
        The outputs of the model for B images.

    Raises:
        ValueError: if the attention takes no mask that the model has.

    Examples:
        >>> from modeling_vitcls import ViTCLSForImageClassification
        >>> from modeling_vitcls.inference.interventions import continue_from
        >>> model = ViTCLSForImageClassification.from_pretrained("runs/photos").eval()
        >>> states = model(pixel_values, output_hidden_states=True).hidden_states[:5]  # four layers
        >>> logits = continue_from(model, pixel_values, states, torch.tensor([[0, 1], [2, 3]])).logits
    """
    layers = model.base_model.layers
    if type(layers) is nn.ModuleList:  # A person has replaced the list
        layers = model.base_model.layers = ViTCLSLayers(layers)
    special = shown.new_tensor(range(model.config.token_layout.num_prefix_tokens))
    kept = torch.cat([special.expand(len(shown), -1), len(special) + shown], dim=1)
    num_passed = len(states) - 1
    later = layers[num_passed:]

    def select(mask: Any, angles: Any, *others: Any) -> Any:
        if mask is not None:  # [1, heads or 1, N or 1, N] -> [B, heads or 1, n, n]
            require_mask(model.config, "leaving patches out")
            mask = mask[0].expand(-1, mask.shape[3], -1)
            mask = mask[:, kept[:, :, None], kept[:, None]].transpose(0, 1)
        if angles is not None:  # [2, (heads,) patches, head_dim] -> [2, B, heads or 1, n, head_dim]
            angles = angles.view(2, -1, *angles.shape[-2:])[:, :, shown].transpose(1, 2)
        return mask, angles, *others

    def run_later(
        hidden_states: Tensor, inputs: list[Any], read_layers: Collection[int], **kwargs: Any
    ) -> dict[int, Tensor]:
        inputs = [select(*each) for each in inputs[num_passed:]]
        passed = [each[0, kept] for each in states]
        found = later(passed.pop(), inputs, range(len(later) + 1), **kwargs)
        return dict(enumerate([*passed, *found.values()]))

    # A patched `forward` lets the last layer compute all tokens. One of Accelerate comes back.
    with patch.object(layers, "forward", run_later):
        return model(pixel_values)

"""Passes with interventions: tokens are hidden, replaced with those of other photos, or left out.

    intervene(model, photos, [1, 2])                        no token attends to the special tokens 1 and 2
    states = model(others, output_hidden_states=True).hidden_states
    intervene(model, photos, [1, 2], states, (3, 6))        in layers 3 to 6, they are those of other photos
    continue_from(model, photo, states[:5], shown)          outputs without other patches after four layers

Hiding a token measures its place: without a token that takes much attention, every softmax changes,
whatever the token held. Another photo's token in its place measures its content (arXiv 2604.14433).

The functions run the layers of the model one after another, and nothing of the model changes.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..model.attention_masks_vitcls import apply_mask, require_mask
from ..model.blocks_vitcls import ViTCLSLayers
from ..model.heads_vitcls import ALL_TOKENS


# The first and the last layer, from 1; None is all layers
LayerRange = tuple[int, int] | None


def intervene(
    model: Any,
    pixel_values: Tensor,
    positions: Sequence[int],
    sources: Sequence[Tensor] | None = None,
    layers: LayerRange = None,
) -> Any:
    """Compute the outputs of a model while special tokens are hidden or replaced.

    No token attends to a hidden token, not even the token itself; a head that reads it still reads it.
    A replaced token is another photo's in the inputs of the layers and after each, where a head may read it.

    Args:
        model: a classifier or an encoder, with SDPA or eager attention if tokens are hidden.
        pixel_values: photos [B, C, H, W].
        positions: of the special tokens in the sequence, from 0 (`config.token_layout`).
        sources: hidden states [B, N or more special tokens, D] of B other photos, before the first layer
            and after each layer. Default: the tokens are hidden.
        layers: the first and the last layer, from 1. Default: all.

    Returns:
        `logits` and what else the heads return, without the distance; of an encoder, `last_hidden_state` and
        `pooler_output`.

    Raises:
        ValueError: if there are no such layers, or the attention takes no mask.

    Examples:
        >>> from modeling_vitcls import ViTCLSModel
        >>> from modeling_vitcls.inference.interventions import intervene
        >>> model = ViTCLSModel.from_pretrained("runs/photos", num_register_tokens=4).eval()
        >>> outputs = intervene(model, pixel_values, [1, 2, 3, 4], layers=(1, 2))
    """
    encoder = model.base_model
    number = len(encoder.layers)
    first, last = layers or (1, number)
    if not 1 <= first <= last <= number:
        raise ValueError(
            f"layers {first} to {last}: the model has layers 1 to {number}. Name the first and the last"
        )
    if sources is None:
        require_mask(encoder.config, "hiding tokens")

    def replace(index: int, states: Tensor) -> Tensor:
        if sources is None or not first - 1 <= index <= last:
            return states
        replaced = states.clone()
        replaced[:, positions] = sources[index][:, positions].to(states)
        return replaced

    hidden_states, inputs = encoder.embed(pixel_values)
    bias = hidden_states.new_zeros(1, 1, 1, hidden_states.shape[1])
    bias[..., positions] = -torch.inf
    states = {0: replace(0, hidden_states)}
    for index, layer in enumerate(encoder.layers, start=1):
        mask, angles = inputs[index - 1]
        if sources is None and first <= index <= last:
            mask = apply_mask(bias, mask)
        states[index] = replace(index, layer(states[index - 1], mask, angles))
    return read_states(model, states)


def continue_from(model: Any, pixel_values: Tensor, states: Sequence[Tensor], shown: Tensor) -> Any:
    """Run the later layers of a model on some patches of a photo that has passed the earlier ones.

    The other patches are left out of the sequence. Those that stay keep their positions.

    Args:
        model: a classifier or an encoder, with SDPA or eager attention if it has a mask.
        pixel_values: the photo [1, C, H, W].
        states: [1, N, D] before the first layer and after each layer that the photo has passed.
        shown: [B, n], the patches that stay in each of B sequences.

    Returns:
        What `intervene` returns, for B images.

    Raises:
        ValueError: if the attention takes no mask that the model has.

    Examples:
        >>> from modeling_vitcls import ViTCLSForImageClassification
        >>> from modeling_vitcls.inference.interventions import continue_from
        >>> model = ViTCLSForImageClassification.from_pretrained("runs/photos").eval()
        >>> states = model(pixel_values, output_hidden_states=True).hidden_states[:5]  # four layers
        >>> logits = continue_from(model, pixel_values, states, torch.tensor([[0, 1], [2, 3]])).logits
    """
    encoder = model.base_model
    special = shown.new_tensor(range(model.config.token_layout.num_prefix_tokens))
    kept = torch.cat([special.expand(len(shown), -1), len(special) + shown], dim=1)

    def select(mask: Any, angles: Any) -> tuple[Any, Any]:
        if mask is not None:  # [1, heads or 1, N or 1, N] -> [B, heads or 1, n, n]
            require_mask(model.config, "leaving patches out")
            mask = mask[0].expand(-1, mask.shape[3], -1)
            mask = mask[:, kept[:, :, None], kept[:, None]].transpose(0, 1)
        if angles is not None:  # [2, (heads,) patches, head_dim] -> [2, B, heads or 1, n, head_dim]
            angles = angles.view(2, -1, *angles.shape[-2:])[:, :, shown].transpose(1, 2)
        return mask, angles

    passed = [each[0, kept] for each in states]
    num_passed = len(passed) - 1
    later = encoder.layers[num_passed:]
    if not isinstance(later, ViTCLSLayers):  # A person has replaced the list
        later = ViTCLSLayers(later)
    _, inputs = encoder.embed(pixel_values)
    selected = [select(*each) for each in inputs[num_passed:]]
    # As in a pass of the model, a packed one computes in the last layer what its classifier reads
    limited = [*selected[:-1], *((*each, model.num_output_tokens) for each in selected[-1:])]
    found = later(passed[-1], limited, range(len(later) + 1))
    states_by_layer = dict(enumerate([*passed[:-1], *found.values()]))
    is_trimmed = model.num_output_tokens is not None and len(later) > 0
    if is_trimmed and ALL_TOKENS in list_read_layers(model):
        before_last = states_by_layer[len(states_by_layer) - 2]
        states_by_layer[ALL_TOKENS] = later[-1](before_last, *selected[-1])
    return read_states(model, states_by_layer)


def read_states(model: Any, states: Mapping[int, Tensor]) -> Any:
    """Compute what the final norm and the heads make of the states [B, N, D] after each layer.

    `ALL_TOKENS` is the last layer, if that has only the tokens that the classifier reads.
    """
    encoder = model.base_model
    last = len(encoder.layers)
    states = {ALL_TOKENS: states[last], **states}
    layer_tokens = {index: encoder.normalize(states[index]) for index in list_read_layers(model)}
    pooled = encoder.pool(layer_tokens)
    if model is encoder:
        return SimpleNamespace(last_hidden_state=layer_tokens[last], pooler_output=pooled)
    return SimpleNamespace(**model.apply_heads(layer_tokens, pooled, has_distance=False))


def list_read_layers(model: Any) -> set[int]:
    """List the layers that a classifier or an encoder reads, as `output_layers` of a pass names them."""
    encoder = model.base_model
    heads = () if model is encoder else model.extra_heads.layers
    return {len(encoder.layers), *encoder.pooled_layer_indices, *heads}

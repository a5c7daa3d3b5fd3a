"""Interventions in the forward pass of any ViTCLS model: tokens are hidden, replaced or left out.

    with hide(model, "registers"):                    no token attends to the registers
    with hide(model, "registers", layers=(3, 6)):     in layers 3 to 6
    states = collect_states(model, others)            special tokens of other photos, after each layer
    with replace(model, "registers", states):         the tokens of photo i are those of others[i]
    with leave_out_patches(model, shown):             the sequence has the special tokens and some patches

Hiding a token measures its place: without a token that takes much attention, every softmax changes,
whatever the token held. Another photo's token in its place measures its content (arXiv 2604.14433). The
contexts set hooks, so they work with gates or without, for registers of a checkpoint and for new ones,
and for CLS tokens that a head reads. Layers count from 1, and both ends are included.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model.attention_masks_vitcls import apply_mask, require_mask
from ..model.configuration_vitcls import ViTCLSConfig


# A group of `config.token_layout`, or indices of special tokens in the sequence
Tokens = str | Sequence[int]
# The first and the last layer, from 1; None is all layers
LayerRange = tuple[int, int] | None


@contextmanager
def hide(model: Any, tokens: Tokens, layers: LayerRange = None) -> Iterator[None]:
    """Hide special tokens from attention within the context: no token attends to them, themselves included.

    A head that reads a hidden token still reads it.

    Args:
        model: any ViTCLS model with SDPA or eager attention.
        tokens: "cls", "distillation" or "registers", or indices of special tokens in the sequence.
        layers: the first and the last layer in which they are hidden, from 1. Default: all.

    Raises:
        ValueError: if there are no such tokens or layers, or the attention takes no mask.

    Examples:
        >>> from modeling_vitcls import ViTCLSModel
        >>> from modeling_vitcls.inference.interventions import hide
        >>> model = ViTCLSModel.from_pretrained("runs/photos", num_register_tokens=4).eval()
        >>> with hide(model, "registers", layers=(1, 2)):
        ...     outputs = model(pixel_values)
    """
    indices = find_tokens(model.config, tokens)
    first, last = find_layers(model, layers)
    require_mask(model.config, "hiding tokens")

    def hide_keys(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        hidden_states, mask, *others = args
        bias = hidden_states.new_zeros(1, 1, 1, hidden_states.shape[1])
        bias[..., indices] = torch.finfo(bias.dtype).min
        # Not a sum with the mask, which could become infinite
        mask = bias if mask is None else apply_mask(bias, mask).clamp(min=bias.min())
        return (hidden_states, mask, *others), kwargs

    with ExitStack() as hooks:
        for layer in model.base_model.layers[first - 1 : last]:
            hooks.enter_context(layer.register_forward_pre_hook(hide_keys, with_kwargs=True))
        yield


@contextmanager
def replace(
    model: Any, tokens: Tokens, states: Tensor, layers: LayerRange = None
) -> Iterator[None]:
    """Replace special tokens within the context: other tokens and the heads read the given states.

    They are written where the first of the layers reads them, and after each of the layers.

    Args:
        model: any ViTCLS model.
        tokens: as in `hide`.
        states: [B, 1 + layers, S, D] for the first B images of a pass, from `collect_states` for others.
        layers: the first and the last of these layers, from 1. Default: all. A token goes on from the
            state that it has after the last one.

    Raises:
        ValueError: if there are no such tokens or layers.

    Examples:
        >>> from modeling_vitcls import ViTCLSModel
        >>> from modeling_vitcls.inference.interventions import collect_states, replace
        >>> model = ViTCLSModel.from_pretrained("runs/photos", num_register_tokens=4).eval()
        >>> states = collect_states(model, pixel_values)
        >>> with replace(model, "registers", states.roll(1, dims=0)):
        ...     outputs = model(pixel_values)
    """
    indices = find_tokens(model.config, tokens)
    first, last = find_layers(model, layers)

    def write(index: int, hidden_states: Tensor) -> Tensor:
        # The last layer may compute only the tokens that the heads read
        computed = [each for each in indices if each < hidden_states.shape[1]]
        written = hidden_states.clone()
        written[: len(states), computed] = states[:, index, computed].to(written)
        return written

    with hook_states(model, range(first - 1, last + 1), write):
        yield


@torch.no_grad()
def collect_states(model: Any, pixel_values: Tensor) -> Tensor:
    """Collect the special tokens of images [B, C, H, W] before and after each layer: [B, 1 + layers, S, D]."""
    with record_states(model) as states:
        model(pixel_values)
    return torch.stack(states, dim=1)


@contextmanager
def record_states(model: Any) -> Iterator[list[Tensor]]:
    """Record the special tokens [B, S, D] before and after each layer, of one pass within the context."""
    num_tokens = model.config.token_layout.num_prefix_tokens
    states: list[Tensor] = []

    def keep(index: int, hidden_states: Tensor) -> None:
        states.append(hidden_states[:, :num_tokens].detach().clone())

    with hook_states(model, range(1 + len(model.base_model.layers)), keep):
        yield states


@contextmanager
def leave_out_patches(model: Any, shown: Tensor) -> Iterator[None]:
    """Leave patches out of the sequence, after the embeddings; the others keep their positions.

    Args:
        model: any ViTCLS model for which `can_leave_out_patches`.
        shown: [B, n], the indices of the patches that stay, for the B images of a pass.
    """
    encoder = model.base_model
    num_special = encoder.config.token_layout.num_prefix_tokens
    images = torch.arange(len(shown), device=shown.device)[:, None]

    def select(module: nn.Module, args: tuple, hidden_states: Tensor) -> Tensor:
        special, patches = hidden_states.tensor_split([num_special], dim=1)
        return torch.cat([special, patches[images, shown]], dim=1)

    def select_angles(module: nn.Module, args: tuple, angles: Any) -> Any:
        if isinstance(angles, list):  # of each layer
            return [select_angles(module, args, each) for each in angles]
        cos_sin = (
            angles if angles.ndim == 4 else angles[:, None]
        )  # [2, heads or 1, patches, head_dim]
        return cos_sin[:, :, shown].transpose(1, 2)  # [2, B, heads or 1, n, head_dim]

    with ExitStack() as hooks:
        hooks.enter_context(encoder.embeddings.register_forward_hook(select))
        if encoder.rotary_positions is not None:
            hooks.enter_context(encoder.rotary_positions.register_forward_hook(select_angles))
        yield


def can_leave_out_patches(config: ViTCLSConfig) -> bool:
    """Check whether a model takes some of the patches: no module counts on the whole grid."""
    has_table = config.relative_position_bias != "none" or config.cls_scopes is not None
    return not has_table and config.pooling != "attention"


# Hooks --------------------------------------------------------------------------------------------


@contextmanager
def hook_states(model: Any, indices: Sequence[int], function: Any) -> Iterator[None]:
    """Call a function with the index and the states [B, N, D] before (0) and after each layer.

    What it returns, unless it is None, replaces the states.
    """
    encoder = model.base_model
    modules = [encoder.embeddings, *encoder.layers]
    with ExitStack() as hooks:
        for index in indices:

            def call(module: nn.Module, args: Any, output: Tensor, index: int = index) -> Any:
                return function(index, output)

            hooks.enter_context(modules[index].register_forward_hook(call))
        yield


def find_tokens(config: ViTCLSConfig, tokens: Tokens) -> list[int]:
    """Find the indices of special tokens in the sequence.

    Raises:
        ValueError: if there are none, or if they are no special tokens.
    """
    indices = tokens
    if isinstance(tokens, str):
        groups = list_groups(config)
        if tokens not in groups:
            raise ValueError(
                f"the model has no special tokens {tokens!r}. It has: {', '.join(groups) or 'none'}"
            )
        indices = groups[tokens]
    number = config.token_layout.num_prefix_tokens
    if not set(indices) <= set(range(number)):
        raise ValueError(f"tokens={[*indices]} are not among the {number} special tokens, from 0")
    return [*indices]


def list_groups(config: ViTCLSConfig) -> dict[str, list[int]]:
    """Map each group of special tokens that is not empty to their indices in the sequence."""
    layout = config.token_layout
    special = range(layout.num_prefix_tokens)
    groups = {group: list(special[tokens]) for group, tokens in layout.items()}
    return {group: members for group, members in groups.items() if members}


def find_layers(model: Any, layers: LayerRange) -> tuple[int, int]:
    """Find the first and the last layer of a range.

    Raises:
        ValueError: if there are no such layers.
    """
    number = len(model.base_model.layers)
    first, last = layers or (1, number)
    if not 1 <= first <= last <= number:
        raise ValueError(
            f"layers {first} to {last}: the model has layers 1 to {number}. Name the first and the last"
        )
    return first, last

"""The last layer, computed only for the tokens that are read.

    layer 1 .. L-1    all tokens
    layer L           keys and values of all tokens; queries, output projection and MLP of those that a head reads

What becomes of the other tokens in the last layer reaches nobody. The special tokens come first in the sequence, so
those that are read are its first ones, and everything that is cut from the sequence by `token_layout` stays right.
"""

from collections.abc import Mapping
from typing import Any

from .configuration_vitcls import ViTCLSConfig


# Implementations of attention that take fewer queries than keys under any mask.
TAKE_FEWER_QUERIES = ("sdpa", "eager")


def num_tokens_read_by_heads(config: ViTCLSConfig) -> int | None:
    """How many tokens, from the first on, the classifiers read of the encoded sequence; None for all.

    All where patches are pooled, and where the last layer writes to a register (`NeuronMover`).
    """
    last_layer_moves_neurons = any(layer == config.num_hidden_layers - 1 for layer, _ in config.register_neurons or ())
    if config.pooling != "cls" or last_layer_moves_neurons:
        return None
    layout = config.token_layout
    return layout.distillation.stop if config.has_distillation_head else layout.cls.stop


def num_tokens_wanted(num_tokens_read: int | None, config: ViTCLSConfig, arguments: Mapping[str, Any]) -> int | None:
    """`num_tokens_read`; None, for all, if the arguments of forward ask to see more than what heads make of them."""
    for name in ("output_hidden_states", "output_attentions"):
        if arguments.get(name, getattr(config, name, False)):
            return None
    return num_tokens_read if config._attn_implementation in TAKE_FEWER_QUERIES else None

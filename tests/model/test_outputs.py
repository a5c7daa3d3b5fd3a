"""Outputs contain only tensors, which gather and pytrees handle."""

import torch
from helpers.tiny_models import (
    IMAGES,
    Kind,
    build_random,
    build_tiny_config,
    each_kind,
    raises_one_line,
)
from torch.utils._pytree import tree_leaves

from modeling_vitcls import ViTCLSModel
from modeling_vitcls.model.modeling_vitcls import (
    ViTCLSModelOutput,
)


@torch.no_grad()
@each_kind
def test_outputs_hold_tensors_only(kind: Kind) -> None:
    model = kind.build()
    model.set_attn_implementation("eager")
    output = model(IMAGES, **kind.inputs, output_hidden_states=True, output_attentions=True)
    assert {"hidden_states", "attentions"} <= output.keys()
    assert all(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(output.to_tuple()))


@torch.no_grad()
def test_a_tuple_ends_with_the_pooler_output() -> None:
    """As in the ViT of transformers."""
    model = build_random(ViTCLSModel)
    output = model(IMAGES)
    values = model(IMAGES, return_dict=False)
    assert isinstance(values, tuple)
    assert len(values) == 2
    assert torch.equal(values[0], output.last_hidden_state)
    assert torch.equal(values[-1], output.pooler_output)


def test_tokens_of_a_rebuilt_output_are_an_error() -> None:
    """An output that was gathered from several processes has lost its layout."""
    rebuilt = ViTCLSModelOutput(**ViTCLSModel(build_tiny_config())(IMAGES))
    with raises_one_line("rebuilt", "config.token_layout"):
        _ = rebuilt.tokens

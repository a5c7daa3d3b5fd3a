"""Random weights are the same in each conversion of a source."""

import torch
from torch import nn

from scripts.random_weights import randomize_weights


def build_model() -> nn.Module:
    return nn.ModuleDict(
        {
            "linear": nn.Linear(100, 40),
            "convolution": nn.Conv2d(4, 20, 5),
            "attention": nn.MultiheadAttention(64, 2),
            "norm": nn.LayerNorm(40),
        }
    )


def test_random_weights_are_reproducible() -> None:
    """A conversion with random weights builds the source twice."""
    torch.manual_seed(0)
    first = randomize_weights(build_model()).state_dict()
    torch.manual_seed(1)
    second = randomize_weights(build_model()).state_dict()
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())

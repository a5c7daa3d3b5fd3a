"""The distributions of random weights, by module and name."""

import torch
from torch import nn

from scripts.random_weights import randomize_weights


class Scale(nn.Module):
    """A module with parameters and buffers of all names that determine the distribution."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("lambda1", "gamma_1", "lambda_q1", "scale", "cls_token", "bias"):
            setattr(self, name, nn.Parameter(torch.zeros(4000)))
        self.bias_table = nn.Parameter(torch.zeros(40, 100))
        self.register_buffer("norm_std", torch.zeros(3, 1, 1000))
        self.register_buffer("running_var", torch.zeros(4000))
        self.register_buffer("norm_mean", torch.zeros(4000))
        self.register_buffer("index", torch.zeros(4000, dtype=torch.long))
        self.register_buffer("cache", torch.zeros(4000), persistent=False)


def build_model() -> nn.Module:
    return nn.ModuleDict(
        {
            "linear": nn.Linear(100, 4000),
            "convolution": nn.Conv2d(4, 200, 5),
            "attention": nn.MultiheadAttention(64, 2),
            "norm": nn.LayerNorm(4000),
            "own": Scale(),
        }
    )


def test_random_weights_are_reproducible() -> None:
    """A conversion with random weights builds the source twice."""
    torch.manual_seed(0)
    first = randomize_weights(build_model()).state_dict()
    torch.manual_seed(1)
    second = randomize_weights(build_model()).state_dict()
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_each_kind_of_weight_has_its_distribution() -> None:
    model = build_model()
    assert randomize_weights(model) is model
    assert not model.training

    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    scales = {
        "norm.weight",
        *(f"own.{name}" for name in ("lambda1", "gamma_1", "scale", "norm_std", "running_var")),
    }
    stds = {
        "linear.weight": 0.1,
        "convolution.weight": 0.1,
        "attention.in_proj_weight": 1 / 8,
        "attention.out_proj.weight": 1 / 8,
        "own.lambda_q1": 0.1,
        **dict.fromkeys(("own.cls_token", "own.bias_table", "own.norm_mean"), 0.5),
    }
    constants = {"own.index", "own.cache"}
    for name, weight in weights.items():
        if name in constants:
            assert not weight.any(), name
        elif name in scales:
            assert 0.5 <= weight.min() < 0.51, name
            assert 1.49 < weight.max() <= 1.5, name
        else:
            torch.testing.assert_close(
                weight.std(), torch.tensor(stds.get(name, 0.2)), rtol=0.15, atol=0
            )
            assert weight.mean().abs() < 0.1, name

"""The relative position bias, compared with loops over pairs of tokens.

Interpolation is written out by hand.

tests/model/test_tokens.py tests masks and the scopes of CLS tokens, and tests/model/test_gates.py
tests gates.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import build_tiny_config, randomize

from modeling_vitcls.model.attention_masks_vitcls import RelativePositionBias, TokenGates


FIELDS: dict[str, Any] = {
    "num_cls_tokens": 1,
    "num_register_tokens": 2,
    "attn_implementation": "sdpa",
}
NUM_SPECIAL = 3
GRID = (3, 5)  # rows and columns of patches of the tables


def interpolate(values: np.ndarray, position: float) -> np.ndarray:
    """Interpolate values [n, ...] linearly between two indices; the ends are constant."""
    position = min(max(position, 0), len(values) - 1)
    lower = min(math.floor(position), len(values) - 2)
    return values[lower] * (1 - (position - lower)) + values[lower + 1] * (position - lower)


def compute_bias(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return the bias [N, N, heads] of the pairs of tokens for a table [distances + 3, heads]."""
    (rows, columns), (table_rows, table_columns) = grid, (2 * size - 1 for size in GRID)
    by_distance = table[:-3].reshape(table_rows, table_columns, -1)
    special_to_patch, patch_to_special, special_to_special = table[-3:]
    tokens: list[Any] = [None] * NUM_SPECIAL + [(y, x) for y in range(rows) for x in range(columns)]

    def resample(values: np.ndarray, index: int, size: int) -> np.ndarray:
        return interpolate(values, (index + 0.5) * len(values) / size - 0.5)

    def look_up(query: Any, key: Any) -> np.ndarray:
        if query is None:
            return special_to_special if key is None else special_to_patch
        if key is None:
            return patch_to_special
        row = resample(by_distance, query[0] - key[0] + rows - 1, 2 * rows - 1)
        return resample(row, query[1] - key[1] + columns - 1, 2 * columns - 1)

    return np.array([[look_up(query, key) for key in tokens] for query in tokens])


@pytest.mark.parametrize("grid", [GRID, (2, 5), (4, 3)], ids=str)
@pytest.mark.parametrize("sharing", ["shared", "layer"])
@torch.no_grad()
def test_the_bias_depends_on_the_distance_of_two_patches(
    sharing: str, grid: tuple[int, int]
) -> None:
    """For other grids than the grid of the tables, the tables are interpolated."""
    config = build_tiny_config(
        **FIELDS, relative_position_bias=sharing, image_size=[8 * size for size in GRID]
    )
    module = randomize(RelativePositionBias(config))
    num_tokens = NUM_SPECIAL + math.prod(grid)
    found = module(torch.zeros(2, num_tokens, 16), None, grid)
    biases = [found] if sharing == "shared" else found

    assert (
        len(module.tables)
        == len(biases)
        == (1 if sharing == "shared" else config.num_hidden_layers)
    )

    for bias, table in zip(biases, module.tables, strict=True):
        # [heads, N, N]
        expected = torch.from_numpy(compute_bias(table.double().numpy(), grid)).permute(2, 0, 1)
        assert bias.shape == (1, *expected.shape)
        assert bias.dtype == torch.float32
        assert (bias[0] - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_masks_hide_tokens_whatever_their_bias_is() -> None:
    """A boolean mask and an additive mask have the same effect on the softmax."""
    config = build_tiny_config(
        **FIELDS, relative_position_bias="shared", gated_tokens={"registers": 1}
    )
    module = randomize(RelativePositionBias(config))
    gates = TokenGates(config)
    gates.gates.fill_(0.25 * TokenGates.OPEN)
    states = torch.zeros(2, NUM_SPECIAL + 16, 16)
    is_visible = torch.rand(2, 1, 1, NUM_SPECIAL + 16) < 0.5
    is_visible[..., :4] = True
    additive = torch.zeros(is_visible.shape).masked_fill(
        ~is_visible, torch.finfo(torch.float32).min
    )
    weights = module(states, None, (4, 4)).exp() * is_visible  # [2, heads, N, N]
    weights[..., 2] *= 0.25  # the last register is gated
    expected = weights / weights.sum(dim=-1, keepdim=True)

    for mask in (is_visible, additive):
        found = gates(states, module(states, mask, (4, 4))).softmax(dim=-1)
        assert (found - expected).abs().max() <= 1e-6

"""The relative position bias: what it depends on, and masks.

tests/model/test_tokens.py tests masks and the scopes of CLS tokens, and
tests/model/test_fade_in.py tokens that are faded in.
"""

import pytest
import torch
from helpers.tiny_models import build_tiny_config, get_largest_difference, randomize
from torch.testing import assert_close

from modeling_vitcls.model.attention_masks_vitcls import RelativePositionBias, TokenFadeIn


pytestmark = pytest.mark.usefixtures("no_grad")

FIELDS = {
    "num_cls_tokens": 1,
    "num_register_tokens": 2,
    "attn_implementation": "sdpa",
}
NUM_SPECIAL = 3
GRID = (3, 5)  # rows and columns of patches of the tables


@pytest.mark.parametrize(("sharing", "num_tables"), [("shared", 1), ("layer", 2)])
def test_all_special_tokens_have_the_bias_of_one(sharing: str, num_tables: int) -> None:
    """The tests in peers/ compare that of patches with BEiT, also for other grids than that of the tables."""
    module = randomize(
        RelativePositionBias(build_tiny_config(**FIELDS, relative_position_bias=sharing))
    )
    found = module(torch.zeros(2, NUM_SPECIAL + 16, 16), None, (4, 4))
    biases = [found] if sharing == "shared" else found
    assert len(module.tables) == len(biases) == num_tables
    for bias in biases:
        assert bias.dtype == torch.float32
        of_special, to_special = bias[0, :, :NUM_SPECIAL], bias[0, :, NUM_SPECIAL:, :NUM_SPECIAL]
        assert torch.equal(of_special, of_special[:, :1].expand_as(of_special))
        assert torch.equal(to_special, to_special[:, :1, :1].expand_as(to_special))


def test_tables_are_resampled_along_their_own_axes() -> None:
    """A bias that depends on the rows only does so for another grid."""
    sizes = {"image_size": [8 * size for size in GRID], "relative_position_bias": "shared"}
    module = RelativePositionBias(build_tiny_config(**FIELDS, **sizes))
    module.tables[:, :-3] = torch.arange(5.0).repeat_interleave(9)[:, None]
    bias = module(torch.zeros(1, NUM_SPECIAL + 12, 16), None, (4, 3))
    pairs = bias[0, :, NUM_SPECIAL:, NUM_SPECIAL:].unflatten(2, (4, 3)).unflatten(1, (4, 3))
    assert_close(pairs, pairs[:, :, :1, :, :1].expand_as(pairs))
    assert pairs.std() > 0.1


def test_masks_hide_tokens_whatever_their_bias_is() -> None:
    """A boolean mask and an additive mask have the same effect on the softmax."""
    config = build_tiny_config(
        **FIELDS, relative_position_bias="shared", fading_tokens={"registers": 1}
    )
    module = randomize(RelativePositionBias(config))
    fade_in = TokenFadeIn(config)
    fade_in.progress.fill_(fade_in.FULL // 4)
    states = torch.zeros(2, NUM_SPECIAL + 16, 16)
    is_visible = torch.rand(2, 1, 1, NUM_SPECIAL + 16) < 0.5
    is_visible[..., :4] = True
    additive = torch.zeros(is_visible.shape).masked_fill(
        ~is_visible, torch.finfo(torch.float32).min
    )
    weights = module(states, None, (4, 4)).exp() * is_visible  # [2, heads, N, N]
    weights[..., 2] *= 0.25  # the last register is faded in
    expected = weights / weights.sum(dim=-1, keepdim=True)

    for mask in (is_visible, additive):
        found = fade_in(states, module(states, mask, (4, 4))).softmax(dim=-1)
        assert get_largest_difference(found, expected) <= 1e-6

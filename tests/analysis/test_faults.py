"""Identical tokens, and tokens that training did not move."""

import pytest
import torch

from modeling_vitcls.analysis.inspection import find_identical_tokens, find_unmoved_tokens


def build_states(num_tokens: int = 4, num_images: int = 6) -> torch.Tensor:
    return torch.randn(num_images, num_tokens, 16)


@pytest.mark.parametrize(("noise", "is_found"), [(0.0, True), (1e-3, True), (0.1, False)])
def test_tokens_that_differ_less_than_images_do_are_identical(noise: float, is_found: bool) -> None:
    states = build_states()
    states[:, 3] = states[:, 1] + noise * build_states()[:, 0]
    found = find_identical_tokens({2: states}, [2, 2, 2, 2])
    assert found == ({1: (3, 2), 3: (1, 2)} if is_found else {})


def test_tokens_are_compared_in_the_last_layer_in_which_both_are_used() -> None:
    """In the last layer, two registers are equal, but only CLS is read there."""
    different, equal = build_states(3), build_states(3)
    equal[:, 2] = equal[:, 1]
    assert find_identical_tokens({1: different, 2: equal}, [2, 1, 1]) == {}
    assert find_identical_tokens({1: equal, 2: different}, [2, 1, 1]) == {1: (2, 1), 2: (1, 1)}


def test_one_large_channel_of_all_tokens_hides_no_difference() -> None:
    """Large models have massive activations: in one channel, all tokens have the same value."""
    states = build_states()
    states[..., 3] = 1e4
    assert find_identical_tokens({1: states}, [1, 1, 1, 1]) == {}


@pytest.mark.parametrize(
    ("movement", "expected"),
    [
        ({"cls[0]": 1.0, "registers[0]": 0.0}, [1]),
        ({"cls[0]": 0.0, "registers[0]": 0.0}, []),  # no token was trained
        ({"cls[0]": 1.0}, []),  # unknown
    ],
)
def test_a_token_that_did_not_move_while_others_did_is_found(
    movement: dict[str, float], expected: list[int]
) -> None:
    assert find_unmoved_tokens({"cls": [0], "registers": [1]}, movement) == expected

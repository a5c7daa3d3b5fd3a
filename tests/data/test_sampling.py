"""Sampling: the order of images, their distribution, class weights, and random numbers."""

import numpy as np
import torch
from helpers.batch_plans import build_plan
from pytest import approx

from modeling_vitcls.data.sampling import (
    BatchPlan,
    compute_class_weights,
    derive_seed,
    draw_numbers,
)


def list_keys(plan: BatchPlan, process: int = 0) -> list[tuple[int, int]]:
    return [key for batch in plan.iterate_keys(process) for key in batch]


# The plan -----------------------------------------------------------------------------------------


def test_every_epoch_contains_each_image_once() -> None:
    plan = build_plan(10, epochs=3, batch_size=4)
    keys = list_keys(plan)
    assert plan.num_steps == 8  # 3 x 10 images in batches of 4, rounded up
    for epoch in range(3):
        assert sorted(index for at, index in keys if at == epoch) == list(range(10))
    assert [index for at, index in keys if at == 0] != [index for at, index in keys if at == 1]
    shared = build_plan(10, epochs=3, batch_size=2, gradient_accumulation_steps=2, num_processes=2)
    assert shared.num_steps == 4
    assert shared.count_epochs(2) == 1.6  # 8 images per step


def test_batches_do_not_depend_on_their_division() -> None:
    whole = build_plan(10, max_steps=7, batch_size=8)
    shared = build_plan(
        10, max_steps=7, batch_size=1, gradient_accumulation_steps=4, num_processes=2
    )
    parts = [list(shared.iterate_keys(process)) for process in (0, 1)]
    for step, batch in enumerate(whole.iterate_keys(process_index=0)):
        pieces = [key for part in parts for piece in part[4 * step : 4 * step + 4] for key in piece]
        assert sorted(pieces) == sorted(batch)


def test_the_order_of_images_never_changes() -> None:
    """A run that is resumed with a later version of the package uses the same images."""
    expected = []
    for epoch in range(5):
        generator = torch.Generator().manual_seed(derive_seed(3, epoch))
        expected.append(
            [(epoch, index) for index in torch.randperm(8, generator=generator).tolist()]
        )
    assert list(build_plan(8, epochs=5, batch_size=8, seed=3).iterate_keys(0)) == expected


def test_weights_are_inverse_to_frequency_with_mean_one() -> None:
    labels = [0] * 6 + [1] * 3 + [3]
    weights = compute_class_weights(labels, 5)
    assert weights.tolist() == approx([10 / 18, 10 / 9, 0, 10 / 3, 0])
    assert sum(weights[label].item() for label in labels) / 10 == approx(1)


# Random numbers -----------------------------------------------------------------------------------


def mix_in_python(counter: int) -> int:
    """Return the output of SplitMix64 for one counter value, computed with Python integers."""
    counter = ((counter ^ (counter >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    counter = ((counter ^ (counter >> 27)) * 0x94D049BB133111EB) % 2**64
    return counter ^ (counter >> 31)


def test_random_numbers_never_change() -> None:
    """A later version of the package holds out the same images."""
    gamma = 0x9E3779B97F4A7C15
    assert mix_in_python(gamma) == 0xE220A8397B1DCDAF  # first output of SplitMix64 for the seed 0
    assert derive_seed(3, 1) == 5712964121383671236
    keys = [12, 5_000_000]
    found = draw_numbers(np.array(keys), 3).tolist()
    starts = [mix_in_python(derive_seed(3) ^ mix_in_python(key + gamma)) for key in keys]
    assert found == [mix_in_python((start + gamma) % 2**64) for start in starts]

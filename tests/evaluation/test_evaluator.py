"""The evaluator: every image is counted once, and unreadable images are named."""

from typing import Any

import pytest
import torch
from helpers.evaluation_results import close, compute_outputs
from helpers.evaluation_worker import (
    NUM_IMAGES,
    UNREADABLE,
    build_classifier,
    build_evaluator,
    build_labeled_images,
)
from helpers.tiny_models import raises_one_line
from pytest import MonkeyPatch

from modeling_vitcls.inference.image_pass import prepare_ahead
from modeling_vitcls.runtime.distributed import build_accelerator


def test_unreadable_images_are_named_once_and_not_counted(by_one_process: dict[str, Any]) -> None:
    said: list[str] = []
    pictures = build_labeled_images("single", unreadable=UNREADABLE)
    evaluator = build_evaluator("single", build_accelerator(), pictures, warn=said.append)
    metrics = evaluator(build_classifier("single"))
    assert metrics["num_images"] == NUM_IMAGES - 4
    assert metrics["num_unreadable_images"] == 4
    assert evaluator(build_classifier("single")) == metrics == by_one_process["unreadable"]
    assert len(said) == 4
    assert all(f"'{index}.png'" in line for index, line in zip(UNREADABLE, said, strict=True))

    outputs, labels = compute_outputs("single")
    good = [index for index in range(NUM_IMAGES) if index not in UNREADABLE]
    right = outputs.logits.argmax(1)[good] == torch.tensor(labels)[good]
    assert metrics["accuracy"] == close(right.float().mean().item())


def test_too_many_unreadable_images_are_an_error(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr("modeling_vitcls.data.images.MAX_UNREADABLE_IMAGES", 3)
    accelerator = build_accelerator()
    pictures = build_labeled_images("single", unreadable=UNREADABLE)
    evaluator = build_evaluator("single", accelerator, pictures)
    with raises_one_line("more than 3 images cannot be read", "'12.png'"):
        evaluator(build_classifier("single"))
    evaluator = build_evaluator(
        "single", accelerator, build_labeled_images("single", number=2, unreadable=(0, 1))
    )
    with pytest.raises(ValueError, match="none of the 2 images can be read"):
        evaluator(build_classifier("single"))


def test_evaluation_draws_no_random_numbers() -> None:
    """Otherwise, training would depend on the steps at which it is evaluated."""
    evaluator = build_evaluator("single", build_accelerator(), num_workers=1)
    model = build_classifier("single")
    before = torch.get_rng_state()
    evaluator(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_that_prepare_images_start_no_further_threads() -> None:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        counts = list(prepare_ahead(lambda _: torch.get_num_threads(), range(8), 2, num_ahead=4))
        assert counts == [1] * 8
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(num_threads)

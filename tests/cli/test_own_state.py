"""The Python functions compute the same under any torch defaults, and leave random numbers alone."""

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_options import TINY
from PIL import Image

from modeling_vitcls import evaluate, finetune, predict


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

RUN = {"max_steps": 2, "batch_size": 4, "num_workers": 0, "report": False}
FLAGS: dict[str, Any] = vars(TINY) | RUN


def build_photos() -> list[tuple[Image.Image, str]]:
    """Return photographs of two classes: dark and bright noise."""
    generator = np.random.default_rng(0)
    return [
        (
            Image.fromarray(generator.integers(low, low + 128, (20, 30, 3), dtype=np.uint8)),
            "dark" if low == 0 else "bright",
        )
        for low in (0, 128)
        for _ in range(10)
    ]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS: dict[str, Callable[[], Any]] = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "meta": lambda: torch.device("meta"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the results of a run with torch's defaults."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return folder, finetune(dataset=build_photos(), output_dir=folder, **FLAGS)


@pytest.mark.parametrize("setting", SETTINGS)
def test_finetune_trains_the_same_weights_under_any_torch_default(
    setting: str, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, results = trained
    with SETTINGS[setting]():
        again = finetune(dataset=build_photos(), output_dir=tmp_path / "run", **FLAGS)
    assert again["weights_sha256"] == results["weights_sha256"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_predict_and_evaluate_answer_the_same_under_any_torch_default(
    setting: str, trained: tuple[Path, dict[str, Any]]
) -> None:
    folder, _ = trained
    images = [image for image, _ in build_photos()]
    expected = predict(folder, images)
    loss = evaluate(folder, build_photos(), split="train", num_workers=0)["loss"]

    with SETTINGS[setting]():
        assert predict(folder, images) == expected
        assert evaluate(folder, build_photos(), split="train", num_workers=0)["loss"] == loss


def read_random_numbers() -> tuple[float, float, float]:
    """Return the next random numbers of torch, NumPy and Python, without drawing them."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    numbers = torch.rand(1).item(), np.random.rand(), random.random()
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    return numbers


def test_a_run_leaves_the_random_numbers_of_its_caller(tmp_path: Path) -> None:
    """Also a run that fails."""
    numbers = read_random_numbers()
    finetune(dataset=build_photos(), output_dir=tmp_path / "run", **FLAGS)
    assert read_random_numbers() == numbers

    with pytest.raises(ValueError, match="learning_rate"):
        finetune(dataset=build_photos(), output_dir=tmp_path / "other", **FLAGS, learning_rate=-1.0)
    with pytest.raises(ValueError, match="overwrite"):
        finetune(dataset=build_photos(), output_dir=tmp_path / "run", **FLAGS)
    assert read_random_numbers() == numbers

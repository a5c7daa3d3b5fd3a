"""The commands as Python functions have the results of the command line, whatever torch's defaults are.

Datasets may be in memory, and errors name the argument.
"""

import contextlib
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.photo_folders import draw_noise
from helpers.tiny_models import raises_one_line
from helpers.tiny_options import TINY
from PIL import Image
from pytest import approx

from modeling_vitcls import Predictor, evaluate, finetune, inspect_tokens, predict
from modeling_vitcls.cli.api import build_options
from modeling_vitcls.runtime.files import read_json
from modeling_vitcls.training.options import FinetuneOptions


REQUIRED = {"model": "m", "dataset": "digits", "output_dir": "out"}
RUN = {"max_steps": 2, "batch_size": 4, "num_workers": 0, "report": False}
FLAGS = vars(TINY) | RUN


def build_photos() -> list[tuple[Image.Image, str]]:
    """Return noise of two classes."""
    photos = draw_noise(*[(20, 30)] * 20)
    return [(photo, ("cat", "dog")[index // 10]) for index, photo in enumerate(photos)]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "meta": lambda: torch.device("meta"),
}


@pytest.fixture(scope="module")
def trained(module_path: Path) -> Path:
    """Return the folder of a run with torch's defaults."""
    finetune(dataset=build_photos(), output_dir=module_path / "run", **FLAGS)
    return module_path / "run"


@pytest.mark.parametrize("setting", SETTINGS)
def test_commands_have_the_same_results_under_any_torch_default(
    setting: str, trained: Path, tmp_path: Path
) -> None:
    images = [image for image, _ in build_photos()]
    expected = predict(trained, images)
    loss = evaluate(trained, build_photos(), split="train", num_workers=0)["loss"]

    with SETTINGS[setting]():
        again = finetune(dataset=build_photos(), output_dir=tmp_path / "run", **FLAGS)
        assert predict(trained, images) == expected
        assert evaluate(trained, build_photos(), split="train", num_workers=0)["loss"] == loss
    assert again == read_json(tmp_path / "run/results.json")
    assert again["weights_sha256"] == read_json(trained / "results.json")["weights_sha256"]


def read_random_states() -> tuple[Any, ...]:
    """Return the states of the random numbers of torch, NumPy and Python."""
    return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()


def test_a_run_leaves_the_random_numbers_of_its_caller(tmp_path: Path) -> None:
    """Also a run that fails."""
    states = read_random_states()
    finetune(dataset=build_photos(), output_dir=tmp_path / "run", **FLAGS)
    assert read_random_states() == states

    with pytest.raises(ValueError, match="learning_rate"):
        finetune(dataset=build_photos(), output_dir=tmp_path / "other", **FLAGS, learning_rate=-1.0)
    with pytest.raises(ValueError, match="overwrite"):
        finetune(dataset=build_photos(), output_dir=tmp_path / "run", **FLAGS)
    assert read_random_states() == states


# Functions ----------------------------------------------------------------------------------------


def test_data_in_memory_is_evaluated_on_its_held_out_images(trained: Path) -> None:
    results = read_json(trained / "results.json")
    evaluated = evaluate(trained, build_photos(), num_workers=0)
    assert evaluated["accuracy"] == results["accuracy"]
    assert evaluated["dataset"] == results["dataset"]
    assert evaluated["mixed_precision"] == "no"
    seconds = evaluated["num_images"] / evaluated["images_per_second"]
    assert evaluated["seconds"] == approx(seconds, abs=0.006)  # the duration is rounded


@pytest.mark.parametrize("image", [np.zeros((12, 10, 3)), Image.new("RGB", (10, 12))])
def test_inspection_requires_paths(image: Any) -> None:
    with raises_one_line("PathLike", error=TypeError):
        inspect_tokens("m", image)


def test_every_token_has_an_effect_and_a_report_is_written(trained: Path, tmp_path: Path) -> None:
    photos, labels = zip(*build_photos(), strict=True)
    dataset = Dataset.from_dict({"image": photos, "label": labels})
    inspection = inspect_tokens(
        trained, dataset, output=tmp_path / "report.html", max_images=8, num_images=1
    )
    tokens = {effect["token"] for effect in inspection.effects}
    assert tokens == {"CLS", "register 1", "register 2", "all register tokens"}
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (partial(finetune, **REQUIRED), "learning_rat"),
        (partial(finetune, **REQUIRED), "config"),
        (partial(Predictor, "m"), "top"),
        (partial(Predictor, "m"), "dataset"),
    ],
)
def test_an_unknown_argument_is_named(function: Any, name: str) -> None:
    with raises_one_line(name, error=TypeError):
        function(**{name: "digits"})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("auto_augment", "random", ["trivial"]),
        ("learning_rate", "1e-4", []),
        ("learning_rate", True, []),
        ("image_size", "large", []),
    ],
)
def test_a_wrong_value_names_its_argument(name: str, value: Any, words: list[str]) -> None:
    with raises_one_line(name, *words):
        build_options(FinetuneOptions, **REQUIRED, **{name: value})


def test_predict_names_an_argument_that_is_missing_or_has_no_effect() -> None:
    with raises_one_line("`images`"):
        predict("m")
    with raises_one_line("`output`", "to_csv"):
        predict("m", "photo.jpg", output="rows.csv")
    with raises_one_line("`answers`"):
        predict("m", "photo.jpg", answers=("answers.csv",))

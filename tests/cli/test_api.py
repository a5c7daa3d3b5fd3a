"""The commands as Python functions have the results of the command line.

Datasets may be in memory, and errors name the argument.
"""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import torch
from helpers.accelerate_state import reset_accelerate
from helpers.tiny_models import raises_one_line
from PIL import Image

from modeling_vitcls import evaluate, finetune, inspect_tokens, look, predict
from modeling_vitcls.cli.api import build_options
from modeling_vitcls.runtime.flags import get_flag_fields
from modeling_vitcls.training.options import FinetuneOptions


pytestmark = pytest.mark.usefixtures("fresh_accelerate", "few_digits")

MODEL: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_register_tokens": 1,
    "num_workers": 0,
}
REQUIRED: dict[str, Any] = {"model": "m", "dataset": "digits", "output_dir": "out"}
RUN: dict[str, Any] = {"max_steps": 2, "batch_size": 32, "report": False}


def get_digits() -> list[tuple[Image.Image, str]]:
    """Return scikit-learn's digits as images with labels."""
    digits = sklearn.datasets.load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    return [
        (Image.fromarray(image), str(label))
        for image, label in zip(pixels, digits.target, strict=True)
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return a model that was fine-tuned on digits in memory, and its results."""
    reset_accelerate()
    folder = tmp_path_factory.mktemp("api") / "run"
    return folder, finetune("vitcls-tiny", get_digits(), folder, **MODEL, **RUN)


def test_data_in_memory_is_evaluated_on_its_held_out_images(
    trained: tuple[Path, dict[str, Any]],
) -> None:
    folder, results = trained
    assert results == json.loads((folder / "results.json").read_text(encoding="utf-8"))

    evaluated = evaluate(folder, get_digits(), num_workers=0)
    assert evaluated["accuracy"] == results["accuracy"]
    assert evaluated["dataset"] == results["dataset"]
    assert evaluated["mixed_precision"] == "no"
    seconds = evaluated["num_images"] / evaluated["images_per_second"]
    assert evaluated["seconds"] == pytest.approx(seconds, abs=0.006)  # the duration is rounded


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 3), (3, 12, 10)], ids=str)
def test_one_image_is_one_row_and_a_batch_one_row_per_image(
    shape: tuple[int, ...], trained: tuple[Path, dict[str, Any]]
) -> None:
    folder, _ = trained
    pixels = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    rows = predict(folder, [pixels])
    assert rows[0]["error"] is None
    assert predict(folder, pixels) == rows
    assert predict(folder, torch.from_numpy(pixels)) == rows
    if len(shape) == 3:
        assert len(predict(folder, np.stack([pixels, pixels]))) == 2
        assert len(predict(folder, [np.stack([pixels, pixels])])) == 2
    if shape[-1] == 3:
        assert predict(folder, Image.fromarray(pixels)) == rows


@pytest.mark.parametrize("image", [np.zeros((12, 10, 3)), Image.new("RGB", (10, 12))])
def test_inspection_requires_paths(image: Any) -> None:
    with raises_one_line("PathLike", error=TypeError):
        inspect_tokens("m", image)


def test_every_token_has_an_effect_and_a_report_is_written(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = trained
    inspection = inspect_tokens(
        folder, dataset="digits", output=tmp_path / "report.html", max_images=8, num_images=1
    )
    assert {token for token, _, _ in inspection.effects} == {"CLS", "register"}
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["learning_rat", "config"])
def test_an_unknown_argument_is_named(name: str, tmp_path: Path) -> None:
    with raises_one_line(name, error=TypeError):
        finetune("vitcls-tiny", "digits", tmp_path, **{name: "digits"})


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


@pytest.mark.parametrize("function", [finetune, evaluate, predict, inspect_tokens])
def test_the_docstring_of_a_function_names_the_class_of_its_flags(function: Any) -> None:
    (name,) = re.findall(r"`modeling_vitcls\.([\w.]+)Options`", function.__doc__)
    module, _, stem = name.rpartition(".")
    options = importlib.import_module(f"modeling_vitcls.{module}")
    assert get_flag_fields(getattr(options, f"{stem}Options")).keys() > {"model", "dataset"}


def test_look_writes_the_sheet_that_it_returns(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = trained
    image, _ = get_digits()[0]
    sheet = look(folder, image, output=tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as written:
        assert written.size == sheet.size
    with raises_one_line("`output=", ".png"):
        look(folder, image, output="sheet.pdf")


def test_missing_images_name_the_argument() -> None:
    with raises_one_line("`images`"):
        predict("m")

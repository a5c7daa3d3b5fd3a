"""A run stores class statistics, with which a class is added without the old images."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_options import build_tiny_options, run_to_folder
from PIL import Image

import modeling_vitcls
from modeling_vitcls import ViTCLSForImageClassification, predict


pytestmark = [
    pytest.mark.integration,
    pytest.mark.usefixtures("fresh_accelerate", "few_digits"),
]

add_class = partial(modeling_vitcls.add_class, num_workers=0)
STRIPES = np.zeros((30, 8, 8), np.uint8)
STRIPES[:, :, ::2] = np.arange(200, 230, dtype=np.uint8)[:, None, None]
NEW = [(Image.fromarray(pixels), "stripes") for pixels in STRIPES]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, few_digits: None) -> Path:
    """Return the folder of a run with steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return run_to_folder(build_tiny_options(folder, "digits", max_steps=3))


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """Return the folder of a frozen run of the trained encoder."""
    folder = tmp_path_factory.mktemp("frozen") / "run"
    flags = {"model": str(trained), "trainable": "head", "probe": True}
    return run_to_folder(build_tiny_options(folder, "digits", **flags))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """Return the folder of a run with LoRA, whose weights are merged."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    flags = {"model": str(trained), "trainable": "lora", "max_steps": 2}
    return run_to_folder(build_tiny_options(folder, "digits", **flags))


@pytest.fixture(params=["trained", "frozen", "adapted"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@torch.no_grad()
def compute_logits(folder: Path) -> torch.Tensor:
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return ViTCLSForImageClassification.from_pretrained(folder).eval()(images).logits


def test_a_class_is_added_without_old_images(folder: Path, tmp_path: Path) -> None:
    record = add_class(folder, NEW, tmp_path / "new")
    assert record["result"]["recall"] > 0.9
    assert predict(tmp_path / "new", [NEW[0][0]])[0]["label"] == "stripes"
    assert torch.equal(compute_logits(tmp_path / "new")[:, :10], compute_logits(folder))


def test_an_added_class_is_known(folder: Path, tmp_path: Path) -> None:
    """The distance of its images is small, and not only to the eye of the classifier."""
    add_class(folder, NEW, tmp_path / "new")
    before, after = (
        predict(each, [NEW[0][0]])[0]["distance"] for each in (folder, tmp_path / "new")
    )
    assert after < before

"""Learning is real: the recipes reach what they promise, on real handwritten digits. Minutes long, so all are slow."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.train_cnn_teacher import train_cnn_teacher


REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "scripts"
RECIPE = SCRIPTS / "recipes" / "digits.yaml"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

pytestmark = pytest.mark.slow


def results_of(output: Path, *flags: object) -> dict[str, Any]:
    """Fine-tune by the digits' recipe with further flags; what results.json says."""
    command = [sys.executable, SCRIPTS / "finetune.py", "--config", RECIPE, "--output-dir", output, *flags]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--pooling", "mean", "--num-cls-tokens", 0],
        ["--pooling", "attention", "--num-cls-tokens", 0],
    ],
    ids=["cls", "mean", "attention"],
)
def test_each_pooling_learns_the_digits(tmp_path: Path, flags: list[object]) -> None:
    results = results_of(tmp_path, *flags)
    assert results["num_images"] == 372
    assert results["accuracy"] >= 0.97


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_cnn_teaches_the_distillation_token(tmp_path: Path, kind: str) -> None:
    assert train_cnn_teacher("digits", tmp_path / "teacher") >= 0.98
    results = results_of(tmp_path / "student", "--teacher", tmp_path / "teacher", "--distillation", kind)
    assert results["token_layout"]["distillation"] == 1
    assert results["accuracy"] >= 0.97
    assert min(results["cls_accuracy"], results["distillation_accuracy"]) >= 0.96
    assert results["token_movement"]["distillation[0]"] > 0


def test_a_larger_vit_teaches_too(tmp_path: Path) -> None:
    """The teacher is made by the same script."""
    teacher = results_of(tmp_path / "teacher", "--hidden-size", 96, "--intermediate-size", 384)
    results = results_of(tmp_path / "student", "--teacher", tmp_path / "teacher")
    assert results["num_parameters"] < teacher["num_parameters"]
    assert results["accuracy"] >= 0.97

"""The recipes reach their stated accuracy on real handwritten digits.

All tests are slow: they take minutes.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from helpers.fresh_processes import SCRIPT_ENVIRONMENT, run_python
from helpers.scripts_in_process import SCRIPTS

from modeling_vitcls.runtime.files import read_json
from scripts.studies.train_cnn_teacher import train_cnn_teacher


RECIPE = SCRIPTS / "recipes/digits.yaml"

pytestmark = pytest.mark.slow


def finetune_digits(output: Path, *flags: object) -> dict[str, Any]:
    """Fine-tune with the digits recipe and further flags; return results.json."""
    program = [SCRIPTS / "finetune.py", "--config", RECIPE, "--output-dir", output]
    run_python(*program, *flags, environment=os.environ | SCRIPT_ENVIRONMENT)
    return read_json(output / "results.json")


def test_attention_pooling_learns_the_digits(tmp_path: Path) -> None:
    """The run of README.md in test_readme.py has a CLS token. On a CPU with AVX2: 96.9%."""
    results = finetune_digits(tmp_path, "--pooling", "attention", "--num-cls-tokens", 0)
    assert results["num_images"] == 359
    assert results["accuracy"] >= 0.96


def test_a_cnn_trains_the_distillation_token(tmp_path: Path) -> None:
    assert train_cnn_teacher("digits", tmp_path / "teacher") >= 0.98
    results = finetune_digits(
        tmp_path / "student",
        *("--teacher", tmp_path / "teacher", "--distillation", "hard"),
        *("--num-distillation-tokens", "1"),
    )
    assert results["token_layout"]["distillation"] == 1
    assert results["accuracy"] >= 0.97
    assert min(results["cls_accuracy"], results["distillation_accuracy"]) >= 0.96
    assert results["token_movement"]["distillation[0]"] > 0

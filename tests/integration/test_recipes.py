"""The recipes reach their stated accuracy on real handwritten digits.

All tests are slow: they take minutes.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.fresh_processes import SCRIPT_ENVIRONMENT, run_python
from transformers import VisionTextDualEncoderModel, VisionTextDualEncoderProcessor

from scripts.studies.train_cnn_teacher import train_cnn_teacher
from scripts.studies.train_dual_encoder import train_dual_encoder


SCRIPTS = Path(__file__).parents[2] / "scripts"
RECIPE = SCRIPTS / "recipes" / "digits.yaml"

pytestmark = pytest.mark.slow


def finetune_digits(output: Path, *flags: object) -> dict[str, Any]:
    """Fine-tune with the digits recipe and further flags; return results.json."""
    program = [SCRIPTS / "finetune.py", "--config", RECIPE, "--output-dir", output]
    run_python(*program, *flags, environment=os.environ | SCRIPT_ENVIRONMENT)
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


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


def test_a_dual_encoder_classifies_digits_by_captions(tmp_path: Path) -> None:
    assert train_dual_encoder("digits", tmp_path / "dual", patch_size=8, epochs=20) >= 0.9

    model = VisionTextDualEncoderModel.from_pretrained(tmp_path / "dual")
    assert type(model.vision_model).__name__ == "ViTCLSModel"

    processor = VisionTextDualEncoderProcessor.from_pretrained(tmp_path / "dual")
    tokens = processor(text=["a photo of the 3"])["input_ids"][0]

    assert processor.tokenizer.convert_ids_to_tokens(tokens) == [
        "[CLS]",
        "a",
        "photo",
        "of",
        "the",
        "3",
    ]

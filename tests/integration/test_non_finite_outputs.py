"""Outputs that are NaN are an error of every command that would publish a number about them."""

from pathlib import Path

import pytest
import torch
from helpers.command_in_process import check_error, run_here
from helpers.photo_folders import write_photos
from helpers.tiny_models import PROCESSOR, build_random, save_both
from pytest import CaptureFixture, MonkeyPatch

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel


TRAINING = (
    "--model vitcls-tiny --hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 "
    "--image-size 32 --patch-size 8 --max-steps 2 --batch-size 4"
)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """Work in a folder with `photos`, and a `classifier` and an `encoder` of which one weight is NaN."""
    monkeypatch.chdir(tmp_path)
    write_photos(Path("photos"), range(8))
    labels = {"id2label": {0: "cat", 1: "dog"}, "num_labels": 2}
    for model, weight, folder in (
        (build_random(ViTCLSForImageClassification, **labels), "classifier.weight", "classifier"),
        (build_random(ViTCLSModel), "layernorm.weight", "encoder"),
    ):
        model.get_parameter(weight).data.fill_(torch.nan)
        save_both(model, Path(folder), PROCESSOR)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "evaluate --model classifier --output results.json --per-image rows.parquet",
            ["16 of 16 images"],
        ),
        (f"finetune {TRAINING} --output-dir new --teacher classifier", ["4 of 4", "classifier"]),
        ("finetune --model encoder --output-dir new --batch-size 4 --trainable head", ["images"]),
    ],
    ids=["evaluate", "teacher", "probe"],
)
@pytest.mark.usefixtures("models")
def test_a_command_has_no_result_of_outputs_that_are_not_finite(
    command: str, words: list[str], capsys: CaptureFixture
) -> None:
    assert run_here(*command.split(), "--dataset", "photos", "--num-workers", "0") == 1
    check_error(capsys, "not finite", *words)
    for file in ("new/model.safetensors", "results.json", "rows.parquet"):
        assert not Path(file).exists()

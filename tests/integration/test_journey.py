"""From images to the Hub with the `vitcls` command: pretrain, finetune, evaluate, push and predict on real digits.

The other commands have such tests in their folders: convert, export, inspect, space, benchmark, demo and study.
"""

import json
from pathlib import Path

import pytest
from helpers.accelerate_state import reset_accelerate
from helpers.command_in_process import run_here
from helpers.local_hub import LocalHub
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from modeling_vitcls import predict
from modeling_vitcls.files import read_json


pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("fresh_accelerate", "few_digits", "fast_verification")]

SIZES = "--hidden-size 32 --num-hidden-layers 2 --num-attention-heads 2 --intermediate-size 64 --num-register-tokens 1"
SIZES += " --image-size 16 --patch-size 4"
RUN = "--dataset digits --num-workers 0 --batch-size 32 --no-report"


def run_command(*arguments: object) -> None:
    reset_accelerate()
    assert run_here(*map(str, arguments)) == 0


def test_from_images_to_the_hub(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "400")
    encoder, model, metrics = tmp_path / "encoder", tmp_path / "model", tmp_path / "metrics.json"
    new = ["--model", "vitcls-tiny", *SIZES.split()]
    run_command("pretrain", *new, *RUN.split(), "--max-steps", 3, "--output-dir", encoder)
    flags = ["--max-steps", 40, "--learning-rate", 3e-3, "--select", "last", "--no-probe"]
    run_command("finetune", "--model", encoder, *RUN.split(), *flags, "--output-dir", model)
    results = read_json(model / "results.json")
    assert results["accuracy"] > 0.15 and results["token_layout"]["registers"] == 1
    run_command("evaluate", "--model", model, "--dataset", "digits", "--num-workers", 0, "--output", metrics)
    assert read_json(metrics)["accuracy"] == pytest.approx(results["accuracy"], abs=1e-3)

    run_command("push", "--model", model, "--hub-model-id", "ann/digits")
    assert "vitcls" in hub.read("ann/digits", "README.md").decode()
    (tmp_path / "pushed.safetensors").write_bytes(hub.read("ann/digits", "model.safetensors"))
    pushed, saved = load_file(tmp_path / "pushed.safetensors"), load_file(model / "model.safetensors")
    assert pushed.keys() == saved.keys() and all(tensor.equal(saved[name]) for name, tensor in pushed.items())

    images = [Image.fromarray((digit * 15.9).astype("uint8")) for digit in load_digits().images[:4]]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    paths, output = [tmp_path / f"{index}.png" for index in range(4)], tmp_path / "labels.jsonl"
    run_command("predict", "--model", "ann/digits", *paths, "--output", output)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["label"] for row in rows] == [row["label"] for row in predict(model, images)]

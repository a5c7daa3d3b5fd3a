# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""scripts/run_image_classification.py, the loop that is made to be copied, under accelerate."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.photo_folders import draw_pixels
from helpers.source_checkpoints import save_vit_classifier
from PIL import Image

from modeling_vitcls import ViTCLSForImageClassification


SCRIPT = Path(__file__).parents[2] / "scripts/run_image_classification.py"
PUBLIC = {"ViTCLSForImageClassification", "ViTCLSImageProcessor", "push"}

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a ViT of three other classes, and 26 images of two."""
    folder = tmp_path_factory.mktemp("example")
    save_vit_classifier(folder / "vit")
    for label, shade in (("dark", 0), ("bright", 128)):
        (folder / "photos" / label).mkdir(parents=True)
        for number in range(13):
            pixels = draw_pixels(32, 32, 3, seed=number) // 2 + shade
            Image.fromarray(pixels.astype("uint8")).save(
                folder / "photos" / label / f"{number}.png"
            )
    return folder


def run(
    folder: Path, name: str, *flags: str, processes: int = 1
) -> subprocess.CompletedProcess[str]:
    """Train for two epochs by `accelerate launch`."""
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    command = [sys.executable, "-m", *launch, str(SCRIPT), "--model", str(folder / "vit")]
    command += ["--dataset", str(folder / "photos"), "--output-dir", str(folder / name)]
    command += ["--epochs", "2", "--batch-size", "8", "--learning-rate", "1e-3", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def load_weights(folder: Path) -> dict[str, Any]:
    return ViTCLSForImageClassification.from_pretrained(folder).state_dict()


@pytest.mark.slow
def test_one_and_two_processes_train_the_same_model(folder: Path) -> None:
    flags = ("--num-register-tokens", "4", "--no-augmentation")
    for processes, name in ((1, "one"), (2, "two")):
        ended = run(folder, name, *flags, processes=processes)
        assert ended.returncode == 0, ended.stderr
        assert "images 6, loss" in ended.stdout
    one, two = (load_weights(folder / name) for name in ("one", "two"))
    start = ViTCLSForImageClassification.from_pretrained(folder / "vit").state_dict()
    for name, weights in one.items():
        # Attention does not depend on the biases of keys, so Adam follows their rounding errors
        if not name.endswith("k_proj.bias"):
            assert torch.allclose(weights, two[name], rtol=0, atol=1e-5), name
    name = "vitcls.layers.0.mlp.fc1.weight"
    assert not torch.allclose(one[name], start[name], rtol=0, atol=1e-3)
    assert one["vitcls.embeddings.register_tokens"].shape == (1, 4, 32)


@pytest.mark.slow
def test_a_run_continues_after_its_last_epoch(folder: Path) -> None:
    assert run(folder, "whole", "--no-augmentation").returncode == 0
    assert run(folder, "parts", "--no-augmentation").returncode == 0
    for path in (folder / "parts/epoch-2").iterdir():
        path.unlink()
    (folder / "parts/epoch-2").rmdir()
    (folder / "parts/model.safetensors").unlink()
    ended = run(folder, "parts", "--no-augmentation", "--resume")
    assert ended.stdout.count("accuracy") == 2  # accuracy and balanced accuracy of one epoch
    whole, parts = (load_weights(folder / name) for name in ("whole", "parts"))
    assert all(torch.equal(weights, parts[name]) for name, weights in whole.items())


@pytest.mark.slow
def test_the_distillation_token_learns_from_a_teacher(folder: Path) -> None:
    assert run(folder, "teacher").returncode == 0
    flags = ("--num-distillation-tokens", "1", "--teacher", str(folder / "teacher"))
    ended = run(folder, "student", *flags)
    assert ended.returncode == 0, ended.stderr
    student = ViTCLSForImageClassification.from_pretrained(folder / "student")
    assert student.config.id2label == {0: "bright", 1: "dark"}
    assert student(torch.zeros(1, 3, 32, 32)).distillation_logits.shape == (1, 2)
    refused = run(folder, "student", "--teacher", str(folder / "vit"))
    assert "error: --teacher has other classes than the dataset" in refused.stderr


def test_the_script_has_at_most_250_lines_and_imports_public_names_alone() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if (node.module or "").startswith("modeling_vitcls")]
    assert [node.module for node in ours] == ["modeling_vitcls"]
    assert {name.name for node in ours for name in node.names} == PUBLIC

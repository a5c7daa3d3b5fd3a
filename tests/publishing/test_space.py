"""The page of the demo in a real browser: on this machine, and as a Space that is pushed to a local Hub."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from gradio_client import Client, handle_file
from helpers.local_hub import LocalHub
from helpers.scripts_in_process import run_in_process
from helpers.tiny_models import build_tiny_config, save_with_processor
from huggingface_hub import constants
from PIL import Image
from sklearn.datasets import load_sample_images

import modeling_vitcls as vitcls
from modeling_vitcls.hub import connection
from modeling_vitcls.publishing.model_folder import ModelFolder
from modeling_vitcls.publishing.push import push_folder
from modeling_vitcls.publishing.space import find_published_model


NAMES = ["temple", "flower", "cat", "seven", "bird", "ship"]
PATIENCE = 60_000  # timeout of the browser in milliseconds

pytestmark = pytest.mark.slow  # each demo is a process of its own, and most tests push to a local Hub

# Runs a file like `python FILE`, in a process that cannot import modeling_vitcls.
WITHOUT_PACKAGE = """
import runpy, sys
sys.path.insert(0, {tests!r})
from helpers.load_without_package import PackageBlocker
sys.meta_path.insert(0, PackageBlocker())
sys.path[0] = {folder!r}
runpy.run_path("app.py", run_name="__main__")
"""


# Test inputs and helpers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a real photograph of 640 x 427 pixels."""
    file = tmp_path_factory.mktemp("pictures") / "temple.png"
    Image.fromarray(load_sample_images().images[0]).save(file)
    return file


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a classifier with special tokens of all kinds, whose image processor crops images."""
    config = build_tiny_config(
        num_cls_tokens=2,
        num_distillation_tokens=1,
        num_register_tokens=2,
        num_hidden_layers=3,
        id2label=dict(enumerate(NAMES)),
        num_labels=len(NAMES),
    )
    processor = vitcls.ViTCLSImageProcessor(
        size={"shortest_edge": 40}, do_center_crop=True, crop_size={"height": 32, "width": 32}
    )
    return save_with_processor(
        vitcls.ViTCLSForImageClassification(config), tmp_path_factory.mktemp("models") / "mine", processor
    )


def predict_top_labels(folder: Path, picture: Path) -> dict[str, float]:
    """Return the model's prediction without the demo: the five most probable labels."""
    model = vitcls.ViTCLSForImageClassification.from_pretrained(folder).eval()
    pixel_values = vitcls.ViTCLSImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        top = model(pixel_values).logits[0].softmax(dim=0).topk(5)
    return {NAMES[index]: value for index, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)}


@contextmanager
def run_page(command: list[str], folder: Path, **environment: str) -> Iterator[str]:
    """Run a page in a separate process and yield its address."""
    child = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | environment | {"PYTHONUNBUFFERED": "1", "GRADIO_TEMP_DIR": str(folder / "uploads")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None and child.stderr is not None
        line = child.stdout.readline()
        assert "http://" in line, child.stderr.read()
        yield line.split()[-1]
    finally:
        child.terminate()
        child.communicate(timeout=60)


# The Space ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LocalHub:
    """Start an empty Hub for this process, as ann."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(connection, "RETRY_WAITS", (0.01, 0.02))
    return hub


def test_the_space_runs_without_this_package(hub: LocalHub, classifier: Path, photo: Path, tmp_path: Path) -> None:
    """Later commits of the model have no effect."""
    push_folder(ModelFolder(classifier), "ann/mine")
    model = find_published_model("ann/mine")
    space = tmp_path / "space"
    assert run_in_process("push_space.py", "--model", "ann/mine", "--output", space, "--examples", photo) == 0
    save_with_processor(vitcls.ViTCLSForImageClassification(build_tiny_config(num_labels=1)), tmp_path / "newer")
    push_folder(ModelFolder(tmp_path / "newer"), "ann/mine")

    assert model.sha in (space / "app.py").read_text()
    command = WITHOUT_PACKAGE.format(tests=str(Path(__file__).parents[1]), folder=str(space))
    with run_page(["-P", "-c", command], space, HF_HOME=str(tmp_path / "empty")) as at:
        with urlopen(f"{at.rstrip('/')}/gradio_api/info", timeout=60) as answer:
            assert set(json.load(answer)["named_endpoints"]) == {"/predict"}
        label, maps = Client(at, verbose=False).predict(handle_file(photo), 1, api_name="/predict")
        confidences = {entry["label"]: entry["confidence"] for entry in label["confidences"]}
        assert confidences == pytest.approx(predict_top_labels(classifier, photo), abs=1e-4)
        assert [each["caption"] for each in maps] == ["CLS 1", "CLS 2", "distillation", "register 1", "register 2"]

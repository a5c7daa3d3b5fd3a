"""A Space that shows a model of a local Hub, in a process that cannot import this package."""

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from gradio_client import Client, handle_file
from helpers.local_hub import LocalHub
from helpers.scripts_in_process import run_in_process
from helpers.tiny_models import save_classifier
from PIL import Image
from pytest import approx
from sklearn.datasets import load_sample_images

import modeling_vitcls as vitcls
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.publishing.push import push_folder


pytestmark = pytest.mark.slow  # the demo is a process of its own

# Runs the file like `python app.py` in its folder, in a process that cannot import modeling_vitcls.
WITHOUT_PACKAGE = """
import runpy, sys
sys.modules["modeling_vitcls"] = None
runpy.run_path("app.py", run_name="__main__")
"""


def test_the_space_runs_without_this_package(hub: LocalHub, tmp_path: Path) -> None:
    """Later commits of the model have no effect."""
    counts = {"num_cls_tokens": 2, "num_distillation_tokens": 1, "num_register_tokens": 2}
    model = save_classifier(tmp_path / "mine", num_labels=6, **counts)
    photo = tmp_path / "photo.png"
    space = tmp_path / "space"
    Image.fromarray(load_sample_images().images[0]).save(photo)

    push_folder(ModelFolder(model), "ann/mine")
    assert (
        run_in_process(
            "push_space.py", "--model", "ann/mine", "--output", space, "--examples", photo
        )
        == 0
    )

    push_folder(ModelFolder(save_classifier(tmp_path / "newer", num_labels=1)), "ann/mine")
    child = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_PACKAGE],
        cwd=space,
        env=os.environ
        | {"HF_HOME": str(tmp_path / "empty"), "GRADIO_TEMP_DIR": str(tmp_path / "uploads")}
        | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = child.stdout.readline()
        assert "http://" in line, child.stderr.read()
        at = line.split()[-1]
        with urlopen(f"{at.rstrip('/')}/gradio_api/info", timeout=60) as answer:
            assert set(json.load(answer)["named_endpoints"]) == {"/predict"}
        label = Client(at, verbose=False).predict(handle_file(photo), api_name="/predict")
        confidences = {entry["label"]: entry["confidence"] for entry in label["confidences"]}
        (row,) = vitcls.predict(model, photo, top_k=5)
        found = [
            (row[f"label{end}"], row[f"probability{end}"]) for end in ("", "_2", "_3", "_4", "_5")
        ]
        assert confidences == approx(dict(found), abs=1e-4)
    finally:
        child.terminate()
        child.communicate(timeout=60)

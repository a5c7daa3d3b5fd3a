"""The blocks of README.md run as printed, in a new environment.

The block with `git clone` runs with this repository as its address, and `make` prints its steps.

The Hub is a local one with the two models of the page, with random weights, and accepts the pushes.
The photos are digits.
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import timm
from helpers.doc_pages import ROOT, read_blocks
from helpers.fresh_processes import run_program
from helpers.local_hub import LocalHub, Token, running_hub
from helpers.photo_folders import write_digits
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from modeling_vitcls.runtime.files import read_json


pytestmark = pytest.mark.slow


README = (ROOT / "README.md").read_text()
BLOCKS = [
    block for block in read_blocks(ROOT / "README.md") if block.language in ("python", "bash")
]
CLONE = next(block.text for block in BLOCKS if "git clone" in block.text)
# the fixture `environment` stands for it
NEW_ENVIRONMENT = re.compile(r"^python3 -m venv .*\n", re.MULTILINE)
TIMM_MODEL = "vit_small_patch14_reg4_dinov2.lvd142m"
NOT_COPIED = shutil.ignore_patterns(
    ".venv*", ".git", "runs", "build", "*.egg-info", "__pycache__", ".*_cache", "site"
)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with running_hub() as hub:
        hub.tokens["hf_me"] = Token("ME")
        weights = safetensors.torch.save(
            timm.create_model(TIMM_MODEL, pretrained=False).state_dict()
        )
        hub.create(f"timm/{TIMM_MODEL}", files={"model.safetensors": weights})
        hub.create("facebook/dinov2-small", files=write_dinov2(tmp_path / "dinov2"))
        yield hub


def write_dinov2(folder: Path) -> dict[str, bytes]:
    """Write the files of facebook/dinov2-small, with two layers and random weights."""
    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=2, image_size=518, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 256}, crop_size=224).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the repository with the photos of the page."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT, folder, ignore=NOT_COPIED)
    for path, label, first in (
        ("photos/cat", 0, 0),
        ("photos/dog", 1, 0),
        ("more/cat", 0, 20),
        ("more/dog", 1, 20),
        ("new/bird", 2, 0),
    ):
        write_digits(folder / path, label, slice(first, first + 8))
    shutil.copy(folder / "photos/cat/0.png", folder / "photo.jpg")
    return folder


@pytest.fixture
def environment(tmp_path: Path, hub: LocalHub) -> dict[str, str]:
    """Return the variables of a new environment in which `pip` is uv, which is faster."""
    uv = shutil.which(
        "uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if uv is None:
        pytest.skip("requires uv")
    folder = tmp_path / "environment"
    run_program(uv, "venv", "--quiet", "--python", sys.executable, folder)
    (folder / "bin/pip").write_text(f'#!/bin/sh\nexec {uv} pip "$@" --quiet\n')
    (folder / "bin/pip").chmod(0o755)
    variables = {
        key: value
        for key, value in os.environ.items()
        if key != "PYTHONPATH" and not key.startswith("HF_")
    }
    return variables | {
        "VIRTUAL_ENV": str(folder),
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_me",
        "HF_HUB_DISABLE_XET": "1",
        "UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR", str(Path.home() / ".cache/uv")),
    }


def test_every_block_runs_after_the_printed_installation(
    checkout: Path, environment: dict[str, str], hub: LocalHub
) -> None:
    installation = next(block for block in BLOCKS if NEW_ENVIRONMENT.match(block.text))
    blocks = [block for block in BLOCKS if block.text != CLONE]
    for block in sorted(blocks, key=lambda block: block != installation):
        text = NEW_ENVIRONMENT.sub("", block.text)
        command = ["bash", "-ec", text] if block.language == "bash" else ["python", "-c", text]
        done = run_program(*command, environment=environment, cwd=checkout)
        for printed in re.findall(r"^# ([{(\[].*)$", text, re.MULTILINE):
            assert printed in done.stdout

    assert (checkout / "runs/photos/report.html").stat().st_size > 100_000
    for name in ("ME/photos", "ME/registers"):
        assert "model.safetensors" in hub.files(name)
    assert "modeling_vitcls.py" in hub.files("ME/registers")


def test_the_first_block_clones_an_address_and_makes_its_targets(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("requires a git repository")
    assert CLONE.count("<address>") == 2, "the word is explained, and stands in one command"
    lines = CLONE.replace("<address>", shlex.quote(str(ROOT)))
    environment = os.environ | {"MAKEFLAGS": "n"}
    done = run_program("bash", "-ec", lines, environment=environment, cwd=tmp_path)

    assert "scripts/demo.py" in done.stdout
    assert "-m pytest" in done.stdout


def test_the_numbers_of_the_readme_are_in_committed_results() -> None:
    results = read_json(ROOT / "model_cards/digits/results.json")
    num_right = round(results["accuracy"] * results["num_images"])
    assert f"**{num_right} of {results['num_images']} held-out images are right**" in README

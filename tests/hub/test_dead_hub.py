"""Loading while the Hub does not respond.

Cached files load at once. Otherwise, a one-line error follows within seconds.

Datasets are loaded with `datasets` and timm models with timm, which would retry for most of a
minute. The commands run in this process.
"""

import json
import time
from pathlib import Path

import datasets
import PIL.Image
import pytest
import timm
import torch
from helpers.local_hub import LocalHub
from helpers.read_datasets import load_training_data
from helpers.scripts_in_process import run_in_process
from helpers.tiny_models import raises_one_line
from huggingface_hub import constants
from timm.models import save_for_hf

from modeling_vitcls import ViTCLSConfig
from modeling_vitcls.cli.convert import ConvertOptions, run
from modeling_vitcls.conversion.convert import convert_checkpoint
from modeling_vitcls.data.labels import OneLabel
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.sources import load_splits
from modeling_vitcls.training.teacher import load_teacher
from scripts.tools.random_weights import randomize_weights


DEAD = "http://127.0.0.1:9"  # a closed port
DIGITS = OneLabel({"label": [str(index) for index in range(10)]})


@pytest.fixture
def hub(hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LocalHub:
    """Start a Hub with a user `ann` for all libraries in this process, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "data")
    return hub


def stop_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Point all libraries in this process to a closed port."""
    monkeypatch.setattr(constants, "ENDPOINT", DEAD)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"{DEAD}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", DEAD)


def test_cached_hub_datasets_load_without_the_hub(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {
        "image": [PIL.Image.new("L", (4, 4), 9 * index) for index in range(8)],
        "label": [0, 1] * 4,
    }
    datasets.Dataset.from_dict(rows, features=pictures).to_parquet(tmp_path / "train.parquet")
    content = (tmp_path / "train.parquet").read_bytes()

    hub.create(
        "datasets/ann/pictures",
        private=False,
        files={"README.md": b"# x", "train.parquet": content},
    )
    assert len(load_splits(DataOptions(dataset="ann/pictures")).images_by_split["train"]) == 8
    with raises_one_line(
        "ann/none is not a file or folder", "the Hub has no such dataset", error=OSError
    ):
        load_splits(DataOptions(dataset="ann/none"))
    with raises_one_line(
        "a/b/c is not a file or folder", "not a valid id of a dataset", error=OSError
    ):
        load_splits(DataOptions(dataset="a/b/c"))

    stop_hub(monkeypatch)
    started = time.monotonic()
    assert len(load_splits(DataOptions(dataset="ann/pictures")).images_by_split["train"]) == 8
    assert "127.0.0.1:9 does not respond" in caplog.text
    assert ". Loading ann/pictures from the cache" in caplog.text
    with raises_one_line(
        "ann/none is not a file or folder", f"{DEAD} does not respond", error=OSError
    ):
        load_training_data(DataOptions(dataset="ann/none"))
    assert time.monotonic() - started < 10  # `datasets` takes 40 seconds for one of these requests

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    caplog.clear()
    assert len(load_splits(DataOptions(dataset="ann/pictures")).images_by_split["train"]) == 8
    assert "does not respond" not in caplog.text


def test_cached_timm_models_of_the_hub_are_pinned_and_load_without_the_hub(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_for_hf(
        randomize_weights(timm.create_model("test_vit", num_classes=3)),
        tmp_path / "theirs",
        safe_serialization=True,
    )
    files = {file.name: file.read_bytes() for file in (tmp_path / "theirs").iterdir()}
    commit = hub.create("ann/vit", private=False, files=files).branches["main"]
    run(ConvertOptions(output=tmp_path / "mine", model="timm:hf-hub:ann/vit"))

    report = json.loads((tmp_path / "mine" / "parity_report.json").read_text())
    assert report["source_revision"] == commit
    assert commit in (tmp_path / "mine" / "README.md").read_text()

    broken = files | {"model.safetensors": b"broken", "config.json": b"{}"}
    hub.repositories["ann/vit"].commit(
        "main", "broken", {name: hub.store(name, data) for name, data in broken.items()}
    )

    stop_hub(monkeypatch)
    started = time.monotonic()
    convert_checkpoint(f"timm:hf-hub:ann/vit@{commit}", tmp_path / "again")
    for source in ("timm:hf-hub:ann/none", "timm:vit_tiny_patch16_224"):
        with raises_one_line(
            f"timm cannot load {source[5:]}", f"{DEAD} does not respond", error=OSError
        ):
            convert_checkpoint(source, tmp_path / "none")
    with raises_one_line("timm:hf-hub:ann/none", f"{DEAD} does not respond", error=OSError):
        load_teacher("timm:hf-hub:ann/none", DIGITS, ViTCLSConfig(), torch.device("cpu"))
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("evaluate.py", "--model {} --dataset digits"),
        ("finetune.py", "--model {} --dataset digits --output-dir out"),
        ("finetune.py", "--model vitcls-tiny --dataset {} --output-dir out"),
        ("finetune.py", "--model vitcls-tiny --dataset digits --teacher {} --output-dir out"),
        ("convert.py", "--model transformers:{} --output out"),
        ("export.py", "--model {} --output out.onnx"),
    ],
)
def test_a_mistyped_folder_is_named_in_one_line(
    hub: LocalHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
    flags: str,
) -> None:
    """Check also that the error follows within seconds if the Hub does not respond."""
    monkeypatch.chdir(tmp_path)
    for name, words in {
        "lab/none": [", and the Hub has no such"],
        "runs/my/none": ["not a valid id", "Check the path"],
        "lab/gone": [
            "missing or incomplete in the cache",
            f"{DEAD} does not respond",
            "Check the network",
        ],
    }.items():
        if name == "lab/gone":
            stop_hub(monkeypatch)

        started = time.monotonic()
        status = run_in_process(script, *flags.format(name).split())
        assert time.monotonic() - started < 20

        errors = capsys.readouterr().err
        last = errors.strip().splitlines()[-1]
        assert status == 1
        assert "Traceback" not in errors
        assert last.startswith("error: ")
        assert all(word in last for word in (name, *words)), last

"""Checkpoints by name: used directly or converted once, and pinned to commits."""

import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers.accelerate_state import reset_accelerate
from helpers.source_checkpoints import refuses_conversion, save_vit_classifier
from helpers.tiny_models import (
    edit_weights,
    raises_one_line,
    save_classifier,
)
from helpers.tiny_options import build_tiny_options, run_to_folder
from huggingface_hub import constants
from pytest import LogCaptureFixture, MonkeyPatch
from timm.models import save_for_hf

from modeling_vitcls import (
    Predictor,
    ViTCLSForImageClassification,
    convert_from_timm,
)
from modeling_vitcls.conversion.convert import load_source
from modeling_vitcls.conversion.open_model import (
    compute_cache_name,
    open_model,
)
from modeling_vitcls.hub.loading import pin_revision
from modeling_vitcls.inference.load_model import load_model
from modeling_vitcls.runtime.errors import warn_on_first_process
from modeling_vitcls.runtime.files import read_json


pytestmark = pytest.mark.usefixtures("few_digits")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: MonkeyPatch) -> Iterator[Path]:
    """Use an empty cache without a network, and reset Accelerate."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache/hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_accelerate()
    yield tmp_path / "cache/vitcls/converted"
    reset_accelerate()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The folder of a small ViT of transformers, with a classifier."""
    return save_vit_classifier(tmp_path / "source")


def add_commit(name: str, commit: str) -> Path:
    """Return the folder of a new commit of ann/NAME in the Hub cache, which is `main`."""
    repository = Path(constants.HF_HUB_CACHE, f"models--ann--{name}")
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs/main").write_text(commit)
    return repository / "snapshots" / commit


@pytest.fixture
def cached_hub_model() -> str:
    """Return the id of a vitcls model in the Hub cache, at COMMIT."""
    save_classifier(add_commit("mine", COMMIT))
    return "ann/mine"


def test_a_model_of_transformers_is_converted_once(
    source: Path, own_cache: Path, caplog: LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        folder = open_model(str(source)).path
        assert open_model(str(source)).path == folder
        assert open_model(f"transformers:{source}").path == folder

    assert caplog.text.count("converting") == 1
    assert folder.parent == own_cache
    report = read_json(folder / "parity_report.json")
    assert report["source_class"] == "ViTForImageClassification"

    assert load_model(open_model(str(source))).config.num_labels == 3


def test_the_last_checkpoint_of_trainer_in_a_folder_is_named(tmp_path: Path) -> None:
    for step in (9, 10):
        save_classifier(tmp_path / f"out/checkpoint-{step}")
    with raises_one_line("use that folder", str(tmp_path / "out/checkpoint-10")):
        open_model(str(tmp_path / "out"))
    assert open_model(str(tmp_path / "out/checkpoint-10")).config.num_labels > 0


def test_a_normalization_that_is_assumed_is_named_in_each_run(
    source: Path, caplog: LogCaptureFixture
) -> None:
    open_model(str(source))
    assert "normalized" not in caplog.text

    (source / "preprocessor_config.json").unlink()
    for _ in range(2):
        warn_on_first_process.cache_clear()
        caplog.clear()
        open_model(str(source))
        assert "no image processor, so images are normalized" in caplog.messages[-1]
        assert f"`vitcls convert transformers:{source} FOLDER`" in caplog.messages[-1]


def test_conversions_of_other_sources_and_versions_are_not_used(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """Two folders may have the same name, and files of the same names, sizes and times."""
    names = []
    for name in ("one", "two"):
        folder = tmp_path / name / "source"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        os.utime(folder / "config.json", (0, 0))
        (folder / ".#config.json").symlink_to("me@host.1")  # An editor's lock, a link to nothing
        monkeypatch.chdir(folder.parent)
        names.append(compute_cache_name("source"))
    assert re.fullmatch(r"my-vit-b16-[0-9a-f]{16}", compute_cache_name("timm:my vit+b16"))

    monkeypatch.setattr("modeling_vitcls.conversion.open_model.__version__", "9.9.9")
    names.append(compute_cache_name("source"))
    # does not change the folder itself
    (folder / "config.json").write_text("{ }")
    names.append(compute_cache_name("source"))
    assert len(set(names)) == 4


def test_weights_of_the_same_size_and_time_are_converted_again(source: Path) -> None:
    """`cp -p`, rsync and archives keep the time of modification."""
    old = open_model(str(source)).load(ViTCLSForImageClassification)
    weights_file = source / "model.safetensors"
    time = weights_file.stat().st_mtime_ns
    with edit_weights(source) as weights:
        weights["classifier.weight"] *= -1
    os.utime(weights_file, ns=(time, time))

    new = open_model(str(source)).load(ViTCLSForImageClassification)
    assert torch.equal(new.classifier.weight, -old.classifier.weight)


def test_a_timm_model_on_the_hub_is_converted_at_the_requested_commit(tmp_path: Path) -> None:
    """The newest commit has another classifier."""
    for commit, num_classes in ((COMMIT, 5), (COMMIT[::-1], 6)):
        model = timm.create_model("test_vit", num_classes=num_classes)
        save_for_hf(model, add_commit("timm", commit), safe_serialization=True)

    for name, num_labels, commit in (
        (f"ann/timm@{COMMIT}", 5, COMMIT),
        ("ann/timm", 6, COMMIT[::-1]),
    ):
        folder = open_model(name)
        assert folder.config.num_labels == num_labels
        assert folder.parity_report["source"] == f"timm:hf-hub:ann/timm@{commit}"

    assert load_source(f"timm:hf-hub:ann/timm@{COMMIT}").model.num_classes == 5

    save_for_hf(model, tmp_path / "local", safe_serialization=True)
    assert open_model(str(tmp_path / "local")).config.num_labels == 6


def test_the_conversion_of_a_hub_model_is_pinned(source: Path) -> None:
    """The commit is in the parity report, and a new commit is converted again."""
    folders = []
    for commit in (COMMIT, COMMIT[::-1]):
        shutil.copytree(source, add_commit("vit", commit))
        folders.append(open_model("ann/vit").path)
        for name in ("ann/vit", "transformers:ann/vit"):
            converted = open_model(name)
            report = converted.parity_report
            assert converted.path == folders[-1]  # converted once
            assert report["source"] == f"transformers:ann/vit@{commit}"
            assert report["source_revision"] == commit

    assert folders[0] != folders[1]
    assert open_model(f"ann/vit@{COMMIT}").path == folders[0]
    assert load_source(f"transformers:ann/vit@{COMMIT}").revision == COMMIT


def test_commits_are_pinned(cached_hub_model: str) -> None:
    pinned = f"{cached_hub_model}@{COMMIT}"
    assert pin_revision(cached_hub_model) == pin_revision(pinned) == pinned
    assert pin_revision(f"transformers:{cached_hub_model}@main") == f"transformers:{pinned}"
    assert pin_revision("timm:test_vit") == "timm:test_vit"
    # `datasets` computes features again for another commit.
    assert Predictor(cached_hub_model, "cls").arguments["model"] == pinned
    assert open_model(pinned).path.name == COMMIT

    load_model(open_model(pinned))
    with pytest.raises(OSError, match="ann/mine"):
        open_model(f"{cached_hub_model}@{'f' * 40}")


def test_a_run_records_the_commit(cached_hub_model: str, tmp_path: Path) -> None:
    flags = {"model": cached_hub_model, "max_steps": 1, "batch_size": 8}
    folder = run_to_folder(build_tiny_options(tmp_path / "run", "digits", **flags))
    resolved = yaml.safe_load((folder / "config.resolved.yaml").read_text())
    assert resolved["model"] == f"{cached_hub_model}@{COMMIT}"


def test_the_name_of_a_model_is_not_the_model() -> None:
    with refuses_conversion("timm.create_model('vit_tiny_patch16_224'"):
        convert_from_timm("vit_tiny_patch16_224")  # type: ignore[arg-type]

"""Models and processors that Python pushes load by AutoModel in a process without the package."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.local_hub import LocalHub
from helpers.source_checkpoints import save_large_encoder, save_vit_classifier
from helpers.tiny_models import randomize, save_classifier
from pytest import CaptureFixture, MonkeyPatch

from modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSConfig,
    ViTCLSForImageClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
    convert,
    export,
    push,
)
from modeling_vitcls.publishing.push import PushedCommit
from modeling_vitcls.publishing.verification_script import Outputs, collect_outputs
from modeling_vitcls.publishing.verify import compare_outputs, run_verification_script


@pytest.fixture
def hub(hub: LocalHub, monkeypatch: MonkeyPatch, tmp_path: Path) -> LocalHub:
    """Start an empty Hub for this process and its child processes, as ann."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    return hub


def load_without_package(sha: str) -> tuple[Outputs, dict[str, Any]]:
    """Load a commit of ann/vit in a new process that cannot import the package."""
    commit = PushedCommit(
        repo_id="ann/vit", sha=sha, needs_token=False, url="", is_private=False, files={}, advice=""
    )
    return run_verification_script(commit, "AutoModelForImageClassification", True)


@pytest.mark.slow
def test_a_vit_with_registers_is_pushed_and_loaded_elsewhere(hub: LocalHub, tmp_path: Path) -> None:
    source = save_vit_classifier(tmp_path / "source")
    model = ViTCLSForImageClassification.from_pretrained(source, num_register_tokens=4)
    processor = ViTCLSImageProcessor.from_pretrained(source)
    randomize(model)  # as training would

    model.push_to_hub("ann/vit")
    sha = processor.push_to_hub("ann/vit").oid

    outputs, report = load_without_package(sha)
    assert report["classes"]["AutoModelForImageClassification"] == "ViTCLSForImageClassification"
    assert report["missing"] == []
    model.save_pretrained(tmp_path / "mine")
    processor.save_pretrained(tmp_path / "mine")
    expected, _ = collect_outputs(
        str(tmp_path / "mine"),
        "AutoModelForImageClassification",
        {"trust_remote_code": False},
        ViTCLSBackbone,
    )
    compare_outputs("ann/vit", outputs, expected)


def test_push_returns_the_commit_with_a_card(hub: LocalHub, tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "mine")
    commit = push(folder, "ann/vit", verify=False)
    assert commit.repo_id == "ann/vit"
    config = ViTCLSConfig.from_pretrained("ann/vit", revision=commit.sha)
    assert config.to_dict() == ViTCLSConfig.from_pretrained(folder).to_dict()
    card = transformers.utils.cached_file("ann/vit", "README.md", revision=commit.sha)
    assert "library_name: transformers" in Path(str(card)).read_text()


def test_convert_writes_a_folder_and_returns_its_report(tmp_path: Path) -> None:
    source = save_large_encoder(tmp_path / "source")
    report = convert(f"transformers:{source}", tmp_path / "converted")
    assert report["comparisons"][0]["image_size"] == (280, 280)
    model = ViTCLSModel.from_pretrained(tmp_path / "converted")
    assert model.config.image_size == 280


@pytest.mark.slow
def test_export_writes_a_graph_and_returns_its_report(
    tmp_path: Path, capsys: CaptureFixture
) -> None:
    folder = save_classifier(tmp_path / "mine")
    report = export(folder, tmp_path / "mine.onnx")
    assert (tmp_path / "mine.onnx").is_file()
    assert report["largest_differences"]["logits"] < 1e-4
    assert torch.get_default_dtype() == torch.float32

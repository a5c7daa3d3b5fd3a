"""Published models, loaded in fresh processes: what is right gets a certificate, what is wrong a reason.

The fresh processes are real, so there are few of them: what can be refused before is.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from local_hub import LocalHub, Token, point_client_at, running_hub
from tiny import TASKS, filled, raises_one_line, tiny_config

import modeling_vitcls as vitcls
from modeling_vitcls.hub import connection
from modeling_vitcls.hub.publish import push_folder
from modeling_vitcls.hub.verify import NotVerified, differences, verify


SCRIPT = Path(__file__).parents[1] / "scripts" / "push_to_hub.py"
BACKENDS = ["AutoImageProcessor, torchvision", "AutoImageProcessor, pil"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """An empty Hub, which the client of this process and of its children talks to as ann."""
    with running_hub() as running:
        running.tokens |= {"hf_ann": Token("ann"), "hf_bob": Token("bob")}
        point_client_at(running.url, "hf_ann", monkeypatch, tmp_path / "home")
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))  # which a fresh process must not use
        monkeypatch.setattr(connection, "WAITS", (0.01, 0.02))
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A classifier with its image processor."""
    return saved(vitcls.ViTCLSForImageClassification(tiny_config(num_register_tokens=1)), tmp_path / "my-run")


def saved(model: Any, target: Path) -> Path:
    """Save a model with random weights."""
    filled(model).save_pretrained(target)
    vitcls.ViTCLSImageProcessor(size={"height": 32, "width": 32}).save_pretrained(target)
    return target


def test_the_script_pushes_and_prints_a_certificate(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    """The repository is private, the first request for weights is lost, and there is only the one commit to see."""
    hub.fail("GET", "/objects/", "cut")
    command = [sys.executable, SCRIPT, "--model", folder, "--hub-model-id", "model", "--private"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    commit = hub.repositories["ann/model"].branches["main"]
    assert hub.repositories["ann/model"].private
    assert f"verified: ann/model at {commit}" in ended.stdout
    found = re.findall(r"^    (\S.*?) {2,}(\S*) +largest difference (\S+)$", ended.stdout, re.MULTILINE)
    assert [(way, name) for way, name, _ in found] == [
        ("AutoModel", "ViTCLSModel"),
        ("AutoModelForImageClassification", "ViTCLSForImageClassification"),
        ("AutoImageProcessor, torchvision", "ViTCLSImageProcessor"),
        ("AutoImageProcessor, pil", "ViTCLSImageProcessorPil"),
        ("pipeline", ""),
    ]
    assert all(float(difference) <= 1e-6 for _, _, difference in found)
    line = f'AutoModelForImageClassification.from_pretrained("ann/model", revision="{commit}", trust_remote_code=True)'
    assert ended.stdout.rstrip().endswith(line)
    assert not (tmp_path / "cache").exists()


def test_any_published_model_is_verified_by_any_revision(hub: LocalHub, tmp_path: Path) -> None:
    """An old commit, by its tag, of a repository that holds another kind of model now; without the folder."""
    config = tiny_config(num_cls_tokens=2, tasks=TASKS)
    first = push_folder(saved(vitcls.ViTCLSForMultiTaskClassification(config), tmp_path / "first"), "ann/model").commit
    HfApi().create_tag("ann/model", tag="v1", revision=first)
    second = push_folder(saved(vitcls.ViTCLSModel(tiny_config()), tmp_path / "second"), "ann/model").commit
    certificate = verify("ann/model", "v1")
    assert certificate.revision == first != second
    assert list(certificate.differences) == ["AutoModel", "AutoModelForImageClassification", *BACKENDS]
    assert certificate.classes["AutoModelForImageClassification"] == "ViTCLSForMultiTaskClassification"
    assert max(certificate.differences.values()) <= 1e-6
    assert f'revision="{first}"' in certificate.load_line()


def test_code_may_live_in_one_repository_and_weights_in_another(hub: LocalHub, folder: Path) -> None:
    push_folder(folder, "ann/code")
    for file in ("config.json", "preprocessor_config.json"):
        settings = json.loads((folder / file).read_text())
        settings["auto_map"] = elsewhere(settings["auto_map"], "ann/code")
        (folder / file).write_text(json.dumps(settings))
    for file in folder.glob("*.py"):
        file.unlink()
    pushed = push_folder(folder, "ann/weights")
    assert not [name for name in hub.files("ann/weights") if name.endswith(".py")]
    certificate = verify("ann/weights", pushed.commit, folder)
    assert list(certificate.differences) == ["AutoModel", "AutoModelForImageClassification", *BACKENDS, "pipeline"]


def elsewhere(references: Any, repo_id: str) -> Any:
    """References to classes, with the repository that has their code."""
    if isinstance(references, dict):
        return {name: elsewhere(reference, repo_id) for name, reference in references.items()}
    return f"{repo_id}--{references}"


def test_published_code_that_answers_differently_is_found(hub: LocalHub, folder: Path) -> None:
    code = folder / "heads_vitcls.py"
    change = "pool = CLSPooler.forward\nCLSPooler.forward = lambda self, sequence: 1.001 * pool(self, sequence)\n"
    code.write_text(code.read_text() + change)
    pushed = push_folder(folder, "ann/model")
    with raises_one_line("answers differently", "the limit is", error=NotVerified):
        verify("ann/model", pushed.commit, folder)


@pytest.mark.slow
def test_code_that_needs_this_package_does_not_load(hub: LocalHub, folder: Path) -> None:
    code = folder / "modeling_vitcls.py"
    code.write_text("try:\n    import modeling_vitcls\nexcept ValueError:\n    pass\n" + code.read_text())
    pushed = push_folder(folder, "ann/model")
    with raises_one_line("a fresh process cannot load ann/model", "modeling_vitcls", error=NotVerified):
        verify("ann/model", pushed.commit, folder)


@pytest.mark.parametrize("file", ["model.safetensors", "modeling_vitcls.py", "config.json"])
def test_a_file_that_is_corrupted_in_storage_is_named(hub: LocalHub, folder: Path, file: str) -> None:
    pushed = push_folder(folder, "ann/model")
    hub.corrupt("ann/model", file)
    with raises_one_line("is damaged on the Hub", file, error=NotVerified):
        verify("ann/model", pushed.commit, folder)


def test_a_folder_that_changed_after_the_push_is_another_model(hub: LocalHub, folder: Path) -> None:
    pushed = push_folder(folder, "ann/model")
    (folder / "README.md").write_text("# new\n")
    with raises_one_line("lacks README.md", error=NotVerified):
        verify("ann/model", pushed.commit, folder)
    (folder / "README.md").unlink()
    saved(vitcls.ViTCLSForImageClassification(tiny_config(num_register_tokens=2)), folder)
    with raises_one_line("is not the one in", "push it again", error=NotVerified):
        verify("ann/model", pushed.commit, folder)


def test_what_is_not_there_cannot_be_verified(hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_folder(folder, "ann/model", private=True)
    hub.create("ann/other", private=False)
    with raises_one_line("has no revision v9"):
        verify("ann/model", "v9")
    with raises_one_line("holds no vitcls model", error=NotVerified):
        verify("ann/other")
    with raises_one_line("the Hub has no model ann/typo"):
        verify("ann/typo")
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    with raises_one_line("the Hub has no model ann/model", "private", "hf auth login"):
        verify("ann/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with raises_one_line("HF_HUB_OFFLINE"):
        verify("ann/model")


def test_a_hub_that_stays_down_is_given_up(hub: LocalHub, folder: Path) -> None:
    push_folder(folder, "ann/model")
    hub.fail("GET", "/api/models/ann/model", 500, times=3)
    with raises_one_line("cannot ask the Hub for ann/model", "HTTP 500", error=OSError):
        verify("ann/model")


@pytest.mark.parametrize(
    ("found", "is_right"),
    [
        ([1.0, 100.0], True),
        ([1.0, 100.00005], True),  # of values up to 100
        ([1.0, 100.0002], False),
        ([float("nan"), 100.0], False),
        ([1.0], False),
    ],
)
def test_answers_may_differ_by_a_millionth(found: list[float], is_right: bool) -> None:
    wanted = {"AutoModel/logits": torch.tensor([1.0, 100.0], dtype=torch.float64)}
    answers = {"AutoModel/logits": torch.tensor(found, dtype=torch.float64)}
    if is_right:
        assert differences("ann/model", answers, wanted)["AutoModel"] <= 1e-4
    else:
        with raises_one_line("ann/model answers", "AutoModel/logits", error=NotVerified):
            differences("ann/model", answers, wanted)
    with raises_one_line("other tensors", "AutoModel/logits", error=NotVerified):
        differences("ann/model", {}, wanted)

"""Verification of published models: hashes, and the outputs of the published code."""

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers.local_hub import LocalHub
from helpers.tiny_models import (
    Kind,
    each_kind,
    edit_weights,
    raises_one_line,
    save_classifier,
    save_with_processor,
)
from pytest import MonkeyPatch

import modeling_vitcls as vitcls
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.publishing.push import push_folder
from modeling_vitcls.publishing.verify import compare_outputs, push_and_verify, verify


@pytest.fixture
def hub(hub: LocalHub, monkeypatch: MonkeyPatch, tmp_path: Path) -> LocalHub:
    """Start an empty Hub for this process and its child processes, as ann."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))  # a new process must not use it
    return hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a classifier with its image processor."""
    return save_classifier(tmp_path / "my-run")


@pytest.mark.slow
@each_kind
def test_each_kind_of_model_is_verified_at_its_commit(
    hub: LocalHub, tmp_path: Path, kind: Kind
) -> None:
    mine = ModelFolder(save_with_processor(kind.build(), tmp_path / "mine"))
    first = push_folder(mine, "ann/model")
    push_folder(ModelFolder(save_classifier(tmp_path / "other")), "ann/model")
    report = verify(first, mine)
    assert first.sha in report
    assert kind.model_class.__name__ in report
    assert f"code of modeling_vitcls {vitcls.__version__}" in report


# Untrusted code -----------------------------------------------------------------------------------


CATCHING_IMPORT = "try:\n    import modeling_vitcls\nexcept ValueError:\n    pass\n"
CHANGED_CODE = """
pool = TokenPooler.forward
TokenPooler.forward = lambda self, tokens: 1.001 * pool(self, tokens)
"""


def test_published_code_runs_in_another_process_and_other_logits_are_noticed(
    hub: LocalHub, folder: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """The new process receives no secrets of this process."""
    code = folder / "heads_vitcls.py"
    seen = tmp_path / "seen.json"
    spy = f"import json, os\njson.dump([os.getpid(), dict(os.environ)], open({str(seen)!r}, 'w'))\n"
    code.write_text(code.read_text() + CHANGED_CODE + spy)
    pushed = push_folder(ModelFolder(folder), "ann/model")

    assert not seen.exists()
    monkeypatch.setenv("MY_SECRET", "42")
    with raises_one_line("differ from the reference", "allowed"):
        verify(pushed, ModelFolder(folder))

    process, environment = json.loads(seen.read_text())
    assert process != os.getpid()
    assert environment["HF_ENDPOINT"] == hub.url
    assert environment["PATH"] == os.environ["PATH"]
    assert "hf_ann" not in environment.values()
    assert "MY_SECRET" not in environment
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("raise KeyError('x')\n", "KeyError"),
        (CATCHING_IMPORT, "modeling_vitcls"),
        ("import os\nos._exit(3)\n", "exit status 3"),
    ],
)
def test_code_that_does_not_load_is_an_error(
    hub: LocalHub, folder: Path, code: str, word: str
) -> None:
    """The code fails, requires this package, or ends the process."""
    file = folder / "modeling_vitcls.py"
    file.write_text(code + file.read_text())
    with raises_one_line("was pushed", "not verified", "cannot load", word, error=OSError):
        push_and_verify(ModelFolder(folder), "ann/model")


# Files --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_this_process")
def test_weights_without_a_tensor_are_named_with_the_command_that_pushes_again(
    hub: LocalHub, folder: Path
) -> None:
    with edit_weights(folder) as weights:
        del weights["classifier.bias"]
    words = ("was pushed", "not verified", "lacks the weights classifier.bias")
    command = f"vitcls push --model {folder} --hub-model-id ann/model"
    with raises_one_line(*words, command, error=OSError):
        push_and_verify(ModelFolder(folder), "ann/model")


@pytest.mark.usefixtures("in_this_process")
def test_weights_that_are_corrupted_in_storage_are_noticed(hub: LocalHub, folder: Path) -> None:
    pushed = push_folder(ModelFolder(folder), "ann/model")
    hub.corrupt("ann/model", "model.safetensors")
    with raises_one_line("differ from the reference"):
        verify(pushed, ModelFolder(folder))


def test_a_folder_that_changed_after_the_push_is_noticed(hub: LocalHub, folder: Path) -> None:
    pushed = push_folder(ModelFolder(folder), "ann/model")
    with edit_weights(folder) as weights:
        weights["classifier.bias"] += 1
    with raises_one_line(f": model.safetensors. Push {folder} again"):
        verify(pushed, ModelFolder(folder))


# Outputs ------------------------------------------------------------------------------------------


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("found", "is_equal"),
    [
        ({"logits": ONES}, True),
        ({"logits": ONES + 5e-7}, True),
        ({"logits": ONES + 5e-6}, False),
        ({"logits": ONES * float("nan")}, False),
        ({"logits": torch.ones(3, 2)}, False),
        ({}, False),
        ({"logits": ONES, "more": ONES}, False),
    ],
)
def test_outputs_are_compared_with_a_tolerance(
    found: dict[str, torch.Tensor], is_equal: bool
) -> None:
    with nullcontext() if is_equal else raises_one_line("differ"):
        compare_outputs("ann/model", found, {"logits": ONES})

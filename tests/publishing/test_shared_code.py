"""One code for many models: models that refer to a repository of code, and updates of published code."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.command_in_process import run_here
from helpers.fresh_processes import run_python
from helpers.local_hub import LocalHub, Token, read_files
from helpers.model_folders import write_run_folder
from helpers.released_models import RELEASED
from helpers.tiny_models import save_classifier
from pytest import CaptureFixture, MonkeyPatch

import modeling_vitcls as vitcls
from modeling_vitcls.hub.model_code import get_code_version, read_own_code


CODE = set(read_own_code())
EDIT = "# of another version\n"
OTHER_LOGITS = """
pool = TokenPooler.forward
TokenPooler.forward = lambda self, tokens: 1.001 * pool(self, tokens)
"""


@pytest.fixture
def hub(hub: LocalHub, monkeypatch: MonkeyPatch, tmp_path: Path) -> LocalHub:
    """Start a Hub with the code of the package in ann/code."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))  # A new process must not use it
    assert run_here("push-code", "ann/code") == 0
    return hub


def push_reference(folder: Path) -> int:
    """Push a model to ann/vit that refers to ann/code."""
    flags = "--hub-model-id ann/vit --code-from ann/code --no-verify".split()
    return run_here("push", "--model", folder, *flags)


def read_json(hub: LocalHub, repo_id: str, name: str = "config.json") -> Any:
    return json.loads(hub.read(repo_id, name))


# References ---------------------------------------------------------------------------------------


def test_the_code_is_published_with_a_tag_for_its_version(hub: LocalHub) -> None:
    assert {name for name in hub.files("ann/code") if name.endswith(".py")} == CODE
    tag = f"v{get_code_version().replace('+', '-')}"
    assert hub.files("ann/code", tag) == hub.files("ann/code")


def test_a_model_is_pushed_without_code(hub: LocalHub, tmp_path: Path) -> None:
    assert push_reference(write_run_folder(tmp_path / "mine")) == 0
    assert not [name for name in hub.files("ann/vit") if name.endswith(".py")]
    auto_map = read_json(hub, "ann/vit")["auto_map"]
    assert auto_map["AutoModel"] == "ann/code--modeling_vitcls.ViTCLSModel"
    processor = read_json(hub, "ann/vit", "preprocessor_config.json")
    pil = processor["auto_map"]["AutoImageProcessor"]["pil"]
    assert pil == "ann/code--image_processing_vitcls.ViTCLSImageProcessorPil"

    card = hub.read("ann/vit", "README.md").decode()
    sha = hub.repositories["ann/code"].branches["main"]
    assert f'code_revision = "{sha}"' in card
    assert "trust_remote_code=True, code_revision=code_revision" in card
    assert "[ann/code](https://huggingface.co/ann/code)" in card


def test_code_that_the_repository_has_not_is_not_referred_to(
    hub: LocalHub, tmp_path: Path, capsys: CaptureFixture
) -> None:
    folder = save_classifier(tmp_path / "mine")
    with (folder / "heads_vitcls.py").open("a") as file:
        file.write(EDIT)
    assert push_reference(folder) == 1
    assert "ann/code has other code than" in capsys.readouterr().err
    assert "ann/vit" not in hub.repositories


def test_a_model_that_refers_to_code_is_saved_and_pushed_without_code(
    hub: LocalHub, tmp_path: Path
) -> None:
    push_reference(save_classifier(tmp_path / "mine"))
    again = tmp_path / "again"
    vitcls.ViTCLSForImageClassification.from_pretrained("ann/vit").save_pretrained(again)
    vitcls.ViTCLSImageProcessor.from_pretrained("ann/vit").save_pretrained(again)
    assert not list(again.glob("*.py"))
    before = read_json(hub, "ann/vit")["auto_map"]
    assert json.loads((again / "config.json").read_text())["auto_map"] == before

    vitcls.push(again, "ann/again", verify=False)
    assert read_json(hub, "ann/again")["auto_map"] == before
    assert not [name for name in hub.files("ann/again") if name.endswith(".py")]


LOAD = """
import sys
sys.modules["modeling_vitcls"] = None
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

source, target = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(source, trust_remote_code=True)
model.save_pretrained(target)
processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=True)
processor.save_pretrained(target)
again = AutoModelForImageClassification.from_pretrained(target, trust_remote_code=True)
pixels = torch.linspace(-1, 1, 3 * 16 * 24).reshape(1, 3, 16, 24)
assert torch.equal(model.eval()(pixels).logits, again.eval()(pixels).logits)
pipeline("image-classification", model=source, trust_remote_code=True)
AutoImageProcessor.from_pretrained(target, trust_remote_code=True)
"""


@pytest.mark.slow
def test_a_model_without_code_loads_saves_and_loads_again_without_the_package(
    hub: LocalHub, tmp_path: Path
) -> None:
    push_reference(save_classifier(tmp_path / "mine", image_size=[16, 24], patch_size=8))
    target = tmp_path / "again"
    run_python("-c", LOAD, "ann/vit", target)
    assert not list(target.glob("*.py"))
    for name in ("config.json", "preprocessor_config.json"):
        saved = json.loads((target / name).read_text())
        assert saved["auto_map"] == read_json(hub, "ann/vit", name)["auto_map"]


# Published code -----------------------------------------------------------------------------------


def create_model(hub: LocalHub, repo_id: str, source: Path, edits: dict[str, str]) -> None:
    """Create a repository with a model, the code of the package, and what is appended to its files."""
    code = read_own_code()
    edited = {name: code.get(name, b"") + text.encode() for name, text in edits.items()}
    hub.create(repo_id, files={**read_files(source), **code, **edited})


def create_lab(hub: LocalHub, folder: Path) -> None:
    """Create models with the code of the package, of two other versions, and without code."""
    hub.tokens["hf_ann"] = Token("ann", organizations=("lab",), writable=("ann", "lab"))
    create_model(hub, "lab/current", folder, {})
    create_model(hub, "lab/old", RELEASED / "0.1.0/classifier", {"heads_vitcls.py": EDIT})
    create_model(hub, "lab/older", RELEASED / "0.2.0/masked", {"blocks_vitcls.py": EDIT})
    create_model(hub, "lab/other", folder, {"heads_vitcls.py": OTHER_LOGITS})
    hub.create("lab/bert", files={"config.json": b'{"model_type": "bert"}'})
    hub.create("lab/notes", files={"README.md": b""})


def test_models_of_an_account_are_listed_with_their_code(
    hub: LocalHub, tmp_path: Path, capsys: CaptureFixture
) -> None:
    folder = save_classifier(tmp_path / "mine")
    create_lab(hub, folder)
    push_reference(folder)
    commits = {name: dict(hub.repositories[name].branches) for name in hub.repositories}
    capsys.readouterr()

    assert run_here("update-code", "lab", "ann/vit") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "lab/current  unknown version  code of this package",
        "lab/old  unknown version  other code: heads_vitcls.py",
        "lab/older  unknown version  other code: blocks_vitcls.py",
        "lab/other  unknown version  other code: heads_vitcls.py",
        "ann/vit  no code  refers to ann/code",
    ]
    assert commits == {name: hub.repositories[name].branches for name in hub.repositories}
    assert (
        hub.count_requests("GET", "lab/old/resolve")
        == hub.count_requests("HEAD", "lab/old/resolve")
        == 1
    )


@pytest.mark.slow
def test_code_is_replaced_where_all_outputs_are_equal_to_the_bit(
    hub: LocalHub, tmp_path: Path, capsys: CaptureFixture
) -> None:
    create_lab(hub, save_classifier(tmp_path / "mine"))
    before = {name: hub.files(f"lab/{name}") for name in ("current", "old", "older", "other")}

    assert run_here("update-code", "lab", "--push") == 1
    lines = capsys.readouterr().out
    assert "lab/other  unknown version  left alone: the new code computes other" in lines
    for name in ("current", "other"):
        assert hub.files(f"lab/{name}") == before[name]
    for name in ("old", "older"):
        code = {each: hub.read(f"lab/{name}", each) for each in CODE}
        assert code == read_own_code()
        assert read_json(hub, f"lab/{name}")["code_version"] == get_code_version()
        assert hub.files(f"lab/{name}")["model.safetensors"] == before[name]["model.safetensors"]
    capsys.readouterr()
    assert run_here("update-code", "lab/old", "lab/older") == 0
    assert capsys.readouterr().out.count("code of this package") == 2


def test_an_update_is_a_pull_request_if_a_maintainer_decides(
    hub: LocalHub, tmp_path: Path, in_this_process: None, monkeypatch: MonkeyPatch
) -> None:
    folder = save_classifier(tmp_path / "mine")
    create_model(hub, "ann/vit", folder, {"heads_vitcls.py": EDIT, "gone_vitcls.py": EDIT})
    monkeypatch.setattr(
        "modeling_vitcls.publishing.shared_code.check_outputs_stay", lambda row: None
    )
    assert run_here("update-code", "ann/vit", "--create-pr") == 0
    assert "gone_vitcls.py" in hub.files("ann/vit")
    proposed = hub.files("ann/vit", "refs/pr/1")
    assert set(proposed) >= CODE
    assert "gone_vitcls.py" not in proposed


def test_a_class_of_the_person_is_left_alone(
    hub: LocalHub, tmp_path: Path, capsys: CaptureFixture
) -> None:
    folder = save_classifier(tmp_path / "mine")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "birds.BirdModel"
    (folder / "config.json").write_text(json.dumps(config))
    create_model(hub, "ann/vit", folder, {"heads_vitcls.py": EDIT})
    assert run_here("update-code", "ann/vit", "--push") == 1
    assert "it has code of its own: birds" in capsys.readouterr().out

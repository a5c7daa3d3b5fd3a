"""Pushing model folders to a local Hub, with the real huggingface_hub client."""

import hashlib
import json
import pickle
import shlex
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers import local_hub_server
from helpers.local_hub import LocalHub, Token, point_client_at
from helpers.scripts_in_process import run_in_process
from helpers.tiny_models import build_tiny_config, raises_one_line
from huggingface_hub import HfApi, ModelCard, constants, set_client_factory
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import _http as hub_http
from huggingface_hub.utils import close_session, get_session, http_backoff

import modeling_vitcls as vitcls
from modeling_vitcls.checkpoints import CheckpointStore, read_checkpoint
from modeling_vitcls.hub import connection
from modeling_vitcls.hub.connection import set_hub_timeout
from modeling_vitcls.publishing import publish, push_permissions
from modeling_vitcls.publishing.card_renaming import replace_model_name
from modeling_vitcls.publishing.publish import PushError, build_push_command, push_folder
from modeling_vitcls.publishing.push_permissions import check_namespace, check_push_permissions, check_token


pytestmark = pytest.mark.integration


CODE = {file.name for file in Path(vitcls.__file__).parent.glob("*_vitcls.py")}
WEIGHTS = "model.safetensors"
CARD = "---\nlicense: apache-2.0\n---\n# A model\n"
RECIPE = {"model": "vitcls-tiny", "dataset": "digits", "output_dir": "/home/ann/secret/out", "epochs": 3.0}
RECIPE |= {"push_to_hub": True, "hub_model_id": "ann/model", "hub_private": False}

TOKENS = {
    "hf_ann": Token("ann", {"lab": "write", "club": "contributor", "school": "read"}),
    "hf_read": Token("ann", role="read"),
    "hf_all_of_ann": Token("ann", role="fineGrained", scopes={("user", "ann"): ["repo.content.read", "repo.write"]}),
    "hf_one_model": Token(
        "ann", role="fineGrained", scopes={("model", name): ["repo.write"] for name in ("ann/there", "ann/deleted")}
    ),
    "hf_fine_read": Token("ann", role="fineGrained", scopes={("user", "ann"): ["repo.content.read"]}),
    "hf_bob": Token("bob"),
}


@pytest.fixture
def hub(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """Start an empty Hub for this process, as ann."""
    hub.tokens |= TOKENS
    monkeypatch.setattr(connection, "RETRY_WAITS", (0.01, 0.02, 0.03))
    return hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an output folder: a model, its description, and files that must not be pushed."""
    target = tmp_path / "my-run"
    save_model(target)
    (target / "README.md").write_text(CARD)
    (target / "results.json").write_text('{"accuracy": 0.9}')
    (target / "config.resolved.yaml").write_text(yaml.safe_dump(RECIPE))
    (target / "holiday.png").write_bytes(b"\x89PNG")
    (target / "pictures").mkdir()
    (target / "pictures" / "attention.png").write_bytes(b"\x89PNG2")
    (target / "checkpoints" / "step-1").mkdir(parents=True)
    for name in ("model.safetensors", "old_vitcls.py", "loss.png", "state.json"):
        (target / "checkpoints" / "step-1" / name).write_bytes(b"old")
    for name in ("optimizer.safetensors", "training_args.bin", "model.pkl", "notes.txt", "other/loss.png"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(pickle.dumps(name))
    return target


def save_model(target: Path, num_register_tokens: int = 1, **options: Any) -> None:
    """Save a tiny classifier with its image processor."""
    config = build_tiny_config(num_register_tokens=num_register_tokens)
    vitcls.ViTCLSForImageClassification(config).save_pretrained(target, **options)
    vitcls.ViTCLSImageProcessor(size={"height": 32, "width": 32}).save_pretrained(target)


def snapshot(folder: Path) -> dict[str, str]:
    """Hashes of all files of a folder."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def count_pushes(hub: LocalHub, repo_id: str) -> int:
    """Return the number of pushes to a repository, without its first commit."""
    return len(hub.repositories[repo_id].commits) - 1


# Pushed files --------------------------------------------------------------------------------------------------------


def test_a_push_is_one_commit_of_the_model_files(hub: LocalHub, folder: Path) -> None:
    before = snapshot(folder)
    pushed = push_folder(folder, "ann/model", message="Trained")
    assert count_pushes(hub, "ann/model") == 1
    assert hub.repositories["ann/model"].branches == {"main": pushed.commit}
    assert hub.repositories["ann/model"].commits[pushed.commit].message == "Trained"
    assert pushed.url == f"{hub.url}/ann/model/commit/{pushed.commit}"
    accompanying = {"README.md", "results.json", "config.resolved.yaml", "pictures/attention.png"}
    essential = CODE | {WEIGHTS, "config.json", "preprocessor_config.json"}
    assert set(hub.files("ann/model")) == {".gitattributes", "CODE_LICENSE"} | essential | accompanying
    assert hub.read("ann/model", "CODE_LICENSE") == (Path(__file__).parents[2] / "LICENSE").read_bytes()
    for name in essential | accompanying - {"config.resolved.yaml"}:
        assert hub.read("ann/model", name) == (folder / name).read_bytes()
    assert hub.files("ann/model")[WEIGHTS].is_lfs
    assert not hub.repositories["ann/model"].private
    assert snapshot(folder) == before


def test_the_report_is_pushed_unless_it_shows_images_of_a_local_dataset(hub: LocalHub, folder: Path) -> None:
    (folder / "report.html").write_text("<html>")
    recipe = folder / "config.resolved.yaml"
    for flags, is_pushed in (
        ({"dataset": "digits"}, True),
        ({"dataset": "/home/ann/photos"}, False),
        ({"dataset": "/home/ann/photos", "card_samples": True}, True),
    ):
        recipe.write_text(yaml.safe_dump(flags))
        push_folder(folder, "ann/model")
        assert ("report.html" in hub.files("ann/model")) == is_pushed
    recipe.unlink()  # then the dataset of the report is unknown
    push_folder(folder, "ann/model")
    assert "report.html" not in hub.files("ann/model")


def test_onnx_files_are_pushed_if_their_report_matches_the_weights(
    hub: LocalHub, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"graph")
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    comparison = {"file": "onnx/model.onnx", "largest_difference": 2.5e-7, "top1_agreement": 1.0}
    labeled = {"dataset": "digits", "split": "test", "num_images": 1000, "metric": "accuracy", "model": 0.974}
    report = {"weights_sha256": {WEIGHTS: digest}, "comparisons": [comparison], "labeled": None}
    (folder / "onnx" / "report.json").write_text(json.dumps(report))
    push_folder(folder, "ann/model")
    assert {"onnx/model.onnx", "onnx/report.json"} <= set(hub.files("ann/model")) and not caplog.messages
    assert "| `onnx/model.onnx` | 2.5e-07 | 100.00% |\n" in hub.read("ann/model", "README.md").decode()
    report["labeled"] = labeled | {"files": {"model.onnx": 0.9725}}
    (folder / "onnx" / "report.json").write_text(json.dumps(report))
    push_folder(folder, "ann/model")
    card = hub.read("ann/model", "README.md").decode()
    assert (
        "1,000 images of `digits` (test), one image at a time. For the PyTorch model, the accuracy is 97.40%" in card
    )
    assert "| `onnx/model.onnx` | 2.5e-07 | 100.00% | 97.25% |\n" in card and card.count("## ONNX files") == 1
    save_model(folder, num_register_tokens=2)
    push_folder(folder, "ann/model")
    assert not [name for name in hub.files("ann/model") if name.startswith("onnx/")]
    assert "not publishing onnx/model.onnx, onnx/report.json, because" in caplog.text


def test_the_recipe_is_pushed_without_local_paths(hub: LocalHub, folder: Path) -> None:
    push_folder(folder, "ann/model")
    recipe = yaml.safe_load(hub.read("ann/model", "config.resolved.yaml"))
    assert recipe["epochs"] == 3.0 and recipe["dataset"] == "digits"
    assert "secret" not in str(recipe)
    assert not [flag for flag in recipe if "hub" in flag]  # a repeated run must not push to this repository


def test_pushing_again_keeps_every_commit_and_uploads_only_changes(
    hub: LocalHub, folder: Path, tmp_path: Path
) -> None:
    first = push_folder(folder, "ann/model").commit
    assert push_folder(folder, "ann/model").commit == first  # nothing changed
    (folder / "README.md").write_text(CARD + "more\n")
    second = push_folder(folder, "ann/model").commit
    weights = (folder / WEIGHTS).read_bytes()
    save_model(folder, num_register_tokens=2)
    third = push_folder(folder, "ann/model").commit
    assert len({first, second, third}) == count_pushes(hub, "ann/model") == 3
    assert hub.count_requests("PUT", "/objects/") == 2  # the weights of the first and the third push
    found = [
        Path(HfApi().hf_hub_download("ann/model", WEIGHTS, revision=commit, cache_dir=tmp_path / "cache")).read_bytes()
        for commit in (first, second, third)
    ]
    assert found[0] == found[1] == weights != found[2] == (folder / WEIGHTS).read_bytes()


def test_shards_replace_a_single_weights_file_and_vice_versa(hub: LocalHub, folder: Path) -> None:
    push_folder(folder, "ann/model")
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.md", repo_id="ann/model")
    (folder / WEIGHTS).unlink()
    save_model(folder, max_shard_size="20KB")
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    assert len(shards) > 1
    push_folder(folder, "ann/model")
    there = set(hub.files("ann/model"))
    assert shards | {"model.safetensors.index.json", "notes.md"} <= there and WEIGHTS not in there
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_model(folder)
    push_folder(folder, "ann/model")
    there = set(hub.files("ann/model"))
    assert {WEIGHTS, "notes.md"} <= there and not shards & there and "model.safetensors.index.json" not in there


def test_branches_have_their_own_commits(hub: LocalHub, folder: Path) -> None:
    main = push_folder(folder, "ann/model").commit
    save_model(folder, num_register_tokens=2)
    branch = push_folder(folder, "ann/model", branch="checkpoints/step-100").commit
    assert push_folder(folder, "ann/model", branch="checkpoints/step-100").commit == branch
    assert hub.repositories["ann/model"].branches == {"main": main, "checkpoints/step-100": branch}
    HfApi().create_tag("ann/model", tag="v1", revision=branch)
    assert HfApi().model_info("ann/model", revision="v1").sha == branch
    refs = HfApi().list_repo_refs("ann/model")
    assert {ref.name for ref in refs.branches} == {"main", "checkpoints/step-100"}


def test_a_push_removes_only_outdated_files_of_its_own_branch(hub: LocalHub, folder: Path) -> None:
    """Neither branch contains all files of the other branch."""
    push_folder(folder, "ann/model")
    push_folder(folder, "ann/model", branch="new")
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="metrics.jsonl", repo_id="ann/model", revision="new")
    HfApi().delete_file("results.json", "ann/model")
    (folder / "results.json").unlink()
    push_folder(folder, "ann/model", branch="new")
    assert not {"metrics.jsonl", "results.json"} & set(hub.files("ann/model", "new"))
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="metrics.jsonl", repo_id="ann/model")
    push_folder(folder, "ann/model", branch="new")  # fails if it deletes a file that exists only on main
    assert "metrics.jsonl" in hub.files("ann/model")


@pytest.mark.parametrize(("private", "is_private"), [(False, True), (True, True)])
def test_a_new_repository_has_the_visibility_of_its_organization(
    hub: LocalHub, folder: Path, private: bool, is_private: bool
) -> None:
    hub.private_by_default.add("lab")
    pushed = push_folder(folder, "lab/model", private=private)
    assert hub.repositories["lab/model"].private is pushed.is_private is is_private


def test_a_private_push_is_visible_only_to_its_owner(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    push_folder(folder, "ann/model", private=True)
    assert hub.repositories["ann/model"].private
    assert HfApi().model_info("ann/model").private
    for token in ("hf_bob", False):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).model_info("ann/model")
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).hf_hub_download("ann/model", WEIGHTS, cache_dir=tmp_path / str(token))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), ["does not contain a model", "config.json"]),
        (lambda folder: (folder / WEIGHTS).unlink(), ["lacks model.safetensors"]),
        (lambda folder: (folder / "modeling_vitcls.py").unlink(), ["lacks modeling_vitcls.py"]),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'), ["'vit'", "vitcls convert"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["cannot read", "config.json"]),
        (lambda folder: folder.rename(folder.with_name("other")), ["is not a folder"]),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_not_pushed(
    hub: LocalHub, folder: Path, spoil: Any, words: list[str]
) -> None:
    spoil(folder)
    with raises_one_line(*words):
        push_folder(folder, "ann/model")
    assert not hub.repositories


def test_invalid_metadata_of_the_card_stops_the_push(hub: LocalHub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with raises_one_line("README.md", "vitcls push", error=PushError):
        push_folder(folder, "ann/model")
    assert hub.count_requests("POST", "/validate-yaml") == 1
    assert count_pushes(hub, "ann/model") == 0


# The card ------------------------------------------------------------------------------------------------------------


OWN_CARD = """---
license: apache-2.0
tags:
- vit   # as it is
model-index:
- name: my-run
  results:
  - task:
      type: image-classification
    dataset:
      type: digits
      name: digits
    metrics:
    - type: accuracy
      value: 0.9
---

# my-run

Trained in my-run, against "my-run-2".

    classify = pipeline("image-classification", model="my-run", trust_remote_code=True)
    model = AutoModel.from_pretrained("my-run", trust_remote_code=True)
    other = AutoModel.from_pretrained("my-run-2"); base = AutoModel.from_pretrained("org/base")
    processor = AutoImageProcessor.from_pretrained(
        "my-run", trust_remote_code=True
    )
    vitcls finetune --model my-run --dataset my-run-2

# my-run
"""


def test_the_card_is_published_with_the_name_of_the_repository(hub: LocalHub, folder: Path) -> None:
    """The card in the folder is not changed, nor is text written by a person."""
    (folder / "README.md").write_text(OWN_CARD)
    push_folder(folder, "ann/other")
    assert (folder / "README.md").read_text() == OWN_CARD
    published = hub.read("ann/other", "README.md").decode()
    body = published.partition("\n---\n")[2]
    assert body == OWN_CARD.partition("\n---\n")[2].replace("# my-run", "# ann/other", 1).replace(
        'model="my-run"', 'model="ann/other"'
    ).replace('"my-run", trust', '"ann/other", trust').replace("--model my-run ", "--model ann/other ")
    metadata = yaml.safe_load(published.split("---")[1])
    assert metadata.pop("model-index")[0].pop("name") == "ann/other"
    assert metadata == {"license": "apache-2.0", "tags": ["vit"]}
    assert ModelCard(published).data.eval_results[0].metric_value == 0.9


@pytest.mark.parametrize(
    ("text", "is_changed"),
    [
        (OWN_CARD.replace("my-run\n", "ann/other\n").replace('"my-run"', '"ann/other"').replace("l my", "l x"), False),
        (CARD, False),  # written by hand
        ("# my-run\n", False),  # a heading that is not the name of a model
        ('# old/name\nfrom_pretrained("old/name")\n', True),  # written for another repository
        ('---\nlicense: mit\n---\n\n# old/name\nfrom_pretrained("old/name")\n', True),
        ("---\nlicense: [\n---\n# x\n", False),  # the Hub returns the error
        ("---\nmodel-index: 3\n---\n", False),
        ("---\nmodel-index: [3, {name: [x]}]\n---\n# x\n", False),
        ("---\n- a\n---\n# x\n", False),
        ('---\nmodel-index:\n- name: old/name\n---\n# x\nfrom_pretrained("old/name")\n', True),
        ("---\r\nlicense: mit\r\n---\r\n# x\r\n", False),
        ("", False),
    ],
)
def test_other_cards_are_not_changed(text: str, is_changed: bool) -> None:
    found = replace_model_name("ann/other", text, "my-run")
    assert found == (text.replace("old/name", "ann/other") if is_changed else text)


def test_the_name_of_the_folder_in_the_model_index_is_replaced() -> None:
    card = "---\nlicense: mit\nmodel-index:\n- name: my-run\n  results: []\n---\n# Notes\n"
    assert replace_model_name("ann/other", card, "my-run") == card.replace("my-run", "ann/other")


def test_a_push_removes_files_about_another_model(hub: LocalHub, folder: Path) -> None:
    (folder / "parity_report.json").write_text("{}")
    push_folder(folder, "ann/model")
    for name in ("results.json", "parity_report.json", "config.resolved.yaml", "pictures/attention.png"):
        (folder / name).unlink()
    push_folder(folder, "ann/model")
    there = set(hub.files("ann/model"))
    assert (
        "pictures/attention.png" in there
        and not {"results.json", "parity_report.json", "config.resolved.yaml"} & there
    )


# Permissions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "asked", "found"),
    [
        ("hf_ann", None, "ann/my-run"),
        ("hf_ann", "model", "ann/model"),
        ("hf_ann", "Ann/model", "Ann/model"),
        ("hf_ann", "lab/model", "lab/model"),
        ("hf_ann", "club/model", "club/model"),
        ("hf_all_of_ann", "ann/model", "ann/model"),
        ("hf_one_model", "ann/there", "ann/there"),
    ],
)
def test_a_token_with_permission_returns_the_full_id(
    hub: LocalHub, token: str, asked: str | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create("ann/there", private=False)
    monkeypatch.setenv("HF_TOKEN", token)
    assert check_push_permissions(asked, "my-run") == found
    assert set(hub.repositories) == {"ann/there"}
    assert {method for method, _ in hub.requests} == {"GET"}


@pytest.mark.parametrize(
    ("token", "repo_id", "words"),
    [
        (None, None, ["requires a Hugging Face token", "hf auth login", "HF_TOKEN"]),
        ("hf_wrong", None, ["is invalid", "hf auth login"]),
        ("hf_read", None, ["is read-only", "ann/my-run", "'write'"]),
        ("hf_fine_read", None, ["fine-grained", "ann/my-run", "Write access"]),
        ("hf_one_model", "ann/other", ["fine-grained", "ann/other"]),
        ("hf_one_model", "ann/deleted", ["fine-grained", "ann/deleted"]),  # the token may not create it
        ("hf_ann", "bob/model", ["bob is neither your user name nor", "ann, lab, club, school"]),
        ("hf_ann", "school/model", ["role in school is 'read'"]),
        ("hf_ann", "ann/my model", ["--hub-model-id"]),
        ("hf_ann", "a/b/c", ["--hub-model-id"]),
    ],
)
def test_a_token_without_permission_is_an_error_and_nothing_is_pushed(
    hub: LocalHub, token: str | None, repo_id: str | None, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create("ann/there", private=False)
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with raises_one_line(*words):
        check_push_permissions(repo_id, "my-run")
    assert set(hub.repositories) == {"ann/there"}
    assert {method for method, _ in hub.requests} <= {"GET"}


def test_unknown_roles_and_tokens_are_tested_by_the_push() -> None:
    """The Hub may not return a role or a token, for example for a login in a browser."""
    for organization in ({"name": "Lab"}, {"name": "lab", "roleInOrg": None}, {"name": "lab", "roleInOrg": "admin"}):
        check_namespace("lab/model", {"name": "ann", "orgs": [organization]}, "model")
    with raises_one_line("role in lab is 'read'", "push to ann/model"):
        check_namespace("lab/model", {"name": "ann", "orgs": [{"name": "lab", "roleInOrg": "read"}]}, "model")
    for account in ({"name": "ann"}, {"name": "ann", "auth": {}}, {"auth": {"accessToken": {"role": "write"}}}):
        check_token("ann/model", account, repo_exists=False)


def test_a_private_push_to_a_public_repository_is_an_error(hub: LocalHub) -> None:
    hub.create("ann/public", private=False)
    hub.create("ann/private", private=True)
    assert check_push_permissions("ann/private", "my-run", private=True) == "ann/private"
    assert check_push_permissions("ann/new", "my-run", private=True) == "ann/new"
    assert check_push_permissions("ann/private", "my-run") == "ann/private"
    hub.fail("GET", "/api/models/ann/private", 400)
    with raises_one_line("does not respond: HTTP 400", "or push later", error=OSError):
        check_push_permissions("ann/private", "my-run")
    with raises_one_line("ann/public exists and is public"):
        check_push_permissions("ann/public", "my-run", private=True)


def test_a_model_and_a_space_may_have_the_same_name(hub: LocalHub) -> None:
    hub.create("spaces/ann/space", private=False)
    hub.create("ann/model", private=False)
    with raises_one_line("ann/space exists and is public", "--space-id"):
        check_push_permissions("ann/space", "demo", private=True, repo_type="space")
    assert check_push_permissions("ann/model", "demo", private=True, repo_type="space") == "ann/model"
    with raises_one_line("neither your user name nor one of your organizations", "--space-id"):
        check_push_permissions("bob/demo", "demo", repo_type="space")


@pytest.mark.parametrize("token", ["hf_wrong", "hf_read", "hf_bob"])
def test_a_token_that_has_lost_its_permissions(
    hub: LocalHub, folder: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(folder)
    monkeypatch.setenv("HF_TOKEN", token)
    with raises_one_line("HTTP 40", f"finish with: {build_push_command(folder, 'ann/model')}", error=PushError):
        push_folder(folder, "ann/model")
    assert not hub.repositories
    assert hub.count_requests("POST", "/repos/create") == 1  # a retry would not help
    assert snapshot(folder) == before


# Faults --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("POST", "/repos/create", "drop"),
        ("POST", "/repos/create", "lose"),
        ("GET", "/tree/", "cut"),
        ("POST", "/validate-yaml", 502),
        ("POST", "/preupload/", 500),
        ("POST", "/objects/batch", "drop"),
        ("PUT", "/objects/", "drop"),
        ("PUT", "/objects/", 503),
        ("POST", "/commit/", "drop"),
        ("POST", "/commit/", "lose"),
        ("POST", "/commit/", 500),
        ("POST", "/branch/", 504),
    ],
)
def test_temporary_faults_are_retried(hub: LocalHub, folder: Path, method: str, path: str, kind: str | int) -> None:
    hub.fail(method, path, kind)
    pushed = push_folder(folder, "ann/model", branch="new")
    assert not any(fault.times for fault in hub.faults)
    assert count_pushes(hub, "ann/model") == 1
    assert hub.read("ann/model", WEIGHTS, pushed.commit) == (folder / WEIGHTS).read_bytes()
    assert hub.repositories["ann/model"].branches["new"] == pushed.commit


@pytest.mark.parametrize(("retry_after", "seconds"), [(30, 30.0), (86_400, 300.0)])
def test_a_requested_wait_has_an_upper_bound(
    hub: LocalHub, folder: Path, retry_after: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(connection, "time", SimpleNamespace(sleep=waits.append))
    hub.fail("POST", "/commit/", 429, retry_after=retry_after)
    push_folder(folder, "ann/model")
    assert waits == [seconds]


def test_a_failed_push_is_finished_by_the_printed_command(
    hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command pushes with the same message, branch and checkpoint."""
    (folder / "checkpoints" / "step-1").rename(folder / "notes")
    CheckpointStore(folder / "checkpoints", num_kept=1).save(1, {"model": {"x": torch.ones(1)}}, {"flags": {}}, False)
    before = snapshot(folder)
    hub.fail("POST", "/commit/", 500, times=4)
    message = 'It\'s trained; "well"'
    how: dict[str, Any] = {"private": True, "branch": "new", "message": message, "with_optimizer": True}
    how["with_handler"] = True
    command = build_push_command(folder, "ann/model", **how)
    with raises_one_line("HTTP 500", f"finish with: {command}", error=PushError):
        push_folder(folder, "ann/model", **how)
    assert count_pushes(hub, "ann/model") == 0
    assert snapshot(folder) == before
    sent = hub.count_requests("PUT", "/objects/")
    assert sent == 2
    program, script, *flags = shlex.split(command)
    assert (program, script) == ("vitcls", "push")
    assert run_in_process("push_to_hub.py", *flags, "--no-verify") == 0
    repository = hub.repositories["ann/model"]
    assert count_pushes(hub, "ann/model") == 1 and repository.private
    assert repository.commits[repository.branches["new"]].message == message
    assert {f"checkpoints/step-00000001/{WEIGHTS}", "handler.py"} <= hub.files("ann/model", "new").keys()
    assert hub.count_requests("PUT", "/objects/") == sent  # the weights were already uploaded


def test_the_command_for_a_plain_push_is_short(folder: Path) -> None:
    assert build_push_command(folder, "ann/model") == f"vitcls push --model {folder} --hub-model-id ann/model"


def test_two_simultaneous_pushes_do_not_mix_their_files(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    """The first push arrives after the second, on which it is not based, and is built again."""
    whole = tmp_path / "whole"
    save_model(whole, num_register_tokens=2)
    (whole / "results.json").write_text("{}")
    (folder / WEIGHTS).unlink()
    (folder / "results.json").unlink()
    save_model(folder, max_shard_size="20KB")
    hub.fail("POST", "/commit/", "hold")
    pushing = threading.Thread(target=push_folder, args=(folder, "ann/model"))
    pushing.start()
    wait_until(lambda: hub.count_requests("POST", "/commit/") == 1)
    second = push_folder(whole, "ann/model").commit
    assert set(hub.files("ann/model", second)) >= {WEIGHTS, "results.json"}
    hub.released.set()
    pushing.join(timeout=60)
    there = set(hub.files("ann/model"))
    assert "model.safetensors.index.json" in there and not {WEIGHTS, "results.json"} & there
    assert count_pushes(hub, "ann/model") == 2
    assert hub.count_requests("POST", "/commit/") == 3


def wait_until(is_so: Any) -> None:
    """Wait until a condition is true, for at most a minute."""
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_dead_endpoint_fails_in_seconds(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        point_client_at(f"http://127.0.0.1:{unused.getsockname()[1]}", "hf_ann", monkeypatch, tmp_path)
        monkeypatch.setattr(connection, "RETRY_WAITS", (0.01, 0.02, 0.03))
        started = time.perf_counter()
        with raises_one_line("does not respond", "HF_ENDPOINT", constants.ENDPOINT, error=OSError):
            check_push_permissions("ann/model", "my-run")
        with raises_one_line("finish with: vitcls push", error=PushError):
            push_folder(folder, "ann/model")
        assert time.perf_counter() - started < 5


def test_a_silent_endpoint_times_out(hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_permissions, "TIMEOUT", 0.3)
    monkeypatch.setattr(publish, "TIMEOUT", 0.3)
    hub.fail("GET", "/whoami-v2", "wait")
    hub.fail("POST", "/repos/create", "wait", times=4)
    with raises_one_line("does not respond", error=OSError):
        check_push_permissions("ann/model", "my-run")
    with raises_one_line("finish with: ", error=PushError):
        push_folder(folder, "ann/model")


def test_requests_without_a_client_timeout_time_out(hub: LocalHub) -> None:
    hub.create("ann/there", private=False)
    hub.fail("GET", "/api/models/ann/there", "wait", times=9)
    with pytest.raises(connection.HTTPError), connection.set_hub_timeout(0.2):
        HfApi().model_info("ann/there")


def get_request_timeouts(hub: LocalHub, **options: Any) -> dict[str, float | None]:
    """Return the timeouts of huggingface_hub's client for a request."""
    return get_session().get(f"{hub.url}/api/whoami-v2", **options).request.extensions["timeout"]


def build_timeouts(seconds: float | None) -> dict[str, float | None]:
    """Return the same timeout for all phases."""
    return dict.fromkeys(connection.TIMEOUT_NAMES, seconds)


def test_the_shortest_timeout_applies_to_all_threads(hub: LocalHub) -> None:
    """The threads share a client, whose own timeout is restored after the last thread."""
    before = get_request_timeouts(hub)
    first, second, third = set_hub_timeout(30.0), set_hub_timeout(5.0), set_hub_timeout(60.0)
    for block, seconds in ((first, 30.0), (second, 5.0), (third, 5.0)):
        block.__enter__()
        assert get_request_timeouts(hub) == build_timeouts(seconds)
    for block, seconds in ((first, 5.0), (second, 60.0)):
        block.__exit__(None, None, None)
        assert get_request_timeouts(hub) == build_timeouts(seconds)
    third.__exit__(None, None, None)
    assert get_request_timeouts(hub) == before == build_timeouts(None)


def test_a_timeout_applies_to_new_clients(hub: LocalHub) -> None:
    """huggingface_hub creates a client whenever it cannot connect. Overlapping blocks may use several clients."""
    first, second = set_hub_timeout(30.0), set_hub_timeout(5.0)
    first.__enter__()
    client = get_session()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(connection.HTTPError):
            http_backoff("GET", f"http://127.0.0.1:{unused.getsockname()[1]}", max_retries=0)
    assert get_session() is not client
    assert get_request_timeouts(hub) == build_timeouts(30.0)
    second.__enter__()
    close_session()
    assert get_request_timeouts(hub) == build_timeouts(5.0)
    first.__exit__(None, None, None)
    assert get_request_timeouts(hub) == build_timeouts(5.0)
    second.__exit__(None, None, None)
    assert get_request_timeouts(hub) == build_timeouts(None)


def test_a_timeout_keeps_the_users_client_factory_and_timeouts_of_requests(hub: LocalHub) -> None:
    """The timeout of a client is replaced, because it is for all kinds of requests.

    The timeout of a single request is kept.
    """
    own = get_session().__class__
    before = hub_http._GLOBAL_CLIENT_FACTORY
    set_client_factory(lambda: own(headers={"X-Mine": "yes"}, timeout=3.0))
    try:
        with set_hub_timeout(30.0):
            assert get_session().headers["X-Mine"] == "yes"
            assert get_request_timeouts(hub) == build_timeouts(30.0)
            assert get_request_timeouts(hub, timeout=7.0) == build_timeouts(7.0)
            assert get_request_timeouts(hub, timeout=None) == build_timeouts(30.0)
        assert get_session().headers["X-Mine"] == "yes"
        assert get_request_timeouts(hub) == build_timeouts(3.0)
        with set_hub_timeout(30.0):
            assert len(get_session().event_hooks["request"]) == 1  # wrapped once
    finally:
        set_client_factory(before)


def test_a_background_push_prints_nothing_and_starts_no_threads(
    hub: LocalHub,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture,
) -> None:
    """The Python interpreter would wait at exit for threads that upload several large files."""
    (folder / WEIGHTS).unlink()
    save_model(folder, max_shard_size="20KB")
    monkeypatch.setattr(local_hub_server, "WAIT_SECONDS", 0.5)
    hub.fail("PUT", "/objects/", "wait")
    hub.fail("PUT", "/objects/", 503)
    hub.fail("POST", "/commit/", 500)
    capfd.readouterr()
    pushing = threading.Thread(target=push_folder, args=(folder, "ann/model"), kwargs={"in_background": True})
    pushing.start()
    seen: set[str] = set()
    while pushing.is_alive():
        seen |= {thread.name for thread in threading.enumerate()}
        time.sleep(0.01)
    assert count_pushes(hub, "ann/model") == 1 and hub.count_requests("PUT", "/objects/") > 2
    assert not caplog.text and not "".join(capfd.readouterr())
    assert not [name for name in seen if "ThreadPool" in name]


def test_offline_is_an_immediate_error(hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with raises_one_line("HF_HUB_OFFLINE"):
        check_push_permissions("ann/model", "my-run")
    with raises_one_line("HF_HUB_OFFLINE"):
        push_folder(folder, "ann/model")
    assert not hub.requests


# The script ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (None, "a push requires a Hugging Face token, but no token was found"),
        ("hf_wrong", "the Hugging Face token (HF_TOKEN, or the token of `hf auth login`) is invalid"),
        ("hf_bob", "cannot push to ann/model: ann is neither your user name nor"),
        ("hf_fine_read", "the fine-grained Hugging Face token has no permission to write to ann/model"),
    ],
)
def test_the_script_explains_errors_of_a_token(
    hub: LocalHub,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    token: str | None,
    words: str,
) -> None:
    before = snapshot(folder)
    point_client_at(hub.url, token, monkeypatch, folder.parent / "home")
    flags = ["--model", str(folder), "--hub-model-id", "ann/model"]
    assert run_in_process("push_to_hub.py", *flags) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: {words}") and len(message.splitlines()) == 1
    assert not hub.repositories
    assert snapshot(folder) == before


def test_the_published_checkpoint_is_the_newest_complete_one_without_local_paths(
    hub: LocalHub, folder: Path, tmp_path: Path
) -> None:
    store = CheckpointStore(folder / "checkpoints", num_kept=9)
    flags = {"output_dir": "runs/x", "dataset": str(tmp_path), "model": "/gone/model", "teacher": None, "epochs": 3.0}
    for step in (1, 2, 3):
        store.save(step, {"model": {"x": torch.ones(step)}}, {"step": step, "flags": flags | {"seed": step}}, False)
    (store.get_folder(3) / WEIGHTS).write_bytes(b"damaged")
    (store.get_folder(2) / "notes.pkl").write_bytes(pickle.dumps(3))
    before = snapshot(folder)
    push_folder(folder, "ann/model", with_optimizer=True)
    assert snapshot(folder) == before
    place = "checkpoints/step-00000002"
    assert {name for name in hub.files("ann/model") if name.startswith("ch")} == {
        f"{place}/{WEIGHTS}",
        f"{place}/state.json",
    }
    (tmp_path / "state").mkdir()
    for name in (WEIGHTS, "state.json"):
        (tmp_path / "state" / name).write_bytes(hub.read("ann/model", f"{place}/{name}"))
    published = read_checkpoint(tmp_path / "state")  # with its own checksum
    assert published.metadata == {"step": 2, "flags": {"teacher": None, "epochs": 3.0, "seed": 2}}
    assert torch.equal(published.load_tensors("model")["x"], torch.ones(2))


def test_a_missing_checkpoint_is_an_error_of_the_script(
    hub: LocalHub, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run_in_process("push_to_hub.py", "--model", folder, "--push-optimizer") == 1
    assert "checkpoints has no undamaged checkpoint to publish" in capsys.readouterr().err
    assert not hub.repositories


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", ["--model FOLDER to push", "--verify-only ID"]),
        ("--model x --revision v1", ["--revision", "--verify-only"]),
        ("--model x --revision main", ["--revision", "--verify-only"]),
        ("--verify-only ann/model --hub-model-id ann/other", ["--verify-only pushes nothing", "--hub-model-id"]),
        ("--verify-only ann/model --push-optimizer", ["--push-optimizer"]),
        ("--verify-only ann/model --branch new", ["--branch"]),
        ("--verify-only ann/model --private", ["--private"]),
        ("--verify-only ann/model --message hello", ["--message"]),
        ("--verify-only ann/model --no-verify", ["--no-verify"]),
    ],
)
def test_incompatible_flags_exit_with_status_2(flags: str, words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert run_in_process("push_to_hub.py", *flags.split()) == 2
    printed = "".join(capsys.readouterr())
    assert all(word in printed for word in words), printed


def test_the_script_verifies_the_revision_of_its_flag(
    hub: LocalHub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push_folder(folder, "ann/model")
    assert run_in_process("push_to_hub.py", "--verify-only", "ann/model", "--revision", "v9") == 1
    assert "ann/model has no revision v9" in capsys.readouterr().err


def test_errors_of_the_script_are_one_line_with_status_1(
    hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    assert run_in_process("push_to_hub.py", "--model", folder) == 1
    printed, error = capsys.readouterr()
    assert error.startswith("error: the Hugging Face token is read-only, so it cannot push to ann/my-run")
    assert len(error.strip().splitlines()) == 1 and not printed
    assert not hub.repositories
    assert snapshot(folder) == before

"""Pushing model folders to a Hub on this machine, through the real huggingface_hub client."""

import hashlib
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from local_hub import LocalHub, Token, point_client_at, running_hub
from tiny import raises_one_line, tiny_config

import modeling_vitcls as vitcls
from modeling_vitcls.hub import connection, publish, rights
from modeling_vitcls.hub.publish import PushFailed, push_command, push_folder
from modeling_vitcls.hub.rights import check_push_rights


SCRIPT = Path(__file__).parents[1] / "scripts" / "push_to_hub.py"
CODE = {file.name for file in Path(vitcls.__file__).parent.glob("*_vitcls.py")}
WEIGHTS = "model.safetensors"
CARD = "---\nlicense: apache-2.0\n---\n# A model\n"
RECIPE = {"model": "vitcls-tiny", "dataset": "digits", "output_dir": "/home/ann/secret/out", "epochs": 3.0}

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
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """An empty Hub, which the client of this process talks to as ann."""
    with running_hub() as running:
        running.tokens |= TOKENS
        point_client_at(running.url, "hf_ann", monkeypatch, tmp_path / "home")
        monkeypatch.setattr(connection, "WAITS", (0.01, 0.02, 0.03))
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a run leaves: a model, what is told about it, and what must not leave the machine."""
    target = tmp_path / "my-run"
    save_model(target)
    (target / "README.md").write_text(CARD)
    (target / "results.json").write_text('{"accuracy": 0.9}')
    (target / "config.resolved.yaml").write_text(yaml.safe_dump(RECIPE))
    (target / "confusion.png").write_bytes(b"\x89PNG")
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
    config = tiny_config(num_register_tokens=num_register_tokens)
    vitcls.ViTCLSForImageClassification(config).save_pretrained(target, **options)
    vitcls.ViTCLSImageProcessor(size={"height": 32, "width": 32}).save_pretrained(target)


def snapshot(folder: Path) -> dict[str, str]:
    """Hashes of all files of a folder."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def num_commits(hub: LocalHub, repo_id: str) -> int:
    """Pushes that a repository has seen; its first commit comes with it."""
    return len(hub.repositories[repo_id].commits) - 1


# What is pushed ------------------------------------------------------------------------------------------------------


def test_a_push_is_one_commit_of_what_belongs_to_the_model(hub: LocalHub, folder: Path) -> None:
    before = snapshot(folder)
    pushed = push_folder(folder, "ann/model", message="Trained")
    assert num_commits(hub, "ann/model") == 1
    assert hub.repositories["ann/model"].branches == {"main": pushed.commit}
    assert hub.repositories["ann/model"].commits[pushed.commit].message == "Trained"
    assert pushed.url == f"{hub.url}/ann/model/commit/{pushed.commit}"
    accompanying = {"README.md", "results.json", "config.resolved.yaml", "confusion.png", "pictures/attention.png"}
    essential = CODE | {WEIGHTS, "config.json", "preprocessor_config.json"}
    assert set(hub.files("ann/model")) == {".gitattributes"} | essential | accompanying
    for name in essential | accompanying - {"config.resolved.yaml"}:
        assert hub.read("ann/model", name) == (folder / name).read_bytes()
    assert hub.files("ann/model")[WEIGHTS].is_lfs
    assert not hub.repositories["ann/model"].private
    assert snapshot(folder) == before


def test_the_recipe_is_pushed_without_the_paths_of_this_machine(hub: LocalHub, folder: Path) -> None:
    push_folder(folder, "ann/model")
    recipe = yaml.safe_load(hub.read("ann/model", "config.resolved.yaml"))
    assert recipe["epochs"] == 3.0 and recipe["dataset"] == "digits"
    assert "secret" not in str(recipe)


def test_pushing_again_keeps_every_commit_and_sends_only_what_changed(
    hub: LocalHub, folder: Path, tmp_path: Path
) -> None:
    first = push_folder(folder, "ann/model").commit
    assert push_folder(folder, "ann/model").commit == first  # nothing changed
    (folder / "README.md").write_text(CARD + "more\n")
    second = push_folder(folder, "ann/model").commit
    weights = (folder / WEIGHTS).read_bytes()
    save_model(folder, num_register_tokens=2)
    third = push_folder(folder, "ann/model").commit
    assert len({first, second, third}) == num_commits(hub, "ann/model") == 3
    assert hub.asked("PUT", "/objects/") == 2  # the weights of the first and the third
    found = [
        Path(HfApi().hf_hub_download("ann/model", WEIGHTS, revision=commit, cache_dir=tmp_path / "cache")).read_bytes()
        for commit in (first, second, third)
    ]
    assert found[0] == found[1] == weights != found[2] == (folder / WEIGHTS).read_bytes()


def test_shards_replace_the_weights_of_an_earlier_push_and_the_other_way_round(hub: LocalHub, folder: Path) -> None:
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


def test_a_branch_gets_its_own_commits(hub: LocalHub, folder: Path) -> None:
    main = push_folder(folder, "ann/model").commit
    save_model(folder, num_register_tokens=2)
    branch = push_folder(folder, "ann/model", branch="checkpoints/step-100").commit
    assert push_folder(folder, "ann/model", branch="checkpoints/step-100").commit == branch
    assert hub.repositories["ann/model"].branches == {"main": main, "checkpoints/step-100": branch}
    HfApi().create_tag("ann/model", tag="v1", revision=branch)
    assert HfApi().model_info("ann/model", revision="v1").sha == branch
    refs = HfApi().list_repo_refs("ann/model")
    assert {ref.name for ref in refs.branches} == {"main", "checkpoints/step-100"}


def test_a_private_push_is_seen_by_its_owner_alone(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
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
        (lambda folder: (folder / "config.json").unlink(), ["holds no model", "config.json"]),
        (lambda folder: (folder / WEIGHTS).unlink(), ["lacks model.safetensors"]),
        (lambda folder: (folder / "modeling_vitcls.py").unlink(), ["lacks modeling_vitcls.py"]),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'), ["'vit'", "convert.py"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["cannot read", "config.json"]),
        (lambda folder: folder.rename(folder.with_name("other")), ["is no folder"]),
    ],
)
def test_a_folder_that_would_not_load_is_not_pushed(hub: LocalHub, folder: Path, spoil: Any, words: list[str]) -> None:
    spoil(folder)
    with raises_one_line(*words):
        push_folder(folder, "ann/model")
    assert not hub.repositories


def test_wrong_metadata_of_the_card_stops_the_push_at_once(hub: LocalHub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with raises_one_line("README.md", "push_to_hub.py", error=PushFailed):
        push_folder(folder, "ann/model")
    assert hub.asked("POST", "/validate-yaml") == 1
    assert num_commits(hub, "ann/model") == 0


# Rights --------------------------------------------------------------------------------------------------------------


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
def test_a_token_that_may_push_gives_the_full_id(
    hub: LocalHub, token: str, asked: str | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create("ann/there", private=False)
    monkeypatch.setenv("HF_TOKEN", token)
    assert check_push_rights(asked, "my-run") == found
    assert set(hub.repositories) == {"ann/there"}
    assert {method for method, _ in hub.requests} == {"GET"}


@pytest.mark.parametrize(
    ("token", "repo_id", "words"),
    [
        (None, None, ["no Hugging Face token", "hf auth login", "HF_TOKEN"]),
        ("hf_wrong", None, ["does not know", "hf auth login"]),
        ("hf_read", None, ["may only read", "ann/my-run", "'write'"]),
        ("hf_fine_read", None, ["fine-grained", "ann/my-run", "Write access"]),
        ("hf_one_model", "ann/other", ["fine-grained", "ann/other"]),
        ("hf_one_model", "ann/deleted", ["fine-grained", "ann/deleted"]),  # which it may not make
        ("hf_ann", "bob/model", ["bob is neither you nor", "ann, lab, club, school"]),
        ("hf_ann", "school/model", ["role in school is 'read'"]),
        ("hf_ann", "ann/my model", ["--hub-model-id"]),
        ("hf_ann", "a/b/c", ["--hub-model-id"]),
    ],
)
def test_a_token_that_may_not_push_is_told_why_and_nothing_happens(
    hub: LocalHub, token: str | None, repo_id: str | None, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create("ann/there", private=False)
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with raises_one_line(*words):
        check_push_rights(repo_id, "my-run")
    assert set(hub.repositories) == {"ann/there"}
    assert {method for method, _ in hub.requests} <= {"GET"}


def test_a_public_repository_is_no_place_for_what_is_meant_to_be_private(hub: LocalHub) -> None:
    hub.create("ann/public", private=False)
    hub.create("ann/private", private=True)
    assert check_push_rights("ann/private", "my-run", private=True) == "ann/private"
    assert check_push_rights("ann/new", "my-run", private=True) == "ann/new"
    with raises_one_line("ann/public exists and is public"):
        check_push_rights("ann/public", "my-run", private=True)


@pytest.mark.parametrize("token", ["hf_wrong", "hf_read", "hf_bob"])
def test_a_token_that_lost_its_rights_in_the_meantime(
    hub: LocalHub, folder: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(folder)
    monkeypatch.setenv("HF_TOKEN", token)
    with raises_one_line("HTTP 40", f"finish with: {push_command(folder, 'ann/model')}", error=PushFailed):
        push_folder(folder, "ann/model")
    assert not hub.repositories
    assert hub.asked("POST", "/repos/create") == 1  # trying again would not help
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
def test_what_passes_is_tried_again(hub: LocalHub, folder: Path, method: str, path: str, kind: str | int) -> None:
    hub.fail(method, path, kind)
    pushed = push_folder(folder, "ann/model", branch="new")
    assert not any(fault.times for fault in hub.faults)
    assert num_commits(hub, "ann/model") == 1
    assert hub.read("ann/model", WEIGHTS, pushed.commit) == (folder / WEIGHTS).read_bytes()
    assert hub.repositories["ann/model"].branches["new"] == pushed.commit


def test_too_many_requests_are_followed_by_the_wait_that_is_asked_for(
    hub: LocalHub, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail("POST", "/commit/", 429, retry_after=1)
    started = time.perf_counter()
    push_folder(folder, "ann/model")
    assert time.perf_counter() - started > 1
    assert "HTTP 429" in caplog.text and "trying again in 1 s" in caplog.text


def test_a_push_that_failed_is_finished_by_the_command_it_names(hub: LocalHub, folder: Path) -> None:
    before = snapshot(folder)
    hub.fail("POST", "/commit/", 500, times=4)
    command = push_command(folder, "ann/model", private=True)
    assert command == f"python scripts/push_to_hub.py --model {folder} --hub-model-id ann/model --private"
    with raises_one_line("HTTP 500", f"finish with: {command}", error=PushFailed):
        push_folder(folder, "ann/model", private=True)
    assert num_commits(hub, "ann/model") == 0
    assert snapshot(folder) == before
    sent = hub.asked("PUT", "/objects/")
    assert sent == 1
    push_folder(folder, "ann/model", private=True)
    assert num_commits(hub, "ann/model") == 1
    assert hub.asked("PUT", "/objects/") == sent  # the weights were there already


def test_a_dead_endpoint_fails_in_seconds(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        point_client_at(f"http://127.0.0.1:{unused.getsockname()[1]}", "hf_ann", monkeypatch, tmp_path)
        monkeypatch.setattr(connection, "WAITS", (0.01, 0.02, 0.03))
        started = time.perf_counter()
        with raises_one_line("does not answer", "HF_ENDPOINT", constants.ENDPOINT, error=OSError):
            check_push_rights("ann/model", "my-run")
        with raises_one_line("finish with: python scripts/push_to_hub.py", error=PushFailed):
            push_folder(folder, "ann/model")
        assert time.perf_counter() - started < 5


def test_a_silent_endpoint_is_given_up(hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rights, "PATIENCE", 0.3)
    monkeypatch.setattr(publish, "PATIENCE", 0.3)
    hub.fail("GET", "/whoami-v2", "wait")
    hub.fail("POST", "/repos/create", "wait", times=4)
    with raises_one_line("does not answer", error=OSError):
        check_push_rights("ann/model", "my-run")
    with raises_one_line("finish with: ", error=PushFailed):
        push_folder(folder, "ann/model")


def test_offline_says_so_at_once(hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with raises_one_line("HF_HUB_OFFLINE"):
        check_push_rights("ann/model", "my-run")
    with raises_one_line("HF_HUB_OFFLINE"):
        push_folder(folder, "ann/model")
    assert not hub.requests


# The script ----------------------------------------------------------------------------------------------------------


def test_the_script_ends_with_one_line_and_status_1(
    hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    ended = subprocess.run([sys.executable, SCRIPT, "--model", folder], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: the Hugging Face token may only read, so it cannot push to ann/my-run")
    assert len(ended.stderr.strip().splitlines()) == 1 and not ended.stdout
    assert not hub.repositories
    assert snapshot(folder) == before

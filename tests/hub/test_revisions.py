"""Commits of models and code on the Hub: branches, tags, visibility, and the files of an old commit."""

from pathlib import Path

import pytest
from helpers.local_hub import LocalHub
from helpers.tiny_models import raises_one_line
from huggingface_hub import HfApi, constants, get_session

from modeling_vitcls.hub import loading
from modeling_vitcls.hub.loading import HubCommit, download_files, resolve_commit


pytestmark = pytest.mark.integration


@pytest.fixture
def hub(hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LocalHub:
    """Start a Hub with a public model that has two commits, a tag and a branch, and with a private model."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    files = {"config.json": b"old", "notes.txt": b"notes"}
    model = hub.create("ann/model", private=False, files=files)
    HfApi().create_tag("ann/model", tag="v1")
    model.commit("main", "new", {name: hub.store(name, b"new") for name in files})
    model.commit("branch", "other", {"config.json": hub.store("config.json", b"branch")})
    hub.create("ann/secret", private=True)
    return hub


def test_a_revision_is_resolved_to_its_commit(hub: LocalHub) -> None:
    model = hub.repositories["ann/model"]
    old = model.tags["v1"]
    revisions = {"main": model.branches["main"], "branch": model.branches["branch"], "v1": old, old: old}
    assert len(set(revisions.values())) == 3
    for revision, commit in revisions.items():
        assert resolve_commit("ann/model", revision) == HubCommit("ann/model", commit, needs_token=False)
    assert resolve_commit("ann/model") == resolve_commit("ann/model", "main")
    assert resolve_commit("ann/secret").needs_token
    hub.gated.add("ann/model")
    assert resolve_commit("ann/model").needs_token
    with raises_one_line("ann/model", "v2", error=OSError):
        resolve_commit("ann/model", "v2")
    with raises_one_line("no id at all", error=OSError):
        resolve_commit("no id at all")


def test_only_the_matching_files_of_the_commit_are_downloaded(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = download_files("ann/model", "v1", ["*.json"], folder=tmp_path / "files")
    assert folder == tmp_path / "files" and (folder / "config.json").read_bytes() == b"old"
    assert not (folder / "notes.txt").exists()
    with raises_one_line("cannot download ann/none: HTTP 40", error=OSError):
        download_files("ann/none", "0" * 40, ["*.json"])
    cached = download_files("ann/model", None, ["*.txt"])
    assert (cached / "notes.txt").read_bytes() == b"new" and cached.is_relative_to(tmp_path / "cache")
    monkeypatch.setattr(loading, "snapshot_download", lambda *_, **__: f"{get_session().timeout.read}")
    for given, timeout in (((), loading.COMMIT_TIMEOUT), ((3.0,), 3.0)):
        assert download_files("ann/model", None, [], *given).name == str(timeout)

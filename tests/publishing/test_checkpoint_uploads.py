"""Checkpoints on a branch of the run's repository."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from helpers.local_hub import LocalHub
from huggingface_hub import HfApi

from modeling_vitcls.publishing.checkpoint_uploads import build_checkpoint_uploader


pytestmark = pytest.mark.integration


def test_the_newest_checkpoint_replaces_the_earlier_one_on_the_branch(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are uploaded at once, and the test ends each upload."""
    upload_folder = HfApi.upload_folder
    uploads = []

    def start_upload(api: HfApi, *, run_as_future: bool, **arguments: Any) -> "Future[None]":
        assert run_as_future
        upload_folder(api, **arguments)
        uploads.append(Future())
        return uploads[-1]

    monkeypatch.setattr(HfApi, "upload_folder", start_upload)
    hub.create("ann/model", private=False)
    warnings: list[str] = []
    upload = build_checkpoint_uploader("ann/model", "live", warnings.append)
    for step, uploaded in (
        (1, 1),
        (2, 1),
        (3, 3),
    ):  # the second is saved during the upload of the first
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / "state.json").write_text(f"{step}")
        upload(tmp_path / f"step-{step}")
        assert set(hub.files("ann/model", "live")) - {".gitattributes"} == {
            f"checkpoints/step-{uploaded}/state.json"
        }
        if step == 2:
            uploads[0].set_result(None)
    assert not warnings
    assert set(hub.files("ann/model")) == {".gitattributes"}
    uploads[1].set_exception(OSError("no\nroom"))
    hub.fail("POST", "/branch/live", 500)
    upload(tmp_path / "step-1")
    assert len(warnings) == len(uploads) == 2
    assert all(
        "live" in warning and "ann/model" in warning and "\n" not in warning for warning in warnings
    )

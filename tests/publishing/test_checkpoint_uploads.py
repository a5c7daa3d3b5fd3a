"""Checkpoints on a branch of the run's repository."""

import threading
from pathlib import Path

import pytest
from helpers.local_hub import LocalHub

from modeling_vitcls.publishing.checkpoint_uploads import build_checkpoint_uploader


pytestmark = pytest.mark.integration


def wait_for_uploads() -> None:
    """Wait for the threads of huggingface_hub."""
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(0.5)


def test_the_newest_checkpoint_replaces_the_earlier_one_on_the_branch(hub: LocalHub, tmp_path: Path) -> None:
    hub.create("ann/model", private=False)
    warnings: list[str] = []
    upload = build_checkpoint_uploader("ann/model", "live", warnings.append)
    for step in (1, 2):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / "state.json").write_text(f"{step}")
        upload(tmp_path / f"step-{step}")
        wait_for_uploads()
    assert set(hub.files("ann/model", "live")) - {".gitattributes"} == {"checkpoints/step-2/state.json"}
    assert not warnings and set(hub.files("ann/model")) == {".gitattributes"}
    hub.fail("POST", "/commit/", 403)
    upload(tmp_path / "step-1")
    wait_for_uploads()
    assert len(warnings) == 1 and "live" in warnings[0] and "\n" not in warnings[0]

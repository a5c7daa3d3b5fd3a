"""Output folders: one run at a time, and the files that a new run replaces.

tests/runtime/test_staging.py ends processes that hold the lock.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.photo_folders import get_file_names, write_files, write_photos
from helpers.tiny_models import raises_one_line
from helpers.tiny_options import build_tiny_options, run_training
from pytest import CaptureFixture, MonkeyPatch

from modeling_vitcls.hub.local_paths import resolve_name
from modeling_vitcls.hub.model_files import METRICS_FILE, RECIPE_FILE
from modeling_vitcls.runtime import staging
from modeling_vitcls.runtime.files import read_json
from modeling_vitcls.runtime.staging import LOCK_FILE, lock_folder
from modeling_vitcls.training import steps_run
from modeling_vitcls.training.checkpoints import CheckpointStore
from modeling_vitcls.training.options import FinetuneOptions
from modeling_vitcls.training.run_folder import (
    check_replaceable,
    find_run,
    list_final_files,
    remove_run_files,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs/mine"


# Runs ---------------------------------------------------------------------------------------------


def run(folder: Path, **changes: Any) -> dict[str, Any]:
    settings = {"dataset": "digits", "max_steps": 1, "batch_size": 4}
    return run_training(build_tiny_options(folder, **settings | changes))


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished(module_path: Path) -> Path:
    """Return the folder of a finished run of one step."""
    folder = module_path / "run"
    run(folder)
    return folder


@pytest.fixture
def earlier(finished: Path, folder: Path) -> Path:
    """Return a copy of the folder, which tests may change."""
    return shutil.copytree(finished, folder)


def test_a_run_is_refused_while_another_uses_the_folder(
    folder: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "LOCK_TIMEOUT", 0.5)
    with lock_folder(folder):
        for changes in ({}, {"resume": True}, {"overwrite": True}):
            with raises_one_line(
                f"{folder} is in use by another command", "a different `output_dir`"
            ):
                run(folder, **changes)
        assert get_file_names(folder) == {LOCK_FILE}


def test_a_finished_run_is_replaced_only_with_overwrite(earlier: Path) -> None:
    (earlier / "model.onnx").write_text("of these weights")
    (earlier / "mine.onnx").write_text("of any weights")
    before = contents(earlier)
    with raises_one_line(f"{earlier} contains a finished run. Set `overwrite=True`"):
        run(earlier)
    assert contents(earlier) == before
    assert run(earlier, max_steps=2, overwrite=True)["steps"] == 2
    after = contents(earlier)
    assert after["model.safetensors"] != before["model.safetensors"]
    assert [name for name in after if name.endswith(".onnx")] == ["mine.onnx"]
    assert len(after["metrics.jsonl"].splitlines()) == 2


def test_the_old_model_is_never_next_to_the_new_configuration(
    earlier: Path, monkeypatch: MonkeyPatch
) -> None:
    """The new run may be killed at any time.

    Here, the contents are noted at each removal of a file.
    """
    config = (earlier / "config.resolved.yaml").read_bytes()
    (earlier / "notes.txt").write_text("mine")
    states: list[set[str]] = []
    unlink = Path.unlink

    def note(path: Path, missing_ok: bool = False) -> None:
        if path.parent == earlier and not path.name.startswith("."):  # hidden while written
            states.append(set(contents(earlier)))
            assert (earlier / "config.resolved.yaml").read_bytes() == config
        unlink(path, missing_ok)

    def stop(*arguments: Any, **settings: Any) -> None:
        assert (earlier / LOCK_FILE).exists()
        raise ValueError("stop")

    monkeypatch.setattr(Path, "unlink", note)
    monkeypatch.setattr(steps_run, "build_loop", stop)
    with pytest.raises(ValueError, match="stop"):
        run(earlier, max_steps=2, overwrite=True)
    monkeypatch.undo()
    assert set(contents(earlier)) == {"config.resolved.yaml", "notes.txt"}
    assert (earlier / "config.resolved.yaml").read_bytes() != config
    # a run that was killed before its first checkpoint is replaced
    (earlier / "metrics.jsonl").touch()
    check_replaceable(earlier, CheckpointStore(earlier / "checkpoints", num_kept=1))
    assert len(states) > 10
    assert "results.json" in states[0]
    # an incomplete run is never recognized as finished
    assert not any("results.json" in names for names in states[1:])


def test_a_resumed_run_that_is_finished_changes_nothing(
    earlier: Path, capsys: CaptureFixture
) -> None:
    before = contents(earlier)
    for _ in range(2):
        run(earlier, resume=True, keep_checkpoints=5)  # a flag that may change
        assert contents(earlier) == before
        assert capsys.readouterr().out.startswith("finished ")
    with raises_one_line("`max_steps` 1, but the value in this run is 2"):
        run(earlier, resume=True, max_steps=2)


def test_a_finished_run_is_not_resumed_with_other_photos(tmp_path: Path) -> None:
    folder, photos = tmp_path / "run", write_photos(tmp_path / "photos", range(6))
    run(folder, dataset=photos)
    run(folder, dataset=photos, resume=True)
    write_photos(photos, range(6, 10))
    with raises_one_line("was started: train images", "`overwrite=True`"):
        run(folder, dataset=photos, resume=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"damaged"),
        ("config.resolved.yaml", b""),
        ("config.resolved.yaml", b"- a"),
        ("config.resolved.yaml", b"\xff"),
        ("results.json", b"asked_flags"),
        ("results.json", b"data"),
    ],
)
def test_damaged_weights_or_records_of_a_finished_run_are_named_and_stay(
    name: str, content: bytes, earlier: Path
) -> None:
    if name == "results.json":  # a field of it is missing, as in folders of other versions
        results = read_json(earlier / name)
        del results[content.decode()]
        content = json.dumps(results).encode()
    (earlier / name).write_bytes(content)
    words = ["its weights are missing or have changed"]
    if name != "model.safetensors":
        words = ["`resume=True`", name]
    with raises_one_line(*words, "`overwrite=True`"):
        run(earlier, resume=True)
    assert (earlier / name).read_bytes() == content


@pytest.mark.parametrize("flag", ["model", "teacher"])
def test_sources_in_the_output_folder_are_not_removed(
    flag: str, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    write_files(tmp_path, "run/models/mine/config.json", "run-2/config.json")
    monkeypatch.chdir(tmp_path / "run")  # Hub names are not folders in the output folder

    def check(source: object) -> None:
        flags = {"model": "acme/model", "overwrite": True, flag: resolve_name(str(source))}
        options = FinetuneOptions(dataset="digits", output_dir=Path("../run"), **flags)
        find_run(Path("../run"), CheckpointStore(tmp_path, num_kept=1), options, pytest.fail)

    inside = tmp_path / "run/models/mine"
    for source in (inside, "models/mine", "../run", f"transformers:{inside}"):
        with raises_one_line("`overwrite=True`", f"`{flag}` in {tmp_path / 'run'}"):
            check(source)
    for source in (tmp_path / "run-2", tmp_path, "acme/model"):
        check(source)


@pytest.mark.parametrize(
    "text", ["config.json", "results.json", "images/cat.png", "README.md LICENSE metrics.jsonl"]
)
def test_files_of_other_programs_are_kept(folder: Path, text: str) -> None:
    names = text.split()
    write_files(folder, *names, content=b"mine")
    for changes in ({}, {"resume": True}):
        with raises_one_line(f"would replace ({', '.join(names)})", "`overwrite=True`"):
            run(folder, **changes)
    assert contents(folder) == dict.fromkeys(names, b"mine")


def test_only_the_files_of_a_run_are_removed(earlier: Path) -> None:
    mine = [
        "train.py",
        "images/mine.txt",
        "checkpoints/best.pt",
        "checkpoints/mine/weights.bin",
    ]
    write_files(earlier, *mine, content=b"mine")
    (earlier / ".model.partial").mkdir()
    remove_run_files(earlier, CheckpointStore(earlier / "checkpoints", num_kept=1))

    assert set(contents(earlier)) == set(mine)
    assert not (earlier / ".model.partial").exists()


@pytest.mark.parametrize("name", ["results.json", "config.json", "config.resolved.yaml", None])
def test_only_folders_of_runs_and_models_are_cleared(folder: Path, name: str | None) -> None:
    """A folder with checkpoints is that of a run, too, which requires a flag."""
    names = ["README.md", "images/a.png", "report.html", "parity_report.json"]
    store = CheckpointStore(folder / "checkpoints", num_kept=2)
    write_files(folder, *names)
    remove_run_files(folder, store)
    assert set(contents(folder)) == set(names)
    if name is None:
        for step in (1, 2):
            store.save(step, {"model": {"weight": torch.zeros(1)}}, {"step": step})
        with raises_one_line("an unfinished run (step 2). Set `resume=True` or `overwrite=True`"):
            check_replaceable(folder, store)
    else:
        (folder / name).touch()
    remove_run_files(folder, store)

    assert contents(folder) == {}
    assert not (folder / "images").exists()


def test_a_run_writes_only_listed_files(finished: Path) -> None:
    """A file that is not listed would stay next to the files of the next run."""
    names = {name for name in contents(finished) if not name.startswith("checkpoints/")}
    assert names == {
        *list_final_files(finished),
        METRICS_FILE,
        RECIPE_FILE,
    }


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_other_users_can_read_the_weights_as_all_other_files(finished: Path) -> None:
    weights = {file.stat().st_mode for file in finished.rglob("*.safetensors")}
    assert weights == {(finished / "config.json").stat().st_mode}

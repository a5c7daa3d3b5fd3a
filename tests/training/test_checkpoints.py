"""Checkpoints on disk: whole or not at all, verified and pruned.

test_resume.py kills and resumes whole runs.
"""

import json
import math
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.full_disk import limited_file_size
from helpers.photo_folders import write_files
from helpers.source_checkpoints import RunWhenUnpickled
from helpers.tiny_models import raises_one_line
from helpers.warm_processes import READY
from torch import nn

from modeling_vitcls.runtime.files import compute_file_digest
from modeling_vitcls.training.checkpoints import (
    CheckpointStore,
    DamagedCheckpointError,
    read_training_state,
    write_training_state,
)


needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="needs fork"
)


def build_tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Return tensors to save, which depend on the step."""
    return {
        "model": {"weight": torch.full((100,), float(step))},
        "optimizer": {"step/weight": torch.tensor(step)},
    }


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, build_tensors(step), {"flag": step})


def get_newest(store: CheckpointStore) -> tuple[int | None, list[str]]:
    """Return the step that would be resumed, after a check of its contents, and the warnings."""
    warnings: list[str] = []
    checkpoint = store.load_newest(warnings.append)
    if checkpoint is None:
        return None, warnings
    assert checkpoint.metadata == {"flag": checkpoint.step}
    assert checkpoint.load_tensors("model")["weight"].eq(checkpoint.step).all()
    assert checkpoint.load_tensors("optimizer")["step/weight"].item() == checkpoint.step
    return checkpoint.step, warnings


def test_a_checkpoint_comes_back_to_the_bit(store: CheckpointStore) -> None:
    tensors = {
        "a part": torch.randn(6, 4)[2:4],
        "transposed": torch.randn(6, 4).T,
        "half": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 5),
        "count": torch.tensor([2**53 + 1]),
        "no numbers": torch.tensor([math.nan, math.inf, -math.inf, -0.0]),
        "parameter": nn.Parameter(torch.randn(2)),
    }
    facts = {
        "loss": 0.1 + 0.2,
        "inf": -math.inf,
        "none": None,
        "big": 2**63 + 1,
        "nested": {"name": ["é", True, -0.0]},
    }

    store.save(7, {"model": tensors}, facts)
    assert {path.relative_to(store.folder).as_posix() for path in store.folder.rglob("*")} == {
        "step-00000007",
        "step-00000007/model.safetensors",
        "step-00000007/state.json",
    }

    checkpoint = store.load_newest(pytest.fail)
    assert checkpoint is not None
    assert checkpoint.step == 7
    assert json.dumps(checkpoint.metadata) == json.dumps(facts)

    loaded = checkpoint.load_tensors("model")
    expected = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert safetensors.torch.save(loaded) == safetensors.torch.save(expected)


def test_the_newest_are_kept(store: CheckpointStore) -> None:
    save(store, 10, 20, 30, 40, 50)
    assert store.list_steps() == [40, 50]
    save(store, 100_000_000)
    assert get_newest(store) == (100_000_000, [])


def test_saving_an_earlier_step_removes_later_checkpoints(store: CheckpointStore) -> None:
    save(store, 10, 20, 30)
    truncate(store.get_folder(30) / "model.safetensors")
    assert get_newest(store)[0] == 20
    save(store, 25)
    assert store.list_steps() == [20, 25]


def test_the_rest_of_a_killed_save_is_removed(store: CheckpointStore) -> None:
    for act in (lambda: save(store, 20), lambda: get_newest(store), store.clear):
        save(store, 10)
        for left in (".step-00000010.partial", ".step-00000020.new.partial"):
            write_files(store.folder, f"{left}/model.safetensors")
        act()
        assert not list(store.folder.glob(".*"))
    assert not store.folder.exists()


# Damage -------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "truncated tensors": ("model.safetensors", truncate),
    "a flipped bit in the tensors": ("optimizer.safetensors", flip),
    "missing tensors": ("optimizer.safetensors", Path.unlink),
    "truncated state": ("state.json", truncate),
    "edited state": (
        "state.json",
        lambda file: file.write_text(file.read_text().replace('"flag": 20', '"flag": 21')),
    ),
    "missing state": ("state.json", Path.unlink),
    "deep state": ("state.json", lambda file: file.write_text("[" * 100_000)),
    "a list as state": ("state.json", lambda file: file.write_text("[]")),
    "a state without checksum": ("state.json", lambda file: file.write_text("{}")),
    "a state that is not text": ("state.json", lambda file: file.write_bytes(b"\xff\xfe")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    store: CheckpointStore, damage: str
) -> None:
    name, harm = DAMAGES[damage]
    save(store, 10, 20)
    harm(store.get_folder(20) / name)
    step, (warning,) = get_newest(store)
    assert step == 10
    assert "step-00000020" in warning
    assert name in warning
    assert "\n" not in warning


def test_only_damaged_checkpoints_are_an_error(store: CheckpointStore) -> None:
    save(store, 10, 20)
    for step in (10, 20):
        truncate(store.get_folder(step) / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"all checkpoints in .* are damaged .*step-00000020.*`overwrite=True`"
    ):
        get_newest(store)


def test_nothing_is_unpickled(store: CheckpointStore, tmp_path: Path) -> None:
    """Pickled code with a matching checksum is an error, and does not run."""
    save(store, 10)
    file = store.get_folder(10) / "model.safetensors"
    ran = tmp_path / "ran"
    file.unlink()
    torch.save({"weight": RunWhenUnpickled(ran)}, file)
    state = read_training_state(store.get_folder(10))
    state["files"]["model.safetensors"] = compute_file_digest(file)
    write_training_state(store.get_folder(10), state)
    checkpoint = store.load_newest(pytest.fail)

    assert checkpoint is not None
    with pytest.raises(DamagedCheckpointError, match=r"(?i)header"):
        checkpoint.load_tensors("model")
    assert not ran.exists()


# Killed in the middle of a save -------------------------------------------------------------------


def save_and_die(folder: Path, calls: int) -> None:
    """Save step 20; exit when files or folders are flushed to disk for the `calls`-th time."""
    count = 0

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == calls:
            signal.raise_signal(signal.SIGKILL)

    os.fsync = fsync
    torch.set_num_threads(1)
    save(CheckpointStore(folder, num_kept=2), 20)


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("calls", range(1, 7))
def test_a_save_that_is_killed_at_any_step_leaves_a_whole_checkpoint(
    store: CheckpointStore, calls: int
) -> None:
    save(store, 10)
    process = READY.Process(target=save_and_die, args=(store.folder, calls))
    process.start()
    process.join()
    # 3 files, their folder, all folders
    assert process.exitcode == (-signal.SIGKILL if calls <= 5 else 0)
    assert get_newest(store) == (10 if calls <= 4 else 20, [])
    save(store, 30)
    assert store.list_steps() == ([10, 30] if calls <= 4 else [20, 30])
    assert not list(store.folder.glob(".*"))


# Disk full ----------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_earlier_checkpoints(store: CheckpointStore) -> None:
    """Writing fails, as on a full disk.

    The earlier checkpoint of step 20 is kept if its replacement fails.
    """
    save(store, 10, 20)
    tensors = {"model": {"weight": torch.ones(500_000)}}
    words = (
        f"cannot write the checkpoint of step 20 to {store.folder}",
        "File too large",
        "`resume=True`",
    )
    with limited_file_size(100_000), raises_one_line(*words, error=OSError):
        store.save(20, tensors, {})
    assert get_newest(store) == (20, [])
    assert store.list_steps() == [10, 20]

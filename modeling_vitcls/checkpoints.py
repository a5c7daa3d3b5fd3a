"""Checkpoints on disk: folders of tensors and facts that are there whole, or not at all.

    checkpoints/
      step-00000120/           model.safetensors, optimizer.safetensors, ...: named tensors
                               state.json: step, facts, the SHA-256 of every file, and its own
      step-00000240/
      .step-00000360.partial/  what a killed save, or removal, left behind; the next save removes it

A checkpoint is written into a hidden folder, forced onto the disk and then renamed, so that a process killed at any
moment leaves the one before. Reading is safetensors and JSON alone: nothing is unpickled, and nothing is run.
What the tensors mean, and how several processes hold them, is in training/distributed_state.py.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .distributed import on_main


Tensors = dict[str, torch.Tensor]

STATE_FILE = "state.json"
COMPLETE = re.compile(r"step-(\d{8,})")
PARTIAL, REPLACED = ".partial", ".replaced"  # ends of hidden folders: not whole; whole, but about to be replaced
WRITE_ERRORS = (OSError, SafetensorError)  # safetensors wraps the system's errors in its own


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not those that were written."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk, verified."""

    folder: Path
    step: int
    facts: dict[str, Any]
    files: dict[str, str]  # name -> SHA-256, of all files except state.json

    def tensors(self, name: str) -> Tensors:
        """Return the tensors of `name`.safetensors on the CPU. Raises DamagedCheckpoint if it has no checksum."""
        file = f"{name}.safetensors"
        if file not in self.files:
            raise DamagedCheckpoint(f"the checkpoint {self.folder} is damaged: {STATE_FILE} has no checksum of {file}")
        try:
            return load_file(self.folder / file)
        except SafetensorError as error:
            raise DamagedCheckpoint(f"the checkpoint {self.folder} is damaged: {file} ({error})") from error


class CheckpointStore:
    """The checkpoints of one run. One process writes and reads them: the main one."""

    def __init__(self, folder: Path, keep: int) -> None:
        """`keep`: how many of the newest to keep, besides the best one."""
        self.folder = folder
        self.keep = keep

    def save(self, step: int, tensors: dict[str, Tensors], facts: dict[str, Any], is_best: bool) -> Path:
        """Write a checkpoint, then remove those that are no longer kept.

        Args:
            tensors: file name without its ending -> named tensors, on any device.
            facts: what JSON can hold. Floats come back to the bit, tuples as lists.
            is_best: whether the model is the best one so far; the newest such checkpoint is always kept.

        Raises:
            OSError: in one line, where it cannot be written; what was there before is then untouched.
        """
        target = self.folder / f"step-{step:08d}"
        partial = hidden(target, PARTIAL)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.remove_leftovers()
            partial.mkdir()
            write_checkpoint(partial, step, tensors, facts, is_best)
            move_into_place(partial, target)
        except WRITE_ERRORS as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(self.why_not_saved(step, tensors, error)) from error
        self.prune(step)
        return target

    def newest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest undamaged checkpoint, or None where there is none at all.

        Args:
            warn: takes one line about each damaged checkpoint that was passed over.

        Raises:
            ValueError: in one line, where every checkpoint is damaged.
        """
        self.remove_leftovers()
        damaged = []
        for step in reversed(self.steps()):
            try:
                return read_checkpoint(self.path(step))
            except DamagedCheckpoint as error:
                damaged.append(str(error))
                warn(f"{error}; taking the checkpoint before it")
        if damaged:
            raise ValueError(
                f"every checkpoint in {self.folder} is damaged ({damaged[0]}): remove that folder, or leave out "
                "--resume, to start from the beginning"
            )
        return None

    def clear(self) -> None:
        """Remove all checkpoints of an earlier run, and the folder if nothing else is in it."""
        self.remove_leftovers()
        for step in self.steps():
            remove(self.path(step))
        with suppress(OSError):  # not there, or it holds files that are no checkpoints
            self.folder.rmdir()

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, rising."""
        if not self.folder.is_dir():
            return []
        names = [COMPLETE.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir()]
        return sorted(int(name[1]) for name in names if name)

    def path(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def prune(self, step: int) -> None:
        """Keep the newest and the best up to `step`. Later ones belong to a run that has gone back before them."""
        steps = self.steps()
        past = [other for other in steps if other <= step]
        best = [other for other in past if was_best(self.path(other))]
        kept = {*past[-self.keep :], *best[-1:]}
        for other in steps:
            if other not in kept:
                remove(self.path(other))

    def remove_leftovers(self) -> None:
        """Undo what a killed save had begun."""
        for replaced in self.folder.glob(f".step-*{REPLACED}"):
            target = self.folder / replaced.name.removeprefix(".").removesuffix(REPLACED)
            if target.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(target)
        for partial in self.folder.glob(f".step-*{PARTIAL}"):
            shutil.rmtree(partial)

    def why_not_saved(self, step: int, tensors: dict[str, Tensors], error: Exception) -> str:
        """One line for the person who finds the run stopped."""
        needed = sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
        steps = self.steps()
        last = f"the one of step {steps[-1]} is intact" if steps else "there is none before it"
        existing = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        return (
            f"cannot write the checkpoint of step {step} to {self.folder}: {' '.join(str(error).split())}. It takes "
            f"{megabytes(needed)}, and {megabytes(shutil.disk_usage(existing).free)} are free; {last}. Make room and "
            "go on with --resume"
        )


# Several processes ---------------------------------------------------------------------------------------------------


def save_for_all(
    store: CheckpointStore,
    accelerator: Accelerator,
    step: int,
    tensors: dict[str, Tensors],
    facts: dict[str, Any],
    is_best: bool,
) -> None:
    """`CheckpointStore.save` on the main process, while all wait; where it fails, it fails on all of them."""

    def save() -> None:
        store.save(step, tensors, facts, is_best)

    on_main(accelerator, save)


def newest_for_all(
    store: CheckpointStore, accelerator: Accelerator, warn: Callable[[str], None]
) -> tuple[Checkpoint | None, dict[str, Any] | None]:
    """`CheckpointStore.newest` on the main process: the checkpoint there (None elsewhere), and its facts on all
    processes (None where there is no checkpoint)."""
    found: list[Checkpoint | None] = [None]

    def look() -> dict[str, Any] | None:
        found[0] = newest = store.newest(warn)
        return None if newest is None else newest.facts

    facts = on_main(accelerator, look)
    return found[0], facts


# One checkpoint's files ----------------------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensors], facts: dict[str, Any], is_best: bool
) -> None:
    """Fill an empty folder, and wait until all of it is on the disk."""
    for name, named in tensors.items():
        save_file(separate(named), folder / f"{name}.safetensors")
    files = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
    state = {"format": 1, "step": step, "is_best": is_best, "facts": facts, "files": files}
    (folder / STATE_FILE).write_text(state_text(state), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        force_to_disk(path)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Verify a checkpoint. Raises DamagedCheckpoint, naming the file, unless all of it is as it was written."""
    state = read_state(folder)
    for name, expected in state["files"].items():
        file = folder / name
        if not file.is_file():
            raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: {name} is missing")
        if file_digest(file) != expected:
            raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: {name} is not what was written")
    return Checkpoint(folder, state["step"], state["facts"], state["files"])


def read_state(folder: Path) -> dict[str, Any]:
    """Return the content of state.json. Raises DamagedCheckpoint unless it is as it was written."""
    if not (folder / STATE_FILE).is_file():
        raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: {STATE_FILE} is missing")
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        expected = state.pop("sha256")
        is_undamaged = digest(state) == expected
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # not a JSON object with a checksum
        raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: {STATE_FILE} is unreadable") from None
    if not is_undamaged or not is_state(state):
        raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: {STATE_FILE} is not what was written")
    return state


def is_state(state: dict[str, Any]) -> bool:
    """Return whether a JSON object has the fields of state.json, and names only files of the same folder."""
    files, facts = state.get("files"), state.get("facts")
    return (
        type(state.get("step")) is int
        and isinstance(facts, dict)
        and isinstance(facts.get("flags", {}), dict)
        and isinstance(files, dict)
        and all(Path(name).name == name and isinstance(sha256, str) for name, sha256 in files.items())
    )


def state_text(state: dict[str, Any]) -> str:
    """state.json of what `read_state` gives."""
    return json.dumps(state | {"sha256": digest(state)}, indent=1) + "\n"


def was_best(folder: Path) -> bool:
    """Whether the checkpoint was the best one when it was written."""
    try:
        return bool(read_state(folder)["is_best"])
    except DamagedCheckpoint:
        return False


def separate(tensors: Tensors) -> Tensors:
    """The same values on the CPU, contiguous, each in memory of its own: tied weights share theirs, and safetensors
    refuses that."""
    seen: set[int] = set()
    result: Tensors = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return result


def move_into_place(partial: Path, target: Path) -> None:
    """Rename a complete folder; a checkpoint of the same step steps aside first."""
    replaced = hidden(target, REPLACED)
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    force_to_disk(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; hidden first, so that a part that a killed run leaves of it is not taken for damaged."""
    leftover = checkpoint.rename(hidden(checkpoint, PARTIAL))
    shutil.rmtree(leftover, ignore_errors=True)


def hidden(folder: Path, end: str) -> Path:
    """The folder's name while it is no checkpoint."""
    return folder.with_name(f".{folder.name}{end}")


def force_to_disk(path: Path) -> None:
    """Wait until a file, or the list of files in a folder, is on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def digest(state: dict[str, Any]) -> str:
    """SHA-256 of a JSON object, however it is laid out."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def megabytes(size: int) -> str:
    """Bytes as a person reads them, rounded up."""
    return f"{math.ceil(size / 1e6):,} MB"

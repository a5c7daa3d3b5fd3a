"""Checkpoints on disk: folders of tensors and metadata, written completely or not at all.

    checkpoints/
      step-00000120/           model.safetensors, optimizer.safetensors, ...: named tensors
                               state.json: step, metadata, the SHA-256 of each file, and a SHA-256 of these fields
      step-00000240/
      .step-00000360.partial/  incomplete folder of an interrupted save or removal; deleted by the next save or load

A checkpoint is written to a hidden folder, synchronized to the disk and then renamed, so the
previous checkpoint remains intact even if the process is killed. Only safetensors and JSON are
read: nothing is unpickled or executed. training/distributed_state.py collects the tensors from the
processes.
"""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..runtime.errors import describe_error
from ..runtime.files import compute_file_digest, compute_json_digest, sync_to_disk
from ..runtime.staging import follow_umask


Tensors = dict[str, Tensor]

STATE_FILE = "state.json"
STEP_FOLDER_PATTERN = re.compile(r"step-(\d{8,})")
WRITE_ERRORS = (OSError, SafetensorError)  # Exceptions raised by failed writes


class DamagedCheckpointError(ValueError):
    """Raised if a file of a checkpoint is missing or has changed since it was written."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"the checkpoint {folder} is damaged: {reason}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files have been verified."""

    folder: Path
    step: int
    metadata: dict[str, Any]  # `metadata` in state.json

    def load_tensors(self, name: str) -> Tensors:
        """Load the tensors of `name`.safetensors to the CPU.

        Raise DamagedCheckpointError if the file is damaged.
        """
        try:
            return load_file(self.folder / f"{name}.safetensors")
        except SafetensorError as error:
            raise DamagedCheckpointError(self.folder, f"{name}.safetensors ({error})") from error


@dataclass
class CheckpointStore:
    """The checkpoints of one run. Only the main process writes and reads checkpoints."""

    folder: Path
    num_kept: int  # Number of most recent checkpoints to keep

    def save(
        self,
        step: int,
        tensor_groups: dict[str, Tensors],
        metadata: dict[str, Any],
    ) -> None:
        """Write a checkpoint, then remove old checkpoints.

        Args:
            step: number of completed optimizer steps.
            tensor_groups: file name without its suffix -> named tensors, on any device.
            metadata: JSON-serializable metadata. Floats are restored exactly, and tuples become
                lists.

        Raises:
            OSError: if the checkpoint cannot be written; earlier checkpoints are left unchanged.
        """
        target = self.get_folder(step)
        old_folder = get_partial_path(target)
        partial_folder = old_folder.with_suffix(".new.partial")

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # First, because the remains of an interrupted save may be what fills the disk.
            self.clean_up_interrupted_saves()
            partial_folder.mkdir()
            for name, tensors in tensor_groups.items():
                contiguous = {key: each.contiguous() for key, each in tensors.items()}
                save_file(contiguous, partial_folder / f"{name}.safetensors")
            follow_umask(partial_folder)
            paths = sorted(partial_folder.iterdir())
            state = {
                "format": 1,
                "step": step,
                "metadata": metadata,
                "files": {path.name: compute_file_digest(path) for path in paths},
            }
            write_training_state(partial_folder, state)
            for path in (*partial_folder.iterdir(), partial_folder):
                sync_to_disk(path)
            if target.exists():  # Saved before the evaluation of this step, or damaged
                target.rename(old_folder)
            partial_folder.rename(target)
            # A new name is an entry of the parent folder, which a power failure could lose.
            sync_to_disk(target.parent)
            shutil.rmtree(old_folder, ignore_errors=True)
        except WRITE_ERRORS as error:
            shutil.rmtree(partial_folder, ignore_errors=True)
            raise OSError(
                f"cannot write the checkpoint of step {step} to {self.folder}: "
                f"{describe_error(error)}. Earlier checkpoints are intact: then repeat the command "
                "with `resume=True`"
            ) from error

        # Old checkpoints go only when the new one is complete.
        self.prune(step)

    def load_newest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """Load the newest undamaged checkpoint; None if there are no checkpoints.

        Call `warn` with a message for each damaged checkpoint. Raise ValueError if all checkpoints
        are damaged.
        """
        self.clean_up_interrupted_saves()
        error_messages = []
        for step in reversed(self.list_steps()):
            try:
                return read_checkpoint(self.get_folder(step))
            except DamagedCheckpointError as error:
                error_messages.append(str(error))
                warn(f"{error}; trying the previous checkpoint")

        if error_messages:
            raise ValueError(
                f"all checkpoints in {self.folder} are damaged ({error_messages[0]}). To start "
                "from the beginning, set `overwrite=True` instead of `resume=True`"
            )
        return None

    def clear(self) -> None:
        """Remove all checkpoints of an earlier run, and the folder if it contains nothing else."""
        self.clean_up_interrupted_saves()
        for step in self.list_steps():
            remove_checkpoint(self.get_folder(step))
        with suppress(OSError):  # The folder is missing or not empty
            self.folder.rmdir()

    def list_steps(self) -> list[int]:
        """List the steps of the checkpoints in ascending order."""
        folders = [path for path in self.folder.glob("step-*") if path.is_dir()]
        matches = [STEP_FOLDER_PATTERN.fullmatch(path.name) for path in folders]
        return sorted(int(match[1]) for match in matches if match)

    def get_folder(self, step: int) -> Path:
        """Return the folder of the checkpoint that is saved at `step`."""
        return self.folder / f"step-{step:08d}"

    def prune(self, step: int) -> None:
        """Keep the `num_kept` newest checkpoints up to `step`, the last saved.

        Checkpoints of later steps, saved before the run was resumed from an earlier step, are also
        removed.
        """
        steps = self.list_steps()
        earlier_steps = [stored_step for stored_step in steps if stored_step <= step]
        for stored_step in steps:
            if stored_step not in earlier_steps[-self.num_kept :]:
                remove_checkpoint(self.get_folder(stored_step))

    def clean_up_interrupted_saves(self) -> None:
        """Remove the partial folders of interrupted saves and removals. Links are not followed."""
        for partial_folder in self.folder.glob(get_partial_path(Path("step-*")).name):
            shutil.rmtree(partial_folder, ignore_errors=True)


# Checkpoint files ---------------------------------------------------------------------------------


def read_checkpoint(folder: Path) -> Checkpoint:
    """Verify and return a checkpoint.

    Raise DamagedCheckpointError if a file is missing or damaged.
    """
    state = read_training_state(folder)
    for name, expected_digest in state["files"].items():
        if not (folder / name).is_file() or compute_file_digest(folder / name) != expected_digest:
            raise DamagedCheckpointError(
                folder, f"{name} is missing, or its checksum does not match"
            )
    return Checkpoint(folder, state["step"], state["metadata"])


def read_training_state(folder: Path) -> dict[str, Any]:
    """Read the contents of state.json.

    Raise DamagedCheckpointError if the file is missing or invalid.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        expected_digest = state.pop("sha256")
        is_valid = compute_json_digest(state) == expected_digest
    # LookupError, TypeError, AttributeError, RecursionError: other types of values
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        is_valid = False
    if not is_valid:
        raise DamagedCheckpointError(folder, f"{STATE_FILE} is missing or not valid")
    return state


def write_training_state(folder: Path, state: dict[str, Any]) -> None:
    """Write state.json: the fields of `state` and a checksum of the fields."""
    content = json.dumps(state | {"sha256": compute_json_digest(state)}, indent=1)
    (folder / STATE_FILE).write_text(f"{content}\n", encoding="utf-8")


def remove_checkpoint(folder: Path) -> None:
    """Rename a checkpoint to its partial path, then remove it.

    An interrupted removal does not leave a damaged checkpoint.
    """
    shutil.rmtree(folder.rename(get_partial_path(folder)), ignore_errors=True)


def get_partial_path(folder: Path) -> Path:
    """Return the hidden path of a checkpoint that is incomplete or being removed."""
    return folder.with_name(f".{folder.name}.partial")

"""What `--resume` needs, as it is published: the newest checkpoint of a run, where the user asks for it.

    checkpoints/step-00000120/      model.safetensors, optimizer.safetensors, ...
                                    state.json, without the paths of the machine that trained

Tensors and JSON only, as on disk (training/checkpoints.py): whoever resumes from it unpickles nothing.
"""

from pathlib import Path

from ..training.checkpoints import (
    STATE_FILE,
    Checkpoint,
    CheckpointStore,
    DamagedCheckpoint,
    read_checkpoint,
    read_state,
    state_text,
)
from .contents import Contents
from .places import is_local


def resumable_contents(folder: Path) -> Contents:
    """The files of the newest checkpoint below `folder`, as they are published.

    Flags that name files or folders of this machine are left out of state.json: `--resume` then takes those that it
    is given.

    Raises:
        ValueError: in one line, where there is no undamaged checkpoint.
    """
    checkpoint = newest_checkpoint(folder)
    state = read_state(checkpoint.folder)
    place = checkpoint.folder.relative_to(folder).as_posix()
    contents: Contents = {f"{place}/{name}": checkpoint.folder / name for name in state["files"]}
    state["facts"]["flags"] = {
        name: value for name, value in state["facts"]["flags"].items() if name != "output_dir" and not is_local(value)
    }
    contents[f"{place}/{STATE_FILE}"] = state_text(state).encode()
    return contents


def newest_checkpoint(folder: Path) -> Checkpoint:
    """The newest undamaged one. Nothing is changed: a run may be writing there."""
    store = CheckpointStore(folder / "checkpoints", keep=1)
    for step in reversed(store.steps()):
        try:
            return read_checkpoint(store.path(step))
        except DamagedCheckpoint:
            continue
    raise ValueError(
        f"{store.folder} holds no undamaged checkpoint to publish: leave the optimiser's state out, or give the "
        "--output-dir of a run"
    )

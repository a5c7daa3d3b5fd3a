"""Check the output folder before a run starts, remove replaced files, and lock the folder.

    finished run (results.json)              replaced only with --overwrite
    unfinished run (checkpoints/)            continued with --resume, replaced with --overwrite
    files that were not written by a run     replaced only with --overwrite
    unfinished run without a checkpoint      replaced

A run first removes the files of the earlier run, starting with results.json and the model, and then writes new files.
Therefore, the folder never contains an old model with a new configuration, even if the run is killed.

`FolderLock` prevents other runs from using the folder. The lock file `.vitcls.lock` in the folder contains the host,
the process ID and the start time of the process. The lock is released at the end of the run and on SIGTERM, but not on
SIGKILL. The next run on the same host therefore replaces the lock of a process that has ended. The lock of a process
on another host is not replaced, because the new run cannot check whether that process is still running.
"""

import atexit
import json
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Self

import psutil

from ..checkpoints import CheckpointStore
from ..data.image_folder import format_name_list
from ..hub.local_paths import is_local, split_prefix
from ..options import FinetuneOptions, PretrainOptions
from ..publishing.adapters import ADAPTER_PATTERNS
from ..publishing.manifest import DOCUMENTATION_PATTERNS, MODEL_PATTERNS, RECIPE_FILE, is_match


fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


RESULTS_FILE = "results.json"
METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.json"

ADAPTER_FOLDER = "adapter"  # folder with only the LoRA adapter
# Files that a run writes at the end, in the order in which they are removed; the results and the model come first.
FINAL_FILE_PATTERNS = (
    RESULTS_FILE,
    *MODEL_PATTERNS,
    *(name for name in DOCUMENTATION_PATTERNS if name not in (METRICS_FILE, RECIPE_FILE)),
    *(f"{ADAPTER_FOLDER}/{name}" for name in ADAPTER_PATTERNS),
)
NON_FINITE_FILE = "non_finite.json"  # list of the training images in the step with a non-finite loss
NON_FINITE_FOLDER = "non_finite"  # folder with a checkpoint of the state before the step with a non-finite loss
CHECKPOINTS_FOLDER = "checkpoints"

LOCK_FILE = ".vitcls.lock"
CLOCK_TOLERANCE = 1.0  # maximum difference in seconds between two measurements of a process's start time


def check_replaceable(options: Any, store: CheckpointStore) -> None:
    """Raise ValueError if a new run would replace files without --overwrite, or if --overwrite would remove the
    initial model or the teacher. `store` contains the checkpoints in the output folder."""
    folder = options.output_dir
    if options.run.overwrite:
        check_sources_not_removed(options)
        return
    if (folder / RESULTS_FILE).exists() and (folder / CONFIG_FILE).exists():
        raise ValueError(
            f"{folder} contains a finished run. Set --overwrite to replace the run, or choose a different --output-dir"
        )
    if steps := store.list_steps():
        raise ValueError(
            f"{folder} contains an unfinished run (a checkpoint of step {steps[-1]:,}). Continue the run with "
            "--resume, restart the run with --overwrite, or choose a different --output-dir"
        )
    check_no_unrelated_files(folder)


def check_no_unrelated_files(folder: Path) -> None:
    """Raise ValueError if this run would replace files that were not written by an earlier run."""
    names = list_final_files(folder)
    if (folder / METRICS_FILE).exists() and not (folder / RECIPE_FILE).exists():
        names.append(METRICS_FILE)
    if names:
        raise ValueError(
            f"{folder} contains files that this run would overwrite ({format_name_list(names)}). Move the files, set "
            "--overwrite, or choose a different --output-dir"
        )


def check_sources_not_removed(options: FinetuneOptions | PretrainOptions) -> None:
    """Raise ValueError if --overwrite would remove the initial model or the teacher."""
    folder = options.output_dir.resolve()
    sources = {"--model": options.model.model}
    if isinstance(options, FinetuneOptions) and options.distillation.teacher is not None:
        sources["--teacher"] = options.distillation.teacher
    for flag, name in sources.items():
        path = Path(split_prefix(name)[1]).resolve()
        if is_local(name) and (path == folder or folder in path.parents):
            raise ValueError(
                f"the {flag} path is in --output-dir {folder}, which --overwrite clears. Choose a different "
                "--output-dir"
            )


def remove_run_files(folder: Path, store: CheckpointStore) -> None:
    """Remove the files of an earlier run or model. Other files are kept."""
    has_marker_file = any((folder / name).exists() for name in (RESULTS_FILE, CONFIG_FILE, RECIPE_FILE))
    if not has_marker_file and not store.list_steps():
        return
    for name in (*list_final_files(folder), METRICS_FILE, NON_FINITE_FILE):
        (folder / name).unlink(missing_ok=True)
    for name in ("pictures", ".eval_results", ADAPTER_FOLDER):
        with suppress(OSError):  # the folder does not exist or is not empty
            (folder / name).rmdir()
    shutil.rmtree(folder / NON_FINITE_FOLDER, ignore_errors=True)
    store.clear()
    (folder / RECIPE_FILE).unlink(missing_ok=True)  # removed last, because this file marks an output folder


def list_final_files(folder: Path) -> list[str]:
    """Return the names of the existing files that a run writes at the end, in the order of `FINAL_FILE_PATTERNS`."""
    patterns = ("*", "pictures/*", ".eval_results/*", f"{ADAPTER_FOLDER}/*")
    files = (path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    ranks = {
        name: [rank for rank, pattern in enumerate(FINAL_FILE_PATTERNS) if is_match(name, (pattern,))]
        for name in sorted(names)
    }
    return sorted((name for name in ranks if ranks[name]), key=ranks.__getitem__)


# Lock ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LockOwner:
    """Process that holds the lock of a folder."""

    host: str  # name of the machine
    pid: int  # process ID
    # Start time of the process in seconds since boot, to distinguish processes with the same ID. Unlike the time of
    # day, this value does not change if the system clock is adjusted.
    started_after_boot: float
    since: str  # time at which the lock was acquired

    @classmethod
    def from_this_process(cls) -> Self:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(socket.gethostname(), os.getpid(), get_start_time(psutil.Process()), now)

    @classmethod
    def from_text(cls, text: str) -> Self | None:
        """Parse the text of a lock file. Return None if the text is invalid."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None

    @property
    def is_on_this_host(self) -> bool:
        return self.host == socket.gethostname()

    def is_alive(self) -> bool:
        """Return whether the owner is running. The owner must be a process on this machine."""
        try:
            process = psutil.Process(self.pid)
            is_same_process = abs(get_start_time(process) - self.started_after_boot) < CLOCK_TOLERANCE
            return is_same_process and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class FolderLock:
    """Lock of one output folder. The lock is released at the end of a `with` block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / LOCK_FILE
        self.owner: LockOwner | None = None  # this process while the lock is held, otherwise None
        self.created_folders: list[Path] = []  # folders that were created for the lock, innermost first

    def acquire(self) -> None:
        """Create the folder if necessary, and lock it. Raise ValueError if another run holds the lock."""
        self.created_folders = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        owner = LockOwner.from_this_process()
        with exclude_other_processes(self.folder):
            while not self.create_lock_file(owner):
                self.remove_stale_lock()
        self.owner = owner
        atexit.register(self.release)
        replace_sigterm_handler(signal.SIG_DFL, self.release_and_exit)

    def release(self) -> None:
        """Release the lock if this process holds the lock. Remove empty folders that were created for the lock."""
        if self.owner is None or self.owner.pid != os.getpid():  # a forked process does not hold the lock
            return
        with suppress(FileNotFoundError):
            if LockOwner.from_text(self.file.read_text(encoding="utf-8")) == self.owner:
                self.file.unlink()
        self.owner = None
        atexit.unregister(self.release)
        replace_sigterm_handler(self.release_and_exit, signal.SIG_DFL)
        with suppress(OSError):  # the folder is not empty
            for folder in self.created_folders:
                folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release_and_exit(self, signum: int, frame: FrameType | None) -> None:
        """Handle SIGTERM: release the lock, then end the process with the default handler."""
        self.release()
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)

    # Lock file -------------------------------------------------------------------------------------------------------

    def create_lock_file(self, owner: LockOwner) -> bool:
        """Create the lock file. Return False if the file already exists."""
        try:
            descriptor = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(owner)) + "\n")
        return True

    def remove_stale_lock(self) -> None:
        """Remove the lock if its owner has ended. Raise ValueError if the owner is or may still be running."""
        try:
            owner = LockOwner.from_text(self.file.read_text(encoding="utf-8"))
        except FileNotFoundError:  # the lock has been released
            return
        if owner is None:
            raise ValueError(f"the lock file {self.file} is invalid. If no other run uses the folder, delete the file")
        if owner.is_on_this_host and (owner.pid == os.getpid() or not owner.is_alive()):
            self.file.unlink(missing_ok=True)
            return
        machine, advice = "this machine", "Wait until that run has ended, or choose a different --output-dir"
        if not owner.is_on_this_host:
            machine = f"the host {owner.host}"
            advice += f". If that run has already ended, delete {self.file}"
        raise ValueError(
            f"{self.folder} is in use by another run (process {owner.pid} on {machine}, since {owner.since}). {advice}"
        )


@contextmanager
def exclude_other_processes(folder: Path) -> Iterator[None]:
    """Prevent other processes on this machine from running the `with` block for this folder at the same time. Do
    nothing if the operating system or the file system does not support file locks."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems do not support locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def get_start_time(process: psutil.Process) -> float:
    return round(process.create_time() - psutil.boot_time(), 2)


def replace_sigterm_handler(old_handler: Any, new_handler: Any) -> None:
    """Replace the SIGTERM handler with `new_handler` if the current handler is `old_handler`. Do nothing outside the
    main thread, because Python allows only the main thread to install signal handlers."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == old_handler:
        signal.signal(signal.SIGTERM, new_handler)

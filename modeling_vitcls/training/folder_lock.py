"""The lock of an output folder: one run at a time writes there.

    lock = FolderLock(folder)
    lock.acquire()                 ValueError if another run holds the lock
    with lock: ...                 released at the end, also after an exception

The lock is the file `.vitcls.lock` in the folder, which contains the host, the process and its start time. SIGTERM
releases it, too. A process that was killed with -9 leaves the file: the next run on the same host finds that no such
process is alive, and takes the lock over. About a process of another host nothing is known, so its lock is respected.
"""

import atexit
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import psutil


fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".vitcls.lock"
CLOCK_TOLERANCE = 1.0  # seconds by which two readings of one process's start may differ


@dataclass(frozen=True)
class LockOwner:
    """The process that holds a lock.

    Attributes:
        host: name of its machine.
        pid: its number there.
        started_after_boot: seconds between the start of the machine and that of the process. A process number that is
            in use again has another start. Unlike the time of day it does not change if the clock is set.
        since: when the lock was taken.
    """

    host: str
    pid: int
    started_after_boot: float
    since: str

    @classmethod
    def this_process(cls) -> Self:
        """Return the owner that this process is."""
        return cls(
            socket.gethostname(),
            os.getpid(),
            seconds_after_boot(psutil.Process()),
            datetime.now(UTC).isoformat(timespec="seconds"),
        )

    @classmethod
    def from_text(cls, text: str) -> Self | None:
        """Return the owner that the text of a lock file names; None if the text names none."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None

    @property
    def is_on_this_host(self) -> bool:
        """Whether the owner is a process of this machine."""
        return self.host == socket.gethostname()

    def is_alive(self) -> bool:
        """Return whether the owner, a process of this machine, still runs."""
        try:
            process = psutil.Process(self.pid)
            is_same = abs(seconds_after_boot(process) - self.started_after_boot) < CLOCK_TOLERANCE
            return is_same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class FolderLock:
    """The lock of one output folder; use it as a context manager to release it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / LOCK_FILE
        self.owner: LockOwner | None = None  # this process, while it holds the lock
        self.created: list[Path] = []  # folders that did not exist before, from the innermost on

    def acquire(self) -> None:
        """Take the lock; create the folder if it does not exist.

        Raises:
            ValueError: in one line, if another run holds the lock.
            OSError: if the folder cannot be written.
        """
        self.created = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        mine = LockOwner.this_process()
        with one_process_at_a_time(self.folder):
            while not self.create_file(mine):
                self.remove_stale()
        self.owner = mine
        atexit.register(self.release)
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        ):
            signal.signal(signal.SIGTERM, self.release_and_end)

    def release(self) -> None:
        """Remove the lock if this process holds it, and folders that were created for it and are empty."""
        if self.owner is None or self.owner.pid != os.getpid():  # a forked process does not hold it
            return
        with suppress(FileNotFoundError):
            if LockOwner.from_text(self.file.read_text(encoding="utf-8")) == self.owner:
                self.file.unlink()
        self.owner = None
        atexit.unregister(self.release)
        replace_sigterm_handler(self.release_and_end, signal.SIG_DFL)
        with suppress(OSError):  # not empty
            for folder in self.created:
                folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def release_and_end(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM: release the lock, then end as a process without a handler does."""
        self.release()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    # The file --------------------------------------------------------------------------------------------------------

    def create_file(self, owner: LockOwner) -> bool:
        """Create the lock file; return whether there was none."""
        try:
            descriptor = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(owner)) + "\n")
        return True

    def remove_stale(self) -> None:
        """Remove the lock if its owner has ended.

        Raises:
            ValueError: in one line, if the owner is alive, or may be.
        """
        try:
            owner = LockOwner.from_text(self.file.read_text(encoding="utf-8"))
        except FileNotFoundError:  # released in the meantime
            return
        if owner is None:
            raise ValueError(
                f"the lock file {self.file} cannot be read: if no other run uses the folder, delete the file"
            )
        if owner.is_on_this_host and (owner.pid == os.getpid() or not owner.is_alive()):
            self.file.unlink(missing_ok=True)
            return
        where = "this machine" if owner.is_on_this_host else f"the host {owner.host}"
        advice = "wait until it has ended, or choose another --output-dir"
        if not owner.is_on_this_host:
            advice += f". If it is not running any more, delete {self.file}"
        raise ValueError(
            f"{self.folder} is in use by another run (process {owner.pid} on {where}, since {owner.since}): {advice}"
        )


@contextmanager
def one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine out of this block, where the system and the file system can."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # not on every network file system
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def seconds_after_boot(process: psutil.Process) -> float:
    """Return when a process was started, in seconds since the start of its machine."""
    return round(process.create_time() - psutil.boot_time(), 2)


def replace_sigterm_handler(old: Any, new: Any) -> None:
    """Handle SIGTERM by `new` if it is handled by `old`; Python allows that in the main thread only."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == old:
        signal.signal(signal.SIGTERM, new)

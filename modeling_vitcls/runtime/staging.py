"""Write the files of a folder together: all of them or, if the process is killed, none.

    with create_output_folder(Path("out")) as folder:       # out/.model.partial
        model.save_pretrained(folder)                       # locked: no other command writes to `out`
                                                            # afterwards, the files are in `out`

A hidden folder collects the files, and each is then renamed to its place. One file is the last: the
folder is complete if it is there. What a killed process left behind is removed by the next command
that writes to the folder.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import warn_on_first_process
from .files import sync_to_disk


LOCK_FILE = ".vitcls.lock"
STAGING_FOLDER = ".model.partial"  # The files until all of them are written
LAST_FILE = "config.json"  # A model folder with this file is complete
# Waiting time in seconds. Data loading processes of a killed run hold its lock until they end, a
# few seconds later.
LOCK_TIMEOUT = 10.0
# What file systems without locks say, such as some of networks
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def lock_folder(folder: Path, parameter: str = "output_dir") -> Iterator[None]:
    """Create an output folder if necessary, and lock it inside the block, as `hold_lock` does."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file. Set `{parameter}` to a folder")
    with hold_lock(folder / LOCK_FILE, folder, parameter):
        yield


@contextmanager
def lock_file(file: Path, parameter: str = "output") -> Iterator[None]:
    """Create the folder of an output file if necessary, and lock the file inside the block."""
    with hold_lock(file.with_name(f".{file.name}.lock"), file, parameter):
        yield


@contextmanager
def hold_lock(
    lock_path: Path, output: Path, parameter: str, timeout: float | None = None
) -> Iterator[None]:
    """Hold the lock of an output inside the block.

    The operating system releases the lock of a process that has ended for any reason, even if the
    process ran on another host that shares the file system. On a file system without locks, a
    warning says so.

    Args:
        lock_path: the file of the lock, whose folder is created if necessary.
        output: what is locked, for errors.
        parameter: its name in errors.
        timeout: how long to wait for another command, in seconds; below 0: until it ends. Default:
            LOCK_TIMEOUT.

    Raises:
        ValueError: if another command holds the lock.
    """
    # A command that fails leaves no empty folder behind
    folder = lock_path.parent
    new_folders = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    # A lock is no link. Older versions of filelock would empty the file that one names.
    if lock_path.is_symlink():
        lock_path.unlink()
    seconds = LOCK_TIMEOUT if timeout is None else timeout
    lock = FileLock(lock_path, timeout=seconds, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{output} is in use by another command. Wait until it ends, or set a different "
            f"`{parameter}`"
        ) from None
    except (OSError, NotImplementedError) as error:  # The latter by older versions of filelock
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise OSError(error.errno, error.strerror, str(output)) from error
        warn_on_first_process(
            f"WARNING: the file system of {output} has no locks. Do not run another command with the "
            f"same `{parameter}` until this one ends"
        )
    try:
        yield
    finally:
        # Removed before the release: afterwards, the file could be the lock of another command
        lock_path.unlink(missing_ok=True)
        lock.release()
        for each in new_folders:
            with suppress(OSError):  # The folder is not empty
                each.rmdir()


@contextmanager
def create_output_folder(output: Path, parameter: str = "output") -> Iterator[Path]:
    """Lock a new or empty folder, and yield a folder for its files.

    config.json is moved last. If the block raises an error, nothing is left.

    Args:
        output: the folder.
        parameter: its name in errors.

    Raises:
        ValueError: if `output` is not empty, or another command writes to it.
    """
    output = output.resolve()
    with lock_folder(output, parameter):
        # The command that held the lock may have filled the folder.
        check_output_is_empty(output, parameter)
        # A folder without config.json is never loaded, so a part of the files is not taken for a
        # model.
        with stage_files(output, LAST_FILE) as folder:
            yield folder


def check_output_is_empty(output: Path, parameter: str = "output") -> None:
    """Raise ValueError, with the parameter to set, if `output` is not an empty or a new folder.

    A folder with files of a killed command counts as empty, because they will be replaced.
    """
    if not output.exists():
        return
    names = {path.name for path in output.iterdir()} if output.is_dir() else {output.name}
    is_unfinished = STAGING_FOLDER in names and LAST_FILE not in names
    if names - {LOCK_FILE} and not is_unfinished:
        raise ValueError(
            f"{output} exists and is not empty. Set a different `{parameter}`, or move {output} away"
        )


@contextmanager
def stage_files(folder: Path, last: str) -> Iterator[Path]:
    """Yield a hidden folder for files, and move them to `folder` at the end, all of it on the disk.

    The folder must be locked.

    Args:
        folder: an existing folder.
        last: name of the file to move last, which says that the folder is complete.
    """
    staging_folder = folder / STAGING_FOLDER
    # Files that a killed command has moved are not removed here; this command replaces them. A list
    # of them would have to be read from the folder, and could name any file of the user.
    shutil.rmtree(staging_folder, ignore_errors=True)
    staging_folder.mkdir()
    try:
        yield staging_folder

        follow_umask(staging_folder)
        files = [path for path in staging_folder.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda file: (file == staging_folder / last, file)):
            sync_to_disk(file)
            target = folder / file.relative_to(staging_folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            # A rename within one folder does not copy, and cannot run out of space.
            file.replace(target)
        sync_to_disk(folder)
    finally:
        shutil.rmtree(staging_folder, ignore_errors=True)


def follow_umask(folder: Path) -> None:
    """Give weights in a folder the permissions of a new file.

    safetensors makes them unreadable for other users.
    """
    # There is no way to read the mask without setting it. Files that another thread creates in
    # between are too private, not too open.
    umask = os.umask(0o077)
    os.umask(umask)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~umask)

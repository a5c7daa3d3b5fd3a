"""Image folders in .zip files, which are unpacked to the cache of `datasets` before they are read."""

import hashlib
import shutil
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from ..runtime.errors import format_error, is_disk_full, name_full_disk
from .image_folder import is_hidden
from .images import get_cache_file


MAX_FILES = 1_000_000
MAX_BYTES = 200 * 2**30  # after unpacking
# Factor by which images can be packed; a file that unpacks to more is made to fill the disk.
MAX_RATIO = 200


def is_zip_file(path: Path) -> bool:
    """Return whether a path is that of a .zip file."""
    return path.suffix.lower() == ".zip" and path.is_file()


def unpack_zip(file: Path) -> Path:
    """Return the folder with the unpacked files; if there is only an outer folder, the inner one.

    A file with the same contents is unpacked once. Raise ValueError if it is damaged or encrypted,
    exceeds a limit, or would write outside of the folder.
    """
    try:
        with name_full_disk(get_cache_file("")), zipfile.ZipFile(file) as archive:
            members = list_members(file, archive)
            contents = [(str(path), info.CRC, info.file_size) for path, info in members.items()]
            digest = hashlib.sha256(repr(contents).encode(errors="surrogateescape")).hexdigest()
            root = get_cache_file(f"{file.stem}-{digest[:16]}")
            if not root.is_dir():
                root.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=root.parent) as folder:
                    unpacked = Path(folder, "images")
                    for path, info in members.items():
                        (unpacked / path).parent.mkdir(parents=True, exist_ok=True)
                        with archive.open(info) as source, (unpacked / path).open("wb") as target:
                            shutil.copyfileobj(source, target)
                    try:
                        unpacked.rename(root)
                    except OSError:  # of one of several types if another process has unpacked it
                        if not root.is_dir():
                            raise
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, EOFError) as error:
        if is_disk_full(error):
            raise
        raise ValueError(
            f"cannot unpack {file}: {format_error(error)}. Unpack it with another program, and set "
            "`dataset` to the folder"
        ) from error

    entries = list(root.iterdir())
    while len(entries) == 1 and entries[0].is_dir() and any(map(Path.is_dir, entries[0].iterdir())):
        root = entries[0]
        entries = list(root.iterdir())
    return root


def list_members(file: Path, archive: zipfile.ZipFile) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """Return the visible files in an archive by path.

    Raise ValueError if they exceed a limit, or if a path leads outside of the folder.
    """
    members = {}
    for info in archive.infolist():
        # some programs for Windows write backslashes
        path = PurePosixPath(info.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
            raise ValueError(
                f"{file} contains {info.filename!r}, which would be written outside of its folder. "
                "Use a .zip file from another source"
            )
        if not info.is_dir() and not any(map(is_hidden, path.parts)):
            members[path] = info

    num_bytes = sum(info.file_size for info in members.values())
    num_packed_bytes = sum(info.compress_size for info in members.values())
    if len(members) > MAX_FILES or num_bytes > min(MAX_BYTES, MAX_RATIO * num_packed_bytes):
        raise ValueError(
            f"{file} contains {len(members):,} files of {num_bytes / 1e9:,.1f} GB, packed in "
            f"{num_packed_bytes / 1e9:,.1f} GB, which exceeds the limits. Unpack it with another "
            "program, and set `dataset` to the folder"
        )
    return members

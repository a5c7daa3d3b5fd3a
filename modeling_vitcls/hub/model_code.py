"""Whose code a model has: this package's, other code in its folder, or the code of a repository.

    compare_code(folder.code, read_own_code())      names of the files that differ
    get_code_version()                              `0.1.0+1b2c3d4e`: the package, and a hash of the files that ship

A published config.json has the version as `code_version`. What is compared are the files, because a version
says nothing about an edited file. This package never runs the code of a folder or a repository.
"""

from functools import cache
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash
from packaging.version import InvalidVersion, Version

from ..runtime.errors import format_name_list
from ..runtime.files import compute_json_digest
from ..version import __version__
from .model_files import CODE_PATTERN


OWN_CODE = Path(__file__).parents[1] / "model"
SEPARATOR = "--"  # In `auto_map` between a repository and a class


@cache
def read_own_code() -> dict[str, bytes]:
    """Read the files of this package that travel with a checkpoint, by name."""
    return {file.name: file.read_bytes() for file in OWN_CODE.glob(CODE_PATTERN)}


def get_code_version() -> str:
    """Get the version of this package with a hash of the files that travel with a checkpoint."""
    return f"{__version__}+{compute_json_digest(hash_code(read_own_code()))[:8]}"


def hash_code(code: dict[str, bytes]) -> dict[str, str]:
    """Hash files as Git does, which is the hash that the Hub lists."""
    return {name: git_hash(code[name]) for name in sorted(code)}


def list_published_code(repo_id: str, revision: str | None = None) -> dict[str, str]:
    """List the hashes of the code files in a repository, by name, without a download.

    Raise as huggingface_hub.
    """
    tree = HfApi().list_repo_tree(repo_id, revision=revision)
    return {
        entry.path: entry.blob_id
        for entry in tree
        if isinstance(entry, RepoFile) and Path(entry.path).match(CODE_PATTERN)
    }


def compare_code(
    code: dict[str, bytes] | dict[str, str], other: dict[str, bytes] | dict[str, str]
) -> list[str]:
    """List the names of the files that differ, or that only one of the two has."""
    return sorted(name for name in code.keys() | other.keys() if code.get(name) != other.get(name))


def describe_code(names: list[str]) -> str:
    """Say which code files differ from this package's; empty for none."""
    if not names:
        return ""
    verb = "differs" if len(names) == 1 else "differ"
    return f"{format_name_list(names)} {verb} from modeling_vitcls {__version__}"


def is_newer(code_version: object) -> bool:
    """Check whether the version in a config.json is newer than this package."""
    try:
        return Version(Version(str(code_version)).public) > Version(__version__)
    except InvalidVersion:
        return False

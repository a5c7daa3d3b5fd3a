"""The push: a model folder becomes one commit on the Hub.

    pushed = push_folder(folder, "someone/model", private=False, message="...")
    pushed.commit                          # the hash to pin

What fails for a while is tried again; what the Hub has already is not sent again, also by a later run. The folder is
only read.
"""

import logging
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from . import manifest
from .connection import HUB_ERRORS, check_is_online, endpoint, in_one_line, patience, quiet_client, tried_again
from .manifest import Contents, contents_of, outdated, resumable_contents


# Seconds of silence, not of work: sending a large file takes as long as it takes.
PATIENCE = 120.0
MESSAGE = "Upload model"

log = logging.getLogger(__name__)


class PushFailed(OSError):
    """A push that did not get through. The message ends with the command that finishes it."""


@dataclass(frozen=True)
class Pushed:
    """Where a model folder is now.

    Attributes:
        repo_id: `namespace/name`.
        commit: the hash of the commit, 40 hexadecimal digits.
        url: of the commit, for a browser.
        with_optimizer: whether a checkpoint to resume from is there, too.
        is_private: whether the repository is closed to others.
    """

    repo_id: str
    commit: str
    url: str
    with_optimizer: bool = False
    is_private: bool = False

    @property
    def in_words(self) -> str:
        """Where, and who can see it."""
        return f"{self.url} ({'private' if self.is_private else 'public'})"


def push_folder(
    folder: Path,
    repo_id: str,
    private: bool = False,
    message: str = MESSAGE,
    branch: str | None = None,
    with_optimizer: bool = False,
    in_background: bool = False,
) -> Pushed:
    """Create the repository where it does not exist, and put the files of a model folder there in one commit.

    A commit that would change nothing is not made; the newest one of the branch is then returned. Call it on the main
    process alone, after `check_push_rights`.

    Args:
        folder: with config.json, safetensors, code, image processor, card, results.
        repo_id: `namespace/name`.
        private: whether a new repository is private.
        message: of the commit.
        branch: to commit to, made from `main` where it does not exist; None: `main`.
        with_optimizer: publish the newest checkpoint of `checkpoints/` too, from which `--resume` goes on.
        in_background: show and log nothing, and send large files one after the other, without threads of their own:
            the end of Python would wait for those.

    Raises:
        ValueError: in one line, for a folder that holds no complete model, or no checkpoint where one is asked for.
        PushFailed: an OSError, in one line, with the command that finishes the job.
    """
    check_is_online()
    contents = contents_of(folder, repo_id) | (resumable_contents(folder) if with_optimizer else {})

    def push() -> Pushed:
        commit, is_private = push_once(contents, repo_id, private, message, branch, in_turn=in_background)
        return Pushed(repo_id, commit, f"{endpoint()}/{repo_id}/commit/{commit}", with_optimizer, is_private)

    try:
        with patience(PATIENCE), quiet_client(with_bars=sys.stderr.isatty() and not in_background):
            pushed = tried_again(
                push, f"pushing to {repo_id}", level=logging.DEBUG if in_background else logging.WARNING
            )
    except HUB_ERRORS as error:
        command = push_command(folder, repo_id, private, branch, with_optimizer, message)
        raise PushFailed(why_not_pushed(folder, repo_id, command, error)) from error
    if not pushed.is_private and (dataset := manifest.data_shown(folder)):
        log.warning(manifest.warning(folder, dataset, repo_id))
    return pushed


def push_once(
    contents: Contents, repo_id: str, private: bool, message: str, branch: str | None, in_turn: bool
) -> tuple[str, bool]:
    """One attempt; gives the commit, and whether the repository is private.

    It looks at what is there first, so that it goes on from where another one ended.

    Where someone else pushes in the meantime the Hub refuses the commit (HTTP 412), which is then built anew.
    """
    api = HfApi()
    api.create_repo(repo_id, private=private or None, exist_ok=True)  # None: as the account has it
    if branch is not None:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    info = api.model_info(repo_id, revision=branch)
    parent = info.sha
    there = api.list_repo_files(repo_id, revision=parent)
    removed = [CommitOperationDelete(path_in_repo=name) for name in outdated(there, contents)]
    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in contents.items()]
    if in_turn:
        for large in (addition for addition in added if addition.path_in_repo.endswith(".safetensors")):
            api.preupload_lfs_files(repo_id, [large], revision=branch, free_memory=False)
    commit = api.create_commit(
        repo_id, [*removed, *added], commit_message=message, revision=branch, parent_commit=parent
    )
    return commit.oid, bool(info.private)


def why_not_pushed(folder: Path, repo_id: str, command: str, error: BaseException) -> str:
    """One line: what happened, that nothing is lost, and what to do."""
    return (
        f"the push to {repo_id} failed: {in_one_line(error)}. The model is complete in {folder}; finish with: "
        f"{command}"
    )


def push_command(
    folder: Path,
    repo_id: str,
    private: bool = False,
    branch: str | None = None,
    with_optimizer: bool = False,
    message: str = MESSAGE,
) -> str:
    """The command line that pushes a model folder."""
    flags = ["--model", str(folder), "--hub-model-id", repo_id]
    flags += ["--private"] if private else []
    flags += ["--branch", branch] if branch else []
    flags += ["--message", message] if message != MESSAGE else []
    flags += ["--push-optimizer"] if with_optimizer else []
    return f"python scripts/push_to_hub.py {shlex.join(flags)}"

"""The push: a model folder becomes one commit on the Hub.

    pushed = push_folder(folder, "someone/model", private=False, message="...")
    pushed.commit                          # the hash to pin

What fails for a while is tried again; what the Hub has already is not sent again, also by a later run. The folder is
only read.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from .connection import HUB_ERRORS, check_is_online, endpoint, in_one_line, patience, tried_again
from .contents import Contents, contents_of, outdated


# Seconds of silence, not of work: sending a large file takes as long as it takes.
PATIENCE = 120.0


class PushFailed(OSError):
    """A push that did not get through. The message ends with the command that finishes it."""


@dataclass(frozen=True)
class Pushed:
    """Where a model folder is now.

    Attributes:
        repo_id: `namespace/name`.
        commit: the hash of the commit, 40 hexadecimal digits.
        url: of the commit, for a browser.
    """

    repo_id: str
    commit: str
    url: str


def push_folder(
    folder: Path, repo_id: str, private: bool = False, message: str = "Upload model", branch: str | None = None
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

    Raises:
        ValueError: in one line, for a folder that holds no complete model.
        PushFailed: an OSError, in one line, with the command that finishes the job.
    """
    check_is_online()
    contents = contents_of(folder)
    try:
        with patience(PATIENCE):
            return tried_again(lambda: push_once(contents, repo_id, private, message, branch), f"pushing to {repo_id}")
    except HUB_ERRORS as error:
        raise PushFailed(why_not_pushed(folder, repo_id, private, branch, error)) from error


def push_once(contents: Contents, repo_id: str, private: bool, message: str, branch: str | None) -> Pushed:
    """One attempt. It looks at what is there first, so that it goes on from where another one ended."""
    api = HfApi()
    api.create_repo(repo_id, private=private or None, exist_ok=True)  # None: as the account has it
    if branch is not None:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    published = api.list_repo_files(repo_id, revision=branch)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationDelete(path_in_repo=name) for name in outdated(published, contents)
    ]
    operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in contents.items()]
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=branch)
    return Pushed(repo_id, commit.oid, f"{endpoint()}/{repo_id}/commit/{commit.oid}")


def why_not_pushed(folder: Path, repo_id: str, private: bool, branch: str | None, error: BaseException) -> str:
    """One line: what happened, that nothing is lost, and what to do."""
    return (
        f"the push to {repo_id} failed: {in_one_line(error)}. The model is complete in {folder}; finish with: "
        f"{push_command(folder, repo_id, private, branch)}"
    )


def push_command(folder: Path, repo_id: str, private: bool = False, branch: str | None = None) -> str:
    """The command line that pushes a model folder."""
    flags = ["--model", str(folder), "--hub-model-id", repo_id]
    flags += ["--private"] if private else []
    flags += ["--branch", branch] if branch else []
    return f"python scripts/push_to_hub.py {shlex.join(flags)}"

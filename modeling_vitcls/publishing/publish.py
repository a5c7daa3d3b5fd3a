"""Push a model folder to the Hub in one commit.

    push_result = push_folder(folder, "someone/model", private=False, message="...")
    push_result.commit                     # the commit hash to pin

Temporary failures are retried. Files that the Hub already has are not uploaded again, even by a later run. The folder
is not changed.
"""

import logging
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

from ..hub.connection import HUB_ERRORS, check_is_online, format_hub_error, retry, set_hub_timeout, silence_hub_client
from .code_files import HANDLER_FILE, HANDLER_SOURCE
from .manifest import (
    SAMPLE_IMAGES_FILE,
    RepoFiles,
    collect_checkpoint_files,
    collect_model_files,
    find_local_dataset_in_card,
    find_outdated_files,
)


TIMEOUT = 120.0  # maximum time without a response, in seconds; the duration of an upload is not limited
DEFAULT_MESSAGE = "Upload model"

logger = logging.getLogger(__name__)


class PushError(OSError):
    """Raised if a push fails. The message ends with the command that completes the push."""


@dataclass(frozen=True)
class PushResult:
    """The result of a push."""

    repo_id: str  # `namespace/name`
    commit: str  # commit hash, 40 hexadecimal digits
    url: str  # URL of the commit
    with_optimizer: bool = False  # whether a checkpoint for `--resume` was pushed as well
    is_private: bool = False  # whether the repository is private

    @property
    def summary(self) -> str:
        """Return the URL of the commit and the visibility of the repository."""
        return f"{self.url} ({'private' if self.is_private else 'public'})"


def push_folder(
    folder: Path,
    repo_id: str,
    private: bool = False,
    message: str = DEFAULT_MESSAGE,
    branch: str | None = None,
    with_optimizer: bool = False,
    in_background: bool = False,
    with_handler: bool = False,
) -> PushResult:
    """Push the files of a model folder in one commit; create the repository if it does not exist.

    If nothing has changed, no commit is made, and the newest commit of the branch is returned. Call this function only
    on the main process, after `check_push_permissions`.

    Args:
        folder: Folder with the configuration, weights, code, image processor, card and results of a model.
        repo_id: `namespace/name`.
        private: Whether a new repository must be private. Default: the account's default visibility.
        message: Commit message.
        branch: Branch of the commit, created from `main` if it does not exist. Default: `main`.
        with_optimizer: Whether to also push the newest checkpoint in `checkpoints/`, for `--resume`.
        in_background: Whether to hide progress bars, to log retries at the DEBUG level, and to upload large files
            one by one. Uploads in extra threads would delay the exit of Python.
        with_handler: Whether to also push handler.py for Inference Endpoints (endpoint_handler.py).

    Raises:
        ValueError: If the folder does not contain a complete model or, with `with_optimizer`, an undamaged checkpoint.
        PushError: If the push fails. The message is a single line and ends with the command that completes the push.
    """
    check_is_online()
    files = collect_model_files(folder, repo_id) | (collect_checkpoint_files(folder) if with_optimizer else {})
    files |= {HANDLER_FILE: HANDLER_SOURCE} if with_handler else {}
    try:
        with set_hub_timeout(TIMEOUT), silence_hub_client(sys.stderr.isatty() and not in_background):
            commit, is_private = retry(
                lambda: push_once(files, repo_id, private, message, branch, upload_one_by_one=in_background),
                f"pushing to {repo_id}",
                level=logging.DEBUG if in_background else logging.WARNING,
            )
    except HUB_ERRORS as error:
        push_command = build_push_command(folder, repo_id, private, branch, with_optimizer, message, with_handler)
        raise PushError(
            f"the push to {repo_id} failed: {format_hub_error(error)}. The model is saved in {folder}; "
            f"finish with: {push_command}"
        ) from error
    if not is_private and (dataset := find_local_dataset_in_card(folder)):
        logger.warning(
            f"{repo_id} is public, and its card shows images of {dataset} ({SAMPLE_IMAGES_FILE}). If the images are "
            "confidential, make the repository private in its settings on the Hub. To remove the images instead, "
            f"delete the file on the Hub, delete {folder / SAMPLE_IMAGES_FILE}, and push again"
        )
    url = f"{constants.ENDPOINT}/{repo_id}/commit/{commit}"
    return PushResult(repo_id, commit, url, with_optimizer, is_private)


def push_once(
    files: RepoFiles, repo_id: str, private: bool, message: str, branch: str | None, upload_one_by_one: bool
) -> tuple[str, bool]:
    """Try to push once; return the commit and whether the repository is private.

    The current state of the repository is read first, so that a retry continues an incomplete push. If another push
    happens in the meantime, the Hub rejects the commit (HTTP 412), and the retry builds a new commit.
    """
    api = HfApi()
    api.create_repo(repo_id, private=private or None, exist_ok=True)  # None selects the account's default visibility
    if branch is not None:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    repo_info = api.model_info(repo_id, revision=branch)
    published_files = api.list_repo_files(repo_id, revision=repo_info.sha)
    deletions = [CommitOperationDelete(path_in_repo=name) for name in find_outdated_files(published_files, files)]
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
    if upload_one_by_one:
        for addition in additions:
            if addition.path_in_repo.endswith(".safetensors"):
                api.preupload_lfs_files(repo_id, [addition], revision=branch, free_memory=False)
    commit = api.create_commit(
        repo_id, [*deletions, *additions], commit_message=message, revision=branch, parent_commit=repo_info.sha
    )
    return commit.oid, bool(repo_info.private)


def build_push_command(
    folder: Path,
    repo_id: str,
    private: bool = False,
    branch: str | None = None,
    with_optimizer: bool = False,
    message: str = DEFAULT_MESSAGE,
    with_handler: bool = False,
) -> str:
    """Return the command line that pushes a model folder."""
    flags = ["--model", str(folder), "--hub-model-id", repo_id]
    flags += ["--private"] if private else []
    flags += ["--branch", branch] if branch else []
    flags += ["--message", message] if message != DEFAULT_MESSAGE else []
    flags += ["--push-optimizer"] if with_optimizer else []
    flags += ["--endpoint-handler"] if with_handler else []
    return f"vitcls push {shlex.join(flags)}"

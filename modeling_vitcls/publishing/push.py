"""Push a model folder to the Hub.

    repo_id = prepare_repository("mine", default_name="mine")           # before a training run
    pushed = push_folder(ModelFolder(Path("runs/mine")), repo_id)
    pushed.sha                                                          # the commit hash to pin

huggingface_hub repeats failed uploads of files. After any other failure, the error names the command that
completes the push. Files that the Hub already has are not uploaded again. The folder is not changed.
"""

import logging
import shlex
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import filter_repo_objects

from ..hub.connection import (
    HUB_ERRORS,
    check_is_online,
    describe_no_response,
    format_hub_error,
    hide_hub_progress_bars,
    set_hub_timeout,
)
from ..hub.model_files import (
    CARD_FILE,
)
from ..hub.model_folder import ModelFolder
from ..runtime.flags import to_arguments
from .card import is_edited
from .published_files import DELETE_PATTERNS, collect_files


# Maximum time without a response, in seconds; the duration of an upload is not limited.
TIMEOUT = 50.0
GIT_ATTRIBUTES_FILE = ".gitattributes"  # The Hub keeps the list of large files in it
TOKEN_SETTINGS_URL = "https://huggingface.co/settings/tokens"


logger = logging.getLogger(__name__)


class PushError(OSError):
    """Raised if a push fails. The message ends with the command that completes the push."""


@dataclass(frozen=True)
class PushedCommit:
    """The commit of a push, or the newest one of the branch if nothing has changed."""

    repo_id: str  # `namespace/name`
    sha: str  # Commit hash, 40 hexadecimal digits
    # Whether a download requires a token, because the repository is private or gated
    needs_token: bool
    url: str  # URL of the commit
    is_private: bool
    files: Mapping[str, Path | bytes]  # Name in the repository -> path or content
    advice: str  # How to finish a push that failed, or that was not verified


def prepare_repository(
    repo_id: str | None, default_name: str, private: bool = False, space_sdk: str | None = None
) -> str:
    """Create a repository if it does not exist, check that it accepts a push, and return its id.

    Args:
        repo_id: `namespace/name`, or a name in the user's namespace. Default: `default_name`.
        default_name: Name of the repository in the user's namespace.
        private: Whether the repository must be private. Default: the account's default visibility.
        space_sdk: "gradio" or "static" for a Space.

    Raises:
        ValueError: If the name is invalid, or the token, the namespace or the visibility does not
            permit the push.
        OSError: If the Hub does not respond.
    """
    check_is_online()
    name = repo_id or default_name
    repo_type = "space" if space_sdk else "model"
    remedy = (
        "Run `hf auth login` with a token that may write to the repository "
        f"({TOKEN_SETTINGS_URL}), or set HF_TOKEN; check "
        f"{'`space_id`' if space_sdk else '`hub_model_id`'}"
    )

    api = HfApi()
    try:
        with set_hub_timeout(TIMEOUT):
            name = api.create_repo(
                name,
                private=private or None,
                repo_type=repo_type,
                space_sdk=space_sdk,
                exist_ok=True,
            ).repo_id
            # An existing repository is no error for `create_repo`, even if the token may not write
            # to it.
            api.auth_check(name, repo_type=repo_type, write=True)
            is_private = api.repo_info(name, repo_type=repo_type, timeout=TIMEOUT).private
    except HUB_ERRORS as error:  # ValueError: an invalid name, or no token
        # With a status below 500, the Hub has answered and the user can act. Anything else is a
        # network or a server that may work later.
        is_refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        if not is_refused and not isinstance(error, ValueError):
            raise OSError(f"{describe_no_response(error)}, or push later") from error
        raise ValueError(f"cannot push to {name}: {format_hub_error(error)}. {remedy}") from None

    if private and not is_private:
        raise ValueError(
            f"{name} exists and is public, but a private repository is required. Make the "
            "repository private in its settings on the Hub, or set a different name"
        )
    return name


def push_folder(
    folder: ModelFolder,
    repo_id: str,
    private: bool = False,
    branch: str | None = None,
    license_id: str | None = None,
    card_samples: bool = False,
) -> PushedCommit:
    """Push a model folder; create the repository if it does not exist.

    If nothing has changed, no commit is made, and the newest commit of the branch is returned.

    Args:
        folder: Folder of a complete model (`ModelFolder.check_is_complete`).
        repo_id: `namespace/name`.
        private: Whether a new repository must be private. Default: the account's default
            visibility.
        branch: Branch of the commit, created from `main` if it does not exist. Default: `main`.
        license_id, card_samples: As in `collect_files`.

    Raises:
        ValueError: As in `collect_files`.
        PushError: If the push fails. The message is a single line and ends with the command that
            completes the push.
    """
    files = collect_files(folder, repo_id, license_id, card_samples)
    command = build_push_command(
        folder.path,
        repo_id,
        private=private,
        branch=branch,
        license=license_id,
        card_samples=card_samples,
    )
    return upload_files(
        files,
        repo_id,
        repo_type="model",
        message="Upload model",
        delete_patterns=DELETE_PATTERNS,
        advice=f"The model is saved in {folder.path}; finish with: {command}",
        private=private,
        branch=branch,
    )


def upload_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    repo_type: str,
    message: str,
    delete_patterns: list[str],
    advice: str,
    private: bool = False,
    branch: str | None = None,
) -> PushedCommit:
    """Upload files in one commit; create a model repository if it does not exist.

    If nothing has changed, no commit is made.

    Args:
        files: Name in the repository -> path or content.
        delete_patterns: Patterns of files to remove from the repository unless they are uploaded.
        advice: How to finish a failed push.

    Raises:
        PushError: If the push fails. The message is a single line and ends with `advice`.
    """
    check_is_online()
    api = HfApi()

    try:
        with (
            set_hub_timeout(TIMEOUT),
            nullcontext() if sys.stderr.isatty() else hide_hub_progress_bars(),
        ):
            if repo_type == "model":
                # None: the account's default visibility
                api.create_repo(repo_id, private=private or None, exist_ok=True)
            if branch is not None:
                api.create_branch(repo_id, branch=branch, exist_ok=True)
            info = api.repo_info(repo_id, repo_type=repo_type, revision=branch, timeout=TIMEOUT)
            names = api.list_repo_files(repo_id, repo_type=repo_type, revision=info.sha)
            if CARD_FILE in names and repo_type == "model":
                files = keep_edited_card(files, repo_id, info.sha)
            outdated = set(filter_repo_objects(names, allow_patterns=delete_patterns))
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                CommitOperationDelete(name)
                for name in sorted(outdated - files.keys() - {GIT_ATTRIBUTES_FILE})
            ]
            operations += [CommitOperationAdd(name, content) for name, content in files.items()]
            commit = api.create_commit(
                repo_id,
                operations,
                repo_type=repo_type,
                commit_message=message,
                revision=branch,
                # After another push in the meantime, which may have other files to delete, the Hub
                # rejects the commit (HTTP 412).
                parent_commit=info.sha,
            )
    except HUB_ERRORS as error:
        raise PushError(
            f"the push to {repo_id} failed: {format_hub_error(error)}. {advice}"
        ) from error
    path = f"spaces/{repo_id}" if repo_type == "space" else f"{repo_id}/commit/{commit.oid}"
    return PushedCommit(
        repo_id,
        commit.oid,
        needs_token=bool(info.private or getattr(info, "gated", False)),  # A Space has no gate
        url=f"{constants.ENDPOINT}/{path}",
        is_private=bool(info.private),
        files=files,
        advice=advice,
    )


def keep_edited_card(
    files: Mapping[str, Path | bytes], repo_id: str, commit: str | None
) -> Mapping[str, Path | bytes]:
    """Leave the card out of the files if it is generated, and the one on the Hub was edited.

    A line says what happens to the text on the Hub.
    """
    card = Path(hf_hub_download(repo_id, CARD_FILE, revision=commit)).read_text(encoding="utf-8")
    own = files[CARD_FILE]
    # The Hub writes the license of a new repository to a card without text.
    if not is_edited(card) or not REGEX_YAML_BLOCK.sub("", card).strip():
        return files
    if isinstance(own, bytes):
        logger.warning(
            f"{CARD_FILE} of {repo_id} was edited on the Hub, so it is kept, although it may describe "
            "other weights. To replace it, remove it on the Hub and push again"
        )
        return {name: content for name, content in files.items() if name != CARD_FILE}
    if own.read_text(encoding="utf-8") != card:
        logger.warning(
            f"{own} replaces {CARD_FILE} of {repo_id}, which stays in the commit {commit}"
        )
    return files


def build_push_command(folder: Path, repo_id: str, **others: str | bool | None) -> str:
    """Build the command that a person can run to push a folder, with the other flags that are set."""
    flags = {"model": folder, "hub_model_id": repo_id, **others}
    arguments = [to_arguments(name, value) for name, value in flags.items() if value]
    return f"vitcls push {shlex.join(chain.from_iterable(arguments))}"

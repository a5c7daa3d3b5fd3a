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
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects

from ..hub.connection import (
    HUB_ERRORS,
    check_is_online,
    describe_no_response,
    format_hub_error,
    hide_hub_progress_bars,
    set_hub_timeout,
)
from ..hub.loading import split_revision
from ..hub.model_code import compare_code, hash_code, list_published_code
from ..hub.model_files import CARD_FILE
from ..hub.model_folder import ModelFolder
from ..runtime.errors import format_name_list
from ..runtime.flags import to_arguments
from .card_parts import find_license, merge
from .published_files import DELETE_PATTERNS, check_weights, collect_files


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
    info: CommitInfo | None = None  # What huggingface_hub returned


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where a push goes, and how its commit is made."""

    repo_id: str  # `namespace/name`
    repo_type: str = "model"  # or "space"
    # Whether a new model repository must be private. Default: the account's default visibility
    private: bool = False
    branch: str | None = None  # Created from `main` if it does not exist. Default: `main`
    create_pr: bool = False  # Open a pull request, which requires no right to write
    # The vitcls model that was converted to the pushed one, whose folder is a temporary one
    native_of: Path | None = None
    message: str = "Upload model"
    description: str | None = None
    token: str | bool | None = None  # Default: the one that `hf auth login` has saved


@dataclass(frozen=True)
class Branch:
    """The files of a repository before a push."""

    info: Any  # ModelInfo or SpaceInfo
    names: list[str]
    card: str | None  # Text of README.md of a model


def prepare_repository(
    repo_id: str | None,
    default_name: str,
    private: bool = False,
    space_sdk: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> str:
    """Create a repository if it does not exist, check that it accepts a push, and return its id.

    Args:
        repo_id: `namespace/name`, or a name in the user's namespace. Default: `default_name`.
        default_name: Name of the repository in the user's namespace.
        private: Whether the repository must be private. Default: the account's default visibility.
        space_sdk: "gradio" or "static" for a Space.
        create_pr: Whether a pull request is opened. The repository must exist, and the token only
            has to read it.
        token: The token. Default: the one that `hf auth login` has saved.

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

    api = HfApi(token=token)
    try:
        with set_hub_timeout(TIMEOUT):
            if not create_pr:
                name = api.create_repo(
                    name,
                    private=private or None,
                    repo_type=repo_type,
                    space_sdk=space_sdk,
                    exist_ok=True,
                ).repo_id
                # An existing repository is no error for `create_repo`, even if the token may not
                # write to it.
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
    license_id: str | None = None,
    card_samples: bool = False,
    code_from: str | None = None,
    **settings: Any,
) -> PushedCommit:
    """Push a model folder; create the repository if it does not exist.

    If nothing has changed, no commit is made, and the newest commit of the branch is returned.

    Args:
        folder: Folder of a complete model (`ModelFolder.check_is_complete`).
        repo_id: `namespace/name`.
        license_id, card_samples: As in `collect_files`.
        code_from: The repository whose code the model refers to, as `ID[@REVISION]`. Default: the
            code in the folder, or the repository that the model refers to already.
        settings: Other fields of `Destination`, such as `branch`.

    Raises:
        ValueError: As in `collect_files`, `find_code` and `check_weights`.
        PushError: If the push fails. The message is a single line and ends with the command that
            completes the push.
    """
    destination = Destination(repo_id=repo_id, **settings)
    path = destination.native_of or folder.path
    command = build_push_command(
        path,
        repo_id,
        native=destination.native_of is not None,
        private=destination.private,
        branch=destination.branch,
        create_pr=destination.create_pr,
        license=license_id,
        card_samples=card_samples,
        code_from=code_from,
    )
    code_from = find_code(folder, code_from)
    advice = f"The model is saved in {path}; finish with: {command}"
    # A folder that cannot be published creates no repository
    check_weights(folder)
    files = collect_files(folder, repo_id, license_id, card_samples, code_from)

    branch = open_branch(destination, advice)
    set_license = find_license(branch.card)
    is_unknown = folder.provenance is None or folder.provenance.license is None
    if set_license and license_id is None and is_unknown:  # The text says it, too
        files = collect_files(folder, repo_id, set_license, card_samples, code_from)
    merged = merge_card(files, branch, destination)
    hashes = folder.weights_sha256 or {}
    return commit_files(merged, branch, destination, DELETE_PATTERNS, advice, hashes)


def upload_files(
    files: Mapping[str, Path | bytes],
    destination: Destination,
    delete_patterns: list[str],
    advice: str,
) -> PushedCommit:
    """Upload files in one commit. The arguments and errors are those of `commit_files`."""
    branch = open_branch(destination, advice)
    return commit_files(files, branch, destination, delete_patterns, advice)


# Requests -----------------------------------------------------------------------------------------


@contextmanager
def raise_push_errors(destination: Destination, advice: str) -> Iterator[HfApi]:
    """Enter a group of requests. Their errors become a `PushError` that ends with `advice`."""
    check_is_online()
    try:
        with (
            set_hub_timeout(TIMEOUT),
            nullcontext() if sys.stderr.isatty() else hide_hub_progress_bars(),
            warnings.catch_warnings(),
        ):
            # splits.parquet belongs to the model
            warnings.filterwarnings("ignore", ".* about to commit a data file")
            yield HfApi(token=destination.token)
    except HUB_ERRORS as error:
        raise PushError(
            f"the push to {destination.repo_id} failed: {format_hub_error(error)}. {advice}"
        ) from error


def open_branch(destination: Destination, advice: str) -> Branch:
    """Create the repository of a model and the branch if they do not exist, and list the files.

    Raise PushError, as `commit_files`.
    """
    repo_id, repo_type = destination.repo_id, destination.repo_type
    with raise_push_errors(destination, advice) as api:
        if not destination.create_pr:
            if repo_type == "model":
                # None: the account's default visibility
                api.create_repo(repo_id, private=destination.private or None, exist_ok=True)
            # The branch of a pull request is created with the request
            if destination.branch and not destination.branch.startswith("refs/pr/"):
                api.create_branch(repo_id, branch=destination.branch, exist_ok=True)
        info = api.repo_info(
            repo_id, repo_type=repo_type, revision=destination.branch, timeout=TIMEOUT
        )
        names = api.list_repo_files(repo_id, repo_type=repo_type, revision=info.sha)
        card = None
        if CARD_FILE in names and repo_type == "model":
            file = hf_hub_download(repo_id, CARD_FILE, revision=info.sha, token=destination.token)
            card = Path(file).read_text(encoding="utf-8")
    return Branch(info, names, card)


def commit_files(
    files: Mapping[str, Path | bytes],
    branch: Branch,
    destination: Destination,
    delete_patterns: list[str],
    advice: str,
    hashes: Mapping[str, str] | None = None,
) -> PushedCommit:
    """Upload files in one commit. If nothing has changed, no commit is made.

    Args:
        files: Name in the repository -> path or content.
        branch: The files before.
        destination: The repository.
        delete_patterns: Patterns of files to remove from the repository unless they are uploaded.
        advice: How to finish a failed push.
        hashes: Name -> SHA-256 of the files that the card and the results describe.

    Raises:
        PushError: If the push fails, or a file has another hash by now. The message is a single
            line and ends with `advice`.
    """
    repo_id, info = destination.repo_id, branch.info
    outdated = set(filter_repo_objects(branch.names, allow_patterns=delete_patterns))
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationDelete(name)
        for name in sorted(outdated - files.keys() - {GIT_ATTRIBUTES_FILE})
    ]
    additions = [CommitOperationAdd(name, content) for name, content in files.items()]
    # The Hub accepts no other content than what has been hashed here
    for each in additions:
        sha256 = each.upload_info.sha256.hex()
        if (hashes or {}).get(each.path_in_repo, sha256) != sha256:
            raise PushError(
                f"{each.path_in_repo} was replaced while the push was prepared, and {CARD_FILE} "
                f"describes what was there before. {advice}"
            )
    operations += additions
    with raise_push_errors(destination, advice) as api:
        commit = api.create_commit(
            repo_id,
            operations,
            repo_type=destination.repo_type,
            commit_message=destination.message,
            commit_description=destination.description,
            revision=destination.branch,
            create_pr=destination.create_pr,
            # After another push in the meantime, which may have other files to delete, the Hub
            # rejects the commit (HTTP 412).
            parent_commit=info.sha,
        )
    path = f"{repo_id}/commit/{commit.oid}"
    if destination.repo_type == "space":
        path = f"spaces/{repo_id}"
    return PushedCommit(
        repo_id,
        commit.oid,
        needs_token=bool(info.private or getattr(info, "gated", False)),  # A Space has no gate
        url=commit.pr_url or f"{constants.ENDPOINT}/{path}",
        is_private=bool(info.private),
        files=files,
        advice=advice,
        info=commit,
    )


# Code ---------------------------------------------------------------------------------------------


def find_code(folder: ModelFolder, code_from: str | None = None) -> str | None:
    """Find the commit of the repository whose code a model refers to, or will refer to.

    Args:
        folder: The folder of the model.
        code_from: The repository, as `ID[@REVISION]`. Default: the one in config.json, if any.

    Returns:
        `ID@COMMIT`, or None if the code is next to the weights.

    Raises:
        ValueError: If the repository cannot be read, or if it lacks the code in the folder.
    """
    code_from = code_from or folder.code_repository
    if code_from is None:
        return None
    if folder.is_native:
        raise ValueError(f"{folder.source} needs no code, so `code_from` does not apply")
    repo_id, revision = split_revision(code_from)
    try:
        with set_hub_timeout(TIMEOUT):
            sha = HfApi().model_info(repo_id, revision=revision, timeout=TIMEOUT).sha
            published = list_published_code(repo_id, sha)
    except HUB_ERRORS as error:
        raise ValueError(
            f"cannot read the code in {code_from}: {format_hub_error(error)}"
        ) from None
    names = compare_code(hash_code(folder.code), published)
    if names and folder.code_repository is None:
        raise ValueError(
            f"{repo_id} has other code than {folder.source}: {format_name_list(names)}. Publish the code of "
            f"the package with `vitcls push-code {repo_id}`, or push without `code_from`"
        )
    return f"{repo_id}@{sha}"


# Cards --------------------------------------------------------------------------------------------


def merge_card(
    files: Mapping[str, Path | bytes], branch: Branch, destination: Destination
) -> Mapping[str, Path | bytes]:
    """Keep what a person changed in the card on the Hub, and say it in a line.

    A card that was edited in the folder replaces the one on the Hub.
    """
    own = files[CARD_FILE]
    published = branch.card
    repo_id = destination.repo_id
    if published is None:
        return files
    if isinstance(own, Path):
        if own.read_text(encoding="utf-8") != published:
            logger.warning(
                f"{own} replaces {CARD_FILE} of {repo_id}, which stays in the commit {branch.info.sha}"
            )
        return files

    text, kept = merge(own.decode(), published)
    if kept:
        names = format_name_list([name.replace("## ", "").replace("#", "title") for name in kept])
        warning = ", which may describe other weights" if "text" in kept else ""
        logger.warning(
            f"{CARD_FILE} of {repo_id} was edited on the Hub, so this is kept: {names}{warning}. To replace it, "
            f"remove it from {CARD_FILE} on the Hub and push again"
        )
    return {**files, CARD_FILE: text.encode()}


def build_push_command(folder: Path, repo_id: str, **others: str | bool | None) -> str:
    """Build the command that a person can run to push a folder, with the other flags that are set."""
    flags = {"model": folder, "hub_model_id": repo_id, **others}
    arguments = [to_arguments(name, value) for name, value in flags.items() if value]
    return f"vitcls push {shlex.join(chain.from_iterable(arguments))}"

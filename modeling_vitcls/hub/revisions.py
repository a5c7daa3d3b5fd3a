"""Look up the commit of a branch or tag, and download the files of a commit.

model_commit = resolve_commit("someone/model", "main")
folder = download_commit(model_commit, ["config.json"])
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from .connection import HUB_ERRORS, SHORT_RETRY_WAITS, describe_no_response, format_hub_error, retry, set_hub_timeout
from .loading import describe_missing_repo, describe_missing_revision, is_hub_id


TIMEOUT = 60.0  # maximum time without a response, in seconds


@dataclass(frozen=True)
class HubCommit:
    """A commit on the Hub."""

    repo_id: str  # `namespace/name`
    sha: str  # commit hash, 40 hexadecimal digits
    needs_token: bool  # whether a download requires a token, because the repository is private or gated


def resolve_commit(repo_id: str, revision: str = "main") -> HubCommit:
    """Return the commit of a revision.

    Raise ValueError if the repository or the revision does not exist, and OSError if the Hub does not respond.
    """
    if not is_hub_id(repo_id):
        raise ValueError(describe_missing_repo(repo_id))
    try:
        with set_hub_timeout(TIMEOUT):
            model_info = retry(
                lambda: HfApi().model_info(repo_id, revision=revision, timeout=TIMEOUT),
                f"looking up {repo_id}",
                waits=SHORT_RETRY_WAITS,
            )
    except RepositoryNotFoundError:
        raise ValueError(describe_missing_repo(repo_id)) from None
    except RevisionNotFoundError:
        raise ValueError(describe_missing_revision(repo_id, revision)) from None
    except HUB_ERRORS as error:
        raise OSError(f"cannot look up {repo_id}: {describe_no_response(error)}") from error
    if model_info.sha is None:
        raise OSError(f"the Hub returned no commit for the revision {revision} of {repo_id}. Try again later")
    return HubCommit(repo_id, model_info.sha, bool(model_info.private or model_info.gated))


def download_commit(commit: HubCommit, patterns: Sequence[str], folder: Path | None = None) -> Path:
    """Download the matching files of a commit to a folder, by default to the cache, and return the folder."""
    repo_id = commit.repo_id
    try:
        with set_hub_timeout(TIMEOUT):
            path = retry(
                lambda: HfApi().snapshot_download(
                    repo_id, revision=commit.sha, local_dir=folder, allow_patterns=list(patterns)
                ),
                f"downloading {repo_id}",
            )
    except HUB_ERRORS as error:
        raise OSError(f"cannot download {repo_id}: {format_hub_error(error)}") from error
    return Path(path)

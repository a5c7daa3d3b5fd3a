"""Which commit a name on the Hub stands for, and where that commit's code comes from.

model = published("someone/model", "main")
code = code_of(model, folder_with_its_files)        # None: beside the weights
"""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from .connection import HUB_ERRORS, SHORT_WAITS, no_answer, patience, tried_again
from .loading import is_hub_id, not_there
from .manifest import code_repository


# Seconds of silence, not of work.
PATIENCE = 60.0


@dataclass(frozen=True)
class Published:
    """A commit on the Hub.

    Attributes:
        repo_id: `namespace/name`.
        commit: its hash, 40 hexadecimal digits.
        is_closed: whether a token is needed to read it: a private repository, or one with conditions to accept.
    """

    repo_id: str
    commit: str
    is_closed: bool


def published(repo_id: str, revision: str = "main") -> Published:
    """The commit that a revision stands for.

    Raises:
        ValueError: in one line, for a repository or a revision that is not there.
        OSError: in one line, where the Hub does not answer.
    """
    if not is_hub_id(repo_id):
        raise ValueError(not_there(repo_id))
    try:
        with patience(PATIENCE):
            info = tried_again(
                lambda: HfApi().model_info(repo_id, revision=revision), f"asking for {repo_id}", waits=SHORT_WAITS
            )
    except RepositoryNotFoundError:
        raise ValueError(not_there(repo_id)) from None
    except RevisionNotFoundError:
        raise ValueError(f"{repo_id} has no revision {revision}: give a commit hash, a branch or a tag") from None
    except HUB_ERRORS as error:
        raise OSError(f"cannot ask the Hub for {repo_id}: {no_answer(error)}") from error
    if info.sha is None:
        raise OSError(f"the Hub does not say which commit of {repo_id} {revision} is")
    return Published(repo_id, info.sha, bool(info.private or info.gated))


def code_of(model: Published, files: Path) -> Published | None:
    """The newest commit of the repository that a model takes its code from; None where that is its own.

    Args:
        files: folder with the model's files.

    Raises:
        ValueError, OSError: in one line, where the code is scattered over several repositories; and see `published`.
    """
    try:
        repo_id = code_repository(files, model.repo_id)
    except ValueError as error:
        raise ValueError(f"{model.repo_id} at {model.commit}: {error}") from None
    return published(repo_id) if repo_id else None

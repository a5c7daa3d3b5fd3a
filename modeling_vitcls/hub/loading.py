"""Find the files of a model locally or download them with short timeouts, and return their folder.

    folder = get_model_folder("runs/mine")              # a folder is returned unchanged
    folder = get_model_folder("someone/their-model")    # downloaded; from the cache if the Hub does not respond
    folder = get_model_folder("someone/their-model@v1")
    with fall_back_to_cache("someone/their-data", "dataset"):
        ...                                             # the same rule for downloads by other libraries
    model, commit = load_timm_model("vit_small_patch16_224")          # timm chooses the repository and the commit
    model, commit = load_timm_model("vit_small_patch16_224@weights.pth")
    model, commit = load_timm_model("hf-hub:someone/their-model")     # also with @REVISION
    folder = download_files("someone/their-model", "v1", ["config.json"])

    online          the newest commit; files that are not in the cache are downloaded
    no response     the cached files, with a warning; an error if no files are cached
    offline         the cached files (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE); an error if no files are cached

Loading from the returned folder sends no requests. Without this module, transformers would retry
for a minute if connections were refused, and for many minutes if the Hub did not respond.
"""

import difflib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from huggingface_hub import constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
    validate_repo_id,
)
from torch import nn

from ..model.fast_image_processing_vitcls import open_regular_file
from ..runtime.errors import format_name_list
from .connection import (
    HUB_ERRORS,
    describe_no_response,
    format_hub_error,
    name_cache,
    set_hub_timeout,
)
from .model_files import (
    ADAPTER_FILE,
    CONFIG_FILE,
    CONFIG_FILES,
    PICKLED_WEIGHTS_PATTERNS,
    WEIGHTS_PATTERNS,
)


# Files of a model that this package reads, and one that it refuses. The model's code files are not
# needed.
MODEL_FILE_PATTERNS = (*CONFIG_FILES, *WEIGHTS_PATTERNS, ADAPTER_FILE)

# The address of a page or of a repository
HUB_PAGE = re.compile(r"(?:https?://[^/]+|hf:/)/(?:datasets/)?([\w.-]+/[\w.-]+)")
TIMEOUT = 6.0  # Maximum time without a response, in seconds
COMMIT_TIMEOUT = 60.0  # Maximum time without a response for the files of a commit, in seconds
RETRY_WAIT = 1.0  # Wait before the only retry, after an error of the server, in seconds

RepoType = Literal["model", "dataset"]
PATH_NOUNS: dict[RepoType, str] = {"model": "folder", "dataset": "file or folder"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubCommit:
    """A commit on the Hub."""

    repo_id: str  # `namespace/name`
    sha: str  # Commit hash, 40 hexadecimal digits
    # Whether a download requires a token, because the repository is private or gated
    needs_token: bool


class HubUnreachableError(OSError):
    """Raised if the Hub does not respond. The message is a single line and names the remedy."""


def split_revision(name: str) -> tuple[str, str | None]:
    """Split NAME@REVISION at the last `@`.

    The revision is None if there is no `@`, or if the path `name` exists.
    """
    # Split at the last `@`, because `local@home/model@v1` is a path with a revision as well.
    path, _, revision = name.rpartition("@")
    return (path, revision) if path and revision and not Path(name).exists() else (name, None)


def get_model_folder(source: str, patterns: Sequence[str] = MODEL_FILE_PATTERNS) -> str:
    """Find or download a model's files: the folder is `source` itself, or one in the cache.

    `source` is a folder, or `namespace/name[@REVISION]` on the Hub, with a commit hash, branch or
    tag (default: the newest commit of `main`). The files whose names match `patterns` are
    downloaded.

    Raise ValueError if a revision is given for a folder, and OSError if there is no such folder or
    model, if access is denied, or if the model is neither in the cache nor available from the Hub
    (no response, or offline mode). The message is a single line and names the remedy.
    """
    name, revision = split_revision(source)
    if Path(name).exists():
        if revision is not None:
            raise ValueError(
                f"a revision requires a model on the Hub, but {name} is a folder. Remove "
                f"@{revision}"
            )
        return name
    # For a mistyped path, the Hub's client would explain the syntax of repository ids.
    if not is_hub_id(name):
        raise OSError(describe_missing_repo(name))
    with fall_back_to_cache(name, revision=revision):
        folder = download_files(name, revision, patterns, TIMEOUT)
        if not (folder / CONFIG_FILE).is_file():
            if is_offline_mode():  # The cache has only other files
                raise OSError(describe_incomplete_cache(name, revision))
            raise OSError(
                f"{name} does not contain a model, because {CONFIG_FILE} is missing. Check the name"
            )
    return str(folder)


def get_external_model_folder(source: str) -> str:
    """Find or download a model from another project, as `get_model_folder` does.

    It includes pickled weights if no safetensors files exist.
    """
    folder = get_model_folder(source)
    # Pickles may be large, so they are downloaded only if nothing else is there
    if not any(Path(folder).glob("*.safetensors")):
        folder = get_model_folder(source, (*MODEL_FILE_PATTERNS, *PICKLED_WEIGHTS_PATTERNS))
    for file in Path(folder).iterdir():
        if file.suffix in (".safetensors", ".bin"):
            open_regular_file(file).close()  # transformers' errors about files say less
    return folder


def fetch_repo_info(
    repo_id: str, repo_type: RepoType = "model", revision: str | None = None
) -> dict[str, Any]:
    """Fetch the Hub's information about a repository, using at most two requests.

    Raise HubUnreachableError if the Hub does not respond, and OSError if there is no such
    repository or revision.
    """
    suffix = f"/revision/{quote(revision, safe='')}" if revision else ""
    try:
        response = http_backoff(
            "GET",
            f"{constants.ENDPOINT}/api/{repo_type}s/{repo_id}{suffix}",
            max_retries=1,
            base_wait_time=RETRY_WAIT,
            # A Hub that does not respond now will not respond a second later, either.
            retry_on_exceptions=(),
            headers=build_hf_headers(),
            timeout=TIMEOUT,
        )
        hf_raise_for_status(response)
        return response.json()
    # These two are HTTP errors as well, so they come before HUB_ERRORS: here, the Hub has answered.
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{describe_missing_repo(repo_id, repo_type)} ({format_hub_error(error)})"
        ) from None
    except RevisionNotFoundError as error:
        raise OSError(
            f"{repo_id} has no revision {revision} ({format_hub_error(error)}). Set an existing "
            "commit hash, branch or tag"
        ) from None
    except HUB_ERRORS as error:
        # The Hub refuses an invalid token for public repositories, too.
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
            raise OSError(
                f"the Hub refuses the token: {format_hub_error(error)}. Log in with `hf auth login`, or "
                "unset HF_TOKEN; a public model or dataset needs no token (`hf auth logout`)"
            ) from None
        raise HubUnreachableError(describe_no_response(error)) from error


@contextmanager
def fall_back_to_cache(
    repo_id: str, repo_type: RepoType = "model", revision: str | None = None
) -> Iterator[str | None]:
    """If the Hub does not respond, run the block offline, so that libraries use the cache.

    Yield the hash of the commit on the Hub, or None if the Hub was not reached. Raise OSError if
    there is no such repository or revision, or if the Hub does not respond and the block fails.
    """
    if is_offline_mode():
        yield None
        return

    try:
        commit = fetch_repo_info(repo_id, repo_type, revision)["sha"]
    except HubUnreachableError as error:
        # Python deletes `error` at the end of this block, but the message below needs it.
        hub_error = error
    else:
        yield commit
        return

    # Offline mode comes last, because it also hides that a repository was deleted or made private.
    try:
        with force_offline():
            yield None
    except (
        OSError,
        ValueError,
    ) as error:  # A library's error about files that are not in the cache
        name = repo_id if revision is None else f"{repo_id}@{revision}"
        raise OSError(
            f"{name} is not a {PATH_NOUNS[repo_type]} and is missing or incomplete in the cache, "
            f"and {hub_error}"
        ) from error
    logger.warning("%s. Loading %s from the cache, which may be outdated", hub_error, repo_id)


@contextmanager
def force_offline() -> Iterator[None]:
    """Run the block as if HF_HUB_OFFLINE were set."""
    # The variable is read once, when huggingface_hub is imported, so setting it now would have no
    # effect.
    previous_value = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = previous_value


def get_cached_commit(folder: str) -> str | None:
    """Find the commit hash of a folder in the cache; None for any other folder."""
    path = Path(folder)
    # The cache names the folder of a commit .../snapshots/HASH.
    is_snapshot = path.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", path.name)
    return path.name if is_snapshot else None


def append_commit(source: str, folder: str) -> str:
    """Name the commit of a model that was downloaded to a folder: NAME@COMMIT.

    The name of any other model is returned unchanged.
    """
    commit = get_cached_commit(folder)
    return source if commit is None else f"{source.partition('@')[0]}@{commit}"


def pin_revision(source: str) -> str:
    """Append the commit hash to the id of a Hub model. Other sources are returned unchanged."""
    if source.startswith("timm:"):
        return source
    # The small files are enough to learn the commit. If the conversion of the model is in the
    # cache, the weights are not needed.
    folder = get_model_folder(source.removeprefix("transformers:"), CONFIG_FILES)
    return append_commit(source, folder)


def is_hub_id(source: str) -> bool:
    """Check whether a name is a syntactically valid repository id."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


@name_cache()
def download_files(
    repo_id: str,
    revision: str | None,
    patterns: Sequence[str],
    timeout: float = COMMIT_TIMEOUT,
) -> Path:
    """Download the matching files of a commit to the cache, and return their folder.

    huggingface_hub retries each request.
    """
    try:
        with set_hub_timeout(timeout):
            # Without `local_files_only`, huggingface_hub looks for a commit's files on the Hub even
            # in offline mode.
            folder = snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=list(patterns),
                local_files_only=is_offline_mode(),
            )
    except HUB_ERRORS as error:
        if not is_offline_mode():
            raise OSError(f"cannot download {repo_id}: {format_hub_error(error)}") from error
        raise OSError(describe_incomplete_cache(repo_id, revision)) from error
    return Path(folder)


def describe_incomplete_cache(
    repo_id: str, revision: str | None, repo_type: RepoType = "model"
) -> str:
    """Say that offline mode does not find a repository in the cache, and how to fill the cache."""
    name = repo_id if revision is None else f"{repo_id}@{revision}"
    kind = " --repo-type dataset" if repo_type == "dataset" else ""
    command = f"hf download {repo_id}{kind} --revision {revision or 'main'}"
    return (
        f"{describe_absence(name, repo_type)} and is missing or incomplete in the cache, and "
        "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set. Check the path, or run "
        f"`{command}` on a machine with network access, copy that machine's cache to this machine, and "
        "set HF_HUB_CACHE to the copy"
    )


def resolve_commit(repo_id: str, revision: str = "main") -> HubCommit:
    """Look up the commit of a branch or tag.

    Raise OSError if the repository or the revision does not exist, or if the Hub does not respond.
    """
    if not is_hub_id(repo_id):
        raise OSError(describe_missing_repo(repo_id))
    info = fetch_repo_info(repo_id, revision=revision)
    return HubCommit(repo_id, info["sha"], bool(info.get("private") or info.get("gated")))


def describe_absence(name: str, repo_type: RepoType) -> str:
    """Say that there is no folder of this name, and which files and folders are there instead."""
    folder = Path(name).parent
    names = [each.name for each in folder.iterdir()] if folder.is_dir() else []
    visible = sorted(each for each in names if not each.startswith("."))
    close = difflib.get_close_matches(Path(name).name, visible) or visible
    found = f" (here: {format_name_list(close)})" if close else ""
    return f"{name} is not a {PATH_NOUNS[repo_type]}{found}"


def describe_missing_repo(name: str, repo_type: RepoType = "model") -> str:
    """Say that a repository is missing or private, and what to do in both cases.

    The Hub does not distinguish the two cases.
    """
    if page := HUB_PAGE.match(name):
        return f"{name} is an address. Set the id of the {repo_type}: `{repo_type}={page[1]!r}`"
    absence = describe_absence(name, repo_type)
    if not is_hub_id(name):
        return f"{absence} and not a valid id of a {repo_type} on the Hub. Check the path"
    return (
        f"{absence}, and the Hub has no such {repo_type} (or the {repo_type} is private and the token "
        "cannot read it). Check the name, log in with `hf auth login`, or set HF_TOKEN"
    )


@name_cache()
def load_timm_model(name: str) -> tuple[nn.Module, str | None]:
    """Load a timm model, and return it with the commit hash of its repository.

    The hash is None unless `name` starts with `hf-hub:`. In NAME@FILE, `FILE` contains weights for
    the model, in a format that timm can read.

    Raise OSError if the Hub does not have the repository or does not respond. Other timm errors are
    not caught.
    """
    import timm

    kind, separator, location = name.partition(":")
    if not separator and "@" in name:
        name, _, file = name.partition("@")
        open_regular_file(file).close()  # timm's errors about files say less
        # Older versions of timm would read the file in the format of the published weights, such as
        # Flax's .npz.
        overlay = {"file": file, "custom_load": False}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay), None
    if kind == "hf-hub":
        repo_id, _, revision = location.partition("@")
        with fall_back_to_cache(repo_id, revision=revision or None) as commit:
            # Without the hash, a push in the meantime would make the recorded commit wrong.
            pinned_name = f"{kind}:{repo_id}@{commit}" if commit else name
            return timm.create_model(pinned_name, pretrained=True), commit
    # The name does not say in which repository the weights are, and the request that decides about
    # the cache needs its id.
    config = timm.get_pretrained_cfg(name)
    hub_id = None if config is None else config.hf_hub_id
    with fall_back_to_cache(hub_id) if hub_id else nullcontext():
        return timm.create_model(name, pretrained=True), None

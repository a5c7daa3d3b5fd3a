"""Find the files of a model locally or download them, and return their folder.

    folder = get_model_folder("runs/mine")              # a folder is returned unchanged
    folder = get_model_folder("someone/their-model")    # downloaded; from the cache if the Hub does not respond
    folder = get_model_folder("someone/their-model@v1")
    model, commit = load_timm_model("vit_small_patch16_224")          # timm chooses the repository and the commit
    model, commit = load_timm_model("hf-hub:someone/their-model")     # also with @REVISION
    folder = download_files("someone/their-model", "v1", ["config.json"])

huggingface_hub decides what is downloaded, retried and taken from the cache, and its environment
variables apply, such as HF_HUB_OFFLINE. An error that a person can mend is one line with the
remedy. Loading from the returned folder sends no requests.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from torch import nn

from ..model.field_checks_vitcls import open_regular_file
from ..runtime.errors import format_name_list
from .connection import HUB_ERRORS, describe_no_response, format_hub_error, name_cache
from .model_files import (
    ADAPTER_FILE,
    CODE_PATTERN,
    CONFIG_FILE,
    CONFIG_FILES,
    LICENSE_FILES,
    PARITY_REPORT_FILE,
    PICKLED_WEIGHTS_PATTERNS,
    RECIPE_FILE,
    RESULTS_FILE,
    SPLITS_FILE,
    WEIGHTS_PATTERNS,
)


# Files of a model that this package reads, with the records of its training or conversion, and one
# that it refuses. The model's code files are compared with this package's, and never run.
MODEL_FILE_PATTERNS = (
    *CONFIG_FILES,
    *WEIGHTS_PATTERNS,
    CODE_PATTERN,
    ADAPTER_FILE,
    RESULTS_FILE,
    SPLITS_FILE,
    RECIPE_FILE,
    PARITY_REPORT_FILE,
    *LICENSE_FILES,
)

# The address of a page or of a repository
HUB_PAGE = re.compile(r"(?:https?://[^/]+|hf:/)/(?:datasets/)?([\w.-]+/[\w.-]+)")
RepoType = Literal["model", "dataset"]
PATH_NOUNS: dict[RepoType, str] = {"model": "folder", "dataset": "file or folder"}


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
    folder = download_files(name, revision, patterns)
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


def get_cached_commit(folder: str) -> str | None:
    """Find the commit hash of a folder in the cache; None for any other folder."""
    path = Path(folder)
    # The cache names the folder of a commit .../snapshots/HASH.
    if path.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", path.name):
        return path.name
    return None


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
    return append_commit(
        source, get_model_folder(source.removeprefix("transformers:"), CONFIG_FILES)
    )


def is_hub_id(source: str) -> bool:
    """Check whether a name is a syntactically valid repository id."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def download_files(repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Download the matching files of a commit to the cache, and return their folder.

    Raise OSError if they can be neither downloaded nor found in the cache.
    """
    try:
        with name_cache():
            # Without `local_files_only`, huggingface_hub looks for a commit's files on the Hub even
            # in offline mode.
            folder = snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=list(patterns),
                local_files_only=is_offline_mode(),
            )
    except HUB_ERRORS as error:
        raise OSError(describe_hub_error(error, repo_id, revision)) from error
    return Path(folder)


def describe_hub_error(
    error: BaseException, repo_id: str, revision: str | None = None, repo_type: RepoType = "model"
) -> str:
    """Say in one line why a download failed, and what a person can do."""
    # The order matters: GatedRepoError is a RepositoryNotFoundError, and both are HTTP errors.
    if isinstance(error, GatedRepoError):
        return (
            f"{format_hub_error(error)}. Accept its conditions at {constants.ENDPOINT}/{repo_id}, "
            "and log in with `hf auth login`, or set HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError):
        return describe_missing_repo(repo_id, repo_type)
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{repo_id} has no revision {revision} ({format_hub_error(error)}). Set an existing "
            "commit hash, branch or tag"
        )
    # The Hub refuses an invalid token for public repositories, too.
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
        return (
            f"the Hub refuses the token: {format_hub_error(error)}. Log in with `hf auth login`, or "
            "unset HF_TOKEN; a public model or dataset needs no token (`hf auth logout`)"
        )
    # `datasets` raises ConnectionError for the same reason.
    if isinstance(error, LocalEntryNotFoundError | ConnectionError):
        if is_offline_mode():
            return describe_incomplete_cache(repo_id, revision, repo_type)
        return (
            f"{describe_absence(repo_id, repo_type)} and is missing or incomplete in the cache, and "
            f"{describe_no_response(error.__cause__ or error)}"
        )
    return f"cannot download {repo_id}: {format_hub_error(error)}"


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
    if Path(f"{name}.dvc").is_file():
        return f"{name} is not there, but {name}.dvc is. Run `dvc pull`, which gets it"
    absence = describe_absence(name, repo_type)
    if not is_hub_id(name):
        return f"{absence} and not a valid id of a {repo_type} on the Hub. Check the path"
    return (
        f"{absence}, and the Hub has no such {repo_type} (or the {repo_type} is private or gated and the "
        "token cannot read it). Check the name, log in with `hf auth login`, or set HF_TOKEN"
    )


@name_cache()
def load_timm_model(name: str) -> tuple[nn.Module, str | None]:
    """Load a timm model, and return it with the commit hash of its repository.

    The hash is None unless `name` starts with `hf-hub:`.

    Raise OSError if the Hub does not have the repository or does not respond. Other timm errors are
    not caught.
    """
    import timm

    kind, _, location = name.partition(":")
    if kind == "hf-hub":
        repo_id, _, revision = location.partition("@")
        # Without the hash, a push in the meantime would make the recorded commit wrong.
        commit = download_files(repo_id, revision or None, CONFIG_FILES).name
        return timm.create_model(f"{kind}:{repo_id}@{commit}", pretrained=True), commit
    return timm.create_model(name, pretrained=True), None

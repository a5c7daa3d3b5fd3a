"""From a model's name to a folder that holds its files: asked of the Hub once, bounded in time, or from the cache.

    folder = local_copy("runs/mine")                # a folder is itself
    folder = local_copy("someone/their-model")      # fetched, or the cached one where the Hub does not answer
    with briefly_asked("someone/their-data", "dataset"):
        ...                                         # what other libraries load, under the same rule

    online      the Hub says what is newest; what is not in the cache is downloaded
    no answer   what the cache has, with a warning; else an error, after twice `PATIENCE` seconds
    offline     what the cache has (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE); else an error at once

Whatever loads from the folder then asks nobody. transformers alone tries for a minute where connections are refused,
and for many where the Hub is silent.

timm's models, loaded under the rule of loading.py: a Hub that does not answer costs seconds.

    model, commit = load_timm("vit_small_patch16_224")          # the repository is timm's choice, and so is its commit
    model, commit = load_timm("hf-hub:someone/their-model")     # also @REVISION

timm must be installed.
"""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from torch import nn

from .connection import HUB_ERRORS, endpoint, in_one_line, no_answer, patience, tried_again


# What the package reads of a model. Its code is not among it: the package has its own.
CONFIG = "config.json"
CONFIGURATION = (CONFIG, "preprocessor_config.json")
MODEL_FILES = (*CONFIGURATION, "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
# How other projects saved weights formerly.
PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")

# Seconds of silence after which the Hub counts as not answering, and before it is asked a second time.
PATIENCE = 6.0
WAIT = 1.0

RepoType = Literal["model", "dataset"]
NOUNS: dict[RepoType, str] = {"model": "model", "dataset": "data set"}
PLACES: dict[RepoType, str] = {"model": "folder", "dataset": "file or folder"}  # what it might be instead

log = logging.getLogger(__name__)


class HubUnreachable(OSError):
    """A Hub that does not answer. The message is one line, with what to do."""


def local_copy(source: str, files: Sequence[str] = MODEL_FILES, revision: str | None = None) -> str:
    """The folder that holds a model: `source` itself if it is one, else where the Hub's files are cached.

    Args:
        source: a folder, or `namespace/name` on the Hub.
        files: patterns of the names of those that are needed.
        revision: commit hash, branch or tag on the Hub; None: the newest commit of `main`.

    Raises:
        ValueError: in one line, for a revision of a folder.
        OSError: in one line with what to do: there is no such folder or model, it may not be read, or it is not in the
            cache and the Hub does not answer, or may not be asked.
    """
    if Path(source).exists():
        if revision is not None:
            raise ValueError(f"--revision is about models on the Hub, and {source} is a folder: leave it out")
        return source
    if not is_hub_id(source):
        raise OSError(not_there(source))
    if is_offline_mode():
        folder = cached(source, files, revision)
        if folder is None:
            raise OSError(
                f"{source} is no folder here, nor complete in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE "
                f"(or TRANSFORMERS_OFFLINE) forbids to ask the Hub: run `hf download {source}` where there is a "
                "network, and set HF_HOME to the cache that it filled"
            )
        return folder
    try:
        ask_hub(source, revision=revision)
    except HubUnreachable as error:
        folder = cached(source, files, revision)
        if folder is None:
            raise OSError(
                f"{source} is no folder here, nor complete in the cache {constants.HF_HUB_CACHE}, and {error}"
            ) from error
        log.warning(
            "%s; %s comes from the cache, and may not be the newest: HF_HUB_OFFLINE=1 does not ask", error, source
        )
        return folder
    return downloaded(source, files, revision)


def local_copy_of_any_kind(source: str, revision: str | None = None) -> str:
    """As `local_copy`, for models of other projects: weights that were pickled are fetched where there are no others.

    Raises:
        ValueError, OSError: as `local_copy`.
    """
    folder = local_copy(source, revision=revision)
    if folder == source or any(Path(folder).glob("*.safetensors")):
        return folder
    return local_copy(source, (*MODEL_FILES, *PICKLED_WEIGHTS), revision)


def ask_hub(repo_id: str, repo_type: RepoType = "model", revision: str | None = None) -> Any:
    """What the Hub knows of a repository, asked for twice at most.

    Raises:
        HubUnreachable: an OSError, where it does not answer.
        OSError: in one line, where there is no such repository, or revision.
    """
    try:
        return tried_again(
            lambda: HfApi().repo_info(repo_id, repo_type=repo_type, revision=revision, timeout=PATIENCE),
            f"asking for {repo_id}",
            waits=(WAIT,),
        )
    except RepositoryNotFoundError:
        raise OSError(not_there(repo_id, repo_type)) from None
    except RevisionNotFoundError:
        raise OSError(f"{repo_id} has no revision {revision}: give a commit hash, a branch or a tag") from None
    except HUB_ERRORS as error:
        raise HubUnreachable(no_answer(error)) from error


@contextmanager
def briefly_asked(repo_id: str, repo_type: RepoType = "model", revision: str | None = None) -> Iterator[str | None]:
    """For what other libraries load from the Hub: a Hub that does not answer is asked here alone.

    They then find what is cached, as if HF_HUB_OFFLINE were set; what they raise instead becomes one line.

    Returns:
        The hash of the commit that the Hub says is the newest, or the revision's; None where nobody was asked.

    Raises:
        OSError: in one line with what to do: there is no such repository; or the Hub does not answer, and the cache
            does not have it.
    """
    if is_offline_mode():
        yield None
        return
    try:
        commit = ask_hub(repo_id, repo_type, revision).sha
    except HubUnreachable as error:
        unreachable = error
    else:
        yield commit
        return
    try:
        with offline():
            yield None
    except Exception as error:  # whatever they raise where something is not in the cache
        raise OSError(
            f"{repo_id} is no {PLACES[repo_type]} here, nor complete in the cache, and {unreachable}"
        ) from error
    log.warning("%s; %s comes from the cache, and may not be the newest", unreachable, repo_id)


@contextmanager
def offline() -> Iterator[None]:
    """As if HF_HUB_OFFLINE had been set."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def commit_of(folder: str) -> str | None:
    """The hash of the commit that a folder in the cache holds; None for any other folder."""
    path = Path(folder)
    is_commit = path.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", path.name)
    return path.name if is_commit else None


def is_hub_id(source: str) -> bool:
    """Whether this can be the name of a repository rather than of a folder."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def cached(repo_id: str, files: Sequence[str], revision: str | None) -> str | None:
    """The newest of the cached commits that is complete, as far as the cache knows; None if there is none."""
    try:
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=list(files), local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return folder if Path(folder, CONFIG).is_file() else None


def downloaded(repo_id: str, files: Sequence[str], revision: str | None) -> str:
    """The newest commit, or that of the revision, from a Hub that has just answered."""
    try:
        with patience(PATIENCE), bars_of_one_process():
            folder = tried_again(
                lambda: snapshot_download(repo_id, revision=revision, allow_patterns=list(files)),
                f"downloading {repo_id}",
                waits=(WAIT,),
            )
    except GatedRepoError:
        raise OSError(
            f"{repo_id} is open only to those who accept its conditions: do so at {endpoint()}/{repo_id}, and log in "
            "with `hf auth login`, or set HF_TOKEN"
        ) from None
    except HUB_ERRORS as error:
        raise OSError(f"cannot download {repo_id}: {in_one_line(error)}") from error
    if not Path(folder, CONFIG).is_file():
        raise OSError(f"{repo_id} holds no model that can be loaded, as it has no {CONFIG}: check the name")
    return folder


@contextmanager
def bars_of_one_process() -> Iterator[None]:
    """Let the first process on a machine, which downloads, show how far it is, and the others, which find it, not."""
    group = "huggingface_hub.snapshot_download"
    if os.environ.get("LOCAL_RANK", "0") == "0" or are_progress_bars_disabled(group):
        yield
        return
    disable_progress_bars(group)
    try:
        yield
    finally:
        enable_progress_bars(group)


def not_there(name: str, repo_type: RepoType = "model") -> str:
    """The message for what is neither here nor on the Hub, or not for this token; the Hub does not tell which."""
    noun = NOUNS[repo_type]
    if not is_hub_id(name):
        return f"{name} is no {PLACES[repo_type]} here, and cannot be the id of a {noun} on the Hub: check the path"
    return (
        f"{name} is no {PLACES[repo_type]} here, and the Hub has no such {noun}, or it is private and your token may "
        "not see it: check the name, log in with `hf auth login`, or set HF_TOKEN"
    )


def load_timm(name: str, with_weights: bool = True) -> tuple[nn.Module, str | None]:
    """A model by its name in timm, and the hash of the commit of a repository that the name gives itself.

    Raises:
        OSError: in one line, where the Hub does not have the repository, or does not answer.
        Exception: whatever else timm raises.
    """
    import timm

    kind, colon, place = name.partition(":")
    if not colon:
        known = timm.get_pretrained_cfg(name) if with_weights else None
        with briefly_asked(known.hf_hub_id) if known is not None and known.hf_hub_id else nullcontext():
            return timm.create_model(name, pretrained=with_weights), None
    if kind.lower().replace("_", "-") != "hf-hub":
        return timm.create_model(name, pretrained=with_weights), None
    repo_id, _, revision = place.partition("@")
    with briefly_asked(repo_id, revision=revision or None) as commit:
        pinned = f"{kind}:{repo_id}@{commit}" if commit else name
        return timm.create_model(pinned, pretrained=with_weights), commit

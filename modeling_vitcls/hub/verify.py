"""The proof that a published model is what it should be, and loads anywhere.

    certificate = verify("someone/model", "0123abc...", folder)
    print("\\n".join(certificate.lines()))

1. Every file is downloaded and has the hash that the Hub's list says, and the content that it has in `folder`.
2. A fresh process, with an empty cache and without this package, loads the commit by its hash through the Auto classes
   and pipeline (clean_process.py).
3. It answers fixed inputs as the model in `folder` does, loaded with this package.
"""

import filecmp
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file
from transformers.utils import logging

from ..version import __version__
from . import clean_process
from .clean_process import Answers, collect
from .connection import HUB_ERRORS, check_is_online, in_one_line, patience, tried_again
from .contents import ACCOMPANYING, ESSENTIAL, check_is_model, contents_of


# The largest difference in float32, for values up to 1; for larger ones in proportion.
LIMIT = 1e-6
# Seconds of silence, not of work.
PATIENCE = 60.0
# Seconds before new attempts of what the user waits for.
SHORT_WAITS = (0.5, 1.0)
# Where libraries keep what they downloaded, unless HF_HOME says so.
CACHE_VARIABLES = frozenset(
    {
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "TRANSFORMERS_CACHE",
        "HF_MODULES_CACHE",
        "HF_ASSETS_CACHE",
        "HF_XET_CACHE",
        "HF_TOKEN_PATH",
    }
)


class NotVerified(ValueError):
    """A published model that is not what it should be, or does not load. The message is one line."""


@dataclass(frozen=True)
class Certificate:
    """What was checked.

    Attributes:
        repo_id: `namespace/name`.
        revision: the hash of the commit, 40 hexadecimal digits.
        reference: what the answers were compared with.
        num_files: whose hashes were checked.
        classes: way to load -> the class that it gave.
        differences: way to load -> the largest difference of any value, in float32.
        versions: of what decides about numbers.
    """

    repo_id: str
    revision: str
    reference: str
    num_files: int
    classes: dict[str, str]
    differences: dict[str, float]
    versions: dict[str, str]

    def load_line(self) -> str:
        """The line to copy: it loads exactly what was checked."""
        auto_class = next(
            name for name in reversed(self.classes) if name.startswith("AutoModel") or name == "AutoBackbone"
        )
        return f'{auto_class}.from_pretrained("{self.repo_id}", revision="{self.revision}", trust_remote_code=True)'

    def lines(self) -> list[str]:
        """The certificate for a person to read."""
        width = max(map(len, self.differences))
        return [
            f"verified: {self.repo_id} at {self.revision}",
            f"  {self.num_files} files have the content that they should have",
            f"  a fresh process with an empty cache, without modeling_vitcls, against {self.reference}:",
            *(
                f"    {way:{width}}  {self.classes.get(way, ''):30}  largest difference {difference:.1e}"
                for way, difference in self.differences.items()
            ),
            f"  limit {LIMIT:g}; " + ", ".join(f"{name} {number}" for name, number in self.versions.items()),
            "load it, pinned, as it runs the code in the repository:",
            f"  {self.load_line()}",
        ]


def verify(repo_id: str, revision: str = "main", folder: Path | None = None) -> Certificate:
    """Download, load and compare a published model. Its code is run.

    Args:
        repo_id: `namespace/name`.
        revision: a commit hash; a branch or tag is resolved to its commit first.
        folder: the model that was pushed; None: the files of the commit, loaded with this package's code.

    Raises:
        NotVerified: a ValueError, in one line: files that are damaged or others than in `folder`, a model that does
            not load without this package, or that answers differently.
        ValueError: for a repository or revision that is not there.
        OSError: in one line, where the Hub does not answer.
    """
    check_is_online()
    commit = commit_hash(repo_id, revision)
    with tempfile.TemporaryDirectory(prefix="vitcls-verify-") as scratch_name, quiet():
        scratch = Path(scratch_name)
        published = scratch / "files"
        num_files = download(repo_id, commit, published)
        if folder is not None:
            check_same_files(repo_id, published, folder)
        wanted, _ = collect(str(folder or published))
        found, report = ask_a_fresh_process(repo_id, commit, scratch)
    check_report(repo_id, commit, report)
    return Certificate(
        repo_id=repo_id,
        revision=commit,
        reference=f"{folder}" if folder else f"the same files with modeling_vitcls {__version__}",
        num_files=num_files,
        classes={name: model["class"] for name, model in report["models"].items()}
        | {f"AutoImageProcessor, {backend}": name for backend, name in report["processors"].items()},
        differences=differences(repo_id, found, wanted),
        versions=versions(),
    )


def commit_hash(repo_id: str, revision: str) -> str:
    """The commit that a revision stands for."""
    try:
        with patience(PATIENCE):
            info = tried_again(
                lambda: HfApi().model_info(repo_id, revision=revision), f"asking for {repo_id}", waits=SHORT_WAITS
            )
    except RepositoryNotFoundError:
        raise ValueError(
            f"the Hub has no model {repo_id}, or it is private and your token may not see it: log in with `hf auth "
            "login`, or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{repo_id} has no revision {revision}: give a commit hash, a branch or a tag") from None
    except HUB_ERRORS as error:
        raise OSError(f"cannot ask the Hub for {repo_id}: {in_one_line(error)}") from error
    if info.sha is None:
        raise OSError(f"the Hub does not say which commit of {repo_id} {revision} is")
    return info.sha


# Files ---------------------------------------------------------------------------------------------------------------


def download(repo_id: str, commit: str, target: Path) -> int:
    """Fetch what belongs to a model, and count it. Raises NotVerified where a file is not what the Hub's list says."""
    try:
        with patience(PATIENCE):
            tried_again(
                lambda: HfApi().snapshot_download(
                    repo_id, revision=commit, local_dir=target, allow_patterns=[*ESSENTIAL, *ACCOMPANYING]
                ),
                f"downloading {repo_id}",
            )
            check = HfApi().verify_repo_checksums(repo_id, revision=commit, local_dir=target)
    except HUB_ERRORS as error:
        raise OSError(f"cannot download {repo_id}: {in_one_line(error)}") from error
    if check.mismatches:
        names = ", ".join(mismatch["path"] for mismatch in check.mismatches)
        raise NotVerified(
            f"{repo_id} at {commit} is damaged on the Hub: {names} is not what was uploaded; delete it there and push "
            "again"
        )
    try:
        check_is_model(target)
    except ValueError:
        raise NotVerified(f"{repo_id} at {commit} holds no vitcls model") from None
    return check.checked_count


def check_same_files(repo_id: str, published: Path, folder: Path) -> None:
    """Raise NotVerified unless each file of the model was published as it is in the folder."""
    for name, content in contents_of(folder).items():
        file = published / name
        if not file.is_file():
            raise NotVerified(f"{repo_id} lacks {name}, which {folder} has: push it again")
        is_same = (
            file.read_bytes() == content if isinstance(content, bytes) else filecmp.cmp(file, content, shallow=False)
        )
        if not is_same:
            raise NotVerified(
                f"{name} of {repo_id} is not the one in {folder}: the folder has changed, so push it again"
            )


# Answers -------------------------------------------------------------------------------------------------------------


def ask_a_fresh_process(repo_id: str, commit: str, scratch: Path) -> tuple[Answers, dict[str, Any]]:
    """What clean_process.py writes down. Raises NotVerified where it fails, twice if that may be the network."""
    try:
        return tried_again(
            lambda: run_clean_process(repo_id, commit, scratch), f"loading {repo_id}", waits=SHORT_WAITS[:1]
        )
    except RuntimeError as error:
        raise NotVerified(str(error)) from None


def run_clean_process(repo_id: str, commit: str, scratch: Path) -> tuple[Answers, dict[str, Any]]:
    """The answers and the report of one process.

    Raises:
        RuntimeError: in one line, where it fails in a way that may pass.
        NotVerified: in one line, where it fails otherwise.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as home:
        target = Path(home, "answers")
        target.mkdir()
        request = {"repo_id": repo_id, "revision": commit, "target": str(target)}
        request_file = Path(home, "request.json")
        request_file.write_text(json.dumps(request | {"num_threads": torch.get_num_threads()}), encoding="utf-8")
        child = subprocess.run(
            [sys.executable, "-P", clean_process.__file__, str(request_file)],
            cwd=home,
            env=clean_environment(home),
            capture_output=True,
            text=True,
            check=False,
        )
        if not (target / "report.json").is_file():
            lines = child.stderr.strip().splitlines() or [f"it ended with status {child.returncode}"]
            raise RuntimeError(cannot_load(repo_id, commit, lines[-1]))
        report = json.loads((target / "report.json").read_text(encoding="utf-8"))
        if "error" in report:
            failure = RuntimeError if report["may_pass"] else NotVerified
            raise failure(cannot_load(repo_id, commit, report["error"]))
        return load_file(target / "answers.safetensors"), report


def cannot_load(repo_id: str, commit: str, why: str) -> str:
    """The message of a fresh process that failed."""
    return f"a fresh process cannot load {repo_id} at {commit}: {why}"


def clean_environment(home: str) -> dict[str, str]:
    """The environment of a process that has downloaded nothing yet, with the user's token."""
    kept = {name: value for name, value in os.environ.items() if name not in CACHE_VARIABLES}
    token = get_token()
    return kept | {"HF_HOME": home} | ({"HF_TOKEN": token} if token else {})


def check_report(repo_id: str, commit: str, report: dict[str, Any]) -> None:
    """Raise NotVerified unless it was the published code, at this commit, and all weights, that answered."""
    if report["has_package"]:
        raise NotVerified(
            "the fresh process has imported modeling_vitcls, so it proves nothing about the published code"
        )
    if report["commits"] != [commit]:
        raise NotVerified(f"the fresh process loaded {', '.join(report['commits'])}, not {repo_id} at {commit} alone")
    for auto_class, model in report["models"].items():
        if not model["module"].startswith("transformers_modules."):
            raise NotVerified(f"{auto_class} took {model['class']} from {model['module']}, not from {repo_id}")
        if model["missing"]:
            raise NotVerified(f"{repo_id} at {commit} lacks the weights {', '.join(model['missing'])}")


def differences(repo_id: str, found: Answers, wanted: Answers) -> dict[str, float]:
    """Way to load -> largest difference. Raises NotVerified where one is beyond the limit."""
    if found.keys() != wanted.keys():
        raise NotVerified(f"{repo_id} answers with other tensors: {', '.join(sorted(found.keys() ^ wanted.keys()))}")
    result: dict[str, float] = {}
    for name, value in wanted.items():
        if found[name].shape != value.shape:
            raise NotVerified(
                f"{repo_id} answers in another shape: {name} {list(found[name].shape)}, not {list(value.shape)}"
            )
        difference = largest(found[name].double() - value.double())
        limit = LIMIT * max(1.0, largest(value.double()))
        if not difference <= limit:  # NaN is not
            raise NotVerified(f"{repo_id} answers differently: {name} by {difference:.2g}; the limit is {limit:.2g}")
        way = name.partition("/")[0]
        result[way] = max(result.get(way, 0.0), difference)
    return result


def largest(values: torch.Tensor) -> float:
    """The largest magnitude; 0 of nothing, NaN if there is one."""
    return values.abs().max().item() if values.numel() else 0.0


def versions() -> dict[str, str]:
    """Of what decides about numbers, and about loading."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "huggingface_hub": huggingface_hub.__version__,
        "python": platform.python_version(),
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and remarks, such as that AutoModel leaves the classifier out."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()

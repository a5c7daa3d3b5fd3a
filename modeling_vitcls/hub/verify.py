"""The proof that a published model is what it should be, and loads anywhere.

    certificate = verify("someone/model", "0123abc...", folder)
    print("\\n".join(certificate.lines()))

1. Every file is downloaded and has the hash that the Hub's list says, and the content that it has in `folder`.
2. A fresh process, with an empty cache and without this package, loads the commit by its hash through the Auto classes
   and pipeline (verification_script.py). It is given no token, unless the repository is closed to others, and little
   else of the environment: what runs there may be a stranger's code.
3. It answers fixed inputs as the model in `folder` does, loaded with this package (verification_reference.py). No
   published code runs in this process.
"""

import filecmp
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub import HfApi
from transformers.utils import logging

from ..version import __version__
from .connection import HUB_ERRORS, check_is_online, in_one_line, patience, tried_again
from .manifest import ACCOMPANYING, CHECKPOINTS, ESSENTIAL, check_is_model, contents_of, matches, resumable_contents
from .publish import Pushed
from .revisions import Published, code_of, published
from .verification_process import NotVerified, ask_a_fresh_process
from .verification_reference import Reference
from .verification_script import Answers, collect


# The largest difference in float32, for values up to 1; for larger ones in proportion.
LIMIT = 1e-6
# Seconds of silence, not of work.
PATIENCE = 60.0


class PushedButNotVerified(OSError):
    """A push that got through, and could not be verified. The message ends with the command that verifies it."""


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
        code_revision: the commit that the code came from, where that is in a repository of its own.
    """

    repo_id: str
    revision: str
    reference: str
    num_files: int
    classes: dict[str, str]
    differences: dict[str, float]
    versions: dict[str, str]
    code_revision: str | None = None

    def load_line(self) -> str:
        """The line to copy: it loads exactly what was checked."""
        auto_class = next(
            name for name in reversed(self.classes) if name.startswith("AutoModel") or name == "AutoBackbone"
        )
        pins = f'revision="{self.revision}"' + (
            f', code_revision="{self.code_revision}"' if self.code_revision else ""
        )
        return f'{auto_class}.from_pretrained("{self.repo_id}", {pins}, trust_remote_code=True)'

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
            "load it with its commit pinned, since that runs the code in the repository:",
            f"  {self.load_line()}",
        ]


def verify(
    repo_id: str, revision: str = "main", folder: Path | None = None, with_optimizer: bool = False
) -> Certificate:
    """Download, load and compare a published model. Its code is run, in a process of its own.

    Args:
        repo_id: `namespace/name`.
        revision: a commit hash; a branch or tag is resolved to its commit first.
        folder: the model that was pushed; None: the files of the commit, loaded with this package's code.
        with_optimizer: whether the newest checkpoint in `folder` has to be there; if one is, it is compared anyway.

    Raises:
        NotVerified: a ValueError, in one line: files that are damaged or others than in `folder`, a model that does
            not load without this package, or that answers differently.
        ValueError: for a repository or revision that is not there.
        OSError: in one line, where the Hub does not answer.
    """
    check_is_online()
    model = published(repo_id, revision)
    with tempfile.TemporaryDirectory(prefix="vitcls-verify-") as scratch_name, quiet():
        scratch = Path(scratch_name)
        files = scratch / "files"
        num_files = download(model, files)
        if folder is not None:
            check_same_files(repo_id, files, folder, with_optimizer)
        code = code_of(model, files)
        wanted, _ = collect(Reference(folder or files))
        found, report = ask_a_fresh_process(model, code, scratch)
    check_report(model, code, report)
    return Certificate(
        repo_id=repo_id,
        revision=model.commit,
        reference=f"{folder}" if folder else f"the same files with modeling_vitcls {__version__}",
        num_files=num_files,
        classes={name: found_model["class"] for name, found_model in report["models"].items()}
        | {f"AutoImageProcessor, {backend}": name for backend, name in report["processors"].items()},
        differences=differences(repo_id, found, wanted),
        versions=versions(),
        code_revision=code.commit if code else None,
    )


def verify_pushed(pushed: Pushed, folder: Path) -> Certificate:
    """`verify` what was just pushed from `folder`.

    Raises:
        PushedButNotVerified: an OSError, in one line: why, where the model is, and the command to verify it with.
    """
    try:
        return verify(pushed.repo_id, pushed.commit, folder, pushed.with_optimizer)
    except (ValueError, OSError) as error:
        again = f"python scripts/push_to_hub.py --verify-only {pushed.repo_id} --revision {pushed.commit}"
        raise PushedButNotVerified(
            f"the model was pushed, but not verified: {error}. It is complete in {folder}, and published as "
            f"{pushed.url}; verify it again with: {again}"
        ) from error


# Files ---------------------------------------------------------------------------------------------------------------


def download(model: Published, target: Path) -> int:
    """Fetch what belongs to a model, and count it. Raises NotVerified where a file is not what the Hub's list says."""
    repo_id, commit = model.repo_id, model.commit
    try:
        with patience(PATIENCE):
            tried_again(
                lambda: HfApi().snapshot_download(
                    repo_id,
                    revision=commit,
                    local_dir=target,
                    allow_patterns=[*ESSENTIAL, *ACCOMPANYING, *CHECKPOINTS],
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


def check_same_files(repo_id: str, files: Path, folder: Path, with_optimizer: bool) -> None:
    """Raise NotVerified unless each file that belongs to the model was published as it is in the folder."""
    wanted = contents_of(folder, repo_id)
    checkpoints = {
        name for file in files.rglob("*") if matches(name := file.relative_to(files).as_posix(), CHECKPOINTS)
    }
    if with_optimizer or checkpoints:
        wanted |= resumable_contents(folder)
    if foreign := sorted(checkpoints - wanted.keys()):
        raise NotVerified(f"{repo_id} has {foreign[0]}, which is not the newest checkpoint in {folder}: push it again")
    for name, content in wanted.items():
        file = files / name
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


def check_report(model: Published, code: Published | None, report: dict[str, Any]) -> None:
    """Raise NotVerified unless it was the published code, at these commits, and all weights, that answered."""
    repo_id, commit = model.repo_id, model.commit
    if report["has_package"]:
        raise NotVerified(
            "the fresh process has imported modeling_vitcls, so it proves nothing about the published code"
        )
    if report["commits"] != [commit]:
        raise NotVerified(f"the fresh process loaded {', '.join(report['commits'])}, not {repo_id} at {commit} alone")
    if code is not None and report["code_commits"] != [code.commit]:
        raise NotVerified(
            f"the fresh process took code from {', '.join(report['code_commits'])}, not {code.repo_id} at "
            f"{code.commit} alone"
        )
    for auto_class, found in report["models"].items():
        if not found["module"].startswith("transformers_modules."):
            raise NotVerified(f"{auto_class} took {found['class']} from {found['module']}, not from {repo_id}")
        if found["missing"]:
            raise NotVerified(f"{repo_id} at {commit} lacks the weights {', '.join(found['missing'])}")


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

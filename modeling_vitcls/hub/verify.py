"""Verify that a published model loads without this package and matches its reference.

    report = verify("someone/model", "0123abc...", folder)
    print("\\n".join(report.format_lines()))

1. All files are downloaded. Their hashes must match the Hub's list, and their content the files in `folder`.
2. A new process with an empty cache and without this package loads the commit through the Auto classes and the
   pipeline (verification_script.py). It has a minimal environment, and a token only if the repository is private or
   gated, because it may run code of an unknown author.
3. Its outputs for fixed inputs must match the model in `folder`, loaded with this package
   (verification_reference.py). No published code runs in this process.
"""

import filecmp
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers.utils import logging

from ..system import get_versions
from ..version import __version__
from .code_files import compare_code
from .connection import HUB_ERRORS, check_is_online, format_hub_error, retry, set_hub_timeout
from .manifest import (
    CHECKPOINT_PATTERNS,
    EXTRA_PATTERNS,
    MODEL_PATTERNS,
    check_is_model,
    collect_checkpoint_files,
    collect_model_files,
    is_match,
    is_native_model,
)
from .publish import PushResult
from .revisions import HubCommit, resolve_code_commit, resolve_commit
from .verification_process import NotVerified, run_verification
from .verification_reference import PackageLoader
from .verification_script import HubLoader, Outputs, collect_outputs


# Maximum absolute difference in float32 for values up to 1, and relative to the largest value above 1.
TOLERANCE = 1e-6
TIMEOUT = 60.0  # seconds without a response
PIN_ADVICE = "load it with a pinned commit, because loading runs the code in the repository:"


class PushedButNotVerified(OSError):
    """A push succeeded, but its verification failed. The message ends with the command that verifies it."""


@dataclass(frozen=True)
class VerificationReport:
    """The result of a verification.

    Attributes:
        repo_id: `namespace/name`.
        revision: The hash of the commit, 40 hexadecimal digits.
        reference: Description of the model that the outputs were compared with.
        num_files: Number of files with checked hashes.
        classes: Way to load -> name of the loaded class.
        differences: Way to load -> maximum absolute difference of its outputs, in float32.
        versions: Versions of the libraries.
        code_comparison: One line that compares the published code with the code of this package.
        code_revision: The commit of the code; None if the code is next to the weights.
        is_native: Whether the classes are part of transformers, and no code of the repository runs.
    """

    repo_id: str
    revision: str
    reference: str
    num_files: int
    classes: dict[str, str]
    differences: dict[str, float]
    versions: dict[str, str]
    code_comparison: str
    code_revision: str | None = None
    is_native: bool = False

    def build_load_line(self) -> str:
        """Return the line of code that loads the verified commit."""
        auto_class = next(
            name for name in reversed(self.classes) if name.startswith("AutoModel") or name == "AutoBackbone"
        )
        code_pin = f', code_revision="{self.code_revision}"' if self.code_revision else ""
        trust = "" if self.is_native else ", trust_remote_code=True"
        arguments = f'"{self.repo_id}", revision="{self.revision}"{code_pin}{trust}'
        return f"{auto_class}.from_pretrained({arguments})"

    def format_lines(self) -> list[str]:
        """Return the report as lines of text."""
        width = max(map(len, self.differences))
        return [
            f"verified: {self.repo_id} at {self.revision}",
            f"  {self.num_files} files match their hashes; {self.code_comparison}",
            f"  a new process with an empty cache, without modeling_vitcls, compared with {self.reference}:",
            *(
                f"    {way:{width}}  {self.classes.get(way, ''):30}  largest difference {difference:.1e}"
                for way, difference in self.differences.items()
            ),
            f"  limit {TOLERANCE:g}; " + ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            "load it:" if self.is_native else PIN_ADVICE,
            f"  {self.build_load_line()}",
        ]


def verify(
    repo_id: str, revision: str = "main", folder: Path | None = None, with_optimizer: bool = False
) -> VerificationReport:
    """Download, load and compare a published model. Its code runs in a separate process.

    Args:
        repo_id: `namespace/name`.
        revision: Commit hash, branch or tag.
        folder: The model that was pushed. Default: the files of the commit, loaded with this package's code.
        with_optimizer: Whether the newest checkpoint in `folder` must be published. A published checkpoint is always
            compared.

    Raises:
        NotVerified: If files are damaged or differ from `folder`, or if the model does not load without this package
            or has other outputs. The message is one line.
        ValueError: If the repository or the revision does not exist.
        OSError: If the Hub does not respond.
    """
    check_is_online()
    model = resolve_commit(repo_id, revision)
    with tempfile.TemporaryDirectory(prefix="vitcls-verify-") as scratch_name, silence_transformers():
        scratch = Path(scratch_name)
        files = scratch / "files"
        num_files = download_files(model, files)
        if folder is not None:
            check_same_files(repo_id, files, folder, with_optimizer)
        code = resolve_code_commit(model, files)
        is_native = is_native_model(files)
        code_folder = files if code is None else download_code(code, scratch / "code")
        code_comparison = "no code" if is_native else compare_code(code_folder).describe()
        reference: Any = PackageLoader(folder or files)
        if is_native:
            reference = HubLoader(str(folder or files), trust_remote_code=False)
        expected, _ = collect_outputs(reference)
        outputs, report = run_verification(model, code, scratch, trust_remote_code=not is_native)
    check_script_report(model, code, report, "transformers.models." if is_native else "transformers_modules.")
    return VerificationReport(
        repo_id=repo_id,
        revision=model.commit,
        reference=f"{folder}" if folder else f"the same files with modeling_vitcls {__version__}",
        num_files=num_files,
        classes={name: facts["class"] for name, facts in report["models"].items()}
        | {f"AutoImageProcessor, {backend}": name for backend, name in report["processors"].items()},
        differences=compare_outputs(repo_id, outputs, expected),
        versions=get_versions("huggingface_hub"),
        code_comparison=code_comparison,
        code_revision=code.commit if code else None,
        is_native=is_native,
    )


def verify_push(pushed: PushResult, folder: Path) -> VerificationReport:
    """Verify the push of `folder`.

    Raises:
        PushedButNotVerified: If the verification fails. The message is one line with the reason, the locations of the
            model, and the command that repeats the verification.
    """
    try:
        return verify(pushed.repo_id, pushed.commit, folder, pushed.with_optimizer)
    except (ValueError, OSError) as error:
        command = f"python scripts/push_to_hub.py --verify-only {pushed.repo_id} --revision {pushed.commit}"
        raise PushedButNotVerified(
            f"the model was pushed, but not verified: {error}. It is complete in {folder}, and published as "
            f"{pushed.url}; verify it again with: {command}"
        ) from error


# Files ---------------------------------------------------------------------------------------------------------------


def download_files(model: HubCommit, target: Path) -> int:
    """Download the files of a model and return their number. Raises NotVerified if a file has a wrong hash."""
    repo_id, commit = model.repo_id, model.commit
    try:
        with set_hub_timeout(TIMEOUT):
            retry(
                lambda: HfApi().snapshot_download(
                    repo_id,
                    revision=commit,
                    local_dir=target,
                    allow_patterns=[*MODEL_PATTERNS, *EXTRA_PATTERNS, *CHECKPOINT_PATTERNS, "*.py"],
                ),
                f"downloading {repo_id}",
            )
            check = HfApi().verify_repo_checksums(repo_id, revision=commit, local_dir=target)
    except HUB_ERRORS as error:
        raise OSError(f"cannot download {repo_id}: {format_hub_error(error)}") from error
    if check.mismatches:
        names = ", ".join(mismatch["path"] for mismatch in check.mismatches)
        raise NotVerified(
            f"{repo_id} at {commit} is damaged on the Hub: {names} differs from the uploaded file. Delete it there "
            "and push again"
        )
    try:
        check_is_model(target)
    except ValueError:
        raise NotVerified(f"{repo_id} at {commit} does not contain a vitcls model") from None
    return check.checked_count


def download_code(code: HubCommit, target: Path) -> Path:
    """Download the Python files of a repository and return their folder. Raises OSError if the download fails."""
    try:
        with set_hub_timeout(TIMEOUT):
            retry(
                lambda: HfApi().snapshot_download(
                    code.repo_id, revision=code.commit, local_dir=target, allow_patterns="*.py"
                ),
                f"downloading {code.repo_id}",
            )
    except HUB_ERRORS as error:
        raise OSError(f"cannot download {code.repo_id}: {format_hub_error(error)}") from error
    return target


def check_same_files(repo_id: str, published: Path, folder: Path, with_optimizer: bool) -> None:
    """Raise NotVerified unless each published file equals the file in the folder."""
    expected = collect_model_files(folder, repo_id)
    names = (file.relative_to(published).as_posix() for file in published.rglob("*"))
    checkpoints = {name for name in names if is_match(name, CHECKPOINT_PATTERNS)}
    if with_optimizer or checkpoints:
        expected |= collect_checkpoint_files(folder)
    if unexpected := sorted(checkpoints - expected.keys()):
        raise NotVerified(
            f"{repo_id} contains {unexpected[0]}, which is not the newest checkpoint in {folder}. Push it again"
        )
    for name, content in expected.items():
        file = published / name
        if not file.is_file():
            raise NotVerified(f"{repo_id} lacks {name}, which is in {folder}. Push it again")
        is_same = (
            file.read_bytes() == content if isinstance(content, bytes) else filecmp.cmp(file, content, shallow=False)
        )
        if not is_same:
            raise NotVerified(
                f"{name} of {repo_id} differs from the file in {folder}, which has changed. Push it again"
            )


# Outputs -------------------------------------------------------------------------------------------------------------


def check_script_report(model: HubCommit, code: HubCommit | None, report: dict[str, Any], modules: str) -> None:
    """Raise NotVerified unless the process loaded only classes of `modules` at these commits, and all weights."""
    repo_id, commit = model.repo_id, model.commit
    if report["has_package"]:
        raise NotVerified("the new process imported modeling_vitcls, so it did not test the published code")
    if report["commits"] != [commit]:
        raise NotVerified(f"the new process loaded {', '.join(report['commits'])}, not only {repo_id} at {commit}")
    if code is not None and report["code_commits"] != [code.commit]:
        raise NotVerified(
            f"the new process loaded code from {', '.join(report['code_commits'])}, not only {code.repo_id} at "
            f"{code.commit}"
        )
    for auto_class, facts in report["models"].items():
        if not facts["module"].startswith(modules):
            raise NotVerified(f"{auto_class} loaded {facts['class']} from {facts['module']}, not from {repo_id}")
        if facts["missing"]:
            raise NotVerified(f"{repo_id} at {commit} lacks the weights {', '.join(facts['missing'])}")


def compare_outputs(repo_id: str, outputs: Outputs, expected: Outputs) -> dict[str, float]:
    """Return the maximum absolute difference for each way to load. Raises NotVerified if it exceeds the tolerance."""
    if outputs.keys() != expected.keys():
        names = ", ".join(sorted(outputs.keys() ^ expected.keys()))
        raise NotVerified(f"the outputs of {repo_id} have other tensors than expected: {names}")
    differences: dict[str, float] = {}
    for name, value in expected.items():
        if outputs[name].shape != value.shape:
            raise NotVerified(
                f"the outputs of {repo_id} have another shape than expected: {name} has {list(outputs[name].shape)}, "
                f"not {list(value.shape)}"
            )
        difference = compute_max_abs(outputs[name].double() - value.double())
        limit = TOLERANCE * max(1.0, compute_max_abs(value.double()))
        if not difference <= limit:  # also true for NaN
            raise NotVerified(
                f"the outputs of {repo_id} differ from the reference: {name} by {difference:.2g}; the limit is "
                f"{limit:.2g}"
            )
        way = name.partition("/")[0]
        differences[way] = max(differences.get(way, 0.0), difference)
    return differences


def compute_max_abs(values: torch.Tensor) -> float:
    """Return the maximum absolute value; 0 for an empty tensor, NaN if any value is NaN."""
    return values.abs().max().item() if values.numel() else 0.0


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Turn off transformers' progress bars and warnings, such as the warning that AutoModel drops the classifier."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()

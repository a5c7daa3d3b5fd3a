"""Verify that a published model loads without this package and that its outputs match a reference.

    report = verify("someone/model", "0123abc...", folder)
    print("\\n".join(report.format_lines()))

1. The model's files are downloaded. The hash of each file must match the hash on the Hub, and the contents must equal
   those that a push of `folder` publishes.
2. A new process, with an empty cache and without this package, loads the commit with the Auto classes and the pipeline
   (verification_script.py). Because the process may run code by an unknown author, it receives only a few
   environment variables, and it receives the user's token only if the repository is private or gated. The process is
   not sandboxed: it runs as the current user and can read the user's files.
3. The outputs of the new process for fixed inputs must match the outputs of the model in `folder`, loaded with this
   package (verification_reference.py). No published code runs in the calling process.
"""

import filecmp
import json
import os
import site
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, get_token
from safetensors.torch import load_file

from ..hub.connection import (
    HUB_ERRORS,
    SHORT_RETRY_WAITS,
    check_is_online,
    format_hub_error,
    retry,
    set_hub_timeout,
    silence_transformers,
)
from ..hub.revisions import HubCommit, download_commit, resolve_code_commit, resolve_commit
from ..system import get_versions
from ..version import __version__
from . import verification_script
from .code_files import describe_code_differences
from .manifest import (
    CHECKPOINT_PATTERNS,
    DOCUMENTATION_PATTERNS,
    MODEL_PATTERNS,
    check_is_model,
    collect_checkpoint_files,
    collect_model_files,
    is_match,
    is_native_model,
)
from .publish import PushResult
from .verification_reference import PackageLoader
from .verification_script import HubLoader, Outputs, collect_outputs


# Maximum absolute difference from a reference tensor in float32, relative to the largest absolute value of the
# reference tensor if this value exceeds 1.
TOLERANCE = 1e-6
TIMEOUT = 60.0  # maximum time without a response from the Hub, in seconds
PIN_ADVICE = "load the model at a pinned commit, because loading runs the code in the repository:"

# Environment variables (in upper or lower case) that the new process inherits: locations of programs and libraries,
# access to the Hub, and settings that affect numerical results.
INHERITED_VARIABLES = frozenset(
    (
        "PATH PYTHONPATH LD_LIBRARY_PATH LD_PRELOAD DYLD_LIBRARY_PATH SYSTEMROOT TMPDIR LANG LC_ALL LC_CTYPE "
        "HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE "
        "HF_ENDPOINT HF_HUB_DISABLE_XET HF_HUB_DOWNLOAD_TIMEOUT HF_HUB_ETAG_TIMEOUT CUDA_VISIBLE_DEVICES "
        "ATEN_CPU_CAPABILITY"
    ).split()
)
INHERITED_PREFIXES = ("OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "OPENBLAS_")


class VerificationError(ValueError):
    """Raised if a published model does not load or differs from the reference. The message is a single line."""


@dataclass(frozen=True)
class VerificationReport:
    """The result of a verification."""

    repo_id: str  # `namespace/name`
    revision: str  # commit hash, 40 hexadecimal digits
    reference: str  # description of the reference model
    num_files: int  # number of files whose hashes were checked
    class_names: dict[str, str]  # Auto class, such as "AutoModel" -> name of the loaded class
    differences: dict[str, float]  # Auto class or "pipeline" -> maximum difference between the outputs
    versions: dict[str, str]  # library -> version
    code_comparison: str  # one line that compares the published code with the code of this package
    code_revision: str | None = None  # commit of the code if another repository contains the code
    is_native: bool = False  # whether the model classes are part of transformers, not of the repository

    def format_loading_code(self) -> str:
        """Return the line of code that loads the verified commit."""
        auto_class = next(name for name in reversed(self.class_names) if not name.startswith("AutoImageProcessor"))
        code_pin = f', code_revision="{self.code_revision}"' if self.code_revision else ""
        trust_argument = "" if self.is_native else ", trust_remote_code=True"
        arguments_text = f'"{self.repo_id}", revision="{self.revision}"{code_pin}{trust_argument}'
        return f"{auto_class}.from_pretrained({arguments_text})"

    def format_lines(self) -> list[str]:
        """Return the report as lines of text."""
        width = max(map(len, self.differences))
        return [
            f"verified: {self.repo_id} at {self.revision}",
            f"  {self.num_files} files match their hashes; {self.code_comparison}",
            f"  outputs of a new process (empty cache, no modeling_vitcls), compared with {self.reference}:",
            *(
                f"    {name:{width}}  {self.class_names.get(name, ''):30}  largest difference {difference:.1e}"
                for name, difference in self.differences.items()
            ),
            f"  limit {TOLERANCE:g}; " + ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            "load the model:" if self.is_native else PIN_ADVICE,
            f"  {self.format_loading_code()}",
        ]


def verify(
    repo_id: str, revision: str = "main", folder: Path | None = None, with_optimizer: bool = False
) -> VerificationReport:
    """Download a published model, run it in a new process, and compare its outputs with a reference.

    Args:
        repo_id: `namespace/name`.
        revision: Commit hash, branch or tag.
        folder: Local folder of the pushed model, which is loaded as the reference. By default, the reference is loaded
            from the downloaded files, with the code of this package.
        with_optimizer: Whether the repository must contain the newest checkpoint in `folder`. A checkpoint in
            the repository is always compared with the newest checkpoint in `folder`.

    Raises:
        VerificationError: If files are damaged or differ from those in `folder`, if the model does not load without
            this package, or if the outputs of the model differ from the reference. The message is a single line.
        ValueError: If the repository or the revision does not exist.
        OSError: If the Hub does not respond.
    """
    check_is_online()
    model_commit = resolve_commit(repo_id, revision)
    with tempfile.TemporaryDirectory(prefix="vitcls-verify-") as temporary_path, silence_transformers():
        temporary_folder = Path(temporary_path)
        download_folder = temporary_folder / "files"
        num_files = download_files(model_commit, download_folder)
        if folder is not None:
            check_published_files(repo_id, download_folder, folder, with_optimizer)
        code_commit = resolve_code_commit(model_commit, download_folder)
        is_native = is_native_model(download_folder)
        code_folder = download_folder
        if code_commit is not None:
            code_folder = download_commit(code_commit, ["*.py"], temporary_folder / "code")
        code_comparison = "no code" if is_native else describe_code_differences(code_folder)
        reference_loader: Any = PackageLoader(folder or download_folder)
        if is_native:
            reference_loader = HubLoader(str(folder or download_folder), trust_remote_code=False)
        expected_outputs, _ = collect_outputs(reference_loader)
        outputs, report = run_verification(
            model_commit, code_commit, temporary_folder, trust_remote_code=not is_native
        )
    module_prefix = "transformers.models." if is_native else "transformers_modules."
    check_script_report(model_commit, code_commit, report, module_prefix)
    return VerificationReport(
        repo_id=repo_id,
        revision=model_commit.sha,
        reference=f"{folder}" if folder else f"the same files with modeling_vitcls {__version__}",
        num_files=num_files,
        class_names={name: model_report["class"] for name, model_report in report["models"].items()}
        | {f"AutoImageProcessor, {backend}": name for backend, name in report["processors"].items()},
        differences=compare_outputs(repo_id, outputs, expected_outputs),
        versions=get_versions("huggingface_hub"),
        code_comparison=code_comparison,
        code_revision=code_commit.sha if code_commit else None,
        is_native=is_native,
    )


def verify_push(push_result: PushResult, folder: Path) -> VerificationReport:
    """Verify the model that was pushed from `folder`. Raise OSError if the verification fails.

    The message is a single line and ends with the command that repeats the verification.
    """
    try:
        return verify(push_result.repo_id, push_result.commit, folder, push_result.with_optimizer)
    except (ValueError, OSError) as error:
        command = f"vitcls push --verify-only {push_result.repo_id} --revision {push_result.commit}"
        raise OSError(
            f"the model was pushed, but not verified: {error}. The model is saved in {folder} and published at "
            f"{push_result.url}. Repeat the verification with: {command}"
        ) from error


# Files ---------------------------------------------------------------------------------------------------------------


def download_files(model_commit: HubCommit, target: Path) -> int:
    """Download the files of a model and return the number of files. Raise VerificationError if a hash is wrong."""
    repo_id, commit = model_commit.repo_id, model_commit.sha
    download_commit(model_commit, (*MODEL_PATTERNS, *DOCUMENTATION_PATTERNS, *CHECKPOINT_PATTERNS, "*.py"), target)
    try:
        with set_hub_timeout(TIMEOUT):
            checksum_report = HfApi().verify_repo_checksums(repo_id, revision=commit, local_dir=target)
    except HUB_ERRORS as error:
        raise OSError(f"cannot download {repo_id}: {format_hub_error(error)}") from error
    if checksum_report.mismatches:
        names = ", ".join(mismatch["path"] for mismatch in checksum_report.mismatches)
        raise VerificationError(
            f"{repo_id} at {commit} is damaged on the Hub: the hash of {names} does not match. Delete {names} "
            "on the Hub and push the model again"
        )
    try:
        check_is_model(target)
    except ValueError:
        raise VerificationError(
            f"{repo_id} at {commit} does not contain a vitcls model. Check the id and the revision"
        ) from None
    return checksum_report.checked_count


def check_published_files(repo_id: str, published_folder: Path, folder: Path, with_optimizer: bool) -> None:
    """Raise VerificationError unless the published files match the files that a push of `folder` would publish."""
    expected_files = collect_model_files(folder, repo_id)
    published_names = (file.relative_to(published_folder).as_posix() for file in published_folder.rglob("*"))
    checkpoint_files = {name for name in published_names if is_match(name, CHECKPOINT_PATTERNS)}
    if with_optimizer or checkpoint_files:
        expected_files |= collect_checkpoint_files(folder)
    if unexpected_files := sorted(checkpoint_files - expected_files.keys()):
        raise VerificationError(
            f"{repo_id} contains {unexpected_files[0]}, which is not a file of the newest checkpoint in "
            f"{folder}. Push {folder} again"
        )
    for name, content in expected_files.items():
        file = published_folder / name
        if not file.is_file():
            raise VerificationError(f"{repo_id} lacks {name}, which is in {folder}. Push {folder} again")
        is_unchanged = (
            file.read_bytes() == content if isinstance(content, bytes) else filecmp.cmp(file, content, shallow=False)
        )
        if not is_unchanged:
            raise VerificationError(f"{name} in {repo_id} differs from the file in {folder}. Push {folder} again")


# Process -------------------------------------------------------------------------------------------------------------


def run_verification(
    model_commit: HubCommit, code_commit: HubCommit | None, temporary_folder: Path, trust_remote_code: bool = True
) -> tuple[Outputs, dict[str, Any]]:
    """Run verification_script.py, and return the outputs and the report. Retry once after a possible network error."""
    try:
        return retry(
            lambda: run_script(model_commit, code_commit, temporary_folder, trust_remote_code),
            f"loading {model_commit.repo_id}",
            waits=SHORT_RETRY_WAITS[:1],
        )
    except RuntimeError as error:
        raise VerificationError(str(error)) from None


def run_script(
    model_commit: HubCommit, code_commit: HubCommit | None, temporary_folder: Path, trust_remote_code: bool
) -> tuple[Outputs, dict[str, Any]]:
    """Run verification_script.py once in a new process, and return the outputs and the report.

    Raise RuntimeError if the process fails and a retry may succeed, and VerificationError if a retry would fail again.
    """
    error_prefix = f"a new process cannot load {model_commit.repo_id} at {model_commit.sha}"
    with tempfile.TemporaryDirectory(dir=temporary_folder) as home_folder:
        target = Path(home_folder, "outputs")
        target.mkdir()
        request = {
            "repo_id": model_commit.repo_id,
            "revision": model_commit.sha,
            "code_repo_id": code_commit.repo_id if code_commit else None,
            "code_revision": code_commit.sha if code_commit else None,
            "trust_remote_code": trust_remote_code,
            "target": str(target),
            "num_threads": torch.get_num_threads(),
        }
        request_file = Path(home_folder, "request.json")
        request_file.write_text(json.dumps(request), encoding="utf-8")
        needs_token = model_commit.needs_token or (code_commit is not None and code_commit.needs_token)
        process = subprocess.run(
            [sys.executable, "-P", verification_script.__file__, str(request_file)],
            cwd=home_folder,
            env=build_clean_environment(home_folder, needs_token),
            capture_output=True,
            text=True,
            check=False,
        )
        if not (target / "report.json").is_file():
            lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
            raise RuntimeError(f"{error_prefix}: {lines[-1]}")
        report = json.loads((target / "report.json").read_text(encoding="utf-8"))
        if "error" in report:
            error_class = RuntimeError if report["can_retry"] else VerificationError
            raise error_class(f"{error_prefix}: {report['error']}")
        return load_file(target / "outputs.safetensors"), report


def build_clean_environment(home_folder: str, needs_token: bool) -> dict[str, str]:
    """Return a minimal environment with the cache in `home_folder` and, if `needs_token`, the user's token."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name.upper() in INHERITED_VARIABLES or name.upper().startswith(INHERITED_PREFIXES)
    }
    # PYTHONUSERBASE is the location of packages that were installed with `pip install --user`.
    environment |= {"HOME": home_folder, "HF_HOME": home_folder, "PYTHONUSERBASE": site.getuserbase()}
    token = get_token() if needs_token else None
    return environment | ({"HF_TOKEN": token} if token else {})


# Outputs -------------------------------------------------------------------------------------------------------------


def check_script_report(
    model_commit: HubCommit, code_commit: HubCommit | None, report: dict[str, Any], module_prefix: str
) -> None:
    """Raise VerificationError unless the process loaded all weights and only the expected commits and modules."""
    repo_id, commit = model_commit.repo_id, model_commit.sha
    if report["has_package"]:
        raise VerificationError("the new process imported modeling_vitcls, so it did not test the published code")
    if report["commits"] != [commit]:
        raise VerificationError(
            f"the new process must load only {repo_id} at {commit}, but it loaded "
            f"{', '.join(report['commits']) or 'no commit'}"
        )
    if code_commit is not None and report["code_commits"] != [code_commit.sha]:
        raise VerificationError(
            f"the new process must load code only from {code_commit.repo_id} at {code_commit.sha}, but it loaded code "
            f"from {', '.join(report['code_commits']) or 'no commit'}"
        )
    for auto_class, model_report in report["models"].items():
        if not model_report["module"].startswith(module_prefix):
            raise VerificationError(
                f"{auto_class} loaded {model_report['class']} from {model_report['module']}, not from {repo_id}"
            )
        if model_report["missing"]:
            raise VerificationError(f"{repo_id} at {commit} lacks the weights {', '.join(model_report['missing'])}")


def compare_outputs(repo_id: str, outputs: Outputs, expected_outputs: Outputs) -> dict[str, float]:
    """Return the maximum absolute difference between the outputs for each Auto class and for the pipeline. Raise
    VerificationError if a difference exceeds the tolerance."""
    if outputs.keys() != expected_outputs.keys():
        names = ", ".join(sorted(outputs.keys() ^ expected_outputs.keys()))
        raise VerificationError(
            f"the outputs of {repo_id} do not match the reference; missing or unexpected tensors: {names}"
        )
    differences: dict[str, float] = {}
    for name, expected_output in expected_outputs.items():
        if outputs[name].shape != expected_output.shape:
            raise VerificationError(
                f"the outputs of {repo_id} have an unexpected shape: {name} has {list(outputs[name].shape)}, "
                f"not {list(expected_output.shape)}"
            )
        difference = compute_max_abs(outputs[name].double() - expected_output.double())
        limit = TOLERANCE * max(1.0, compute_max_abs(expected_output.double()))
        if not difference <= limit:  # NaN also raises the error
            raise VerificationError(
                f"the outputs of {repo_id} differ from the reference: {name} by {difference:.2g}; the limit is "
                f"{limit:.2g}"
            )
        loader_name = name.partition("/")[0]
        differences[loader_name] = max(differences.get(loader_name, 0.0), difference)
    return differences


def compute_max_abs(tensor: torch.Tensor) -> float:
    """Return the maximum absolute value of a tensor: 0 if the tensor is empty, NaN if it contains NaN."""
    return tensor.abs().max().item() if tensor.numel() else 0.0

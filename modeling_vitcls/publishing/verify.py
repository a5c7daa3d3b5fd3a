"""Verify that a published model loads without this package and that its outputs match a reference.

    print(verify("someone/model", "0123abc...", ModelFolder(Path("runs/mine"))))

1. The files on the Hub must have the hashes of the files that a push of `folder` publishes or,
   without `folder`, of the downloaded files.
2. A new process, with an empty cache and without this package, loads the commit with the Auto
   classes (verification_script.py). Because the process may run code by an unknown author, it
   receives only a few environment variables, and it receives the user's token only if the
   repository is private or gated. The process is not sandboxed: it runs as the current user and can
   read the user's files.
3. The outputs of the new process for fixed inputs must match the outputs of the model in `folder`,
   loaded with this package. No published code runs in the calling process.

What is not proven:
- That the model is good: its results, the numbers on its card and the card itself are not compared.
- That its code is harmless: equal hashes show that nothing was damaged, not who wrote it.
- Anything but this machine: other versions of Python, torch and transformers, GPUs, half precision.
- Anything but one forward pass of one or two images of random pixels at the native size: not
  training, other sizes, methods such as `adapt`, or exported files, of which only the hashes are
  compared.
- Without `folder`, that the weights are those that you meant: the reference is read from the same
  files.
"""

import json
import os
import site
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, RepoFile, get_token
from huggingface_hub.utils.sha import git_hash
from safetensors.torch import load_file

from ..hub.connection import (
    HUB_ERRORS,
    check_is_online,
    format_hub_error,
    set_hub_timeout,
    silence_transformers,
)
from ..hub.loading import HubCommit, download_files, resolve_commit
from ..hub.model_files import CARD_FILE, CODE_PATTERN, MODEL_PATTERNS, PARITY_REPORT_FILE
from ..hub.model_folder import ModelFolder
from ..model.modeling_vitcls import ViTCLSBackbone
from ..runtime.errors import format_error
from ..runtime.system import get_versions
from ..version import __version__
from . import verification_script
from .published_files import PACKAGE_FOLDER, collect_files
from .push import TIMEOUT, push_folder
from .verification_script import Outputs, collect_outputs


# Maximum absolute difference from a reference tensor in float32, relative to the largest absolute
# value of the reference tensor if this value exceeds 1.
TOLERANCE = 1e-6
VERIFIED_PATTERNS = (*MODEL_PATTERNS, PARITY_REPORT_FILE, CARD_FILE, "*.py")
# Environment variables (in upper or lower case) that the new process inherits: locations of
# programs and libraries, access to the Hub, and settings that affect numerical results.
INHERITED_VARIABLES = frozenset(
    (
        "PATH PYTHONPATH LD_LIBRARY_PATH LD_PRELOAD DYLD_LIBRARY_PATH SYSTEMROOT TMPDIR LANG "
        "LC_ALL LC_CTYPE HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY SSL_CERT_FILE SSL_CERT_DIR "
        "REQUESTS_CA_BUNDLE CURL_CA_BUNDLE HF_ENDPOINT HF_HUB_DISABLE_XET HF_HUB_DOWNLOAD_TIMEOUT "
        "HF_HUB_ETAG_TIMEOUT CUDA_VISIBLE_DEVICES ATEN_CPU_CAPABILITY"
    ).split()
)
INHERITED_PREFIXES = ("OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "OPENBLAS_")


def verify(repo_id: str, revision: str = "main", folder: ModelFolder | None = None) -> str:
    """Run a published model in a new process, and compare its outputs with a reference.

    Args:
        repo_id: `namespace/name`.
        revision: Commit hash, branch or tag.
        folder: Local folder of the pushed model, which is loaded as the reference. By default, the
            reference is loaded from the downloaded files, with the code of this package.

    Returns:
        The report as lines of text.

    Raises:
        ValueError: If files are damaged or differ from those in `folder`, if the model does
            not load without this package, or if the outputs of the model differ from the reference.
            The message is a single line.
        OSError: If the repository or the revision does not exist, or if the Hub does not respond.
    """
    check_is_online()
    commit = resolve_commit(repo_id, revision)
    if folder is not None:
        return verify_folder(commit, folder)
    with tempfile.TemporaryDirectory(prefix="vitcls-verify-") as temporary_path:
        path = download_files(repo_id, commit.sha, VERIFIED_PATTERNS, folder=Path(temporary_path))
        names = {file.relative_to(path): file for file in path.rglob("*") if file.is_file()}
        # huggingface_hub writes files about the download, too.
        downloaded: dict[str, Path | bytes] = {
            name.as_posix(): names[name] for name in names if name.parts[0] != ".cache"
        }
        check_hashes(commit, downloaded, "damaged on the Hub", "Push the model again")
        reference = ModelFolder(path, f"{repo_id} at {commit.sha}")
        reference_name = f"the same files with modeling_vitcls {__version__}"
        return compare_with_reference(commit, downloaded, reference, reference_name)


def verify_folder(commit: HubCommit, folder: ModelFolder) -> str:
    """Compare a commit with the folder from which it was pushed; return the report."""
    files = collect_files(folder, commit.repo_id)
    # The card depends on flags of the push, such as the license, which are not known here.
    del files[CARD_FILE]
    problem = f"missing or different from {folder.path}"
    check_hashes(commit, files, problem, f"Push {folder.path} again")
    return compare_with_reference(commit, files, folder, str(folder.path))


def compare_with_reference(
    commit: HubCommit, files: Mapping[str, Path | bytes], reference: ModelFolder, name: str
) -> str:
    """Compare the outputs of a commit, whose files have the right hashes, with a reference.

    Args:
        commit: The commit, which a new process loads.
        files: The files of the commit.
        reference: The model whose outputs are right.
        name: The name of the reference in the report.
    """
    trust_remote_code = not reference.is_native
    with silence_transformers():
        # AutoBackbone queries the Hub even for a local folder.
        expected_outputs, _ = collect_outputs(
            str(reference.path), {"trust_remote_code": False}, ViTCLSBackbone
        )
    # The reference is computed by this package's code, so a reader should know whether the
    # published code is the same.
    code = compare_code(files) if trust_remote_code else "no code"
    # After the hashes: if files are damaged, their code is not run.
    outputs, report = run_verification_script(commit, trust_remote_code)

    if report["missing"]:
        raise ValueError(
            f"{commit.repo_id} at {commit.sha} lacks the weights {', '.join(report['missing'])}"
        )
    compare_outputs(commit.repo_id, outputs, expected_outputs)

    *_, auto_class = report["classes"]
    trust = ", trust_remote_code=True" if trust_remote_code else ""
    reason = " at this commit, because loading runs the code in the repository" if trust else ""
    classes = [f"{each} ({loaded})" for each, loaded in report["classes"].items()]
    versions = [f"{each} {version}" for each, version in get_versions("huggingface_hub").items()]
    return "\n".join(
        [
            f"verified: {commit.repo_id} at {commit.sha}",
            f"  {len(files)} files match their hashes; {code}",
            f"  outputs in a new process (empty cache, no modeling_vitcls) equal those of {name}",
            f"    {', '.join(classes)}",
            f"    float32, limit {TOLERANCE:g}; {', '.join(versions)}",
            f"load the model{reason}:",
            f'  {auto_class}.from_pretrained("{commit.repo_id}", revision="{commit.sha}"{trust})',
        ]
    )


def push_and_verify(
    folder: ModelFolder, repo_id: str, verifies: bool = True, **settings: Any
) -> None:
    """Push a folder, verify the commit, and print both results.

    Args:
        folder: The folder.
        repo_id: The repository.
        verifies: Whether to verify the commit.
        settings: Other arguments of `push_folder`.

    Raises:
        OSError: If the push or the verification fails. The message is a single line and ends with
            the command that repeats it.
    """
    pushed = push_folder(folder, repo_id, **settings)
    print(f"pushed    {pushed.url} ({'private' if pushed.is_private else 'public'})", flush=True)
    # Adapters and exported files do not load without other files.
    if not verifies or not folder.has_weights:
        return
    print("verifying the pushed commit in a new process", flush=True)
    try:
        print(verify_folder(pushed, folder))
    except (ValueError, OSError) as error:
        command = f"vitcls push --verify-only {pushed.repo_id}@{pushed.sha}"
        raise OSError(
            f"the model was pushed, but not verified: {error}. The model is saved in {folder.path} "
            f"and published at {pushed.url}. Repeat the verification with: {command}"
        ) from error


def check_hashes(
    commit: HubCommit, files: Mapping[str, Path | bytes], problem: str, remedy: str
) -> None:
    """Raise ValueError unless files have the hashes of the files on the Hub.

    `problem` is what the other files are, and `remedy` what to do about it.
    """
    try:
        with set_hub_timeout(TIMEOUT):
            tree = HfApi().list_repo_tree(commit.repo_id, revision=commit.sha, recursive=True)
            entries = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    except HUB_ERRORS as error:
        raise OSError(f"cannot check {commit.repo_id}: {format_hub_error(error)}") from error

    names = [
        name
        for name, content in files.items()
        if name not in entries or not has_content(entries[name], content)
    ]
    if names:
        raise ValueError(
            f"files in {commit.repo_id} at {commit.sha} are {problem}: {', '.join(names)}. {remedy}"
        )


def has_content(entry: RepoFile, content: Path | bytes) -> bool:
    """Compare a file on the Hub with a content, by SHA-256 of large files, or Git's hash."""
    if entry.lfs is not None:
        upload = CommitOperationAdd(entry.path, content).upload_info
        return upload.sha256.hex() == entry.lfs.sha256
    return git_hash(read_content(content)) == entry.blob_id


def read_content(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def compare_code(files: Mapping[str, Path | bytes]) -> str:
    """Compare Python files with the code of this package, and return one line."""
    expected = {
        file.name: file.read_bytes() for file in (PACKAGE_FOLDER / "model").glob(CODE_PATTERN)
    }
    found = {name: read_content(files[name]) for name in files if name.endswith(".py")}
    names = [
        name
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    package = f"modeling_vitcls {__version__}"
    return f"code differs from {package}: {', '.join(names)}" if names else f"code of {package}"


def run_verification_script(
    commit: HubCommit, trust_remote_code: bool
) -> tuple[Outputs, dict[str, Any]]:
    """Run verification_script.py once in a new process, and return the outputs and the report.

    Raise ValueError if the process fails.
    """
    error_prefix = f"a new process cannot load {commit.repo_id} at {commit.sha}"
    with tempfile.TemporaryDirectory(prefix="vitcls-verify-") as home_folder:
        target = Path(home_folder, "outputs")
        target.mkdir()

        # A process, because a module that was imported once cannot be taken back: this one already
        # has modeling_vitcls, its registered classes and the caches of transformers.
        process = subprocess.run(
            [
                sys.executable,
                "-P",
                verification_script.__file__,
                commit.repo_id,
                commit.sha,
                str(trust_remote_code),
                str(torch.get_num_threads()),
                str(target),
            ],
            cwd=home_folder,
            env=build_clean_environment(home_folder, commit.needs_token),
            capture_output=True,
            text=True,
            check=False,
        )

        if not (target / "report.json").is_file():
            last_line = (process.stderr.strip().splitlines() or [""])[-1]
            raise ValueError(
                f"{error_prefix}: exit status {process.returncode}. {last_line}".rstrip(". ")
            )
        report = json.loads((target / "report.json").read_text(encoding="utf-8"))
        if "error" in report:
            raise ValueError(f"{error_prefix}: {report['error']}")
        return load_file(target / "outputs.safetensors"), report


def build_clean_environment(home_folder: str, needs_token: bool) -> dict[str, str]:
    """Build a minimal environment with the cache in `home_folder`.

    It contains the user's token if `needs_token` is True.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name.upper() in INHERITED_VARIABLES or name.upper().startswith(INHERITED_PREFIXES)
    }
    # PYTHONUSERBASE is the location of packages that were installed with `pip install --user`.
    environment |= {
        "HOME": home_folder,
        "HF_HOME": home_folder,
        "PYTHONUSERBASE": site.getuserbase(),
    }
    token = get_token() if needs_token else None
    return environment | ({"HF_TOKEN": token} if token else {})


def compare_outputs(repo_id: str, outputs: Outputs, expected_outputs: Outputs) -> None:
    """Raise ValueError unless the outputs are those of the reference, up to the tolerance."""
    if outputs.keys() != expected_outputs.keys():
        raise ValueError(f"the outputs of {repo_id} and the reference differ in their names")
    for name, expected in expected_outputs.items():
        limit = TOLERANCE * max(1.0, expected.abs().max().item())
        try:
            # Also of shapes; NaN equals nothing
            torch.testing.assert_close(outputs[name], expected, rtol=0, atol=limit)
        except AssertionError as error:
            raise ValueError(
                f"the outputs of {repo_id} differ from the reference: {name}: {format_error(error)}"
            ) from None

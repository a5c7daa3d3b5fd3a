"""Verify that a pushed model loads without this package, with the outputs of the local model.

    print(verify(push_folder(folder, "me/mine"), folder))

1. The files on the Hub must have the hashes of the files that were pushed.
2. A new process, with an empty cache and without this package, loads the commit with the Auto
   classes (verification_script.py). It receives only a few environment variables, and the user's
   token only if the repository is private or gated. The process is not sandboxed: it runs as the
   current user and can read the user's files.
3. The outputs of the new process for fixed inputs must match the outputs of the model in `folder`,
   loaded with this package. No published code runs in the calling process.

What is not proven:
- That the model is good: its results, the numbers on its card and the card itself are not compared.
- That its code is harmless: equal hashes show that nothing was damaged, not who wrote it.
- Anything but this machine: other versions of Python, torch and transformers, GPUs, half precision.
- Anything but one forward pass of one or two images of random pixels at the native size: not
  training, other sizes, methods such as `adapt`, or exported files, of which only the hashes are
  compared.
"""

import json
import os
import site
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, RepoFile, get_token
from huggingface_hub.utils.sha import git_hash
from safetensors.torch import load_file

from ..hub.connection import (
    HUB_ERRORS,
    format_hub_error,
    set_hub_timeout,
    silence_transformers,
)
from ..hub.model_code import describe_code
from ..hub.model_folder import ModelFolder
from ..model.modeling_vitcls import ViTCLSBackbone
from ..runtime.errors import format_error
from ..runtime.system import get_versions
from ..version import __version__
from . import verification_script
from .push import TIMEOUT, PushedCommit, push_folder
from .verification_script import Outputs, collect_outputs


# Maximum absolute difference from a reference tensor in float32, relative to the largest absolute
# value of the reference tensor if this value exceeds 1.
TOLERANCE = 1e-6
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


def push_and_verify(
    folder: ModelFolder, repo_id: str, verifies: bool = True, **settings: Any
) -> PushedCommit:
    """Push a folder, verify the commit, print both results, and return the commit.

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
    if not verifies:
        return pushed
    print("verifying the pushed commit in a new process", flush=True)
    try:
        print(verify(pushed, folder))
    except (ValueError, OSError) as error:
        raise OSError(
            f"the model was pushed to {pushed.url}, but not verified: {error}. {pushed.advice}"
        ) from error
    return pushed


def verify(commit: PushedCommit, folder: ModelFolder) -> str:
    """Run a pushed model in a new process, and compare its outputs with the local model's.

    Args:
        commit: The commit, which the new process loads.
        folder: The folder that was pushed, whose outputs are right.

    Returns:
        The report as lines of text.

    Raises:
        ValueError: If the files on the Hub are not those that were pushed, if the model does not
            load without this package, or if its outputs differ. The message is a single line.
        OSError: If the Hub does not respond.
    """
    check_hashes(commit, folder)
    trust_remote_code = not folder.is_native
    with silence_transformers():
        # AutoBackbone queries the Hub even for a local folder.
        expected_outputs, _ = collect_outputs(
            str(folder.path), folder.auto_class, {"trust_remote_code": False}, ViTCLSBackbone
        )
    # The reference is computed by this package's code, so a reader should know whether the
    # published code is the same.
    own_code = f"code of modeling_vitcls {__version__}"
    code = f"code: {describe_code(folder.other_code)}" if folder.other_code else own_code
    if not any(name.endswith(".py") for name in commit.files):
        code = "code in another repository" if trust_remote_code else "no code"
    outputs, report = run_verification_script(
        commit.repo_id, folder.auto_class, commit.sha, trust_remote_code, commit.needs_token
    )

    if report["missing"]:
        raise ValueError(
            f"{commit.repo_id} at {commit.sha} lacks the weights {', '.join(report['missing'])}"
        )
    compare_outputs(commit.repo_id, outputs, expected_outputs)

    trust = ", trust_remote_code=True" if trust_remote_code else ""
    reason = " at this commit, because loading runs the code in the repository" if trust else ""
    classes = [f"{each} ({loaded})" for each, loaded in report["classes"].items()]
    versions = [f"{each} {version}" for each, version in get_versions("huggingface_hub").items()]
    return "\n".join(
        [
            f"verified: {commit.repo_id} at {commit.sha}",
            f"  {len(commit.files)} files match their hashes; {code}",
            f"  outputs in a new process (empty cache, no modeling_vitcls) equal the outputs of {folder.path}",
            f"    {', '.join(classes)}",
            f"    float32, limit {TOLERANCE:g}; {', '.join(versions)}",
            f"load the model{reason}:",
            f'  {folder.auto_class}.from_pretrained("{commit.repo_id}", revision="{commit.sha}"{trust})',
        ]
    )


def check_hashes(commit: PushedCommit, folder: ModelFolder) -> None:
    """Raise ValueError unless the files on the Hub have the hashes of the pushed files."""
    try:
        with set_hub_timeout(TIMEOUT):
            tree = HfApi().list_repo_tree(commit.repo_id, revision=commit.sha, recursive=True)
            entries = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    except HUB_ERRORS as error:
        raise OSError(f"cannot check {commit.repo_id}: {format_hub_error(error)}") from error

    names = [
        name
        for name, content in commit.files.items()
        if name not in entries or not has_content(entries[name], content)
    ]
    if names:
        raise ValueError(
            f"files in {commit.repo_id} at {commit.sha} are missing or different from "
            f"{folder.path}: {', '.join(names)}. Push {folder.path} again"
        )


def has_content(entry: RepoFile, content: Path | bytes) -> bool:
    """Compare a file on the Hub with a content, by SHA-256 of large files, or Git's hash."""
    if entry.lfs is not None:
        return CommitOperationAdd(entry.path, content).upload_info.sha256.hex() == entry.lfs.sha256
    return git_hash(read_content(content)) == entry.blob_id


def read_content(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def run_verification_script(
    source: str,
    auto_class: str,
    commit: str = "",
    trust_remote_code: bool = True,
    needs_token: bool = False,
) -> tuple[Outputs, dict[str, Any]]:
    """Run verification_script.py once in a new process, and return the outputs and the report.

    The source is the id of a repository with a commit, or a folder. Raise ValueError if the process fails.
    """
    place = f"{source} at {commit}" if commit else source
    error_prefix = f"a new process cannot load {place}"
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
                source,
                commit,
                auto_class,
                str(trust_remote_code),
                str(torch.get_num_threads()),
                str(target),
            ],
            cwd=home_folder,
            env=build_clean_environment(home_folder, needs_token),
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
    """Raise ValueError unless the outputs equal the reference, up to the tolerance."""
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

"""Run verification_script.py in a process with an empty cache, a minimal environment, and a token only if required.

The process may run code of an unknown author. It runs as the current user, who can read the user's files: this is not
a sandbox.
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
from huggingface_hub import get_token
from safetensors.torch import load_file

from . import verification_script
from .connection import SHORT_RETRY_WAITS, retry
from .revisions import HubCommit
from .verification_script import Outputs


# Environment variables that the process keeps, in upper or lower case: locations of programs and libraries, access to
# the Hub, and settings that affect numerical results.
KEPT_VARIABLES = frozenset(
    {
        "PATH",
        "PYTHONPATH",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "DYLD_LIBRARY_PATH",
        "SYSTEMROOT",
        "TMPDIR",
        "LANG",
        "LC_ALL",
        "LC_CTYPE",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "NO_PROXY",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE",
        "HF_ENDPOINT",
        "HF_HUB_DISABLE_XET",
        "HF_HUB_DOWNLOAD_TIMEOUT",
        "HF_HUB_ETAG_TIMEOUT",
        "CUDA_VISIBLE_DEVICES",
        "ATEN_CPU_CAPABILITY",
    }
)
KEPT_PREFIXES = ("OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "OPENBLAS_")


class NotVerified(ValueError):
    """A published model does not load, or differs from its reference. The message is one line."""


def run_verification(
    model: HubCommit, code: HubCommit | None, scratch: Path, trust_remote_code: bool = True
) -> tuple[Outputs, dict[str, Any]]:
    """Return the outputs and the report of verification_script.py, after one retry if the network may have failed.

    Raises:
        NotVerified: If the process fails.
    """
    try:
        return retry(
            lambda: run_script(model, code, scratch, trust_remote_code),
            f"loading {model.repo_id}",
            waits=SHORT_RETRY_WAITS[:1],
        )
    except RuntimeError as error:
        raise NotVerified(str(error)) from None


def run_script(
    model: HubCommit, code: HubCommit | None, scratch: Path, trust_remote_code: bool
) -> tuple[Outputs, dict[str, Any]]:
    """Run the script once in a new process, and return its outputs and its report.

    Raises:
        RuntimeError: If the process fails and a retry may succeed.
        NotVerified: If the process fails for another reason.
    """
    failed = f"a new process cannot load {model.repo_id} at {model.commit}"
    with tempfile.TemporaryDirectory(dir=scratch) as home:
        target = Path(home, "outputs")
        target.mkdir()
        request = {
            "repo_id": model.repo_id,
            "revision": model.commit,
            "code_repo_id": code.repo_id if code else None,
            "code_revision": code.commit if code else None,
            "trust_remote_code": trust_remote_code,
            "target": str(target),
            "num_threads": torch.get_num_threads(),
        }
        request_file = Path(home, "request.json")
        request_file.write_text(json.dumps(request), encoding="utf-8")
        needs_token = model.needs_token or (code is not None and code.needs_token)
        process = subprocess.run(
            [sys.executable, "-P", verification_script.__file__, str(request_file)],
            cwd=home,
            env=build_clean_environment(home, needs_token),
            capture_output=True,
            text=True,
            check=False,
        )
        if not (target / "report.json").is_file():
            lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
            raise RuntimeError(f"{failed}: {lines[-1]}")
        report = json.loads((target / "report.json").read_text(encoding="utf-8"))
        if "error" in report:
            error_class = RuntimeError if report["may_pass"] else NotVerified
            raise error_class(f"{failed}: {report['error']}")
        return load_file(target / "outputs.safetensors"), report


def build_clean_environment(home: str, needs_token: bool) -> dict[str, str]:
    """Return a minimal environment with an empty cache.

    Args:
        home: Home folder of the process, which also contains its cache.
        needs_token: Whether loading the model requires the user's token.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name.upper() in KEPT_VARIABLES or name.upper().startswith(KEPT_PREFIXES)
    }
    # PYTHONUSERBASE: packages installed with `pip install --user`.
    environment |= {"HOME": home, "HF_HOME": home, "PYTHONUSERBASE": site.getuserbase()}
    token = get_token() if needs_token else None
    return environment | ({"HF_TOKEN": token} if token else {})

"""The process that verification_script.py runs in: an empty cache, a bare environment, and no token that it does not
need.

What runs there may be a stranger's code. It runs as the user, who can read his own files: this is no sandbox.
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
from .connection import SHORT_WAITS, tried_again
from .revisions import Published
from .verification_script import Answers


# All that the fresh process is told of the environment: where programs and libraries are, how to reach the Hub, and
# what decides about the bits of numbers. In upper or lower case.
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
    """A published model that is not what it should be, or does not load. The message is one line."""


def ask_a_fresh_process(model: Published, code: Published | None, scratch: Path) -> tuple[Answers, dict[str, Any]]:
    """What verification_script.py writes down. Raises NotVerified where it fails, twice if that may be the network."""
    try:
        return tried_again(
            lambda: run_clean_process(model, code, scratch), f"loading {model.repo_id}", waits=SHORT_WAITS[:1]
        )
    except RuntimeError as error:
        raise NotVerified(str(error)) from None


def run_clean_process(model: Published, code: Published | None, scratch: Path) -> tuple[Answers, dict[str, Any]]:
    """The answers and the report of one process.

    Raises:
        RuntimeError: in one line, where it fails in a way that may pass.
        NotVerified: in one line, where it fails otherwise.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as home:
        target = Path(home, "answers")
        target.mkdir()
        request = {
            "repo_id": model.repo_id,
            "revision": model.commit,
            "code_repo_id": code.repo_id if code else None,
            "code_revision": code.commit if code else None,
            "target": str(target),
            "num_threads": torch.get_num_threads(),
        }
        request_file = Path(home, "request.json")
        request_file.write_text(json.dumps(request), encoding="utf-8")
        child = subprocess.run(
            [sys.executable, "-P", verification_script.__file__, str(request_file)],
            cwd=home,
            env=clean_environment(home, needs_token=model.is_closed or (code is not None and code.is_closed)),
            capture_output=True,
            text=True,
            check=False,
        )
        if not (target / "report.json").is_file():
            lines = child.stderr.strip().splitlines() or [f"it ended with status {child.returncode}"]
            raise RuntimeError(cannot_load(model, lines[-1]))
        report = json.loads((target / "report.json").read_text(encoding="utf-8"))
        if "error" in report:
            failure = RuntimeError if report["may_pass"] else NotVerified
            raise failure(cannot_load(model, report["error"]))
        return load_file(target / "answers.safetensors"), report


def cannot_load(model: Published, why: str) -> str:
    """The message of a fresh process that failed."""
    return f"a fresh process cannot load {model.repo_id} at {model.commit}: {why}"


def clean_environment(home: str, needs_token: bool) -> dict[str, str]:
    """The environment of a process that has downloaded nothing yet, and is told nothing that it does not need.

    Args:
        home: what it finds as its user's folder, and caches in.
        needs_token: whether it can load the model only with the user's token.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.upper() in KEPT_VARIABLES or name.upper().startswith(KEPT_PREFIXES)
    }
    kept |= {"HOME": home, "HF_HOME": home, "PYTHONUSERBASE": site.getuserbase()}  # where `pip install --user` puts
    token = get_token() if needs_token else None
    return kept | ({"HF_TOKEN": token} if token else {})

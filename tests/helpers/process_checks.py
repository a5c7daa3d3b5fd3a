"""Run checks on several processes at the same time, and report their errors."""

import json
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import distributed


def write_report(checks: Mapping[str, Callable[..., None]], folder: Path, *arguments: Any) -> None:
    """Call every check with the folder and the arguments on all processes.

    FOLDER/report.json contains the errors of each check on all processes, or an empty string.
    """
    report = {}
    for name, check in checks.items():
        try:
            check(folder, *arguments)
            error = ""
        except Exception:
            error = traceback.format_exc()
        errors = [""] * distributed.get_world_size()
        distributed.all_gather_object(errors, error)
        report[name] = "\n".join(
            f"process {rank}: {text}" for rank, text in enumerate(errors) if text
        )
    if distributed.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")

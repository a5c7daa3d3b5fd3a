"""What follows a training run, on the main process: report, card, push and verification."""

import os
from pathlib import Path

from ..hub.connection import silence_transformers
from ..hub.model_files import CARD_FILE, REPORT_FILE
from ..hub.model_folder import ModelFolder
from ..training.options import FinetuneOptions, PretrainOptions, RunOptions
from .card import write_card
from .push import prepare_repository, push_folder
from .report import write_report
from .verify import verify_push


def prepare_push(options: FinetuneOptions | PretrainOptions) -> str | None:
    """Create the repository to push to before training, and return its id.

    It is None without `push_to_hub` and on processes other than the main process. Raise
    ValueError or OSError if a push is not possible.
    """
    # Accelerate, which knows the process, is built only in the run. The repository is created before
    # it: a token that may not write should not be found after hours of training.
    is_main_process = os.environ.get("RANK", "0") == "0"
    if not options.push_to_hub or not is_main_process:
        return None
    name = options.output_dir.resolve().name
    return prepare_repository(options.hub_model_id, name)


def finish_run(path: Path, options: RunOptions, repo_id: str | None) -> None:
    """Write the report and the card of a finished run; with `repo_id`, push and verify the folder.

    Raise OSError if a file cannot be written, or if the push or the verification fails. The message
    is a single line.
    """
    folder = ModelFolder(path)
    report = path / REPORT_FILE
    # A finished run that is repeated with --resume has its report already.
    if options.report and not report.exists():
        with silence_transformers():
            diagnosis = write_report(folder, warn)
        if diagnosis is not None:
            print(f"diagnosis {diagnosis}")

    write_card(folder)
    print(f"written   {path / CARD_FILE}" + (f", {report}" if report.exists() else ""))
    if repo_id is None:
        return

    push_result = push_folder(folder, repo_id)
    print(f"pushed    {push_result.summary}")
    print("verifying loading the pushed model in a new process")
    print(verify_push(push_result, folder))


def warn(message: str) -> None:
    print(f"WARNING: {message}", flush=True)

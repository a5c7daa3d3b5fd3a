"""What follows a training run, on the main process: report, card, push and verification."""

from functools import partial

from ..additions.extend import Addition
from ..hub.connection import silence_transformers
from ..hub.model_files import CARD_FILE, REPORT_FILE
from ..hub.model_folder import ModelFolder
from .card import write_card
from .report import write_addition_page, write_report, write_safely
from .verify import push_and_verify


def finish_run(folder: ModelFolder, has_report: bool, repo_id: str | None) -> None:
    """Write the report and the card of a finished run; with `repo_id`, push and verify the folder.

    Raise OSError if a file cannot be written, or if the push or the verification fails. The message
    is a single line.
    """
    report = folder.path / REPORT_FILE
    # A finished run that is repeated with --resume has its report already.
    if has_report and not report.exists():
        with silence_transformers():
            faults = write_report(folder)
        if faults:
            print(f"faults    {faults}")

    write_card(folder)
    print(f"written   {folder.path / CARD_FILE}" + (f", {report}" if report.exists() else ""))
    if repo_id is not None:
        push_and_verify(folder, repo_id)


def finish_addition(folder: ModelFolder, addition: Addition) -> None:
    """Write the report and the card of a model that has just got another task or class."""
    with silence_transformers():
        write_safely(partial(write_addition_page, folder, addition))
    write_card(folder)

"""What follows a run or an addition, on the main process: report and card."""

from ..hub.connection import silence_transformers
from ..hub.model_files import CARD_FILE, REPORT_FILE
from ..hub.model_folder import ModelFolder
from .card import write_card
from .report import write_report


def finish_run(folder: ModelFolder, has_report: bool = True) -> None:
    """Write the report and the card of a finished run or addition.

    Raise OSError if a file cannot be written. The message is a single line.
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

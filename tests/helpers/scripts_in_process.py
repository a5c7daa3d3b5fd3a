"""Run scripts in the test process."""

import runpy
import sys

from pytest import MonkeyPatch

from helpers.doc_pages import ROOT


SCRIPTS = ROOT / "scripts"


def run_in_process(script: str, *flags: object) -> int:
    """Run a script of scripts/ in this process and return its exit status."""
    with MonkeyPatch.context() as patch:
        patch.syspath_prepend((SCRIPTS / script).parent)
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        patch.setenv("COLUMNS", "400")
        try:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0

"""Run scripts/predict.py with a second process that is slow or dies: LAST_SHARD=slow|die slow_prediction.py FLAG...

slow    the second process writes its shard after the main process has checked twice whether the folder is complete
die     the second process exits before it writes its shard, and the main process once it has checked twice
"""

import os
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from modeling_vitcls.inference import predict


SCRIPT = Path(__file__).parents[2] / "scripts" / "predict.py"
CHECKS = Path(sys.argv[sys.argv.index("--output") + 1]).with_name("checks")  # one character per check


def check_again(_seconds: float) -> None:
    """Replace the wait of the main process between two checks."""
    with CHECKS.open("a") as checks:
        checks.write(".")
    if os.environ["LAST_SHARD"] == "die" and len(CHECKS.read_text()) >= 2:
        os._exit(1)  # as the launcher would end it
    time.sleep(0.05)


def write_late(*arguments: Any) -> None:
    """Replace `write_rows` of the second process."""
    if os.environ["LAST_SHARD"] == "die":
        os._exit(1)
    while not CHECKS.exists() or len(CHECKS.read_text()) < 2:
        time.sleep(0.01)
    write_rows(*arguments)


if __name__ == "__main__":
    write_rows = predict.write_rows
    if os.environ["RANK"] == "0":
        predict.time = SimpleNamespace(sleep=check_again)  # type: ignore[assignment]
    else:
        predict.write_rows = write_late
    sys.argv[0] = str(SCRIPT)
    runpy.run_path(str(SCRIPT), run_name="__main__")

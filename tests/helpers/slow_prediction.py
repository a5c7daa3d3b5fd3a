"""Run scripts/predict.py with a second process that is slow or dies: LAST_SHARD=slow|die slow_prediction.py FLAG...

slow    the second process writes its shard after the main process has checked twice whether the folder is complete
die     the second process exits before it writes its shard
"""

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from modeling_vitcls.inference import outputs, predict


SCRIPT = Path(__file__).parents[2] / "scripts" / "predict.py"
CHECKS = Path(sys.argv[sys.argv.index("--output") + 1]).with_name("checks")  # one character per check
is_complete = outputs.ShardFolder.is_complete
write_rows = predict.write_rows


def record_check(*arguments: Any) -> bool:
    """Replace `is_complete` of the main process."""
    with CHECKS.open("a") as checks:
        checks.write(".")
    return is_complete(*arguments)


def write_late(*arguments: Any) -> None:
    """Replace `write_rows` of the second process."""
    if os.environ["LAST_SHARD"] == "die":
        os._exit(1)
    while not CHECKS.exists() or len(CHECKS.read_text()) < 2:
        time.sleep(0.01)
    write_rows(*arguments)


if __name__ == "__main__":
    outputs.SECONDS_BETWEEN_CHECKS, outputs.SECONDS_BETWEEN_HEARTBEATS, outputs.MAX_HEARTBEAT_AGE = 0.05, 0.1, 5.0
    if os.environ["RANK"] == "0":
        outputs.ShardFolder.is_complete = record_check  # type: ignore[method-assign]
    else:
        predict.write_rows = write_late
    sys.argv[0] = str(SCRIPT)
    runpy.run_path(str(SCRIPT), run_name="__main__")

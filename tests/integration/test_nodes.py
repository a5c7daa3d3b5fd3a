"""Two `torchrun` agents that SLURM starts on two nodes train as two processes of one machine.

`srun` and `scontrol` are replaced by small programs that start one process per node on this
machine.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.utils.other import get_free_port
from helpers.doc_pages import ROOT
from helpers.fresh_processes import SCRIPT_ENVIRONMENT
from helpers.photo_folders import write_photos
from helpers.tiny_options import assert_equal_runs
from helpers.warm_processes import run_together, wait_for_step


pytestmark = pytest.mark.slow

SRUN = """#!/usr/bin/env bash
# Start the command once per node; pass SIGUSR1 on, as srun does.
while [[ $1 == -* ]]; do shift; done
pids=()
trap 'kill -USR1 "${pids[@]}"' USR1
for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done
status=0
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; result=$?; done
    [ "$result" = 0 ] || { status=$result; [ "$result" -gt 128 ] && kill "${pids[@]}" 2>/dev/null; }
done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1" = requeue ] && echo requeue "$2" >> "$SCONTROL_LOG" || { echo 127.0.0.1; echo 127.0.0.2; }
"""
ENVIRONMENT = os.environ | SCRIPT_ENVIRONMENT | {"PYTHONUNBUFFERED": "1"}
FLAGS = (
    "--model vitcls-tiny --image-size 32 --patch-size 8 --hidden-size 32 --num-hidden-layers 2 "
    "--num-attention-heads 2 --batch-size 4 --max-steps 12 --save-every 2 "
    "--num-workers 0 --model-config drop_path_rate=0.1"
)


def test_the_slurm_script_continues_after_the_time_limit(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", range(20))
    flags = [*FLAGS.split(), "--dataset", str(photos)]
    whole = tmp_path / "whole"
    run_together("finetune.py", *flags, "--output-dir", whole, log=tmp_path / "whole.log")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    folder = tmp_path / "run"
    log = tmp_path / "scontrol.log"
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {
        "SLURM_JOB_ID": str(get_free_port()),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "a[1-2]",
    }
    environment = ENVIRONMENT | slurm | {"PATH": path, "SCONTROL_LOG": str(log)}
    script = ROOT / "scripts/slurm/finetune.sbatch"

    def submit() -> subprocess.Popen[str]:
        command = ["bash", str(script), *flags, "--output-dir", str(folder)]
        output = (tmp_path / "output").open("a")
        return subprocess.Popen(
            command, env=environment, text=True, stdout=output, stderr=output, cwd=ROOT
        )

    job = submit()
    wait_for_step(folder, 3, lambda: job.poll() is None, tmp_path / "output")
    job.send_signal(signal.SIGUSR1)
    job.wait(timeout=240)
    assert log.read_text().split() == ["requeue", slurm["SLURM_JOB_ID"]]
    assert not (folder / "results.json").exists()
    job = submit()
    assert job.wait(timeout=240) == 0, (tmp_path / "output").read_text()
    assert log.read_text().count("requeue") == 1
    assert_equal_runs(folder, whole)

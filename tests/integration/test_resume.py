"""Stop and resume: a killed or stopped run has the result of an uninterrupted one.

Runs are killed with `kill -9` at random steps and resumed with the same command and --resume. Most
start as forks of a server that has already imported the libraries; some start with the real
`accelerate launch`, in one and two processes.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.fresh_processes import SCRIPT_ENVIRONMENT
from helpers.photo_folders import write_photos
from helpers.tiny_options import assert_equal_runs
from helpers.warm_processes import (
    READY,
    SCRIPTS,
    run_script,
    run_together,
    wait_for_step,
)
from pytest import TempPathFactory

from modeling_vitcls.data import workers


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs sessions of processes")

TINY = (
    "--model vitcls-tiny --hidden-size 32 --num-hidden-layers 2 --num-attention-heads 2 "
    "--intermediate-size 64 --image-size 32 --patch-size 16 --num-register-tokens 2 "
    "--model-config drop_path_rate=0.2 --no-report"
)
# 36 images: 4.5 steps per epoch, 23 steps. Checkpoints and logged records fall on different steps.
SCHEDULE = "--epochs 5 --batch-size 8 --learning-rate 3e-3 --num-workers 0 --save-every 3"
RUN = f"{TINY} {SCHEDULE}"
EVERYTHING = (
    f"{RUN} --batch-size 4 --gradient-accumulation-steps 2 --mixup 0.4 "
    "--augment random_erasing=0.3 cutmix=1 --auto-augment trivial --layer-decay 0.8 "
    "--keep-checkpoints 2"
)
NUM_STEPS = 23
Run = Callable[[str], Path]  # Flags -> folder of the run


# Runs ---------------------------------------------------------------------------------------------


class RunningProcess:
    """A run in one or several processes."""

    def __init__(self, folder: Path, process: Any) -> None:
        self.folder = folder
        self.process = process

    @property
    def output(self) -> str:
        return read_log(self.folder).read_text()

    def wait(self) -> int:
        """Wait until the run has ended and return its exit status."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.wait(timeout=240)
        self.process.join(timeout=240)
        return self.process.exitcode

    def wait_for_step(self, step: int) -> None:
        wait_for_step(self.folder, step, self.is_alive, read_log(self.folder))

    def is_alive(self) -> bool:
        process = self.process
        return (
            process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()
        )

    def kill(self) -> None:
        """Send `kill -9` to the run and its child processes.

        The children of a launcher are in their own sessions.
        """
        family = []
        with suppress(psutil.NoSuchProcess):  # it may have ended together with another process
            run = psutil.Process(self.process.pid)
            family = [run, *run.children(recursive=True)]
            for member in family:
                member.kill()
        self.wait()
        while any(is_alive(member) for member in family):
            time.sleep(0.01)


def is_alive(process: psutil.Process) -> bool:
    """Return whether the process is running. A zombie process has ended."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def read_log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def build_command(folder: Path, flags: str) -> list[str]:
    return [str(SCRIPTS / "finetune.py"), "--output-dir", str(folder), *flags.split()]


def build_ready_process(folder: Path, flags: str, target: Callable[..., None] | None = None) -> Any:
    """Return a process that runs the script and has already imported the libraries."""
    _, *all_flags = build_command(folder, flags)
    process = READY.Process(target=target or finetune, args=(all_flags, read_log(folder)))
    process.start()
    return process


def finetune(flags: list[str], log: Path) -> None:
    run_script("finetune.py", flags, log, log, SCRIPT_ENVIRONMENT)


def finetune_with_late_workers(flags: list[str], log: Path) -> None:
    """Simulate a busy machine: the thread of a worker that waits for SIGTERM is delayed."""
    wait = workers.wait_for_parent_signal
    workers.wait_for_parent_signal = lambda: (time.sleep(3), wait())
    finetune(flags, log)


def start(folder: Path, flags: str) -> RunningProcess:
    return RunningProcess(folder, build_ready_process(folder, flags))


def launch(folder: Path, flags: str, processes: int = 1) -> RunningProcess:
    """Run the script with the real `accelerate launch`, like a shell: in its own process group."""
    several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []  # use CPUs
    launcher = f"-m accelerate.commands.launch --num_processes {processes}".split()
    command = [*launcher, *several, *build_command(folder, flags)]
    with read_log(folder).open("a") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=output,
            env=os.environ | SCRIPT_ENVIRONMENT,
            start_new_session=True,
        )
    return RunningProcess(folder, process)


def finish(folder: Path, flags: str) -> str:
    """Run to the end with exit status 0, and return the printed text."""
    read_log(folder).unlink(missing_ok=True)
    run = start(folder, flags)
    assert run.wait() == 0, run.output
    return run.output


def draw_steps(count: int, seed: int) -> list[int]:
    """Return increasing steps at which a run is killed."""
    return sorted(random.Random(seed).sample(range(2, NUM_STEPS - 1), count))


# Results ------------------------------------------------------------------------------------------


def get_resumed_step(output: str) -> int:
    """Return the step after which a run continued, from its output."""
    (line,) = [line for line in output.splitlines() if line.startswith("resumed")]
    return int(line.split("after step ")[1].split()[0])


@pytest.fixture(scope="module")
def image_folder(module_path: Path) -> Path:
    """Write 36 noise images for training and 10 for testing; one is unreadable."""
    write_photos(module_path / "train", range(18), "dusk", "noon")
    write_photos(module_path / "test", range(18, 23), "dusk", "noon")
    broken = module_path / "train/noon/5.png"
    broken.write_bytes(broken.read_bytes()[:100])
    return module_path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: TempPathFactory) -> Run:
    """Return a function: flags -> folder of an uninterrupted run."""

    @cache
    def folder_of(flags: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "model"
        finish(folder, flags)
        return folder

    return folder_of


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Return an output folder. Processes that a test starts there are ended after the test."""
    yield tmp_path / "model"
    for process in psutil.process_iter(["cmdline"]):
        if str(tmp_path) in (process.info["cmdline"] or []):
            process.kill()


# Killed runs --------------------------------------------------------------------------------------


VARIANTS = {
    "several kinds of tokens": (
        f"{RUN} --num-cls-tokens 2 --num-distillation-tokens 1 --pooling cls_mean"
    ),
    "all options": EVERYTHING,
    "a teacher": f"{RUN} --distillation soft",
}


@pytest.mark.parametrize(
    "variant",
    [
        name if name == "several kinds of tokens" else pytest.param(name, marks=pytest.mark.slow)
        for name in VARIANTS
    ],
)
def test_a_killed_run_of_any_kind_ends_with_the_same_weights(
    variant: str, image_folder: Path, folder: Path, uninterrupted: Run
) -> None:
    """A run with all options is killed several times; the last one has no workers."""
    flags = f"{VARIANTS[variant]} --dataset {image_folder}"
    if variant == "a teacher":
        flags += f" --teacher {uninterrupted(f'{RUN} --dataset {image_folder}')}"
    before = f"{flags} --num-workers 1 --save-every 2 --keep-checkpoints 1"
    steps = draw_steps(1, seed=list(VARIANTS).index(variant))
    for number, step in enumerate([3, 8, 14] if variant == "all options" else steps):
        run = start(folder, f"{before} --resume" if number else before)
        run.wait_for_step(step)
        run.kill()
        assert not (folder / "results.json").exists()

    output = finish(folder, f"{flags} --resume")
    assert get_resumed_step(output) > 0
    assert "skipped an image" not in output  # it was printed before
    assert_equal_runs(folder, uninterrupted(flags))


# Stopped runs -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_delayed_workers_do_not_block_the_end(image_folder: Path, folder: Path) -> None:
    """The cluster's SIGTERM, sent to all, is still pending in a worker at the end of the run."""
    flags = f"{RUN} --epochs 15 --dataset {image_folder} --num-workers 2 --save-every 1000"
    run = RunningProcess(folder, build_ready_process(folder, flags, finetune_with_late_workers))
    run.wait_for_step(6)
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM, run.output
    assert "stopped by SIGTERM; a checkpoint was saved" in run.output
    assert "Traceback" not in run.output


@pytest.mark.slow
def test_a_terminated_launcher_stops_its_run(
    image_folder: Path, folder: Path, uninterrupted: Run
) -> None:
    """SIGTERM ends `accelerate launch`, which does not forward it.

    The run detects this, saves and ends.
    """
    flags = f"{RUN} --epochs 15 --dataset {image_folder}"  # not finished before that
    run = launch(folder, f"{flags} --save-every 1000")
    run.wait_for_step(2)
    (child,) = psutil.Process(run.process.pid).children()
    run.process.terminate()
    assert run.wait() == -signal.SIGTERM
    while is_alive(child):
        time.sleep(0.01)
    assert "stopped by SIGTERM; a checkpoint was saved" in run.output
    assert get_resumed_step(finish(folder, f"{flags} --resume")) >= 2
    assert_equal_runs(folder, uninterrupted(flags))


# Several processes --------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_are_interrupted_and_resumed(
    image_folder: Path, folder: Path, tmp_path: Path
) -> None:
    """Ctrl-C in a terminal goes to the launcher's process group, and torchrun forwards it.

    The run has workers.
    """
    flags = f"{EVERYTHING} --batch-size 2 --dataset {image_folder}"
    run = launch(folder, f"{flags} --num-workers 1 --save-every 1000", 2)
    run.wait_for_step(4)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.wait() == 1
    assert run.output.count("stopped by SIGINT; a checkpoint was saved") == 1

    words = build_command(folder, f"{flags} --resume")
    output = run_together(*words, log=tmp_path / "resumed.log")
    assert get_resumed_step(output) >= 4
    words = build_command(tmp_path / "whole", flags)
    run_together(*words, log=tmp_path / "whole.log")
    assert_equal_runs(folder, tmp_path / "whole")

"""Stop and resume: a run that was killed or asked to stop ends as the one that was not, to the bit.

Runs are killed with `kill -9` at random steps and resumed with the same command and --resume. Most start as forks of
a server that has loaded everything already; some through the real `accelerate launch`, in one and two processes.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest
import torch
from fresh_processes import SCRIPT_ENVIRONMENT
from PIL import Image
from safetensors.torch import load_file
from warm_processes import READY, SCRIPTS, find_free_port, get_loopback, get_rank_variables, run_script

from modeling_vitcls.data import batches


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs sessions of processes")

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = SCRIPT_ENVIRONMENT | {"GLOO_SOCKET_IFNAME": get_loopback()}
TINY = (
    "--model vitcls-tiny --hidden-size 32 --num-hidden-layers 2 --num-attention-heads 2 --intermediate-size 64 "
    "--image-size 32 --patch-size 16 --num-register-tokens 2 --drop-path-rate 0.2 --no-report"
)
# 36 images: 4.5 steps an epoch, 23 steps. Checkpoints and lines of metrics fall on different steps.
SCHEDULE = (
    "--epochs 5 --batch-size 8 --learning-rate 3e-3 --num-workers 0 --save-every 3 --log-every 2 --health-every 0"
)
RUN = f"{TINY} {SCHEDULE}"
EVERYTHING = (
    f"{RUN} --batch-size 4 --gradient-accumulation-steps 2 --ema-decay 0.9 --mixup 0.4 --cutmix 1 "
    "--random-erasing 0.3 --auto-augment trivial --layer-decay 0.8 --health-every 3"
)
NUM_STEPS = 23
NOT_COMPARED = ("images_per_second", "peak_memory_mb", "seconds", "energy", "inference", "versions")


# Runs ----------------------------------------------------------------------------------------------------------------


class Started:
    """A run in its own process or processes."""

    def __init__(self, folder: Path, flags: str, process: Any) -> None:
        self.folder = folder
        self.flags = flags
        self.process = process

    @property
    def output(self) -> str:
        return log_of(self.folder).read_text(encoding="utf-8")

    def wait(self) -> int:
        """Until it has ended by itself: its exit status."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.wait(timeout=240)
        self.process.join(timeout=240)
        return self.process.exitcode

    def wait_for_step(self, step: int) -> None:
        """Until it has logged a step."""
        deadline = time.monotonic() + 120
        while steps_logged(self.folder) < step:
            assert time.monotonic() < deadline and self.is_alive(), self.output
            time.sleep(0.002)

    def is_alive(self) -> bool:
        process = self.process
        return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()

    def kill(self) -> None:
        """`kill -9`, with its children: a launcher's are in sessions of their own."""
        family = []
        with suppress(psutil.NoSuchProcess):  # it may have ended with another
            run = psutil.Process(self.process.pid)
            family = [run, *run.children(recursive=True)]
            for member in family:
                member.kill()
        self.wait()
        while any(is_alive(member) for member in family):
            time.sleep(0.01)


def is_alive(process: psutil.Process) -> bool:
    """Whether it still does something; nobody may have asked for the exit status of an orphan."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def steps_logged(folder: Path) -> int:
    try:
        return json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def command(folder: Path, flags: str) -> list[str]:
    return [str(SCRIPTS / "finetune.py"), "--output-dir", str(folder), *flags.split()]


def ready(folder: Path, flags: str, target: Callable[..., None] | None = None, **several: str) -> Any:
    """Run the script in a process that has loaded everything already."""
    _, *all_flags = command(folder, flags)
    process = READY.Process(target=target or finetune, args=(all_flags, log_of(folder), ENVIRONMENT | several))
    process.start()
    return process


def finetune(flags: list[str], log: Path, environment: dict[str, str]) -> None:
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # 5 s after each pass of a stream
    run_script("finetune.py", flags, log, log, environment)


def finetune_with_late_workers(flags: list[str], log: Path, environment: dict[str, str]) -> None:
    """As on a busy machine: a worker's thread that waits for SIGTERM does not get to run for a while."""
    wait = batches.wait_for_parent_signal
    batches.wait_for_parent_signal = lambda: (time.sleep(3), wait())
    finetune(flags, log, environment)


def start(folder: Path, flags: str) -> Started:
    return Started(folder, flags, ready(folder, flags))


def launch(folder: Path, flags: str, processes: int = 1, *launcher_flags: str) -> Started:
    """Run the script through the real `accelerate launch`, as a shell would: in a process group of its own."""
    several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []  # the devices are CPUs
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    with log_of(folder).open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*launcher, *several, *launcher_flags, *command(folder, flags)],
            stdout=output,
            stderr=output,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )
    return Started(folder, flags, process)


def finish(folder: Path, flags: str) -> str:
    """Run to the end, successfully; what it printed."""
    log_of(folder).unlink(missing_ok=True)
    run = start(folder, flags)
    assert run.wait() == 0, run.output
    return run.output


def refusal(folder: Path, flags: str) -> str:
    """Run, and have it refused in one line: that line."""
    log_of(folder).unlink(missing_ok=True)
    run = start(folder, flags)
    assert run.wait() == 1, run.output
    assert "Traceback" not in run.output, run.output
    return run.output.splitlines()[-1]


def kill(folder: Path, flags: str, step: int) -> None:
    """Start a run, and kill it with -9 once it has logged a step."""
    run = start(folder, flags)
    run.wait_for_step(step)
    run.kill()
    assert not (folder / "results.json").exists()


def kill_and_resume(folder: Path, flags: str, kills: list[int]) -> str:
    """Kill a run with -9 once it has logged each of these steps, and at last let it end; what it printed then."""
    for number, step in enumerate(kills):
        kill(folder, f"{flags} --resume" if number else flags, step)
    return finish(folder, f"{flags} --resume")


def start_two(folder: Path, flags: str) -> list[Started]:
    """Two processes that work together, the main one first."""
    port = find_free_port()
    return [Started(folder, flags, ready(folder, flags, **get_rank_variables(rank, 2, port))) for rank in range(2)]


def finish_two(folder: Path, flags: str) -> str:
    """Run to the end in two processes; what they printed."""
    log_of(folder).unlink(missing_ok=True)
    for run in start_two(folder, flags):
        assert run.wait() == 0, run.output
    return log_of(folder).read_text(encoding="utf-8")


def random_steps(count: int, seed: int) -> list[int]:
    """Rising steps to kill a run at."""
    return sorted(random.Random(seed).sample(range(2, NUM_STEPS - 1), count))


# What they left ------------------------------------------------------------------------------------------------------


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [comparable(json.loads(line)) for line in lines]


def comparable(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in NOT_COMPARED}


def assert_equal_runs(folder: Path, expected: Path) -> None:
    """Losses, learning rates, gradient norms, weights and results to the bit; speeds may differ."""
    assert records(folder) == records(expected)
    weights, expected_weights = (load_file(place / "model.safetensors") for place in (folder, expected))
    assert weights.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        assert torch.equal(weights[name], weight), name
    results, expected_results = (json.loads((place / "results.json").read_text()) for place in (folder, expected))
    assert comparable(results) == comparable(expected_results)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def resumed_after(output: str) -> int:
    """The step that a run said it goes on from."""
    (line,) = [line for line in output.splitlines() if line.startswith("resumed")]
    return int(line.split("after step ")[1].split()[0])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 36 images of noise to train on and 10 to test, in two classes, one darker; one cannot be read."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = random.Random(0)
    for index in range(23):
        for name, brightest in (("dusk", 120), ("noon", 255)):
            place = folder / ("train" if index < 18 else "test") / name
            place.mkdir(parents=True, exist_ok=True)
            pixels = bytes(noise.randrange(brightest) for _ in range(3 * 20 * 24))
            Image.frombytes("RGB", (20, 24), pixels).save(place / f"{index}.png")
    broken = folder / "train" / "noon" / "5.png"
    broken.write_bytes(broken.read_bytes()[:100])
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Flags -> folder of a run that nobody stopped."""
    folders: dict[str, Path] = {}

    def folder_of(flags: str) -> Path:
        if flags not in folders:
            folder = tmp_path_factory.mktemp("whole") / "model"
            finish(folder, flags)
            folders[flags] = folder
        return folders[flags]

    return folder_of


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """To run in; nothing that was started there outlives the test."""
    yield tmp_path / "model"
    for process in psutil.process_iter(["cmdline"]):
        if str(tmp_path) in (process.info["cmdline"] or []):
            process.kill()


# Killed --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_anywhere_with_everything_on(
    pictures: Path, folder: Path, uninterrupted: Callable[[str], Path]
) -> None:
    """In the first epoch and after it, with accumulation, moving average, mixup and CutMix."""
    flags = f"{EVERYTHING} --dataset {pictures}"
    output = kill_and_resume(folder, flags, [3, 8, *random_steps(2, seed=1)])
    assert resumed_after(output) > 3
    assert "skipped an image" not in output  # it was named before
    assert_equal_runs(folder, uninterrupted(flags))
    assert checkpoints(folder) == checkpoints(uninterrupted(flags))  # the newest two and the best


VARIANTS = {
    "repeated augmentation": f"{RUN} --repeated-augmentation 2",
    "several kinds of tokens": f"{RUN} --num-cls-tokens 2 --num-distillation-tokens 1 --pooling cls_mean",
    "head": f"{SCHEDULE} --model {{trained}} --trainable head",
    "LoRA": f"{SCHEDULE} --model {{trained}} --trainable lora --lora-rank 2 --ema-decay 0.9",
    "last layer": f"{SCHEDULE} --model {{trained}} --trainable last-1 --class-balance sampling",
    "a teacher": f"{RUN} --teacher {{trained}} --distillation soft",
}


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "variant", [name if name in ("head", "LoRA") else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_killed_and_resumed(variant: str, pictures: Path, folder: Path, uninterrupted: Callable[[str], Path]) -> None:
    """With workers before it and none after it, and with other checkpoints."""
    trained = uninterrupted(f"{RUN} --dataset {pictures}")
    flags = VARIANTS[variant].format(trained=trained) + f" --dataset {pictures}"
    before = f"{flags} --num-workers 1 --save-every 2 --keep-checkpoints 1 --max-broken-images 5"
    run = start(folder, before)
    run.wait_for_step(*random_steps(1, seed=list(VARIANTS).index(variant)))
    run.kill()
    assert resumed_after(finish(folder, f"{flags} --resume")) > 0
    assert_equal_runs(folder, uninterrupted(flags))


@pytest.mark.slow
def test_a_stream_goes_on(pictures: Path, folder: Path, uninterrupted: Callable[[str], Path]) -> None:
    files = sorted(map(str, pictures.glob("*/*/*.png")), key=lambda name: Path(name).stem)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dusk", "noon"])})
    rows = {"image": files, "label": [int("noon" in name) for name in files]}
    parquet = pictures.parent / "pictures.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(parquet)
    flags = f"{RUN} --dataset {parquet} --streaming --shuffle-buffer 10 --max-steps {NUM_STEPS}"
    kill_and_resume(folder, flags, random_steps(2, seed=3))
    assert_equal_runs(folder, uninterrupted(flags))


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_a_warning(
    pictures: Path, folder: Path, uninterrupted: Callable[[str], Path]
) -> None:
    flags = f"{RUN} --dataset {pictures}"
    kill(folder, flags, step=10)
    *_, before, newest = sorted((folder / "checkpoints").glob("step-*"))
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    output = finish(folder, f"{flags} --resume")
    assert f"WARNING: the checkpoint {newest} is damaged: model.safetensors differs from the written file" in output
    assert resumed_after(output) == step_of(before)
    assert_equal_runs(folder, uninterrupted(flags))


def test_only_damaged_checkpoints_are_refused(pictures: Path, folder: Path) -> None:
    flags = f"{RUN} --dataset {pictures}"
    kill(folder, flags, step=8)
    for state in (folder / "checkpoints").glob("step-*/state.json"):
        state.write_text("{", encoding="utf-8")
    message = refusal(folder, f"{flags} --resume")
    assert message.startswith("error: all checkpoints in") and "--overwrite instead of --resume" in message


def test_resume_without_a_checkpoint_starts_from_the_beginning(
    pictures: Path, folder: Path, uninterrupted: Callable[[str], Path]
) -> None:
    flags = f"{RUN} --dataset {pictures}"
    finish(folder, f"{flags} --resume")
    assert_equal_runs(folder, uninterrupted(flags))


@pytest.mark.slow
def test_a_full_disk_costs_nothing(pictures: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]) -> None:
    disk = ["tmpfs", str(tmp_path / "disk")]
    (tmp_path / "disk").mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", *disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        flags = f"{RUN} --dataset {pictures}"
        folder = tmp_path / "disk" / "model"
        log_of(folder).symlink_to(tmp_path / "log")
        run = start(folder, flags)
        assert run.wait() == 1
        message = run.output.splitlines()[-1]
        assert "No space left on device" in message and "is intact" in message and "Traceback" not in run.output
        subprocess.run(["mount", "-o", "remount,size=50m", *disk], check=True)
        assert resumed_after(finish(folder, f"{flags} --resume")) > 0
        assert_equal_runs(folder, uninterrupted(flags))
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)


# Asked to stop -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(
    number: signal.Signals, pictures: Path, folder: Path, uninterrupted: Callable[[str], Path]
) -> None:
    """To the run and its workers, between two checkpoints, of a run that is not over before it comes."""
    flags = f"{RUN} --epochs 15 --dataset {pictures}"
    run = start(folder, f"{flags} --num-workers 2 --save-every 1000")
    run.wait_for_step(6)
    os.killpg(run.process.pid, number)
    assert run.wait() == 128 + number, run.output
    assert not (folder / ".vitcls.lock").exists()
    assert f"stopped by {number.name}; a checkpoint was saved" in run.output
    assert "Traceback" not in run.output
    assert resumed_after(finish(folder, f"{flags} --resume")) >= 6
    assert_equal_runs(folder, uninterrupted(flags))


@pytest.mark.slow
def test_workers_that_notice_late_hold_nothing_up(pictures: Path, folder: Path) -> None:
    """The cluster's SIGTERM still waits to be noticed when the run ends: one of its own would be lost."""
    flags = f"{RUN} --epochs 15 --dataset {pictures} --num-workers 2 --save-every 1000"
    run = Started(folder, flags, ready(folder, flags, finetune_with_late_workers))
    run.wait_for_step(6)
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM, run.output


@pytest.mark.slow
def test_a_launcher_that_is_terminated(pictures: Path, folder: Path, uninterrupted: Callable[[str], Path]) -> None:
    """`accelerate launch` dies of SIGTERM without passing it on; the run notices, saves and ends."""
    flags = f"{RUN} --epochs 15 --dataset {pictures}"  # not over before that
    run = launch(folder, f"{flags} --save-every 1000")
    run.wait_for_step(2)
    (child,) = psutil.Process(run.process.pid).children()
    run.process.terminate()
    assert run.wait() == -signal.SIGTERM
    while is_alive(child):
        time.sleep(0.01)
    assert "stopped by SIGTERM; a checkpoint was saved" in run.output
    assert resumed_after(finish(folder, f"{flags} --resume")) >= 2
    assert_equal_runs(folder, uninterrupted(flags))


# Several processes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_are_interrupted_then_killed(pictures: Path, folder: Path, tmp_path: Path) -> None:
    """Ctrl-C in a terminal goes to the launcher's process group, and torchrun passes it on. With workers."""
    flags = f"{EVERYTHING} --batch-size 2 --dataset {pictures}"
    run = launch(folder, f"{flags} --num-workers 1 --save-every 1000", 2)
    run.wait_for_step(4)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.wait() == 1
    assert run.output.count("stopped by SIGINT; a checkpoint was saved") == 1

    again = start_two(folder, f"{flags} --resume")
    again[0].wait_for_step(12)
    for process in again:
        process.kill()
    assert resumed_after(finish_two(folder, f"{flags} --resume")) >= 9
    whole = tmp_path / "whole"
    finish_two(whole, flags)
    assert_equal_runs(folder, whole)


@pytest.mark.slow
def test_two_processes_rehearse_with_a_tracker(pictures: Path, folder: Path) -> None:
    pytest.importorskip("tensorboard")
    output = finish_two(folder, f"{RUN} --dataset {pictures} --dry-run --log-with tensorboard")
    assert "no files were kept" in output
    assert [path.name for path in folder.parent.iterdir()] == [log_of(folder).name]


@pytest.mark.slow
def test_two_sharded_processes_are_killed(pictures: Path, folder: Path, tmp_path: Path) -> None:
    """FSDP2: each process holds half of the weights, of their moments and of their average."""
    flags = f"{EVERYTHING} --batch-size 2 --dataset {pictures}"
    sharded = ("--config_file", str(SCRIPTS / "accelerate" / "fsdp2_cpu.yaml"))
    run = launch(folder, flags, 2, *sharded)
    run.wait_for_step(10)
    run.kill()
    for place, more in ((folder, " --resume"), (tmp_path / "whole", "")):
        run = launch(place, flags + more, 2, *sharded)
        assert run.wait() == 0, run.output
    assert resumed_after(log_of(folder).read_text(encoding="utf-8")) >= 6
    assert_equal_runs(folder, tmp_path / "whole")


# What may change, and what not ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after step 6. Nothing below changes it."""
    folder = tmp_path_factory.mktemp("killed") / "model"
    kill(folder, f"{RUN} --dataset {pictures}", step=6)
    return folder


CHANGES = {
    "--learning-rate 0.001": "--learning-rate 0.003, but this run has 0.001",
    "--hidden-size 48": "--hidden-size 32, but this run has 48",
    "--dataset digits": "but this run has digits",
    "--seed 1": "--seed 0, but this run has 1",
    "--mixup 0.1": "--mixup 0.0, but this run has 0.1",
    "--batch-size 4": "has 23 steps of 8 images, but this run has 45 of 4. Set --batch-size x",
    "--ema-decay 0.9": "--ema-decay unset, but this run has 0.9",
    "--epochs 9": "--epochs 5.0, but this run has 9.0",
    "--max-steps 40": "--max-steps unset, but this run has 40",
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_is_refused(change: str, killed: Path, pictures: Path) -> None:
    before = contents(killed)
    message = refusal(killed, f"{RUN} --dataset {pictures} --resume {change}")
    assert message.startswith("error: ") and CHANGES[change] in message
    if change.startswith(("--epochs", "--max-steps")):
        assert "learning rate" in message  # it falls to 0 at the end that was planned
    assert contents(killed) == before


def test_an_unfinished_run_is_not_overwritten(killed: Path, pictures: Path) -> None:
    before = contents(killed)
    assert "Continue it with --resume" in refusal(killed, f"{RUN} --dataset {pictures}")
    assert contents(killed) == before


def test_a_finished_run_says_so(pictures: Path, uninterrupted: Callable[[str], Path]) -> None:
    flags = f"{RUN} --dataset {pictures}"
    folder = uninterrupted(flags)
    before = contents(folder)
    output = finish(folder, f"{flags} --resume")
    assert "already contains the results of this run" in output and "step 2/" not in output
    assert contents(folder) == before


# One folder, several runs --------------------------------------------------------------------------------------------


def test_a_second_run_in_the_folder_is_refused(
    pictures: Path, folder: Path, uninterrupted: Callable[[str], Path]
) -> None:
    """On one process and on two, of which one speaks for both. The first run does not notice."""
    flags = f"{RUN} --dataset {pictures}"
    run = start(folder, f"{flags} --epochs 200")
    run.wait_for_step(2)
    for number, more in enumerate(("", "--overwrite", "--resume")):
        log = folder.with_name(f"second-{number}.log")
        _, *second = command(folder, f"{flags} {more}")
        process = READY.Process(target=finetune, args=(second, log, ENVIRONMENT))
        process.start()
        process.join(timeout=240)
        assert process.exitcode == 1
        assert log.read_text().splitlines()[-1].startswith(f"error: {folder} is in use by another run (process ")
    log = folder.with_name("two.log")
    port = find_free_port()
    both = [
        READY.Process(
            target=finetune, args=(command(folder, flags)[1:], log, ENVIRONMENT | get_rank_variables(rank, 2, port))
        )
        for rank in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=240)
    assert [process.exitcode for process in both] == [1, 1]
    assert log.read_text().count("is in use by another run") == 1 and "Traceback" not in log.read_text()
    run.kill()
    assert (folder / ".vitcls.lock").exists()
    finish(folder, f"{flags} --overwrite")
    assert not (folder / ".vitcls.lock").exists()
    assert_equal_runs(folder, uninterrupted(flags))


@pytest.mark.slow
def test_a_new_run_that_is_killed_early_leaves_no_old_model(pictures: Path, folder: Path) -> None:
    flags = f"{RUN} --dataset {pictures}"
    finish(folder, f"{flags} --max-steps 3")
    before = contents(folder)
    assert "contains a finished run. Replace it with --overwrite" in refusal(folder, flags)
    assert contents(folder) == before
    run = start(folder, f"{flags} --save-every 1000 --overwrite --seed 1")
    deadline = time.monotonic() + 120
    config = folder / "config.resolved.yaml"
    while not config.exists() or "seed: 1" not in config.read_text(encoding="utf-8"):
        assert time.monotonic() < deadline and run.is_alive(), run.output
        time.sleep(0.001)
    run.kill()
    left = {path.name for path in folder.iterdir()} - {".vitcls.lock"}
    assert "config.resolved.yaml" in left <= {"config.resolved.yaml", "metrics.jsonl", ".metrics.jsonl.partial"}
    finish(folder, f"{flags} --max-steps 3")
    assert comparable(json.loads((folder / "results.json").read_text()))["steps"] == 3


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run, but its lock, and what was being written when it was killed."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".vitcls.lock"]
    return {str(path): path.read_bytes() for path in files if not path.parent.name.startswith(".")}

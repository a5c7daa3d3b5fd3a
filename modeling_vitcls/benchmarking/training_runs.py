"""Training runs, ours and transformers' Trainer's in turns: the whole way from pictures to updated weights.

Both sides run as they would alone, in processes of their own: scripts/finetune.py, and transformers_trainer.py. Each
appends a line to a file every few steps. All but the one whose turn it is are suspended, and what is measured is the
time between lines, by this process's clock. Needs signals to suspend processes, so no Windows.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from ..conversion.from_transformers import convert_from_transformers
from ..image_processing_vitcls import ViTCLSImageProcessor
from .comparison import Comparison, check_agreement, chosen, in_turns, last_words
from .image_processing import write_photographs
from .peers import SMALL, Size, transformers_vit


@dataclass(frozen=True)
class TrainingRun:
    """One row of the report: AdamW, warm-up and cosine, label smoothing and clipping are the same for all."""

    dataset: str  # "digits" or "photographs"
    size: Size
    batch_size: int
    mixed_precision: str
    num_workers: int
    log_every: int  # steps between two lines
    lines_per_turn: int
    learning_rate: float
    augmentation: dict[str, Any]


CROPS = {"crop_scale": 0.35, "flip": True, "rotation": 0, "shift": 0.0, "zoom": 0.0}
SMALL_SHIFTS = {"crop_scale": 1.0, "flip": False, "rotation": 10, "shift": 0.1, "zoom": 0.1}

PHOTOGRAPHS = TrainingRun("photographs", SMALL, 16, "bf16", 1, 1, 3, 5e-4, CROPS)
# As in scripts/recipes/digits.yaml, but for the registers, which the other side does not have.
DIGITS = TrainingRun("digits", Size(32, 8, 64, 4, 4), 64, "no", 0, 20, 3, 2e-3, SMALL_SHIFTS)

TRAINING_RUNS = {
    "ViT-S/16 at 224, bf16": PHOTOGRAPHS,
    "ViT-S/16 at 224, fp32": replace(PHOTOGRAPHS, mixed_precision="no"),
    "digits, fp32": DIGITS,
    "digits, bf16": replace(DIGITS, mixed_precision="bf16"),
}
TOY_RUNS = {"toy": replace(DIGITS, size=Size(32, 8, 32, 2, 2), log_every=1, lines_per_turn=1)}

MAX_STEPS = 1_000_000  # never reached
PHOTOGRAPHS_PER_CLASS = 512  # no epoch ends while it is measured: Trainer then starts its workers anew
WARM_UP_LINES = 2
LONGEST_TURN = 600  # seconds


def compare_training(rows: tuple[str, ...], num_pairs: int, toy: bool) -> Iterator[Comparison]:
    """The named rows of `TRAINING_RUNS`, or all, against transformers.

    Raises:
        ValueError: for an unknown row, if outputs differ, or if a run fails.
    """
    for name, run in chosen(TOY_RUNS if toy else TRAINING_RUNS, rows).items():
        with tempfile.TemporaryDirectory() as folder:
            yield compare_runs(name, run, num_pairs, Path(folder))


def compare_runs(name: str, run: TrainingRun, num_pairs: int, folder: Path) -> Comparison:
    """One row."""
    dataset, label_names = prepare_data(run.dataset, folder)
    difference = prepare_models(run, label_names, folder, name)
    with (
        Contestant(our_command(run, dataset, folder), folder / "ours" / "metrics.jsonl", run) as ours,
        Contestant(their_command(run, dataset, folder), folder / "theirs.jsonl", run) as theirs,
    ):
        measured = in_turns(ours.turn, theirs.turn, num_pairs)
    return Comparison("training", name, "transformers", *measured, difference, asdict(run))


# Data and models, the same for both ----------------------------------------------------------------------------------


def prepare_data(dataset: str, folder: Path) -> tuple[str, list[str]]:
    """What to pass as `--dataset`, and the names of the labels."""
    if dataset == "digits":
        return dataset, [str(digit) for digit in range(10)]
    return str(write_photographs(folder / "photographs", PHOTOGRAPHS_PER_CLASS)), ["china", "flower"]


def prepare_models(run: TrainingRun, label_names: list[str], folder: Path, name: str) -> float:
    """Save transformers' ViT and ours with the same weights; the largest difference of their outputs.

    Raises:
        ValueError: if they differ.
    """
    torch.manual_seed(0)
    labels = {
        "id2label": dict(enumerate(label_names)),
        "label2id": {label: index for index, label in enumerate(label_names)},
    }
    theirs = transformers_vit(run.size, **labels).eval()
    ours = convert_from_transformers(theirs)
    pixel_values = torch.randn(2, 3, run.size.image_size, run.size.image_size)
    difference = check_agreement(
        lambda pixels: ours(pixels).logits, lambda pixels: theirs(pixels).logits, pixel_values, name
    )
    theirs.save_pretrained(folder / "their_model")
    ours.save_pretrained(folder / "our_model")
    sides = {"height": run.size.image_size, "width": run.size.image_size}
    ViTCLSImageProcessor(size=sides, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder / "our_model")
    return difference


# The two sides -------------------------------------------------------------------------------------------------------


def our_command(run: TrainingRun, dataset: str, folder: Path) -> list[str]:
    """Return the command line of `vitcls finetune`, without evaluations and checkpoints."""
    flags = {
        "model": folder / "our_model",
        "dataset": dataset,
        "output-dir": folder / "ours",
        "max-steps": MAX_STEPS,
        "evaluate-every": MAX_STEPS,
        "batch-size": run.batch_size,
        "learning-rate": run.learning_rate,
        "mixed-precision": run.mixed_precision,
        "num-workers": run.num_workers,
        "log-every": run.log_every,
        "held-out-fraction": 0.1,
        **{name.replace("_", "-"): value for name, value in run.augmentation.items() if name != "flip"},
    }
    listed = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    program = [sys.executable, "-m", "modeling_vitcls.cli", "finetune"]
    return [*program, *listed, "--flip" if run.augmentation["flip"] else "--no-flip"]


def their_command(run: TrainingRun, dataset: str, folder: Path) -> list[str]:
    """transformers_trainer.py."""
    settings = {
        **{name: value for name, value in vars(run).items() if name != "size"},
        "model": str(folder / "their_model"),
        "image_size": run.size.image_size,
        "dataset": dataset,
        "output_dir": str(folder / "theirs"),
        "metrics": str(folder / "theirs.jsonl"),
        "max_steps": MAX_STEPS,
    }
    file = folder / "theirs.json"
    file.write_text(json.dumps(settings), encoding="utf-8")
    return [sys.executable, "-m", "modeling_vitcls.benchmarking.transformers_trainer", str(file)]


class Contestant:
    """A training run that is suspended but for its turns. Use it as a context manager."""

    def __init__(self, command: list[str], lines: Path, run: TrainingRun) -> None:
        self.command = command
        self.lines = lines
        self.run = run
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by __exit__

    def __enter__(self) -> Self:
        """Start, warm up, and suspend."""
        self.process = subprocess.Popen(
            self.command, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            self.wait_for_lines(WARM_UP_LINES)
            self.signal(signal.SIGSTOP)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
        self.process.wait()
        self.log.close()

    def turn(self) -> float:
        """Images per second over `lines_per_turn` lines; the line during which it was suspended does not count."""
        before = self.num_lines()
        self.signal(signal.SIGCONT)
        started = self.wait_for_lines(before + 1)
        first = self.num_lines()
        ended = self.wait_for_lines(first + self.run.lines_per_turn)
        num_images = (self.num_lines() - first) * self.run.log_every * self.run.batch_size
        self.signal(signal.SIGSTOP)
        return num_images / (ended - started)

    def wait_for_lines(self, number: int) -> float:
        """The time at which so many lines are there.

        Raises:
            ValueError: if the run ends, or nothing comes.
        """
        begun = time.perf_counter()
        while self.num_lines() < number:
            if self.process.poll() is not None or time.perf_counter() - begun > LONGEST_TURN:
                raise ValueError(f"{' '.join(self.command[1:3])} failed: {self.last_words()}")
            time.sleep(0.001)
        return time.perf_counter()

    def num_lines(self) -> int:
        """Lines written so far."""
        return self.lines.read_bytes().count(b"\n") if self.lines.is_file() else 0

    def last_words(self) -> str:
        """The last line that it printed."""
        self.log.seek(0)
        return last_words(self.log.read().decode(errors="replace"))

    def signal(self, number: signal.Signals) -> None:
        """To the run and the workers that it started."""
        os.killpg(self.process.pid, number)

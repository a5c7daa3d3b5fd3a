"""Measure and test the package on a CUDA device, and write docs/speed-gpu.md.

The parts measure the speed, train with sharded weights, and run the core tests.

    python scripts/tools/gpu.py                        all parts, under 25 minutes (`make gpu`)
    python scripts/tools/gpu.py --parts step fsdp2     some parts
    python scripts/tools/gpu.py --dry-run              all parts on the CPU, with a tiny model; nothing is written

The file is written after each part. If a part fails, the file contains the error, the other parts
are still run, and the exit status is 1. Without a CUDA device, the script prints a message and
exits with status 0.

`make gpu` installs packages first. On a machine without internet access, run the script with a
Python that has the packages, from the root of the repository: PYTHONPATH=. python3 scripts/tools/gpu.py
"""

import argparse
import os
import subprocess
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path

import torch

from modeling_vitcls.runtime.files import read_json


REPOSITORY = Path(__file__).parents[2]
OUTPUT = REPOSITORY / "docs" / "speed-gpu.md"
TESTS = [*"-q tests/model -n 4 --dist loadfile -m".split(), "not slow"]
FSDP2_TIMEOUT = 300  # seconds


def main() -> None:
    """Run the selected parts, and exit with status 1 if a part failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="Markdown file; default: docs/speed-gpu.md"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="run on the CPU with a tiny model, and write nothing"
    )
    flags = parser.parse_args()
    if not flags.dry_run and not torch.cuda.is_available():
        print(
            "PyTorch found no CUDA device: nothing was measured. --dry-run runs all parts on the "
            "CPU"
        )
        return
    device = "the CPU" if flags.dry_run else torch.cuda.get_device_name()
    sections = [
        f"# Speed on {device}\n\nWritten by `make gpu`. PyTorch {torch.__version__}, CUDA "
        f"{torch.version.cuda}."
    ]
    has_failed = False
    for name in flags.parts:
        try:
            text = PARTS[name](flags.dry_run)
        except Exception as error:  # a part that fails does not end the other measurements
            traceback.print_exc()
            # without its message, which contains local paths
            text = f"failed: {type(error).__name__}, see the output"
            has_failed = True
        sections.append(f"## {name}\n\n{text.strip()}")
        print(f"\n{sections[-1]}", flush=True)
        if not flags.dry_run:
            flags.output.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    raise SystemExit(int(has_failed))


def run(*command: object, timeout: float | None = None, **environment: str) -> None:
    """Run a program in Python, from the root of the repository."""
    subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=REPOSITORY,
        env=os.environ | environment,
        timeout=timeout,
        check=True,
    )


def measure(work: str, is_dry_run: bool) -> str:
    """Return the table of `scripts/benchmark.py` with a ViT-S/16, or a tiny model on the CPU."""
    flags = "--device cuda --backends torch compiled --batch-sizes 1 64"
    if is_dry_run:
        flags = "--host-time --rounds 1"
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "speed.md")
        run("scripts/benchmark.py", "--work", work, "--markdown", page, *flags.split())
        return page.read_text(encoding="utf-8")


def train_sharded(is_dry_run: bool) -> str:
    """Train a small model with sharded weights, and return a sentence with the loss.

    There is one process per GPU.
    """
    settings_file, num_processes = (
        ("fsdp2_cpu.yaml", 2) if is_dry_run else ("fsdp2.yaml", torch.cuda.device_count())
    )
    with tempfile.TemporaryDirectory() as folder:
        launch = f"--config_file scripts/accelerate/{settings_file} --num_processes {num_processes}"
        flags = "--config digits --max-steps 10 --no-report --overwrite --output-dir"
        run(
            *("-m", "accelerate.commands.launch", *launch.split()),
            *("-m", "modeling_vitcls.cli", "finetune", *flags.split(), folder),
            timeout=FSDP2_TIMEOUT,
        )
        results = read_json(Path(folder, "results.json"))
    return (
        f"{results['steps']} steps with {num_processes} process(es) on {results['device']}: "
        f"loss {results['loss']:.3f}"
    )


def run_tests(is_dry_run: bool) -> str:
    """Run the core tests with one thread per process; with `is_dry_run`, only collect the tests."""
    run("-m", "pytest", *TESTS, *["--collect-only"] * is_dry_run, OMP_NUM_THREADS="1")
    return "passed: `pytest tests/model -m 'not slow'`"


PARTS = {
    "inference": partial(measure, "inference"),
    "step": partial(measure, "step"),
    "fsdp2": train_sharded,
    "tests": run_tests,
}


if __name__ == "__main__":
    main()

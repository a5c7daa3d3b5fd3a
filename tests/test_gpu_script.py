"""scripts/gpu.py: the dry run on the CPU, and machines without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).parents[1]
# Part -> words in its section
PARTS = {"inference": "| torch fp32 |", "step": "| torch bf16 |", "fsdp2": "2 process", "tests": "passed"}


@pytest.mark.parametrize("flags", [("--dry-run",), ()])
def test_the_script_runs_on_a_cpu(flags: tuple[str, ...], tmp_path: Path) -> None:
    """The dry run runs all parts. Without it and without a GPU, nothing is measured; neither writes the file."""
    command = [sys.executable, str(ROOT / "scripts" / "gpu.py"), *flags, "--output", str(tmp_path / "speed.md")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    for part, words in PARTS.items():
        assert (words in ran.stdout.partition(f"## {part}\n")[2]) == bool(flags), part
    assert not (tmp_path / "speed.md").exists()

"""scripts/gpu.py without a GPU: its exit, and a dry run on the CPU."""

import sys
from pathlib import Path

import pytest
import torch
from helpers.fresh_processes import run_fresh
from helpers.scripts_in_process import run_in_process

from scripts import gpu


pytestmark = pytest.mark.integration


SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu.py"


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="this machine has a GPU: `make gpu` runs everything"
)
def test_without_a_gpu_it_ends_with_a_message(capsys: pytest.CaptureFixture) -> None:
    assert run_in_process("gpu.py") == 0
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.slow
def test_the_dry_run_passes_all_parts_on_the_cpu(tmp_path: Path) -> None:
    output = tmp_path / "speed.md"
    done = run_fresh(SCRIPT, "--dry-run", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert "failed:" not in done.stdout
    assert not output.exists()
    assert "| inference, batch 2 | torch fp32 |" in done.stdout
    assert "| step, batch 2 | timm bf16 |" in done.stdout
    assert "10 steps with 2 process(es) on CPU" in done.stdout
    assert "FSDP" in done.stdout
    assert done.stdout.partition("## tests\n")[2].lstrip().startswith("passed: ")


def test_a_failed_part_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(is_dry_run: bool) -> str:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(gpu, "PARTS", {"first": fail, "second": lambda is_dry_run: "| 1,000 |"})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run"])
    with pytest.raises(SystemExit, match="1"):
        gpu.main()
    assert (
        "## first\n\nfailed: OutOfMemoryError: out of memory\n\n## second\n\n| 1,000 |"
        in capsys.readouterr().out
    )

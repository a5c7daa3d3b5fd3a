"""scripts/tools/gpu.py without a GPU: its exit, and a dry run on the CPU."""

from pathlib import Path

import pytest
from helpers.fresh_processes import run_python


SCRIPT = Path(__file__).parents[2] / "scripts" / "tools" / "gpu.py"


@pytest.mark.slow
def test_the_dry_run_passes_all_parts_on_the_cpu(tmp_path: Path) -> None:
    output = tmp_path / "speed.md"
    done = run_python(SCRIPT, "--dry-run", "--output", str(output))
    assert "failed:" not in done.stdout
    assert not output.exists()
    assert "| inference, batch 2 | torch fp32 |" in done.stdout
    assert "| step, batch 2 | timm fp32 |" in done.stdout
    assert "10 steps with 2 process(es) on CPU" in done.stdout
    assert "FSDP" in done.stdout
    assert done.stdout.partition("## tests\n")[2].lstrip().startswith("passed: ")

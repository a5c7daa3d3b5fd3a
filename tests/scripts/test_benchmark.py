"""`python scripts/benchmark.py`."""

from pathlib import Path

import pytest
from helpers.scripts_in_process import run_in_process
from helpers.tiny_models import build_tiny_config

from modeling_vitcls import ViTCLSForImageClassification


@pytest.mark.integration
def test_the_table_has_a_row_for_each_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ViTCLSForImageClassification(build_tiny_config(num_register_tokens=2))
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "new" / "speed.md"
    flags = "--batch-sizes 2 --rounds 2 --backends torch --peers timm --precisions fp32".split()
    model_flags = ["--model", tmp_path / "model", "--markdown", file]
    assert run_in_process("benchmark.py", *model_flags, *flags) == 0
    rows = [line.split("|") for line in file.read_text().splitlines() if line.startswith("| inf")]
    assert [row[2].strip() for row in rows] == ["torch fp32", "timm fp32"]
    assert all(float(row[3]) > 0 for row in rows)

"""scripts/gpu.py: without a GPU, its exit, its pages, and its measurements on the CPU."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fresh_processes import run_fresh
from helpers.tiny_models import build_tiny_config

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.benchmarking.comparison import Comparison
from scripts import gpu


pytestmark = pytest.mark.integration


REPOSITORY = Path(__file__).parents[2]
MACHINE = {"processor": "CPU", "cores": 2, "threads": 1, "load": 0.0, "accelerator": "GPU of the test"}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: `make gpu` runs everything")


@no_gpu
def test_without_a_gpu_it_ends_with_a_message() -> None:
    ended = run_fresh(REPOSITORY / "scripts" / "gpu.py")
    assert ended.returncode == 0 and "no CUDA device" in ended.stdout


@pytest.fixture
def _tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure tiny models in small batches, without compilation, for one call per measurement."""

    def build_model(num_registers: int) -> ViTCLSForImageClassification:
        torch.manual_seed(0)
        return ViTCLSForImageClassification(build_tiny_config(num_register_tokens=num_registers))

    monkeypatch.setattr(gpu, "build_model", build_model)
    monkeypatch.setattr(gpu, "BATCH_SIZE", 2)
    monkeypatch.setattr(gpu, "COMPILE_MODES", {"eager": None})
    monkeypatch.setattr(gpu, "measure_throughput", partial(gpu.measure_throughput, min_seconds=0.0))


@pytest.mark.usefixtures("_tiny_models")
def test_measurements_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    header, _, *lines = gpu.measure_forward_passes("cpu")
    assert header == "| precision | mode | tokens | images/s | difference |"
    rows = [line.strip("| ").split(" | ") for line in lines]
    modes = [
        ("fp32", "eager"),
        ("bf16", "eager"),
        ("bf16", gpu.FLASH_MODE),
        ("fp16", "eager"),
        ("fp16", gpu.FLASH_MODE),
    ]
    assert [tuple(row[:3]) for row in rows] == [(*mode, tokens) for tokens in gpu.NUM_REGISTERS for mode in modes]
    for precision, _, _, speed, difference in rows:
        assert int(speed.replace(",", "")) > 0 and float(difference) < gpu.MAX_DIFFERENCES[precision]
    header, _, *lines = gpu.measure_training_steps("cpu")
    assert (
        header == "| mode | tokens | images/s | MFU |" and len(lines) == 2 and gpu.FAILURE_PREFIX not in "".join(lines)
    )
    monkeypatch.setattr(gpu, "MAX_DIFFERENCES", gpu.MAX_DIFFERENCES | {"fp32": -1.0})
    _, _, failed, *others = gpu.measure_forward_passes("cpu")
    assert failed.startswith("| fp32 | eager | 197 tokens | failed: ValueError: the logits differ from the CPU logits")
    assert sum(gpu.FAILURE_PREFIX in line for line in others) == 1 and len(others) == 9  # one row per number of tokens


def test_a_failed_part_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail() -> Iterator[str]:
        raise torch.OutOfMemoryError("CUDA | out of memory\nmore")

    def table() -> Iterator[str]:
        yield from (*gpu.format_header("mode", "images/s"), gpu.format_row("eager", "1,000"))

    monkeypatch.setattr(gpu, "PARTS", {"first": ("First", fail), "second": ("Second", table)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU of the test")
    file = tmp_path / "speed.md"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(file)])
    with pytest.raises(SystemExit, match="1"):
        gpu.main()
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# Speed on GPU of the test\n\nWritten by `make gpu`.")
    assert "## First\n\n\nfailed: OutOfMemoryError: CUDA / out of memory\n\n## Second\n" in text
    assert text.endswith("| mode | images/s |\n| --- | --- |\n| eager | 1,000 |\n")
    assert text.partition("\n\n## ")[2] in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(file), "--parts", "second"])
    with pytest.raises(SystemExit, match="0"):
        gpu.main()


def test_a_failed_row_does_not_stop_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_benchmarks(work: tuple[str, ...], rows: tuple[str, ...], settings: Any) -> Iterator[Comparison]:
        if rows == ("fp32, batch 8",):
            raise ValueError("the outputs differ")
        yield Comparison(work[0], rows[0], "timm", [2.0, 2.0], [1.0, 1.0], 0.0, {"device": settings.device})

    monkeypatch.setattr(gpu, "run_benchmarks", run_benchmarks)
    monkeypatch.setattr("modeling_vitcls.benchmarking.tables.get_machine_properties", lambda: MACHINE)
    failed, empty, table = gpu.compare_models("inference")
    assert failed == "fp32, batch 8: failed: ValueError: the outputs differ" and not empty
    assert "| inference: fp32, batch 1 | 2.0 | timm 2.00 (2.00 to 2.00) |" in table and "GPU of the test" in table


@pytest.mark.slow
def test_sharded_training() -> None:
    (sentence,) = gpu.run_fsdp2(REPOSITORY / "scripts" / "accelerate" / "fsdp2_cpu.yaml", 2)
    assert sentence.startswith("10 steps with 2 process(es) on CPU") and "FSDP" in sentence

"""scripts/gpu.py: without a GPU, its exit and its measurements on the CPU."""

from pathlib import Path

import pytest
import torch
from fresh_processes import run_fresh
from tiny_models import build_tiny_config

from modeling_vitcls import ViTCLSForImageClassification
from scripts import gpu


REPOSITORY = Path(__file__).parents[2]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: `make gpu` runs everything")


@no_gpu
def test_without_a_gpu_it_ends_with_a_message() -> None:
    ended = run_fresh(REPOSITORY / "scripts" / "gpu.py")
    assert ended.returncode == 0 and "no CUDA device" in ended.stdout


@pytest.fixture
def _tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure tiny models in small batches, without compilation."""

    def build_model(num_registers: int) -> ViTCLSForImageClassification:
        torch.manual_seed(0)
        return ViTCLSForImageClassification(build_tiny_config(num_register_tokens=num_registers))

    monkeypatch.setattr(gpu, "build_model", build_model)
    monkeypatch.setattr(gpu, "BATCH_SIZE", 2)
    monkeypatch.setattr(gpu, "COMPILE_MODES", {"eager": None})


@pytest.mark.usefixtures("_tiny_models")
def test_measurements_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(gpu.measure_forward_passes("cpu"))
    assert [row[:3] for row in rows[:5]] == [
        ("fp32", "eager", "197 tokens"),
        ("bf16", "eager", "197 tokens"),
        ("bf16", gpu.FLASH_MODE, "197 tokens"),
        ("fp16", "eager", "197 tokens"),
        ("fp16", gpu.FLASH_MODE, "197 tokens"),
    ]
    assert len(rows) == 10 and len(list(gpu.measure_steps("cpu"))) == 2
    monkeypatch.setattr(gpu, "LIMITS", {"fp32": -1.0})
    with pytest.raises(ValueError, match="logits differ from the CPU logits"):
        next(gpu.measure_forward_passes("cpu"))


@pytest.mark.slow
def test_sharded_training() -> None:
    sentence = gpu.run_fsdp2(REPOSITORY / "scripts" / "accelerate" / "fsdp2_cpu.yaml", 2)
    assert sentence.startswith("10 steps with 2 process(es) on CPU") and "FSDP" in sentence

"""DeepSpeed ZeRO-2 and ZeRO-3 train like DDP, with the real `accelerate launch`, on two CPU processes.

The tests are slow, and skipped if DeepSpeed is not installed, because the package does not require it.
"""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_accelerate_configs import CONFIGS, STEPS, TINY, assert_same_run, launch, read_json, read_metrics

from modeling_vitcls import ViTCLSForImageClassification


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
WITHOUT_EMA = [flag for flag in STEPS if flag not in ("--ema-decay", 0.9)]
# DeepSpeed keeps small tensors whole on every process, which would be all tensors of this model.
ZERO_3_OF_ALL = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def write_config(folder: Path, stage: int, precision: str = "no") -> str:
    """Write the repository's file for a stage, changed to two processes and float32."""
    settings: dict[str, Any] = yaml.safe_load((CONFIGS / f"deepspeed_zero{stage}.yaml").read_text(encoding="utf-8"))
    settings |= {"num_processes": 2, "mixed_precision": precision}
    if stage == 3:
        (folder / "zero3.json").write_text(json.dumps(ZERO_3_OF_ALL), encoding="utf-8")
        settings["deepspeed_config"] = {
            "deepspeed_config_file": str(folder / "zero3.json"),
            "zero3_init_flag": settings["deepspeed_config"]["zero3_init_flag"],
        }
        # the launcher does not accept it together with a DeepSpeed file; our flag is used
        del settings["mixed_precision"]
    file = folder / "launch.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(
    ("script", "stage", "flags"),
    [("finetune.py", 2, STEPS), ("finetune.py", 3, WITHOUT_EMA), ("pretrain.py", 3, WITHOUT_EMA)],
    ids=["zero2-ema", "zero3", "pretraining-zero3"],
)
def test_it_trains_like_ddp(script: str, stage: int, flags: list[Any], tmp_path: Path) -> None:
    ddp, zero = tmp_path / "ddp", tmp_path / "zero"
    launch("ddp_cpu.yaml", script, *TINY, *flags, "--output-dir", ddp)
    output = launch(write_config(tmp_path, stage), script, *TINY, *flags, "--output-dir", zero)
    assert_same_run(ddp, zero, tolerance=1e-4)
    assert output.count("no checkpoints are saved") == output.count("WARNING: ") == 1
    assert not (zero / "checkpoints").exists()
    results, others = read_json(zero / "results.json"), read_json(ddp / "results.json")
    assert "sharded by DeepSpeed" in results["device"] and results["num_processes"] == 2
    for name in ("num_parameters", "num_images", "steps"):
        assert results[name] == others[name]
    for token, moved in others["token_movement"].items():
        assert results["token_movement"][token] == pytest.approx(moved, abs=1e-5) and moved > 0


@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_is_used_only_in_the_forward_pass(stage: int, tmp_path: Path) -> None:
    """Check also that the saved model loads."""
    folder = tmp_path / "model"
    flags = [*TINY, *WITHOUT_EMA, "--mixed-precision", "bf16", "--output-dir", folder]
    output = launch(write_config(tmp_path, stage), "finetune.py", *flags)
    assert "mixed precision: bf16" in output and read_json(folder / "results.json")["mixed_precision"] == "bf16"
    assert all(math.isfinite(record["gradient_norm"]) for record in read_metrics(folder))
    saved = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in saved.values())
    model, info = ViTCLSForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name]), name


@pytest.mark.parametrize(
    ("stage", "flags"),
    [(2, ["--resume"]), (2, ["--compile"]), (2, ["--mixed-precision", "fp16"]), (3, ["--ema-decay", 0.9])],
    ids=lambda value: str(value),
)
def test_unsupported_options_are_a_one_line_error(stage: int, flags: list[Any], tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        launch(write_config(tmp_path, stage), "finetune.py", *TINY, *flags, "--output-dir", tmp_path / "model")
    printed = str(caught.value)
    assert "error: " in printed and "supported under DeepSpeed" in printed
    assert 'finetune.py", line' not in printed  # no traceback except the launcher's
    assert not (tmp_path / "model").exists()

"""scripts/accelerate/*.yaml: all files are valid, and the files for CPUs train.

`accelerate launch` starts the runs. DDP and FSDP2 on two processes must be equal, with gradient
accumulation and evaluations during training.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from helpers.doc_pages import ROOT
from helpers.fresh_processes import SCRIPT_ENVIRONMENT, run_python
from helpers.tiny_options import forget_end, read_metrics
from pytest import approx
from safetensors.torch import load_file
from torch.testing import assert_close

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.runtime.files import read_json


CONFIGS = ROOT / "scripts/accelerate"
FILES = sorted(CONFIGS.glob("*.yaml"))
NUM_HELD_OUT_DIGITS = 359
RUN = (
    "--model vitcls-tiny --dataset digits --image-size 32 --patch-size 8 --hidden-size 32 "
    "--num-hidden-layers 2 --num-attention-heads 2 --intermediate-size 64 --num-cls-tokens 1 "
    "--num-register-tokens 2 --num-workers 0 --crop-scale 1 --no-flip --no-report"
).split()
# An epoch has two steps of 2 x 2 x 180 images: three epochs, evaluated after each.
STEPS = (
    "--max-steps 6 --batch-size 180 --gradient-accumulation-steps 2 "
    "--learning-rate 3e-3 --keep-checkpoints 2"
).split()


def launch(config: str, folder: Path, *flags: object) -> str:
    """Train with a configuration, and return the output."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", CONFIGS / config]
    program = [ROOT / "scripts/finetune.py", *RUN, "--output-dir", folder, *flags]
    # FSDP2 shards plain layers. Lean ones round differently, and AdamW enlarges that in each step.
    ran = run_python(
        *launcher,
        *program,
        environment=os.environ | SCRIPT_ENVIRONMENT | {"VITCLS_CPU_KERNELS": "0"},
    )
    return ran.stdout + ran.stderr


def assert_same_run(one: Path, other: Path, tolerance: float) -> None:
    """Check that two runs logged equal metrics and have equal weights."""
    for first, second in zip(read_metrics(one), read_metrics(other), strict=True):
        assert first.keys() == second.keys()
        for name in first.keys() - {"images_per_second"}:
            assert second[name] == approx(first[name], abs=tolerance, rel=tolerance), (
                first["step"],
                name,
            )
    assert_close(load_weights(other), load_weights(one), atol=tolerance, rtol=0)


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights that two runs share.

    A sharded run stores no class statistics. A bias of the keys adds the same number to all scores
    of a query, which softmax removes: its gradient is rounding, which AdamW scales to whole steps.
    """
    weights = load_file(folder / "model.safetensors")
    # The best temperature is at a flat minimum, where rounding moves it: weights as they were trained
    temperature = read_json(folder / "results.json")["calibration"]["temperature"]
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] *= temperature
    return {
        name: value
        for name, value in weights.items()
        if "class_distance" not in name and not name.endswith("k_proj.bias")
    }


def train_two(config: str, folder: Path) -> Path:
    """Train on two CPU processes, without warnings, and return the folder of the model."""
    output = launch(config, folder, *STEPS)
    assert "warning" not in output.lower()
    return folder


@pytest.fixture(scope="module")
def fsdp2(module_path: Path) -> Path:
    """Train on two CPU processes, each with a shard of the weights."""
    return train_two("fsdp2_cpu.yaml", module_path / "fsdp2")


# The files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_all_keys_are_known_to_accelerate(file: Path) -> None:
    """The launcher rejects unknown keys of the file, but ignores unknown keys of its sections."""
    load_config_from_file(str(file))
    flags = {action.dest for action in launch_command_parser()._actions}
    settings = yaml.safe_load(file.read_text())
    assert [name for name in settings.get("fsdp_config", {}) if name not in flags] == []


# Runs ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fsdp2_trains_like_ddp(fsdp2: Path, tmp_path: Path) -> None:
    ddp = train_two("ddp_cpu.yaml", tmp_path / "ddp")  # each process has the whole model
    assert_same_run(ddp, fsdp2, tolerance=1e-4)

    for folder in (ddp, fsdp2):
        results = read_json(folder / "results.json")
        assert results["num_processes"] == 2
        assert results["num_images"] == NUM_HELD_OUT_DIGITS
        assert all(moved > 0 for moved in results["token_movement"].values())
        evaluated = [
            record["step"] for record in read_metrics(folder) if "held_out_accuracy" in record
        ]
        assert evaluated == [2, 4, 6]
    assert "weights sharded by FSDP" in read_json(fsdp2 / "results.json")["device"]
    assert "parts" not in read_json(ddp / "results.json")["device"]

    losses = [record["loss"] for record in read_metrics(fsdp2)]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_the_model_trained_with_fsdp2_loads(fsdp2: Path) -> None:
    model, info = ViTCLSForImageClassification.from_pretrained(fsdp2, output_loading_info=True)
    assert not any(info.values())
    saved = load_file(fsdp2 / "model.safetensors")
    trained = load_file(fsdp2 / "checkpoints/step-00000006/model.safetensors")
    temperature = read_json(fsdp2 / "results.json")["calibration"]["temperature"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name]), name
        if name.startswith("classifier"):
            assert_close(parameter.data, trained[name] / temperature)
        else:
            assert torch.equal(parameter, trained[name]), name


@pytest.mark.slow
def test_a_run_with_fsdp2_is_resumed_with_ddp(fsdp2: Path, tmp_path: Path) -> None:
    """Resume after four of six steps.

    DDP sums the gradients in another order; test_resume.py resumes with FSDP2.
    """
    folder = shutil.copytree(fsdp2, tmp_path / "resumed")
    forget_end(folder, 6)
    assert "after step 4 of 6" in launch("ddp_cpu.yaml", folder, *STEPS, "--resume")
    assert_same_run(fsdp2, folder, tolerance=1e-9)

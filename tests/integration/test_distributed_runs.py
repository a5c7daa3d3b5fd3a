"""Training on several processes: two processes on this machine's CPU equal one process; settings of DeepSpeed.

The checks are in distributed_worker.py. They run once, in the same two processes.
"""

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import DistributedType
from helpers.distributed_worker import CHECKS, NUM_PROCESSES
from helpers.tiny_models import raises_one_line
from helpers.warm_processes import run_checks

from modeling_vitcls.distributed import (
    check_deepspeed_flags,
    configure_deepspeed,
    get_precision,
    set_deepspeed_training_options,
)
from modeling_vitcls.options import RunOptions, TrainingOptions


pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return check -> error, "" if it passed."""
    return run_checks("distributed_worker.py", tmp_path_factory.mktemp("distributed"), NUM_PROCESSES)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_several_processes_equal_one(name: str, report: dict[str, str]) -> None:
    if report[name]:
        pytest.fail(report[name], pytrace=False)


# Settings of DeepSpeed, without DeepSpeed. test_deepspeed.py trains with DeepSpeed.


def build_deepspeed_accelerator(stage: int = 2, precision: str = "bf16") -> Any:
    """Return an object with the settings that Accelerate has for DeepSpeed."""
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={"bf16": {"enabled": precision == "bf16"}})
    return SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        mixed_precision=precision,
        deepspeed_plugin=plugin,
        num_processes=3,
    )


@pytest.mark.parametrize(("precision", "uses_autocast"), [("bf16", True), ("no", False)])
def test_deepspeed_keeps_float32_weights_and_computes_in_the_given_precision(
    precision: str, uses_autocast: bool
) -> None:
    accelerator = build_deepspeed_accelerator(precision=precision)
    configure_deepspeed(accelerator)
    settings = accelerator.deepspeed_plugin.deepspeed_config
    assert settings["bf16"]["enabled"] is False
    assert settings["torch_autocast"]["enabled"] is uses_autocast
    assert get_precision(accelerator) == precision
    accelerator.mixed_precision = "no"  # DeepSpeed computes in the precision of its own configuration
    assert get_precision(accelerator) == precision


def test_deepspeed_uses_the_batch_size_and_gradient_norm_of_the_run() -> None:
    accelerator = build_deepspeed_accelerator()
    training = TrainingOptions(batch_size=8, gradient_accumulation_steps=5, max_gradient_norm=0.5)
    set_deepspeed_training_options(accelerator, training)
    settings = accelerator.deepspeed_plugin.deepspeed_config
    assert settings["train_micro_batch_size_per_gpu"] == 8 and settings["gradient_accumulation_steps"] == 5
    assert settings["train_batch_size"] == 8 * 5 * 3 and settings["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    ("stage", "training", "run", "flag"),
    [
        (2, {}, {"resume": True}, "--resume"),
        (3, {}, {"resume": True}, "--resume"),
        (2, {"compile": True}, {}, "--compile"),
        (3, {"ema_decay": 0.9}, {}, "--ema-decay"),
        (2, {"ema_decay": 0.9}, {}, None),
        (3, {}, {}, None),
    ],
)
def test_unsupported_flags_with_deepspeed_are_errors(
    stage: int, training: dict[str, Any], run: dict[str, Any], flag: str | None
) -> None:
    arguments = build_deepspeed_accelerator(stage), TrainingOptions(**training), RunOptions(**run)
    if flag is None:
        check_deepspeed_flags(*arguments)
        return
    with raises_one_line(f"{flag} is not supported with DeepSpeed ZeRO-{stage}. Remove {flag}, or use FSDP2"):
        check_deepspeed_flags(*arguments)


@pytest.mark.parametrize(
    ("fields", "words"), [({"stage": 1}, "zero_stage 1 is not supported"), ({"precision": "fp16"}, "fp16")]
)
def test_unsupported_settings_of_deepspeed_are_errors(fields: dict[str, Any], words: str) -> None:
    with raises_one_line(words):
        configure_deepspeed(build_deepspeed_accelerator(**fields))

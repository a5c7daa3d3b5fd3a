"""Training on several processes: two processes on this machine's CPU equal one process; settings of DeepSpeed.

The checks are in distributed_worker.py. They run once, in the same two processes.
"""

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import DistributedType
from distributed_worker import CHECKS, NUM_PROCESSES
from tiny_models import raises_one_line
from warm_processes import run_checks

from modeling_vitcls.distributed import configure_deepspeed


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
        distributed_type=DistributedType.DEEPSPEED, mixed_precision=precision, deepspeed_plugin=plugin
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


@pytest.mark.parametrize(
    ("fields", "words"), [({"stage": 1}, "zero_stage 1 is not supported"), ({"precision": "fp16"}, "fp16")]
)
def test_unsupported_settings_of_deepspeed_are_errors(fields: dict[str, Any], words: str) -> None:
    with raises_one_line(words):
        configure_deepspeed(build_deepspeed_accelerator(**fields))

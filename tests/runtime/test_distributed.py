"""Settings of the Accelerator that depend on the device and on `accelerate launch`."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from helpers.tiny_models import build_tiny_config, raises_one_line
from pytest import MonkeyPatch
from torch import nn

from modeling_vitcls.runtime import distributed
from modeling_vitcls.runtime.distributed import (
    build_accelerator,
    set_mixed_precision,
)


def test_deepspeed_is_an_error(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with raises_one_line("DeepSpeed", "fsdp2.yaml"):
        build_accelerator()


@pytest.mark.parametrize("is_fsdp2", [False, True])
def test_only_version_2_of_fsdp_is_supported(is_fsdp2: bool, monkeypatch: MonkeyPatch) -> None:
    """An Accelerator with FSDP cannot be built without a launcher."""
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=is_fsdp2)
    monkeypatch.setattr(distributed, "Accelerator", lambda **arguments: accelerator)
    with nullcontext() if is_fsdp2 else raises_one_line("fsdp_version"):
        build_accelerator()


# Precision ----------------------------------------------------------------------------------------


def choose(
    monkeypatch: MonkeyPatch, width: int, is_supported: bool = True, **arguments: Any
) -> Any:
    """Return the accelerator with the precision selected for a model of a width."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(distributed, "has_bfloat16", lambda device: is_supported)
    accelerator = build_accelerator()
    set_mixed_precision(accelerator, "auto", build_tiny_config(hidden_size=width), **arguments)
    return accelerator


@pytest.mark.parametrize(("width", "is_supported"), [(192, True), (176, True), (768, False)])
def test_bfloat16_is_selected_for_large_models_on_cpus_with_bfloat16(
    width: int, is_supported: bool, monkeypatch: MonkeyPatch
) -> None:
    accelerator = choose(monkeypatch, width, is_supported)
    expected = torch.bfloat16 if (width, is_supported) == (192, True) else torch.float32
    with accelerator.autocast():
        assert nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == expected
    model = accelerator.prepare(nn.Linear(2, 2))
    assert model(torch.ones(2, 2)).dtype == torch.float32  # outputs are float32 in any precision
    assert accelerator.mixed_precision == ("bf16" if expected == torch.bfloat16 else "no")


def test_the_precision_of_the_launcher_is_kept(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "has_bfloat16", lambda device: True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    accelerator = build_accelerator()
    assert set_mixed_precision(accelerator, "auto", build_tiny_config(hidden_size=768)) == "no"
    assert accelerator.mixed_precision == "no"


def test_a_resumed_run_in_float32_stays_in_float32_where_bfloat16_exists(
    monkeypatch: MonkeyPatch,
) -> None:
    assert choose(monkeypatch, 192, recorded="no").mixed_precision == "no"


def test_later_accelerators_of_a_process_may_have_another_precision(
    monkeypatch: MonkeyPatch,
) -> None:
    choose(monkeypatch, 192)
    assert build_accelerator(mixed_precision="no").mixed_precision == "no"
    assert build_accelerator(mixed_precision="bf16").mixed_precision == "bf16"
    assert choose(monkeypatch, 16).mixed_precision == "no"

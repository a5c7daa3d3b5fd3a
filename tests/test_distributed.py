"""Settings of the Accelerator that depend on the device and the configuration of `accelerate launch`."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType, PartialState
from helpers.tiny_models import build_tiny_config, raises_one_line

from modeling_vitcls import ViTCLSForImageClassification, distributed
from modeling_vitcls.distributed import build_accelerator, configure_layer_sharding


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replace the Accelerator, which cannot be built without a launcher, and return the arguments of its constructor.
    The argument "result" contains its attributes."""
    found: dict[str, Any] = {"result": {"distributed_type": DistributedType.NO}}

    def build(**arguments: Any) -> SimpleNamespace:
        found.update(arguments)
        return SimpleNamespace(**found["result"])

    monkeypatch.setattr(distributed, "Accelerator", build)
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.mark.parametrize("has_gpu", [False, True])
def test_the_device(has_gpu: bool, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
    accelerator: Any = build_accelerator(3, "bf16", trackers=("json",), tracker_folder=tmp_path)
    (handler,) = arguments["kwargs_handlers"]
    assert arguments["cpu"] == (not has_gpu)
    assert handler.timeout.total_seconds() == 12 * 3600
    assert (arguments["mixed_precision"], arguments["log_with"]) == ("bf16", ["json"])
    assert accelerator.gradient_accumulation_steps == 3
    assert arguments["project_config"].logging_dir == str(tmp_path)


def test_fsdp_on_cpus_is_enabled(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate ignores FSDP on CPUs."""
    plugins: list[Any] = []

    class Plugin(SimpleNamespace):
        def __init__(self) -> None:
            super().__init__(precision=None)
            plugins.append(self)

        def set_mixed_precision(self, precision: str) -> None:
            self.precision = precision

    monkeypatch.setattr(distributed, "FullyShardedDataParallelPlugin", Plugin)
    result = {"distributed_type": DistributedType.MULTI_CPU, "is_fsdp2": True}
    for number, (use_fsdp, precision) in enumerate(((False, "bf16"), (True, "no"), (True, "bf16"))):
        arguments["result"] = result | {"mixed_precision": precision, "state": SimpleNamespace()}
        if use_fsdp:
            monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        accelerator: Any = build_accelerator()
        assert len(plugins) == number
        if use_fsdp:
            assert accelerator.state.fsdp_plugin is plugins[-1]
            assert plugins[-1].precision == (None if precision == "no" else precision)
            assert accelerator.state.distributed_type == DistributedType.FSDP
            assert PartialState().distributed_type == DistributedType.FSDP


@pytest.mark.parametrize("is_fsdp2", [False, True])
def test_only_version_2_of_fsdp_is_supported(
    is_fsdp2: bool, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # Accelerate has enabled FSDP on GPUs
    arguments["result"] = {"distributed_type": DistributedType.FSDP, "is_fsdp2": is_fsdp2}
    with nullcontext() if is_fsdp2 else raises_one_line("fsdp_version"):
        build_accelerator()


def test_deepspeed_is_an_error(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with raises_one_line("DeepSpeed", "fsdp2.yaml"):
        build_accelerator()


def test_missing_trackers_are_errors() -> None:
    with raises_one_line("--log-with", "no_tracker"):
        build_accelerator(trackers=("json", "no_tracker"))


def test_models_are_sharded_by_layer_unless_the_configuration_names_modules() -> None:
    model = ViTCLSForImageClassification(build_tiny_config(layer_type="parallel"))
    names = {type(layer).__name__ for layer in model.vitcls.layers}
    for configured, expected in ((None, sorted(names)), (["Linear"], ["Linear"])):
        plugin = SimpleNamespace(transformer_cls_names_to_wrap=configured)
        configure_layer_sharding(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), model)  # type: ignore[arg-type]
        assert plugin.transformer_cls_names_to_wrap == expected
    configure_layer_sharding(SimpleNamespace(state=SimpleNamespace()), model)  # type: ignore[arg-type]

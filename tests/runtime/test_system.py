"""Memory, and the names of devices, processors and libraries."""

import importlib.metadata
import platform
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate import DistributedType

from modeling_vitcls.runtime.system import describe_device, get_peak_memory, get_versions
from modeling_vitcls.version import __version__


def test_the_peak_memory_of_this_process_or_of_a_gpu_is_in_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peak = get_peak_memory(torch.device("cpu"))
    assert 0.9 * psutil.Process().memory_info().rss < peak < psutil.virtual_memory().total
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: device.index)
    assert get_peak_memory(torch.device("cuda:1")) == 1


def test_versions_are_those_of_installed_libraries() -> None:
    versions = get_versions("numpy", "not-a-library")
    libraries = ("torchvision", "transformers", "accelerate", "numpy")
    expected = {name: importlib.metadata.version(name) for name in libraries}
    expected |= {
        "modeling_vitcls": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    assert versions == expected


def test_a_device_is_described_by_its_threads_or_name_and_its_sharding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    threads = f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    for name, kind, expected in (
        ("cpu", DistributedType.NO, f"{threads} per process"),
        ("cpu", DistributedType.FSDP, f"{threads} per process, weights sharded by FSDP"),
        ("mps", DistributedType.NO, "mps"),
        ("cuda:1", DistributedType.FSDP, "GPU 1, weights sharded by FSDP"),
    ):
        accelerator: Any = SimpleNamespace(device=torch.device(name), distributed_type=kind)
        assert describe_device(accelerator) == expected

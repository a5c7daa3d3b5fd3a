"""Memory, and the names of devices, processors and libraries."""

import importlib.metadata
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate import DistributedType

from modeling_vitcls.system import (
    describe_device,
    format_device_name,
    get_peak_memory,
    get_processor_name,
    get_versions,
)
from modeling_vitcls.version import __version__


def test_the_peak_memory_of_this_process_is_in_bytes() -> None:
    peak = get_peak_memory(torch.device("cpu"))
    assert 0.9 * psutil.Process().memory_info().rss < peak < psutil.virtual_memory().total


def test_versions_of_installed_libraries() -> None:
    versions = get_versions("numpy", "not-a-library")
    libraries = ("torchvision", "transformers", "accelerate", "numpy")
    expected = {name: importlib.metadata.version(name) for name in libraries}
    expected |= {"modeling_vitcls": __version__, "python": platform.python_version(), "torch": torch.__version__}
    assert versions == expected


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="needs /proc/cpuinfo")
def test_the_name_of_the_processor() -> None:
    lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()]
    names = {fields[1].strip() for fields in lines if fields[0].strip() == "model name"}
    assert get_processor_name() in (names or {platform.processor(), platform.machine()})


def test_names_of_devices() -> None:
    threads = f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    for name, kind, expected in (
        ("cpu", DistributedType.NO, f"{threads} per process"),
        ("cpu", DistributedType.FSDP, f"{threads} per process, weights sharded by FSDP"),
        ("mps", DistributedType.NO, "mps"),
    ):
        accelerator: Any = SimpleNamespace(device=torch.device(name), distributed_type=kind)
        assert describe_device(accelerator) == expected
    assert format_device_name(torch.device("cpu")) == threads
    assert format_device_name(torch.device("mps")) == "mps"

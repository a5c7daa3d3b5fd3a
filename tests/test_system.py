"""Reuse of memory of freed tensors, power and energy, and the names of devices, processors and libraries."""

import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate import DistributedType
from helpers.fresh_processes import run_fresh

from modeling_vitcls import system
from modeling_vitcls.system import (
    describe_device,
    estimate_energy,
    format_device_name,
    get_peak_memory,
    get_power_limit,
    get_processor_name,
    get_versions,
    keep_freed_memory,
)
from modeling_vitcls.version import __version__


needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no such settings")

# Repeatedly allocates and frees three tensors of 40 MB, and prints the number of pages that the system cleared for
# them.
CODE = """
import resource
import sys
import torch
from modeling_vitcls.distributed import build_accelerator

if "as it is" not in sys.argv:
    build_accelerator()

def work():
    several = [torch.ones(10_000_000) for _ in range(3)]

work()
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_cleared_pages(*arguments: str, **variables: str) -> int:
    ran = run_fresh("-c", CODE, *arguments, environment={**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables})
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


@pytest.mark.slow
@needs_glibc
def test_memory_is_kept() -> None:
    assert count_cleared_pages() < 1_000
    assert count_cleared_pages("as it is") > 1_000


@needs_glibc
def test_settings_of_the_user_are_kept() -> None:
    assert count_cleared_pages(MALLOC_TRIM_THRESHOLD_="131072") > 1_000


# nvidia-smi of a machine with two GPUs
NVIDIA_SMI = """#!/bin/sh
test "$2 $3" = "--query-gpu=power.limit --format=csv,noheader,nounits" || exit 2
case "$1" in
    --id=GPU-first) echo 350.00 ;;
    --id=GPU-second) echo "[N/A]" ;;
    *) echo 100.00; exit 6 ;;
esac
"""


def test_the_power_of_a_gpu_is_the_limit_of_its_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(["first", "first", "second", "third", "first"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=next(names)))
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    device = torch.device("cuda", 0)
    assert get_power_limit(device) == 350.0
    estimate = estimate_energy(7200.0, 4, device)
    assert estimate is not None
    assert (estimate["kilowatt_hours"], estimate["watts_per_process"]) == (2.8, 350.0)
    assert estimate["assumption"].startswith("each GPU ran at its power limit throughout the run")
    assert get_power_limit(device) is None  # the driver does not know the limit
    assert get_power_limit(device) is None  # the program fails
    (tmp_path / "nvidia-smi").unlink()
    assert estimate_energy(7200.0, 4, device) is None


def test_the_power_of_a_cpu_depends_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert estimate_energy(10.0, 4, torch.device("cpu")) == {
        "kilowatt_hours": 0.000667,  # 6 threads of 10 W in 4 processes
        "watts_per_process": 60.0,
        "assumption": "6 threads per process drew 10 W each throughout the run; the rest of the machine is not "
        "counted",
    }
    assert estimate_energy(10.0, 4, torch.device("mps")) is None


@needs_glibc
@pytest.mark.parametrize(
    ("variable", "settings"), [("", [(-4, 0), (-1, -1)]), ("MALLOC_ARENA_MAX", []), ("GLIBC_TUNABLES", [])]
)
def test_freed_memory_is_kept_unless_the_user_configures_malloc(
    variable: str, settings: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[int, int]] = []
    mallopt = SimpleNamespace(mallopt=lambda *setting: found.append(setting))
    monkeypatch.setattr(system.ctypes, "CDLL", lambda name: mallopt)
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES", "THP_"))]:
        monkeypatch.delenv(name)
    if variable:
        monkeypatch.setenv(variable, "1")
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    keep_freed_memory()
    assert found == settings and os.environ["THP_MEM_ALLOC_ENABLE"] == ("0" if variable else "1")


def test_the_peak_is_the_throughput_of_the_fastest_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, shapes = iter([0.5, 0.25]), []

    def measure(function: Callable[[], torch.Tensor], device: torch.device) -> float:
        product = function()
        shapes.append((product.shape, product.dtype))
        return next(seconds)

    monkeypatch.setattr(system, "measure_fastest_call", measure)
    monkeypatch.setattr(system, "MATRIX_SIZES", {"cpu": 24})
    assert system.measure_gemm_peak("cpu", torch.bfloat16) == 2 * 24**3 / (
        0.25 if torch.backends.mkldnn.is_available() else 0.5
    )
    assert set(shapes) == {((24, 24), torch.bfloat16)}


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
        ("mps", DistributedType.DEEPSPEED, "mps, sharded by DeepSpeed"),
    ):
        accelerator: Any = SimpleNamespace(device=torch.device(name), distributed_type=kind)
        assert describe_device(accelerator) == expected
    assert format_device_name(torch.device("cpu")) == threads
    assert format_device_name(torch.device("mps")) == "mps"

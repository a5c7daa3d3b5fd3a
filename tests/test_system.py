"""Training on CPUs reuses memory of freed tensors."""

import os
import platform

import pytest
from fresh_processes import run_fresh


pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no such settings")

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
def test_memory_is_kept() -> None:
    assert count_cleared_pages() < 1_000
    assert count_cleared_pages("as it is") > 1_000


def test_settings_of_the_user_are_kept() -> None:
    assert count_cleared_pages(MALLOC_TRIM_THRESHOLD_="131072") > 1_000

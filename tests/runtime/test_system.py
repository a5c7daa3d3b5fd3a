"""Memory, and the names of devices, processors and libraries."""

import psutil
import pytest
import torch

from modeling_vitcls.runtime.system import get_peak_memory


def test_the_peak_memory_of_this_process_or_of_a_gpu_is_in_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peak = get_peak_memory(torch.device("cpu"))
    assert 0.9 * psutil.Process().memory_info().rss < peak < psutil.virtual_memory().total
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: device.index)
    assert get_peak_memory(torch.device("cuda:1")) == 1

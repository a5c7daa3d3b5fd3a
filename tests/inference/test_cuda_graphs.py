"""CUDA graphs of repeated passes, with a stand-in for the graph: it repeats the recorded call."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from pytest import LogCaptureFixture, MonkeyPatch
from torch.testing import assert_close

from modeling_vitcls.inference import cuda_graphs
from modeling_vitcls.inference.cuda_graphs import MAX_GRAPHS, GraphedFunction


class Function:
    """A function that writes to the same memory in each replay, as a graph does."""

    def __init__(self) -> None:
        self.calls: list[torch.Tensor] = []
        self.output = torch.empty(0)

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls.append(images)
        self.output = images.flatten(1).sum(dim=1)
        return {"sums": self.output}

    def replay(self) -> None:
        self.output.copy_(self.calls[-1].flatten(1).sum(dim=1))


@pytest.fixture
def function(monkeypatch: MonkeyPatch) -> Function:
    function = Function()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: function)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **settings: nullcontext())
    return function


def compute_sums(function: Any, *sizes: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Compute batches of these sizes, and return the outputs, read afterwards, and the right ones."""
    graphed = GraphedFunction(function, torch.device("cuda"))
    batches = [torch.rand(size, 3, 4, 4) for size in sizes]
    outputs = [graphed(images)["sums"] for images in batches]
    return outputs, [images.flatten(1).sum(dim=1) for images in batches]


def test_the_second_batch_of_a_shape_is_recorded_and_a_smaller_last_one_is_computed(
    function: Function,
) -> None:
    assert_close(*compute_sums(function, 4, 4, 4, 4, 3))
    assert [len(images) for images in function.calls] == [4, 4, 3]


def test_images_of_many_shapes_do_not_fill_the_memory(function: Function) -> None:
    sizes = range(1, MAX_GRAPHS + 3)
    compute_sums(function, *sizes, *sizes, *sizes)
    assert len(function.calls) == 2 * len(sizes) + 2  # the last two shapes are never recorded


def test_a_function_that_cannot_be_recorded_is_called_and_one_line_says_so(
    function: Function, monkeypatch: MonkeyPatch, caplog: LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(cuda_graphs, "record_graph", fail)
    assert_close(*compute_sums(function, 4, 4, 4))
    assert [record.getMessage() for record in caplog.records] == [
        "without CUDA graphs, because this model cannot be recorded: operation not permitted"
    ]


def test_nothing_is_recorded_if_the_environment_says_so(
    function: Function, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setenv("VITCLS_CUDA_GRAPHS", "0")
    compute_sums(function, 4, 4, 4)
    assert len(function.calls) == 3

"""The tiers of tests: which tests are marked as integration, and which --quick selects."""

import multiprocessing
import subprocess
from typing import Any

import conftest
import pytest
import torch
from helpers.fresh_processes import run_fresh

from modeling_vitcls.training import task


def start_a_process() -> Any:
    return subprocess.run(["true"], check=True)


def start_through_a_function() -> Any:
    return [start_a_process() for _ in range(2)]


def start_in_a_nested_function() -> Any:
    def inner() -> Any:
        return run_fresh("-c", "pass")

    return inner


def start_workers() -> Any:
    return multiprocessing.get_context("spawn")


def start_workers_of_torch() -> Any:
    return torch.multiprocessing.get_context("spawn")


def start_a_compiler() -> Any:
    return torch.compile(torch.nn.Identity())


def train() -> Any:
    return task.run_task(...)


def compute() -> int:
    return sum(range(3))


def call_each_other() -> Any:
    return compute() or call_each_other()


@pytest.mark.parametrize(
    "function",
    [
        start_a_process,
        start_through_a_function,
        start_in_a_nested_function,
        start_workers,
        start_workers_of_torch,
        start_a_compiler,
        train,
    ],
)
def test_functions_that_start_something_are_found(function: Any) -> None:
    assert conftest.uses_starter(function, {})


@pytest.mark.parametrize("function", [compute, call_each_other, len, None])
def test_other_functions_start_nothing(function: Any) -> None:
    assert not conftest.uses_starter(function, {})


def test_this_file_is_marked(request: pytest.FixtureRequest) -> None:
    marked = {item.name.partition("[")[0] for item in request.session.items if item.get_closest_marker("integration")}
    assert "test_other_functions_start_nothing" not in marked


def test_the_browser_makes_a_test_integration() -> None:
    assert conftest.uses_starter(conftest.browser, {}) and not conftest.uses_starter(conftest.enable_ctrl_c, {})

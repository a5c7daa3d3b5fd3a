"""The workloads and the selection of their rows."""

import pytest
from helpers.tiny_models import raises_one_line

from modeling_vitcls.benchmarking.comparison import BenchmarkSettings
from modeling_vitcls.benchmarking.peers import SMALL_SIZE
from modeling_vitcls.benchmarking.work import WORKLOADS, run_benchmarks


TOY_SETTINGS = BenchmarkSettings(("timm",), 1, is_toy=True)


@pytest.mark.parametrize("name", ["pixels", pytest.param("prediction", marks=pytest.mark.slow)])
def test_work_without_peers_is_compared(name: str) -> None:
    found = list(run_benchmarks((name,), (), BenchmarkSettings(("transformers",), 2, is_toy=True)))
    assert [each.name for each in found] == list(WORKLOADS[name].rows)
    assert all(len(each.ratios) == 2 and each.difference < 1e-4 for each in found)
    assert all("ratio" in each.to_dict() for each in found)


def test_rows_are_selected_by_name() -> None:
    assert SMALL_SIZE.intermediate_size == 1536
    (result,) = run_benchmarks(("inference", "probe"), ("fp32, batch 1",), TOY_SETTINGS)
    assert (result.workload, result.name) == ("inference", "fp32, batch 1")
    with raises_one_line("--rows", "'digits'", "'digits, fp32'"):
        next(run_benchmarks(("training",), ("digits",), BenchmarkSettings(("timm",), 1)))

"""python scripts/benchmark.py: rows, ratios, and errors if outputs differ."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import build_tiny_config, raises_one_line

from modeling_vitcls import ViTCLSForImageClassification
from scripts import benchmark
from scripts.benchmark import BenchmarkOptions, Row, format_markdown, run_benchmarks


pytestmark = pytest.mark.integration

SMALL = {"batch_sizes": (2,), "rounds": 2}


@pytest.fixture(autouse=True)
def _one_call_per_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SECONDS_PER_MEASUREMENT", 1e-6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    ViTCLSForImageClassification(build_tiny_config(num_register_tokens=2)).save_pretrained(folder)
    return str(folder)


def test_backends_and_peers_have_the_outputs_of_the_model(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "measure_calls_per_second", lambda function: 5.0)
    monkeypatch.setattr(benchmark, "NUM_CHECKED_IMAGES", 1)
    settings = BenchmarkOptions(model, ("inference", "step"), ("torch", "openvino"), **SMALL)
    settings = BenchmarkOptions(**vars(settings) | {"precisions": ("fp32", "bf16")})
    rows = run_benchmarks(settings)
    peers = [
        (peer, precision) for peer in ("timm", "transformers") for precision in ("fp32", "bf16")
    ]
    ours = [("torch", "fp32"), ("torch", "bf16")]
    exported = [("openvino", "fp32"), ("openvino", "bf16")]
    names = [("inference", *each) for each in (*ours, *exported, *peers)] + [
        ("step", *each) for each in ours + peers
    ]
    assert [(row.work, row.engine, row.precision) for row in rows] == names
    assert all(row.difference < (1e-4 if row.precision == "fp32" else 0.08) for row in rows)
    assert all(
        row.difference > 1e-4
        for row in rows
        if row.precision == "bf16" and row.engine != "openvino"
    )
    assert all(row.throughputs == [10.0, 10.0] for row in rows)  # two rounds
    # the caption has no local path
    assert str(Path(model).parent) not in format_markdown(rows, settings)


@pytest.mark.parametrize("error", [0.01, float("nan")])
def test_models_with_different_outputs_are_not_compared(
    error: float, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = benchmark.convert_from_timm

    def convert_wrongly(timm_model: Any) -> Any:
        converted: Any = convert(timm_model)
        with torch.no_grad():
            converted.classifier.bias += error
        return converted

    monkeypatch.setattr(benchmark, "convert_from_timm", convert_wrongly)
    with raises_one_line("timm in fp32", "differs from the model"):
        run_benchmarks(BenchmarkOptions(model, backends=(), peers=("timm",), **SMALL))


def test_ratios_compare_measurements_of_the_same_round() -> None:
    rows = [Row("inference", name, "fp32", 3, 1, 0.0) for name in ("torch", "timm")]
    calls: list[str] = []
    benchmark.measure_rows(
        rows, [lambda: calls.append("ours"), lambda: calls.append("theirs")], num_rounds=2
    )
    # the second round is reversed
    assert [name for name, _ in itertools.groupby(calls)] == ["ours", "theirs", "ours"]

    ours, theirs = (
        Row("inference", "torch", "fp32", 1, 1, 0.0, values)
        for values in ([2.0, 9.0, 8.0], [1.0, 3.0, 2.0])
    )

    assert ours.compute_ratios(theirs) == [2.5, 3.0, 3.5]  # of 2, 3 and 4
    assert (
        Row("", "", "", 1, 1, 0.0, [6.0]).compute_ratios(Row("", "", "", 1, 1, 0.0, [2.0]))
        == [3.0] * 3
    )

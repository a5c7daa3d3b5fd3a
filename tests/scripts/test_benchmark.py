"""python scripts/benchmark.py: rows, ratios, and errors if outputs differ."""

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import raises_one_line, save_classifier
from pytest import MonkeyPatch

from scripts import benchmark
from scripts.benchmark import BenchmarkOptions, format_markdown, run_benchmarks


SMALL = {"batch_sizes": (2,), "rounds": 2}


@pytest.fixture(scope="module")
def model(module_path: Path) -> str:
    return str(save_classifier(module_path, num_register_tokens=2))


def test_backends_and_peers_have_the_outputs_of_the_model(
    model: str, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "measure_calls_per_second", lambda function: 5.0)
    monkeypatch.setattr(benchmark, "NUM_CHECKED_IMAGES", 1)
    choices = {"backends": ("torch", "openvino"), "precisions": ("fp32", "bf16")}
    settings = BenchmarkOptions(model, ("inference", "step"), **choices, **SMALL)
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
    assert all(row.throughputs == [10.0, 10.0] for row in rows)  # five calls with two images
    assert all(row.difference < (1e-4 if row.precision == "fp32" else 0.08) for row in rows)
    # the caption has no local path
    assert str(Path(model).parent) not in format_markdown(rows, settings)


@pytest.mark.parametrize("error", [0.01, float("nan")])
def test_models_with_different_outputs_are_not_compared(
    error: float, model: str, monkeypatch: MonkeyPatch
) -> None:
    convert = benchmark.convert_from_timm

    def convert_wrongly(timm_model: Any) -> Any:
        converted = convert(timm_model)
        converted.classifier.bias.data += error
        return converted

    monkeypatch.setattr(benchmark, "convert_from_timm", convert_wrongly)
    with raises_one_line("timm in fp32", "differs from the model"):
        run_benchmarks(BenchmarkOptions(model, backends=(), peers=("timm",), **SMALL))

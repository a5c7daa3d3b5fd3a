"""python scripts/benchmark.py: rows, ratios, and errors if outputs differ."""

import itertools
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import SIZES, build_tiny_config, raises_one_line

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel
from modeling_vitcls.cli.parsing import run_script
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


def test_calls_have_the_threads_of_this_process() -> None:
    """With one thread, the calls per second of CPU time are measured."""
    before = torch.get_num_threads()
    seen = []

    def note() -> None:
        seen.append(torch.get_num_threads())
        time.sleep(0.01)

    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            speed = benchmark.measure_calls_per_second(note)
            assert seen[-1] == num_threads
            assert (speed > 110) == benchmark.uses_cpu_time() == (num_threads == 1)
    finally:
        torch.set_num_threads(before)


def test_backends_and_peers_have_the_outputs_of_the_model(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[Any] = []

    def measure(function: Any) -> float:
        outputs.append(function())
        return 5.0

    monkeypatch.setattr(benchmark, "measure_calls_per_second", measure)
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
    loaded = ViTCLSForImageClassification.from_pretrained(model)
    num_flops = {False: loaded.flops()}
    loaded.config.compute_all_tokens = True
    num_flops[True] = loaded.flops()  # timm and transformers compute all tokens in the last layer
    for row in rows:
        expected = num_flops[row.engine in ("timm", "transformers")] * (
            3 if row.work == "step" else 1
        )
        assert row.flops_per_image == expected
    assert all(row.throughputs == [10.0, 10.0] for row in rows)  # two rounds
    inferred, stepped = outputs[:16], outputs[16:]
    assert all(len(output) == 2 and output.is_inference() for output in inferred)
    assert stepped == [None] * 12
    # the caption has no local path
    assert str(Path(model).parent) not in format_markdown(rows, settings)


@pytest.mark.slow
def test_encoders_in_int8_are_measured_and_differ_slightly(tmp_path: Path) -> None:
    ViTCLSModel(build_tiny_config()).save_pretrained(tmp_path)
    settings = BenchmarkOptions(
        str(tmp_path), ("inference",), ("onnx", "openvino"), (), ("fp32", "int8"), **SMALL
    )

    rows = run_benchmarks(settings)

    engines = [
        (engine, precision) for engine in ("onnx", "openvino") for precision in ("fp32", "int8")
    ]
    assert [(row.engine, row.precision) for row in rows] == engines
    assert all(
        row.difference < 0.5 and (row.difference > 1e-4) == (row.precision == "int8")
        for row in rows
    )

    table = format_markdown(rows, settings)
    assert "| openvino int8 |" in table
    assert " onnxruntime " in table


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


def test_exported_files_are_measured_on_the_cpu(model: str) -> None:
    with raises_one_line("openvino", "CPU"):
        run_benchmarks(BenchmarkOptions(model, backends=("openvino",), device="cuda"))
    for device, exported in (("cpu", ("onnx", "openvino")), ("cuda", ())):
        settings = benchmark.set_default_engines(BenchmarkOptions(model, device=device))
        assert (settings.backends, settings.peers) == (
            ("torch", "compiled", *exported),
            ("timm", "transformers"),
        )
    assert benchmark.set_default_engines(BenchmarkOptions(model, peers=())).peers == ()


def test_only_the_engine_of_this_name_is_compiled(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda engine: compiled.append(engine))

    loaded = benchmark.load_model(model, tmp_path)
    engines = [
        benchmark.build_engine(name, "fp32", loaded, "cpu", tmp_path)[1]
        for name in ("torch", "compiled")
    ]
    assert compiled == engines[1:]

    expected = ViTCLSForImageClassification.from_pretrained(
        model
    ).state_dict()  # trained weights are not replaced
    assert all(tensor.equal(expected[name]) for name, tensor in loaded.state_dict().items())


def test_peers_have_the_size_of_the_model() -> None:
    fields = {
        "image_size": [16, 24],
        "patch_size": [8, 4],
        "num_channels": 1,
        "num_attention_heads": 4,
    }
    names = ["image_height_width", "patch_height_width", "num_channels", "num_labels"]
    names += SIZES.keys() - {"image_size", "patch_size"}
    config = build_tiny_config(**fields)

    for built in (
        benchmark.convert_from_timm(benchmark.build_timm_vit(config)),
        benchmark.convert_from_transformers(benchmark.build_transformers_vit(config)),
    ):
        assert all(getattr(built.config, name) == getattr(config, name) for name in names)


def test_the_best_matrix_product_counts_multiplications_and_additions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dtypes: list[torch.dtype] = []

    def measure(function: Any) -> int:
        dtypes.append(function().dtype)
        return len(dtypes)

    monkeypatch.setattr(benchmark, "measure_calls_per_second", measure)
    monkeypatch.setattr(benchmark, "EMULATED_DTYPES", {torch.float16})
    # the last is faster
    assert benchmark.measure_matrix_product("cpu", torch.float16) == 2 * 1024**3 * len(dtypes)
    assert set(dtypes) == {torch.float32}


def test_a_training_step_changes_the_weights() -> None:
    engine = torch.nn.Linear(4, 3)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    before = engine.weight.detach().clone()
    images = torch.randn(4, 4)
    with autocast():
        loss = torch.nn.functional.cross_entropy(engine(images).float(), torch.tensor([0, 1, 2, 0]))
    (gradient,) = torch.autograd.grad(loss, engine.weight)
    benchmark.take_step(engine, torch.optim.SGD(engine.parameters(), lr=0.1), images, autocast)
    torch.testing.assert_close(engine.weight, before - 0.1 * gradient)
    assert engine.weight.grad is None


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


def test_the_table_compares_rows_of_the_same_batch_and_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benchmark, "measure_matrix_product", lambda device, dtype: 1e9)
    speeds = {
        ("torch", "fp32", 2): 100,
        ("torch", "bf16", 2): 200,
        ("timm", "fp32", 2): 50,
        ("torch", "fp32", 4): 400,
    }
    speeds["onnx", "int8", 4] = 600
    rows = [
        Row("step", *each, 10**6, 0.0, [speed - 1, speed, speed + 50])
        for each, speed in speeds.items()
    ]
    text = format_markdown(rows, BenchmarkOptions("m", backends=("torch",), peers=("timm",)))

    cells = [
        [cell.split(" (")[0].strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()[2:7]
    ]
    assert cells == [
        ["step, batch 2", "torch fp32", "100.0", "1.00", "timm 2.00", "10%"],
        ["step, batch 2", "torch bf16", "200.0", "2.00", "", "20%"],
        ["step, batch 2", "timm fp32", "50.0", "0.50", "", "5%"],
        ["step, batch 4", "torch fp32", "400.0", "1.00", "", "40%"],
        ["step, batch 4", "onnx int8", "600.0", "1.50", "", ""],
    ]
    assert "2.00 (1.83 to 2.01)" in text
    assert "1 GFLOP/s in bf16" in text
    assert f"images per {'CPU ' * benchmark.uses_cpu_time()}second, medians of 7 rounds" in text


def test_the_table_is_printed_and_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(benchmark, "run_benchmarks", lambda settings: [settings.rounds])
    monkeypatch.setattr(
        benchmark, "format_markdown", lambda rows, settings: f"table {rows} {settings.rounds}"
    )
    flags = ["--rounds", "3", "--markdown", str(tmp_path / "new" / "speed.md")]
    run_script(BenchmarkOptions, benchmark.run, flags)
    assert (
        (tmp_path / "new" / "speed.md").read_text()
        == capsys.readouterr().out.strip()
        == "table [3] 3"
    )

"""The benchmarks at toy size: comparisons, files, and errors if the outputs of the two sides differ."""

import copy
import json
import mmap
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fresh_processes import run_fresh
from PIL import Image
from sklearn.datasets import load_digits
from tiny_models import raises_one_line
from torchvision.transforms import v2
from transformers import ViTForImageClassification

from modeling_vitcls import ViTCLSImageProcessor
from modeling_vitcls.benchmarking import comparison, image_files, own_features, peers, tables, training_runs
from modeling_vitcls.benchmarking.comparison import (
    BenchmarkSettings,
    Comparison,
    check_logits,
    check_tensors,
    compare_peak_memory,
    compare_throughput,
    compute_quartiles,
    measure_throughput,
)
from modeling_vitcls.benchmarking.image_files import (
    PIXEL_ROWS,
    PREDICTION_ROWS,
    PredictionProcess,
    build_image_processors,
    build_pipeline_predictor,
    check_labels,
    compare_processors,
    write_benchmark_files,
    write_photographs,
)
from modeling_vitcls.benchmarking.own_features import (
    ATTENTION_ROWS,
    INEXACT_ROWS,
    PROBE_ROWS,
    build_model_and_images,
    check_attention,
    check_disabled_feature,
    train_probe,
)
from modeling_vitcls.benchmarking.peers import (
    FORWARD_PASSES,
    PEERS,
    SMALL_SIZE,
    TOY_SIZE,
    TRAINING_STEPS,
    ForwardPass,
    build_model,
    build_random_images,
    build_step_runners,
    check_gradients,
    compare_forward_pass,
    compare_step,
)
from modeling_vitcls.benchmarking.tables import (
    compute_lowest_ratios,
    format_markdown,
    print_comparison,
    print_tables,
    write_reports,
)
from modeling_vitcls.benchmarking.training_runs import (
    CROP_AUGMENTATION,
    DIGITS_RUN,
    MAX_STEPS,
    SHIFT_AUGMENTATION,
    TRAINING_RUNS,
    LineWriter,
    SuspendedRun,
    build_finetune_command,
    build_trainer_command,
    build_transforms,
    collate_images,
    load_dataset,
    save_models,
)
from modeling_vitcls.benchmarking.work import WORKLOADS, run_benchmarks
from modeling_vitcls.commands.parsing import parse_with_recipe
from modeling_vitcls.options import FinetuneOptions
from modeling_vitcls.training.linear_probe import compute_features


TOY_SETTINGS = BenchmarkSettings(("timm",), 1, is_toy=True)
SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"
KEYS = {
    "work",
    "name",
    "against",
    "ratio",
    "quartiles",
    "pairs",
    "ours_images_per_second",
    "theirs_images_per_second",
    "ratios",
    "largest_difference_of_outputs",
}


def check_file(file: Path, num_pairs: int) -> list[dict[str, Any]]:
    """Return the comparisons in a results file, after a check of their keys and values."""
    results = json.loads(file.read_text())
    assert {"processor", "cores", "threads", "load"} <= set(results["machine"])
    assert {"modeling_vitcls", "torch", "transformers", "timm"} <= set(results["versions"])
    for entry in results["comparisons"]:
        assert set(entry) >= KEYS
        assert entry["pairs"] == len(entry["ratios"]) == num_pairs and min(entry["ratios"]) > 0
        assert entry["quartiles"][0] <= entry["ratio"] <= entry["quartiles"][1]
    return results["comparisons"]


@pytest.mark.slow
def test_the_script_compares_forward_passes(tmp_path: Path) -> None:
    file, table = tmp_path / "folder" / "results.json", tmp_path / "other" / "table.md"
    row = "fp32, batch 1"
    flags = ("--work", "inference", "--rows", row, "--toy", "--pairs", "3", "--markdown", str(table))
    done = run_fresh(SCRIPT, *flags, "--output", str(file))
    assert done.returncode == 0, done.stderr
    found = check_file(file, 3)
    assert [(each["name"], each["against"]) for each in found] == [(row, "transformers"), (row, "timm")]
    assert "images per second" in done.stdout and "ratio to the fastest peer" in done.stdout and "torch" in done.stdout
    (better,) = json.loads(file.read_text())["over_the_better"]
    assert better == {"work": "inference", "name": row, "ratio": min(each["ratio"] for each in found)}
    assert table.read_text().count("\n| ") == 1 and "torch" in table.read_text()


@pytest.mark.slow
def test_the_script_compares_steps(tmp_path: Path) -> None:
    """The memory of each side is measured in a new process."""
    file = tmp_path / "results.json"
    flags = ("--work", "inference", "step", "--rows", "fp32, batch 16", "--against", "timm", "--toy", "--pairs", "2")
    done = run_fresh(SCRIPT, *flags, "--output", str(file))
    assert done.returncode == 0, done.stderr
    (found,) = check_file(file, 2)
    assert found["work"] == "training step" and "MiB" in done.stdout
    assert found["ours_peak_bytes"] > 0 and found["theirs_peak_bytes"] > 0


@pytest.mark.slow
def test_the_script_compares_reading_attention(tmp_path: Path) -> None:
    """Reading attention is compared with a plain forward pass, in time and memory."""
    file = tmp_path / "results.json"
    row = "token_attention, batch 16"
    done = run_fresh(SCRIPT, "--work", "attention", "--toy", "--pairs", "2", "--rows", row, "--output", str(file))
    assert done.returncode == 0, done.stderr
    (found,) = check_file(file, 2)
    assert (found["name"], found["against"]) == (row, "a plain forward pass")
    assert found["ours_peak_bytes"] >= 0 and found["theirs_peak_bytes"] >= 0
    assert found["largest_difference_of_outputs"] < 1e-5
    assert "images per second" in done.stdout and "MiB" in done.stdout


@pytest.mark.parametrize("name", ["pixels", pytest.param("prediction", marks=pytest.mark.slow)])
def test_work_without_peers_is_compared(name: str) -> None:
    found = list(run_benchmarks((name,), (), BenchmarkSettings(("transformers",), 2, is_toy=True)))
    assert [each.name for each in found] == list(WORKLOADS[name].rows)
    assert all(len(each.ratios) == 2 and each.difference < 1e-4 for each in found)
    assert all("ratio" in each.to_dict() for each in found)


def test_the_probe_counts_the_images_of_all_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides train the classifier as a plain loop over the pooled features does."""
    measured: list[Any] = []
    encoded: list[int] = []

    def encode(model: Any, images: torch.Tensor) -> torch.Tensor:
        encoded.append(len(images))
        return compute_features(model, images)

    def measure(ours: Any, theirs: Any, num_images: int, settings: BenchmarkSettings) -> Any:
        measured.append((num_images, settings.num_pairs, settings.is_toy))
        for train, expected in ((ours, [16] * 2), (theirs, [16] * 2 * 10)):
            encoded.clear()
            train()
            assert encoded == expected
        return [1.0], [1.0]

    monkeypatch.setattr(own_features, "compute_features", encode)
    monkeypatch.setattr(own_features, "compare_throughput", measure)
    (result,) = run_benchmarks(("probe",), (), TOY_SETTINGS)
    assert measured == [(10 * 32, 1, True)] and result.details["num_epochs"] == 10 and result.difference < 1e-4
    row = replace(PROBE_ROWS["10 epochs, batch 16"], num_epochs=3)
    model, images, labels = build_model(TOY_SIZE), build_random_images(32, TOY_SIZE.image_size), torch.arange(32) % 5
    with torch.no_grad():
        features = model.vitcls(images).pooler_output
    classifier = copy.deepcopy(model.classifier)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3)
    for start in (0, 16) * 3:
        batch = slice(start, start + 16)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(classifier(features[batch]), labels[batch]).backward()
        optimizer.step()
    for use_cache in (True, False):
        assert torch.allclose(train_probe(model, images, labels, row, use_cache), classifier.weight, atol=1e-5)


def test_reading_attention_is_compared_with_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that measures the memory of each side is replaced by constants."""
    requests = []

    def measure(*arguments: str) -> int:
        requests.append(arguments)
        return 100 if "--theirs" in arguments else 250

    monkeypatch.setattr(comparison, "measure_peak_memory_in_process", measure)
    names = ("token_attention, batch 1", "statistics, batch 16")
    entries = [result.to_dict() for result in run_benchmarks(("attention",), names, TOY_SETTINGS)]
    assert [entry["name"] for entry in entries] == list(names)
    assert {entry["against"] for entry in entries} == {"a plain forward pass"}
    assert [entry["batch_size"] for entry in entries] == [1, 16]
    for entry in entries:
        assert (entry["ours_peak_bytes"], entry["theirs_peak_bytes"]) == (250, 100)
        assert (
            entry["size"] == vars(TOY_SIZE) and entry["pairs"] == 1 and entry["largest_difference_of_outputs"] < 1e-5
        )
    module = "modeling_vitcls.benchmarking.own_features"
    assert requests == [(module, name, "--toy", *side) for name in names for side in ((), ("--theirs",))]


@pytest.mark.slow
@pytest.mark.parametrize("against", PEERS)
def test_compiled_models_are_compared(against: str) -> None:
    row = replace(FORWARD_PASSES["bf16, batch 16, compiled"], batch_size=2)
    assert row.use_compile
    assert compare_forward_pass("row", row, PEERS[against](TOY_SIZE), TOY_SETTINGS).difference < 0.1


@pytest.mark.parametrize("name", ATTENTION_ROWS)
def test_attention_is_checked_before_it_is_measured(name: str) -> None:
    row = ATTENTION_ROWS[name]
    model, pixel_values = build_model_and_images(row.batch_size, is_toy=True)
    assert len(pixel_values) == row.batch_size and model.config.num_register_tokens == 4
    assert check_attention(row, model, pixel_values, name) < 1e-5
    assert row.compute(model, pixel_values[:1]).abs().max() > 0
    with torch.no_grad():
        assert measure_throughput(lambda: row.compute(model, pixel_values), row.batch_size, 0.0) > 0
    assert model.config._attn_implementation == "sdpa"
    wrong = replace(row, compute=lambda model, pixels: row.compute(model, pixels) + 0.1, reference=row.compute)
    with raises_one_line(name, "differ by 0.1"):
        check_attention(wrong, model, pixel_values, name)
    not_a_number = replace(
        row, compute=lambda model, pixels: row.compute(model, pixels) * float("nan"), reference=row.compute
    )
    with raises_one_line("differ by nan"):
        check_attention(not_a_number, model, pixel_values, name)


@pytest.mark.skipif(sys.platform != "linux", reason="requires /proc")
def test_memory_is_the_peak_during_the_function() -> None:
    """Memory that is freed before the end counts (64 MiB), memory of the warm-up does not (128 MiB)."""

    def allocate_and_free(num_bytes: int) -> None:
        memory = mmap.mmap(-1, num_bytes)  # not from the free memory of this process
        np.frombuffer(memory, dtype=np.uint8)[:] = 1

    growth = comparison.measure_memory_growth(lambda: allocate_and_free(2**27), lambda: allocate_and_free(2**26))
    assert 63 * 2**20 < growth < 80 * 2**20


@pytest.mark.parametrize(("flags", "expected"), [((), (16, 2, 2, 5, 21)), (("--theirs",), (16, 5))])
def test_the_memory_of_attention_or_of_a_forward_pass_is_measured(
    flags: tuple[str, ...], expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warm-up uses one image. Memory is replaced by the shape of the output."""
    monkeypatch.setattr(sys, "argv", ["own_features", "token_attention, batch 16", "--toy", *flags])
    shapes: list[tuple[int, ...]] = []

    def measure(warm_up: Any, function: Any) -> int:
        shapes.extend(tuple(run().shape) for run in (warm_up, function))
        return 0

    monkeypatch.setattr(own_features, "measure_memory_growth", measure)
    own_features.main()
    assert shapes == [(1, *expected[1:]), expected]


@pytest.mark.parametrize("flags", [(), ("--theirs",)])
def test_the_memory_of_a_step_excludes_the_optimizer_state(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The warm-up allocates the optimizer state and frees the gradients."""
    monkeypatch.setattr(sys, "argv", ["peers", "fp32, batch 16", "timm", "--toy", *flags])

    def measure(warm_up: Any, runner: Any) -> int:
        warm_up()
        parameters = list(runner.model.parameters())
        assert len(runner.optimizer.state) == len(parameters) and len(runner.labels) == 16
        assert all(parameter.grad is None for parameter in parameters)
        assert (type(runner.model).__name__ == "VisionTransformer") == bool(flags)
        return 123

    monkeypatch.setattr(peers, "measure_memory_growth", measure)
    peers.main()
    assert capsys.readouterr().out == "123\n"


def test_a_process_replies_to_each_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One JSON line per request: the labels of all files, and the images per second."""
    batch_sizes = []

    def predict(batch_size: int) -> list[tuple[str, float]]:
        batch_sizes.append(batch_size)
        return [("cat", 0.5), ("dog", 0.25)]

    write_benchmark_files(tmp_path, is_toy=True)
    monkeypatch.setitem(image_files.PREDICTORS, "theirs", lambda size, folder: predict)
    measured = []

    def measure(run: Any, *arguments: Any) -> float:
        measured.append((run(), *arguments))
        return 7.5

    monkeypatch.setattr(image_files, "measure_throughput", measure)
    monkeypatch.setattr(sys, "argv", ["image_files", "theirs", str(tmp_path), "--toy"])
    monkeypatch.setattr(sys, "stdin", ["labels 16\n", "speed 4\n"])
    image_files.main()
    replies = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert replies == [[["cat", 0.5], ["dog", 0.25]], 7.5]
    assert batch_sizes == [16, 4] and measured[0][1:] == (4, 0.0)  # 4 files, and a single call


@pytest.mark.parametrize("against", PEERS)
@pytest.mark.parametrize("name", TRAINING_STEPS)
def test_gradients_are_compared_before_steps_are_measured(name: str, against: str) -> None:
    ours, theirs = build_step_runners(TRAINING_STEPS[name], PEERS[against](TOY_SIZE))
    assert ours.model.training and theirs.model.training
    logits: list[torch.Tensor] = []
    ours.model.register_forward_hook(lambda module, inputs, output: logits.append(output.logits))
    assert check_gradients(ours, theirs, name) < ours.row.gradient_limit
    gradient = ours.compute_patch_gradient(num_images=1)  # earlier gradients are discarded
    assert torch.allclose(ours.compute_patch_gradient(num_images=1), gradient, rtol=0.01)
    before = [parameter.detach().clone() for parameter in ours.model.parameters()]
    ours()
    assert not all(map(torch.equal, before, ours.model.parameters()))
    assert {each.dtype for each in logits} == {ours.row.autocast or torch.float32}
    assert [len(each) for each in logits] == [2, 1, 1, 16]
    with torch.no_grad():
        theirs.model.get_parameter("head.weight" if against == "timm" else "classifier.weight").neg_()
    with raises_one_line(name, "the gradients", "differ"):
        check_gradients(ours, theirs, name)


def test_pixels_that_differ_are_not_compared(tmp_path: Path) -> None:
    files = write_benchmark_files(tmp_path, is_toy=True)
    ours, theirs = build_image_processors(TOY_SIZE, tmp_path)
    name, row = next(iter(PIXEL_ROWS.items()))
    ours.resample = 3
    with raises_one_line(name, "the pixel values differ"):
        compare_processors(name, row, files, ours, theirs, TOY_SETTINGS)


@pytest.mark.parametrize("name", ["one file", "lists of 16 files, as paths for both image processors"])
def test_each_call_processes_all_files_in_batches(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = PIXEL_ROWS[name]
    files = write_benchmark_files(tmp_path, is_toy=True) * (5 if row.num_files == 16 else 1)
    assert len(files) == (20 if row.num_files == 16 else 4)
    ours, theirs = build_image_processors(TOY_SIZE, tmp_path)
    calls: dict[str, list[Any]] = {"ours": [], "theirs": []}

    def record(side: str, processor: Any) -> Any:
        def process(batch: list[Any], **kwargs: Any) -> Any:
            calls[side].append([getattr(image, "filename", image) for image in batch])
            return processor(batch, **kwargs)

        return process

    sides = record("ours", ours), record("theirs", theirs)
    found = compare_processors(name, row, files, *sides, TOY_SETTINGS)
    batches = [files[:16], files[16:]] if row.num_files == 16 else [[file] for file in files]
    num_calls = 2 + 2  # two checks, a warm-up and a measurement
    assert calls == {"ours": batches * num_calls, "theirs": batches * num_calls}
    assert found.details["num_files"] == len(files)

    def compare_sides(ours: Any, theirs: Any, num_images: int, settings: BenchmarkSettings) -> Any:
        assert num_images == len(files)
        for run, expected in ((ours, {"ours": batches, "theirs": []}), (theirs, {"ours": [], "theirs": batches})):
            calls.update(ours=[], theirs=[])
            run()
            assert calls == expected
        return [3.0], [2.0]

    monkeypatch.setattr(image_files, "compare_throughput", compare_sides)
    assert compare_processors(name, row, files, *sides, TOY_SETTINGS).ratios == [1.5]


def test_the_pipeline_predicts_sorted_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both programs must return the labels in the same order, whatever the file system lists first."""
    write_benchmark_files(tmp_path, is_toy=True)
    list_files = Path.rglob
    predictions = []
    for is_reversed in (False, True):
        monkeypatch.setattr(
            Path, "rglob", lambda *arguments, reverse=is_reversed: sorted(list_files(*arguments), reverse=reverse)
        )
        predictions.append(build_pipeline_predictor(TOY_SIZE, tmp_path)(2))
    assert predictions[0] == predictions[1] and len({score for _, score in predictions[0]}) == 4


def test_vitcls_predict_is_compared_with_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two processes are replaced by their functions in this process, and the speeds by constants."""
    requests: list[tuple[Any, ...]] = []
    predictors: list[Any] = []

    class Process:
        def __init__(self, program: str, folder: str, settings: BenchmarkSettings) -> None:
            self.program = program
            self.predict = image_files.PREDICTORS[program](TOY_SIZE, Path(folder))

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *exc_info: object) -> None:
            pass

        def request(self, request_kind: str, batch_size: int) -> Any:
            requests.append((self.program, request_kind, batch_size))
            return self.predict(batch_size) if request_kind == "labels" else {"ours": 3.0, "theirs": 2.0}[self.program]

    monkeypatch.setattr(image_files, "PredictionProcess", Process)
    monkeypatch.setattr(image_files, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(image_files, "get_num_workers", lambda: 3)
    build = image_files.Predictor
    monkeypatch.setattr(
        image_files, "Predictor", lambda *arguments: predictors.append(build(*arguments)) or predictors[-1]
    )
    results = list(run_benchmarks(("prediction",), (), TOY_SETTINGS))
    assert [(predictor.batch_size, predictor.num_workers) for predictor in predictors] == [(16, 3), (1, 3)]
    assert [result.name for result in results] == list(PREDICTION_ROWS)
    for result in results:
        assert result.ratios == [1.5] and 0 < result.difference < 1e-4
        assert result.details == {"num_files": 4, "size": vars(TOY_SIZE)}
    kinds = [("ours", "labels"), ("theirs", "labels"), ("ours", "speed"), ("theirs", "speed")]
    assert requests == [(*kind, batch_size) for batch_size in (16, 1) for kind in kinds]


def test_labels_and_weights_that_differ_are_not_compared() -> None:
    name = next(iter(PREDICTION_ROWS))
    cat = ("cat", 0.5)
    assert check_labels([cat, cat], [("cat", 0.50005), cat], name) == pytest.approx(5e-5)
    with raises_one_line(name, "image 1 is cat", "dog"):
        check_labels([cat, cat], [cat, ("dog", 0.5)], name)
    with raises_one_line(name, "differ by 0.1"):
        check_labels([cat], [("cat", 0.6)], name)
    assert check_tensors(torch.ones(2), torch.ones(2), 1e-4, "probe", "the weights") == 0
    with raises_one_line("probe", "the weights differ by 0.5"):
        check_tensors(torch.tensor([1.0, 0.5]), torch.ones(2), 1e-4, "probe", "the weights")
    # The limit is relative to the largest expected value.
    assert check_tensors(torch.tensor([-1000.0, 0.05]), torch.tensor([-1000.0, 0.0]), 1e-4, "", "") < 0.1
    with raises_one_line("differ by 0.002, more than 0.001"):
        check_tensors(torch.tensor([0.01, 0.002]), torch.tensor([0.01, 0.0]), 0.1, "probe", "the weights")
    with raises_one_line("row: the outputs have different shapes, [2, 1] and [2, 5]"):
        check_logits(lambda pixels: torch.ones(2, 1), lambda pixels: torch.ones(2, 5), torch.zeros(2), "row")


@pytest.mark.slow
def test_the_error_of_a_failed_process_is_reported(tmp_path: Path) -> None:
    with (
        PredictionProcess("nobody's", str(tmp_path), TOY_SETTINGS) as process,
        raises_one_line("nobody's failed", "choose from"),
    ):
        process.request("labels", 1)


@pytest.mark.slow
def test_the_script_compares_training(tmp_path: Path) -> None:
    """Two real training runs, one suspended while the other has its turn."""
    file = tmp_path / "results.json"
    done = run_fresh(SCRIPT, "--work", "training", "--toy", "--pairs", "2", "--output", str(file))
    assert done.returncode == 0, done.stderr
    (found,) = check_file(file, 2)
    assert found["name"] == "toy" and found["dataset"] == "digits"
    assert 0 <= found["largest_difference_of_outputs"] < 1e-4


def test_wrong_flags_are_one_line() -> None:
    with raises_one_line("--rows: there is no row 'fp64'", "'bf16, batch 1'", "'10 epochs, batch 16'"):
        next(run_benchmarks(("inference", "probe"), ("fp32, batch 1", "fp64"), TOY_SETTINGS))
    done = run_fresh(SCRIPT, "--work", "training", "--pairs", "0")
    assert done.returncode == 2 and "--pairs is 0" in done.stderr


@pytest.mark.parametrize("against", PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_differ_are_not_compared(against: str, dtype: torch.dtype) -> None:
    peer = PEERS[against](TOY_SIZE)
    found = compare_forward_pass("row", ForwardPass(dtype, 2), peer, TOY_SETTINGS)
    assert found.against == against and found.difference < 0.1
    with torch.no_grad():
        peer.ours.get_parameter("vitcls.layers.1.mlp.fc1.weight").mul_(1.5)
    with raises_one_line(f"row against {against}", "the outputs differ"):
        compare_forward_pass("row", ForwardPass(dtype, 2), peer, TOY_SETTINGS)


def test_throughputs_belong_to_their_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward passes, training steps and attention maps, each with the images per call."""
    events: list[str] = []
    calls: list[tuple[list[str], list[str], int]] = []
    requests: list[tuple[str, ...]] = []

    def compare_sides(ours: Any, theirs: Any, num_images: int, settings: BenchmarkSettings) -> Any:
        sides = []
        for run in (ours, theirs):
            events.clear()
            run()
            sides.append(list(events))
        calls.append((*sides, num_images))
        return [3.0], [2.0]

    def measure(*arguments: str) -> int:
        requests.append(arguments)
        return 5 if "--theirs" in arguments else 4

    def read(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        events.append("read")
        return model.token_attention(pixel_values)

    for module in (peers, own_features):
        monkeypatch.setattr(module, "compare_throughput", compare_sides)
    monkeypatch.setattr(comparison, "measure_peak_memory_in_process", measure)
    peer = PEERS["timm"](TOY_SIZE)
    peer.ours.register_forward_hook(lambda *arguments: events.append("ours"))
    peer.theirs.register_forward_hook(lambda *arguments: events.append("theirs"))
    step = replace(TRAINING_STEPS["fp32, batch 16"], batch_size=5)
    results = [
        compare_forward_pass("row", ForwardPass(torch.float32, 3), peer, TOY_SETTINGS),
        compare_step("row", step, peer, TOY_SETTINGS),
        *own_features.compare_attention({"row": own_features.AttentionRow(read, 2)}, TOY_SETTINGS),
    ]
    assert calls == [(["ours"], ["theirs"], 3), (["ours"], ["theirs"], 5), (["read"], [], 2)]
    size, peaks = {"size": vars(TOY_SIZE)}, {"ours_peak_bytes": 4, "theirs_peak_bytes": 5}
    assert [result.details for result in results] == [
        size | {"device": "cpu"},
        size | peaks | {"device": "cpu"},
        size | peaks | {"batch_size": 2},
    ]
    assert all(result.ratios == [1.5] for result in results) and 0 < results[1].difference < step.gradient_limit
    flags = (
        ("modeling_vitcls.benchmarking.peers", "row", "timm"),
        ("modeling_vitcls.benchmarking.own_features", "row"),
    )
    assert requests == [(*process, "--toy", *side) for process in flags for side in ((), ("--theirs",))]


@pytest.mark.parametrize(("is_toy", "seconds"), [(True, 0.0), (False, 0.5)])
def test_pairs_are_measured_alternately(is_toy: bool, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[object, int, float]] = []

    def measure(function: Any, num_images: int, min_seconds: float) -> float:
        measured.append((function(), num_images, min_seconds))
        return float(len(measured))

    monkeypatch.setattr(comparison, "measure_throughput", measure)
    throughputs = compare_throughput(lambda: "ours", lambda: "theirs", 7, BenchmarkSettings((), 3, is_toy=is_toy))
    assert throughputs == ([1.0, 4.0, 5.0], [2.0, 3.0, 6.0])
    order = ("ours", "theirs", "theirs", "ours", "ours", "theirs")
    assert measured == [(side, 7, seconds) for side in order]


def test_inexact_features_are_compared_with_the_plain_model() -> None:
    """The plain model drops and merges nothing; the other one computes the same if its feature is set to 0."""
    names = [name for name in INEXACT_ROWS if " 4," in name or " 0.5," in name]
    entries = [result.to_dict() for result in run_benchmarks(("inexact",), tuple(names), TOY_SETTINGS)]
    assert [(entry["name"], entry["against"]) for entry in entries] == [(name, "the plain model") for name in names]
    assert [entry.get("merged_patches_per_layer") for entry in entries] == [4, None]
    assert [entry.get("patch_drop_rate") for entry in entries] == [None, 0.5]
    assert all(entry["device"] == "cpu" and entry["largest_difference_of_outputs"] == 0 for entry in entries)
    merging = build_model(TOY_SIZE, merged_patches_per_layer=4)
    with raises_one_line(names[0], "set to 0", "the outputs differ"):
        check_disabled_feature(INEXACT_ROWS[names[0]], merging, TOY_SIZE, names[0])


@pytest.mark.parametrize("name", INEXACT_ROWS)
def test_inexact_models_have_the_field_of_their_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = INEXACT_ROWS[name]
    computation, num_images = row.build_computation(build_model(TOY_SIZE), TOY_SIZE, "cpu")
    outputs: Any = computation()
    assert num_images == (4 if outputs else 16) and (outputs is None or outputs.logits.shape == (4, 5))
    build = lambda model, *others: (lambda: getattr(model.config, row.field), 9)  # noqa: E731
    measure = lambda ours, theirs, num_images, settings: ([ours()], [theirs() + num_images])  # noqa: E731
    monkeypatch.setitem(INEXACT_ROWS, name, replace(row, build_computation=build))
    monkeypatch.setattr(own_features, "compare_throughput", measure)
    (result,) = run_benchmarks(("inexact",), (name,), TOY_SETTINGS)
    assert (result.ours, result.theirs) == ([row.value], [0 + 9])


def test_nan_outputs_are_not_compared() -> None:
    peer = PEERS["transformers"](TOY_SIZE)
    with torch.no_grad():
        peer.ours.get_parameter("classifier.bias").fill_(float("nan"))
    with raises_one_line("differ by nan"):
        compare_forward_pass("row", ForwardPass(torch.float32, 2), peer, TOY_SETTINGS)


def test_both_sides_of_training_begin_with_the_same_weights(tmp_path: Path) -> None:
    from modeling_vitcls import ViTCLSForImageClassification

    run = replace(DIGITS_RUN, size=TOY_SIZE)
    names = ["a", "b", "c"]
    assert save_models(run, names, tmp_path, "row") < 1e-5
    ours = ViTCLSForImageClassification.from_pretrained(tmp_path / "our_model")
    assert ours.config.id2label == dict(enumerate(names))
    assert ours.config.hidden_size == TOY_SIZE.hidden_size
    theirs = ViTForImageClassification.from_pretrained(tmp_path / "their_model")
    processor = ViTCLSImageProcessor.from_pretrained(tmp_path / "our_model")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    transform = build_transforms({"crop_scale": 1.0, "flip": False, "rotation": 0}, TOY_SIZE.image_size)
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    batch = collate_images([(image, 2), (image, 1)], transform)
    assert batch["labels"].tolist() == [2, 1] and torch.allclose(batch["pixel_values"][1:], pixel_values, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(ours(pixel_values).logits, theirs(pixel_values).logits, atol=1e-5)


@pytest.mark.parametrize("name", TRAINING_RUNS)
def test_our_run_has_the_settings_of_the_row_and_no_evaluation(name: str, tmp_path: Path) -> None:
    run = TRAINING_RUNS[name]
    command = build_finetune_command(run, "digits", tmp_path)
    options = parse_with_recipe(FinetuneOptions, command[command.index("finetune") + 1 :])
    training = options.training
    assert training.evaluate_every >= training.max_steps == MAX_STEPS
    assert (training.batch_size, training.learning_rate) == (run.batch_size, run.learning_rate)
    assert (training.mixed_precision, training.log_every) == (run.mixed_precision, run.log_every)
    assert options.data.num_workers == run.num_workers
    assert {field: getattr(options.augmentation, field) for field in run.augmentation} == run.augmentation


def test_their_run_has_the_settings_of_the_row(tmp_path: Path) -> None:
    run = replace(DIGITS_RUN, size=TOY_SIZE, num_workers=3)
    *program, file = build_trainer_command(run, "digits", tmp_path)
    assert program[1:] == ["-m", "modeling_vitcls.benchmarking.training_runs"]
    settings = json.loads(Path(file).read_text())
    for name in ("batch_size", "mixed_precision", "num_workers", "log_every", "learning_rate", "augmentation"):
        assert settings[name] == getattr(run, name), name
    assert (settings["dataset"], settings["image_size"]) == ("digits", 32)
    paths = [settings[name] for name in ("model", "output_dir", "metrics")]
    assert paths == [str(tmp_path / name) for name in ("their_model", "theirs", "theirs.jsonl")]


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_both_runs_have_the_same_hyperparameters(
    mixed_precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained: Trainer is replaced by a function that returns its arguments."""
    run = replace(DIGITS_RUN, size=TOY_SIZE, mixed_precision=mixed_precision, num_workers=2)
    save_models(run, [str(digit) for digit in range(10)], tmp_path, "row")
    calls: list[dict[str, Any]] = []

    def build_trainer(model: Any, arguments: Any, **others: Any) -> Any:
        return SimpleNamespace(train=lambda: calls.append({"model": model, "arguments": arguments, **others}))

    monkeypatch.setattr(training_runs, "Trainer", build_trainer)
    training_runs.main(json.loads(Path(build_trainer_command(run, "digits", tmp_path)[-1]).read_text()))
    (call,) = calls
    command = build_finetune_command(run, "digits", tmp_path)
    ours, theirs = (
        parse_with_recipe(FinetuneOptions, command[command.index("finetune") + 1 :]).training,
        call["arguments"],
    )
    assert (theirs.max_steps, theirs.per_device_train_batch_size) == (ours.max_steps, ours.batch_size)
    assert (theirs.learning_rate, theirs.weight_decay) == (ours.learning_rate, ours.weight_decay)
    assert theirs.warmup_steps == ours.warmup * ours.max_steps and theirs.lr_scheduler_type == "cosine"
    assert (theirs.label_smoothing_factor, theirs.max_grad_norm) == (ours.label_smoothing, ours.max_gradient_norm)
    assert theirs.bf16 == (mixed_precision == "bf16") == (ours.mixed_precision == "bf16") and not theirs.fp16
    assert theirs.optim == "adamw_torch_fused" and theirs.dataloader_num_workers == 2
    assert theirs.dataloader_drop_last and not theirs.remove_unused_columns
    assert (theirs.save_strategy.value, theirs.logging_strategy.value) == ("no", "no")
    batch = call["data_collator"]([call["train_dataset"][index] for index in (0, 5)])
    assert batch["pixel_values"].shape == (2, 3, 32, 32) and batch["labels"].tolist() == [0, 5]
    assert call["model"].config.hidden_size == TOY_SIZE.hidden_size and len(call["train_dataset"]) == 1797
    call["callbacks"][0].on_step_end(theirs, SimpleNamespace(global_step=run.log_every), None)
    assert (tmp_path / "theirs.jsonl").read_text().count("\n") == 1


def test_the_speed_is_measured_between_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without a process: while it is not suspended, it writes a line every 0.5 seconds of a simulated clock."""
    file, clock, signals = tmp_path / "lines", [0.0], []
    run = SuspendedRun([], file, replace(DIGITS_RUN, log_every=20, batch_size=64, lines_per_turn=3))
    run.process = SimpleNamespace(poll=lambda: None)

    def sleep(seconds: float) -> None:
        clock[0] += 0.5
        with file.open("a") as lines:
            lines.write("line\n")

    monkeypatch.setattr(training_runs, "time", SimpleNamespace(perf_counter=lambda: clock[0], sleep=sleep))
    monkeypatch.setattr(run, "send_signal", signals.append)
    file.write_text("line\n" * 7)
    assert run.measure_throughput() == 20 * 64 / 0.5
    assert signals == [signal.SIGCONT, signal.SIGSTOP] and run.count_lines() == 7 + 1 + 3
    run.log.write(b"one\nthe last line\n")
    monkeypatch.setattr(training_runs, "MAX_WAIT_SECONDS", 10)
    with raises_one_line("the last line"):
        run.wait_for_lines(11 + 22)  # after 11 seconds
    run.log.close()


def test_both_runs_train_on_the_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two processes are replaced by constant speeds."""
    runs: list[tuple[list[str], Path]] = []

    class Run:
        def __init__(self, command: list[str], metrics_file: Path, run: Any) -> None:
            runs.append((command, metrics_file))
            self.speed = {"ours": 3.0, "theirs": 2.0}[metrics_file.relative_to(tmp_path).parts[0].partition(".")[0]]

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *exc_info: object) -> None:
            pass

        def measure_throughput(self) -> float:
            return self.speed

    monkeypatch.setattr(training_runs, "SuspendedRun", Run)
    monkeypatch.setattr(training_runs, "PHOTOGRAPHS_PER_CLASS", 2)
    run = replace(TRAINING_RUNS["ViT-S/16 at 224, fp32"], size=TOY_SIZE)
    result = training_runs.compare_runs("row", run, 2, tmp_path)
    assert (result.ours, result.theirs, result.details) == ([3.0] * 2, [2.0] * 2, asdict(run))
    assert 0 < result.difference < 1e-4
    dataset = str(tmp_path / "photographs")
    (ours, our_metrics), (theirs, their_metrics) = runs
    assert ours[ours.index("--dataset") + 1] == json.loads(Path(theirs[-1]).read_text())["dataset"] == dataset
    assert (our_metrics, their_metrics) == (tmp_path / "ours" / "metrics.jsonl", tmp_path / "theirs.jsonl")
    for folder in ("our_model", "their_model"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["id2label"] == {"0": "china", "1": "flower"} and config["hidden_size"] == TOY_SIZE.hidden_size
    images = load_dataset(dataset, 0)
    assert [label for _, label in images] == [0, 0, 1, 1] and images[0][0].size == (500, 375)


def test_their_augmentation_has_the_strength_of_the_row() -> None:
    """Check the ranges of the random transforms, and that the crop has the size of the model."""
    crops = build_transforms(CROP_AUGMENTATION, 32).transforms
    (crop,) = [one for one in crops if isinstance(one, v2.RandomResizedCrop)]
    (flip,) = [one for one in crops if isinstance(one, v2.RandomHorizontalFlip)]
    assert (crop.size, crop.scale, flip.p) == ((32, 32), (0.35, 1.0), 0.5)
    assert not any(isinstance(one, v2.RandomAffine) for one in crops)
    shifts = build_transforms(SHIFT_AUGMENTATION | {"shift": 0.2}, 32).transforms
    (affine,) = [one for one in shifts if isinstance(one, v2.RandomAffine)]
    assert (affine.degrees, affine.translate, affine.scale) == ([-10, 10], (0.2, 0.2), pytest.approx((0.9, 1.1)))
    assert not any(isinstance(one, (v2.RandomResizedCrop, v2.RandomHorizontalFlip)) for one in shifts)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    pixel_values = v2.Compose(crops)(image)
    assert pixel_values.shape == (3, 32, 32) and -1 <= pixel_values.min() < -0.5 < 0.5 < pixel_values.max() <= 1


def test_digits_are_images_of_the_size_of_the_model() -> None:
    images = load_dataset("digits", 32)
    digits = load_digits()
    assert len(images) == 1797 and [label for _, label in images[:20]] == digits.target[:20].tolist()
    image = images[7][0]
    assert (image.mode, image.size) == ("RGB", (32, 32))
    small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float)[..., 0]
    assert np.abs(small - digits.images[7] * 255 / 16).mean() < 20


def test_a_line_is_written_after_every_few_steps(tmp_path: Path) -> None:
    writer = LineWriter(tmp_path / "lines", log_every=3)
    for step in range(1, 8):
        writer.on_step_end(None, SimpleNamespace(global_step=step), None)
    assert [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()] == [{"step": 3}, {"step": 6}]


def test_the_plain_peer_has_no_cpu_kernels() -> None:
    peer = PEERS["plain"](TOY_SIZE)
    assert "cpu_kernels=True" in str(peer.ours) and "cpu_kernels=True" not in str(peer.theirs)


@pytest.mark.parametrize("name", PEERS)
def test_peers_have_the_requested_size(name: str) -> None:
    size = replace(TOY_SIZE, image_size=40, num_hidden_layers=3, num_attention_heads=4, num_labels=7)
    config = PEERS[name](size).ours.config
    assert {field: getattr(config, field) for field in vars(size)} == vars(size)
    assert config.intermediate_size == 4 * 32


@pytest.mark.parametrize("name", PEERS)
def test_no_parameter_of_a_peer_is_constant(name: str) -> None:
    """A bias of zeros or a scale of ones would hide differences between the two sides."""
    for parameter_name, parameter in PEERS[name](TOY_SIZE).theirs.named_parameters():
        assert parameter.numel() == 1 or parameter.std() > 0, parameter_name


def test_memory_used_before_a_measurement_on_a_gpu_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 bytes are allocated and 900 were allocated before; the measured function needs 30 more bytes."""
    current, peak = [100], [1000]

    def reset() -> None:
        peak[0] = current[0]

    def allocate_and_free() -> None:
        peak[0] = max(peak[0], current[0] + 30)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    assert comparison.measure_gpu_memory_growth(allocate_and_free) == 30


def test_the_lowest_ratio_is_that_of_the_faster_peer() -> None:
    results = [
        Comparison("work", "row", peer, [6.0] * 3, [theirs] * 3, 0.0, {}) for peer, theirs in (("a", 3.0), ("b", 4.0))
    ]
    single = Comparison("work", "other", "a", [1.0], [1.0], 0.0, {"ours_peak_bytes": 90, "theirs_peak_bytes": 100})
    assert compute_lowest_ratios([*results, single]) == {("work", "row"): 1.5}
    lines = format_markdown([*results, single]).splitlines()
    assert lines[0] == "| work | images/s | times as fast (quartiles) | peak memory, vitcls / baseline |"
    assert lines[2] == "| work: row | 6.0 | a 2.00 (2.00 to 2.00), b 1.50 (1.50 to 1.50) |  |"
    assert lines[3] == "| work: other | 1.0 | a 1.00 (1.00 to 1.00) | a 0.90 |"
    assert "Medians of 1 to 3 pairs" in lines[5]
    lines = format_markdown(results).splitlines()
    assert lines[:2] == ["| work | images/s | times as fast (quartiles) |", "|---|---|---|"]
    assert lines[2] == "| work: row | 6.0 | a 2.00 (2.00 to 2.00), b 1.50 (1.50 to 1.50) |"


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (1.25, 2.0, 3.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(tables, "get_processor_name", lambda: "Some processor")
    monkeypatch.setattr(tables, "get_versions", lambda *libraries: {"python": "3", **dict.fromkeys(libraries, "1")})
    result = Comparison("work", "row", "a", [1.0], [1.0], 0.0, {"device": "cpu"})
    assert tables.describe_machine([result]) == "Some processor, 2 threads on 4 cores, load 1.2; python 3, timm 1"


def test_reports_contain_the_measured_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ratios 2 to 4 of the first peer, and 1.5 of the second peer; 3 MiB and 4 MiB of memory."""
    peaks = {"ours_peak_bytes": 3 * 2**20, "theirs_peak_bytes": 4 * 2**20, "device": "cpu"}
    results = [
        Comparison("work", "row", "first", [6.0, 9.0, 8.0], [3.0, 3.0, 2.0], 1e-6, peaks),
        Comparison("work", "row", "second", [6.0] * 3, [4.0] * 3, 1e-7, {}),
    ]
    assert print_comparison(results[0]) is results[0]
    assert capsys.readouterr().out == "work: row, against first: 3.00 times as fast (2.50 to 3.50)\n"
    print_tables(results)
    cells = [re.split(r"\s*[│┃]\s*", line.strip("│┃ ")) for line in capsys.readouterr().out.splitlines()]
    for row in (
        ["work: row", "first", "8.0", "3.0", "3.00", "2.50 to 3.50"],
        ["work: row", "second", "6.0", "4.0", "1.50", "1.50 to 1.50"],
        ["work: row", "1.50"],
        ["work: row", "first", "3", "4"],
    ):
        assert row in cells, row
    assert ["work: row", "second", "6", "4"] not in cells  # without measured memory
    more = Comparison("work", "other", "first", [1.0] * 12, [1.0] * 12, 0.0, {"theirs_peak_bytes": 0})
    _, _, row, other, _, caption = format_markdown([*results, more]).splitlines()
    assert row == "| work: row | 7.0 | first 3.00 (2.50 to 3.50), second 1.50 (1.50 to 1.50) | first 0.75 |"
    assert other == "| work: other | 1.0 | first 1.00 (1.00 to 1.00) |  |"
    assert caption.startswith("Medians of 3 to 12 pairs of measurements. ")
    write_reports(results, tmp_path / "new" / "results.json", None, None)
    first, second = check_file(tmp_path / "new" / "results.json", 3)
    assert (first["ratio"], first["quartiles"], first["ratios"]) == (3.0, [2.5, 3.5], [2.0, 3.0, 4.0])
    assert (first["ours_images_per_second"], first["theirs_images_per_second"]) == (8.0, 3.0)
    assert (first["largest_difference_of_outputs"], first["ours_peak_bytes"]) == (1e-6, 3 * 2**20)
    assert second["against"] == "second" and "ours_peak_bytes" not in second
    lowest = json.loads((tmp_path / "new" / "results.json").read_text())["over_the_better"]
    assert lowest == [{"work": "work", "name": "row", "ratio": 1.5}]


def test_memory_is_read_from_the_last_line_of_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, sys\nprint('log', os.environ['MALLOC_MMAP_THRESHOLD_'])\nprint(7 if sys.argv[2:] else 5)"
    (tmp_path / "measured_module.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert compare_peak_memory("measured_module", "row") == {"ours_peak_bytes": 5, "theirs_peak_bytes": 7}
    with raises_one_line("cannot measure the memory of row --toy", "No module named no_module"):
        compare_peak_memory("no_module", "row", "--toy")


def test_photographs_are_a_folder_per_label(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "photographs", num_images_per_class=4)
    files = sorted(folder.rglob("*.jpg"))
    assert [str(file.relative_to(folder)) for file in files] == [
        f"{name}/00{index}.jpg" for name in ("china", "flower") for index in range(4)
    ]
    pixels = []
    for index, file in enumerate(files):
        with Image.open(file) as image:
            assert (image.format, image.size) == ("JPEG", (500, 375))
            assert ("progressive" in image.info) is (index % 4 == 3)
            pixels.append(np.asarray(image, dtype=int))
    differences = [np.abs(pixels[index] - pixels[index + 1]).mean() for index in range(7)]
    # Other crops, and another photograph
    assert all(difference > (50 if index == 3 else 5) for index, difference in enumerate(differences))


def test_the_last_line_of_a_run_that_ends_is_reported(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('first'); raise SystemExit('no such model')"]
    with raises_one_line("failed: no such model"), SuspendedRun(command, tmp_path / "lines", DIGITS_RUN):
        pass


def test_a_suspended_run_runs_only_in_its_turns(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    loop = "import sys, time\nwhile True:\n print('x', file=open(sys.argv[1], 'a')); time.sleep(0.01)"
    with SuspendedRun([sys.executable, "-c", loop, str(lines)], lines, DIGITS_RUN) as run:
        before = run.count_lines()
        subprocess.run(["sleep", "0.2"], check=True)
        assert run.count_lines() - before <= 1  # suspended
        assert run.measure_throughput() > 0
        assert run.count_lines() >= before + 1 + DIGITS_RUN.lines_per_turn
    assert run.process.poll() is not None


def test_the_throughput_counts_the_images_of_all_calls_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []

    def process_batch() -> None:
        calls.append(None)
        clock[0] += 8.0 if len(calls) == 1 else 0.5

    monkeypatch.setattr(comparison.time, "perf_counter", lambda: clock[0])
    assert measure_throughput(process_batch, num_images=4, min_seconds=1.5) == 8.0  # images per second
    assert len(calls) == 4


def test_ratios_are_of_pairs() -> None:
    found = Comparison("work", "row", "them", [2.0, 9.0, 8.0], [1.0, 3.0, 2.0], 0.0, {}).to_dict()
    assert found["ratios"] == [2.0, 3.0, 4.0] and found["ratio"] == 3.0 and found["quartiles"] == [2.5, 3.5]
    assert compute_quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_rows_are_selected_by_name() -> None:
    assert SMALL_SIZE.intermediate_size == 1536
    (result,) = run_benchmarks(("inference", "probe"), ("fp32, batch 1",), TOY_SETTINGS)
    assert (result.workload, result.name) == ("inference", "fp32, batch 1")
    with raises_one_line("--rows", "'digits'", "'digits, fp32'"):
        next(run_benchmarks(("training",), ("digits",), BenchmarkSettings(("timm",), 1)))

"""The benchmarks at toy size: comparisons, files, and errors if the outputs of the two sides differ."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benchmark_results import check_file
from helpers.fresh_processes import run_fresh
from helpers.tiny_models import raises_one_line

from modeling_vitcls.benchmarking import comparison, own_features, peers
from modeling_vitcls.benchmarking.comparison import BenchmarkSettings, check_logits, check_tensors
from modeling_vitcls.benchmarking.image_files import PREDICTION_ROWS, check_labels
from modeling_vitcls.benchmarking.peers import (
    PEERS,
    TOY_SIZE,
    TRAINING_STEPS,
    ForwardPass,
    compare_forward_pass,
    compare_step,
)
from modeling_vitcls.benchmarking.work import run_benchmarks


pytestmark = pytest.mark.integration


TOY_SETTINGS = BenchmarkSettings(("timm",), 1, is_toy=True)
SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"


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

"""scripts/benchmark.py at toy size: what it compares, what it writes, and that it compares nothing that differs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import raises_one_line

from modeling_vitcls.benchmarking.comparison import Comparison, chosen, in_turns, quartiles
from modeling_vitcls.benchmarking.inference import FORWARD_PASSES, ForwardPass, compare_forward_pass
from modeling_vitcls.benchmarking.peers import PEERS, SMALL, TOY
from modeling_vitcls.benchmarking.training import DIGITS, TRAINING_RUNS, Contestant, prepare_models, write_photographs


SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"
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


def run_script(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def check_file(file: Path, num_pairs: int) -> list[dict[str, Any]]:
    """The comparisons in a results file, whose figures fit each other."""
    results = json.loads(file.read_text())
    assert {"processor", "cores", "threads", "load"} <= set(results["machine"])
    assert {"modeling_vitcls", "torch", "transformers", "timm"} <= set(results["versions"])
    for found in results["comparisons"]:
        assert set(found) >= KEYS
        assert found["pairs"] == len(found["ratios"]) == num_pairs and min(found["ratios"]) > 0
        assert found["quartiles"][0] <= found["ratio"] <= found["quartiles"][1]
    return results["comparisons"]


def test_the_script_compares_forward_passes(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "results.json"
    flags = ("--work", "inference", "--toy", "--against", "transformers", "timm", "--pairs", "3")
    done = run_script(*flags, "--output", str(file))
    assert done.returncode == 0, done.stderr
    found = check_file(file, 3)
    assert [(each["against"], each["name"]) for each in found] == [
        (peer, name) for peer in ("transformers", "timm") for name in FORWARD_PASSES
    ]
    assert "images per second" in done.stdout and "torch" in done.stdout


@pytest.mark.slow
def test_the_script_compares_training(tmp_path: Path) -> None:
    """Two real training runs, one suspended while the other has its turn."""
    file = tmp_path / "results.json"
    done = run_script("--work", "training", "--toy", "--pairs", "2", "--output", str(file))
    assert done.returncode == 0, done.stderr
    (found,) = check_file(file, 2)
    assert found["name"] == "toy" and found["dataset"] == "digits"
    assert 0 <= found["largest_difference_of_outputs"] < 1e-4


def test_wrong_flags_are_one_line() -> None:
    done = run_script("--work", "inference", "--rows", "fp64")
    assert done.returncode == 1 and done.stderr.startswith("error: --rows: there is no 'fp64'")
    done = run_script("--work", "training", "--pairs", "0")
    assert done.returncode == 2 and "--pairs is 0" in done.stderr


@pytest.mark.parametrize("against", PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_differ_are_not_compared(against: str, dtype: torch.dtype) -> None:
    peer = PEERS[against](TOY)
    found = compare_forward_pass("row", ForwardPass(dtype, 2), peer, 1, toy=True)
    assert found.against == against and found.difference < 0.1
    with torch.no_grad():
        peer.ours.get_parameter("vitcls.layers.1.mlp.fc1.weight").mul_(1.5)
    with raises_one_line(f"row against {against}", "the outputs differ"):
        compare_forward_pass("row", ForwardPass(dtype, 2), peer, 1, toy=True)


def test_no_numbers_are_not_compared() -> None:
    peer = PEERS["transformers"](TOY)
    with torch.no_grad():
        peer.ours.get_parameter("classifier.bias").fill_(float("nan"))
    with raises_one_line("differ by nan"):
        compare_forward_pass("row", ForwardPass(torch.float32, 2), peer, 1, toy=True)


def test_both_sides_of_training_begin_with_the_same_weights(tmp_path: Path) -> None:
    from dataclasses import replace

    from modeling_vitcls import ViTCLSForImageClassification

    run = replace(DIGITS, size=TOY)
    names = ["a", "b", "c"]
    assert prepare_models(run, names, tmp_path, "row") < 1e-5
    ours = ViTCLSForImageClassification.from_pretrained(tmp_path / "our_model")
    assert ours.config.id2label == dict(enumerate(names))
    assert ours.config.hidden_size == TOY.hidden_size


def test_photographs_are_a_folder_per_label(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "photographs", per_class=2)
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*.jpg")) == [
        "china/000.jpg",
        "china/001.jpg",
        "flower/000.jpg",
        "flower/001.jpg",
    ]


def test_a_run_that_ends_is_reported_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('first'); raise SystemExit('no such model')"]
    with raises_one_line("failed: no such model"), Contestant(command, tmp_path / "lines", DIGITS):
        pass


def test_a_contestant_runs_in_its_turns_alone(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    loop = "import sys, time\nwhile True:\n print('x', file=open(sys.argv[1], 'a')); time.sleep(0.01)"
    with Contestant([sys.executable, "-c", loop, str(lines)], lines, DIGITS) as contestant:
        before = contestant.num_lines()
        subprocess.run(["sleep", "0.2"], check=True)
        assert contestant.num_lines() - before <= 1  # suspended
        assert contestant.turn() > 0
        assert contestant.num_lines() >= before + 1 + DIGITS.lines_per_turn
    assert contestant.process.poll() is not None


def test_ratios_are_of_pairs() -> None:
    order: list[str] = []

    def side(name: str, values: list[float]) -> Any:
        def measure() -> float:
            order.append(name)
            return values.pop(0)

        return measure

    ours, theirs = in_turns(side("ours", [2.0, 9.0, 8.0]), side("theirs", [1.0, 3.0, 2.0]), 3)
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    found = Comparison("work", "row", "them", ours, theirs, 0.0, {}).as_dict()
    assert found["ratios"] == [2.0, 3.0, 4.0] and found["ratio"] == 3.0 and found["quartiles"] == [2.5, 3.5]
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_rows_are_chosen_by_name() -> None:
    assert list(chosen(TRAINING_RUNS, ())) == list(TRAINING_RUNS)
    assert list(chosen(TRAINING_RUNS, ("digits, fp32",))) == ["digits, fp32"]
    assert SMALL.intermediate_size == 1536
    with raises_one_line("--rows", "'digits'", "'digits, fp32'"):
        chosen(TRAINING_RUNS, ("digits",))
